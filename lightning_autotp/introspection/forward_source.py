"""What a module's forward pass reads of the module, and what it does with it: the names in its code."""

import ast
import dis
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any, Optional

from torch.nn import Module


def calls_loss_function(cls: type) -> bool:
    """Whether a model's loss is what its ``loss_function`` gives, or there is none: its forward takes no labels."""
    forwards = list(forwards_of(cls))
    if any(map(names_loss_function, forwards)):
        return True
    last = forwards[-1]
    return "super" not in last.__code__.co_names and "labels" not in inspect.signature(last).parameters


def forwards_of(cls: type) -> Iterator[FunctionType]:
    """The forward of a class, and those of its parents that it calls."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            forward = inspect.unwrap(vars(base)["forward"])
            yield forward
            if "super" not in forward.__code__.co_names:
                return


def names_loss_function(forward: FunctionType) -> bool:
    return "loss_function" in forward.__code__.co_names


def reads(module: Any) -> frozenset[str]:
    """Names of attributes that the forward pass of ``module``'s class may read, those of methods it calls included."""
    cls: Any = type(module)
    return _reads(cls)


@cache
def _reads(cls: Any) -> frozenset[str]:
    found: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        # a parent's method of that name may be called by super()
        for code in (_code(vars(parent).get(name)) for parent in cls.__mro__ if parent is not Module):
            new = (_names(code) if code is not None else set()) - found
            found |= new
            waiting += new
    return frozenset(found)


@cache
def changes_in_place(cls: Any) -> bool:
    """Whether the forward of ``cls`` or a method that it calls may change a tensor in place (``x += y``, ``x.mul_``).

    Functions that it calls are not looked into.
    """
    methods = _reads(cls) | {"forward"}
    codes = (_code(vars(parent).get(name)) for parent in cls.__mro__ if parent is not Module for name in methods)
    return any(_changes(code) for code in codes if code is not None)


def _changes(code: CodeType) -> bool:
    for step in dis.get_instructions(code):
        augmented = step.opname.startswith("INPLACE_") or step.opname == "BINARY_OP" and step.argrepr.endswith("=")
        if augmented or step.opname == "STORE_SUBSCR":
            return True
    called = [name for name in _names(code) if name.endswith("_") and not name.endswith("__")]
    return bool(called) or any(_changes(inner) for inner in code.co_consts if isinstance(inner, CodeType))


def _code(method: Any) -> Optional[CodeType]:
    return getattr(inspect.unwrap(method), "__code__", None) if inspect.isfunction(method) else None


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def delegates(cls: Any) -> bool:
    """Whether the forward of ``cls`` leaves the weight to its base class: it calls ``super().forward`` and not more.

    Asking the weight for its dtype or device is no use of it.
    """
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    if code is None or "__class__" not in code.co_freevars or "forward" not in code.co_names:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "NOP")]
    uses = [after.argval for step, after in pairwise(steps) if step.argval == "weight"]
    return all(use in ("dtype", "device") for use in uses)


def passes_input(cls: Any) -> bool:
    """Whether the forward of ``cls`` hands its first argument on to ``super().forward`` as it came."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, SyntaxError, TypeError):
        return False
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    first = [argument.arg for argument in function.args.args][1:2]
    changed = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and _called(n) == "forward"]
    given = [call.args[0].id for call in calls if call.args and isinstance(call.args[0], ast.Name)]
    return len(calls) == 1 and given == first and not set(first) & changed


_SCALING = ("sqrt", "rsqrt", "arange", "linspace", "log", "log2", "pow")

_VIEWS = ("view", "reshape", "unflatten")


def computes(module: Any) -> frozenset[str]:
    """Attributes that the forward pass of ``module``'s class computes with: powers, divisors, ranges, not only sizes.

    Such as ``scores / self.embed_size**0.5``, or ALiBi's slopes from ``self.num_heads``. What is kept one object
    further on is ``"config.num_heads"``. Nothing is known of a class without source.
    """
    cls: Any = type(module)
    return _computes(cls)


def views(module: Any) -> frozenset[str]:
    """Attributes that stand before a ``-1`` in a view in the forward pass: wrong ones would fit as well."""
    cls: Any = type(module)
    return _views(cls)


@cache
def _computes(cls: Any) -> frozenset[str]:
    found = set()
    for tree in _methods(cls):
        around = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            name, at = _attribute(node), node
            while name and at in around:
                outer = around[at]
                if isinstance(outer, ast.BinOp):
                    divides = isinstance(outer.op, ast.Div) and outer.right is at
                    if divides or isinstance(outer.op, ast.Pow) and outer.left is at:
                        found.add(name)
                elif isinstance(outer, ast.Call) and at in outer.args and _called(outer) in _SCALING:
                    found.add(name)
                elif not (isinstance(outer, ast.UnaryOp) or isinstance(outer, ast.Call) and _called(outer) == "float"):
                    break
                at = outer
    return frozenset(found)


@cache
def _views(cls: Any) -> frozenset[str]:
    found = set()
    for node in (node for tree in _methods(cls) for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and _called(node) in _VIEWS:
            sizes = [e for arg in node.args for e in (arg.elts if isinstance(arg, (ast.Tuple, ast.List)) else [arg])]
            found |= {_attribute(size) for size, after in pairwise(sizes) if ast.unparse(after) == "-1"}
    return frozenset(found - {""})


def _methods(cls: Any) -> Iterator[ast.AST]:
    """The source of the forward pass and of what it may call."""
    for name in {"forward", *_reads(cls)}:
        method = inspect.unwrap(getattr(cls, name, None) or reads)
        if inspect.isfunction(method) and method is not reads and method.__module__ != Module.__module__:
            try:
                yield ast.parse(textwrap.dedent(inspect.getsource(method)))
            except (OSError, SyntaxError, TypeError):
                continue


def _attribute(node: ast.AST) -> str:
    """``"x"`` for ``self.x``, ``"x.y"`` for ``self.x.y``, else nothing."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return ".".join(names) if isinstance(node, ast.Name) and node.id == "self" and len(names) <= 2 else ""


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
