"""Whether a module computes each token of ``[..., tokens, features]`` from that token alone, read from its code.

Only what is surely so is: norms over features, activations, and modules whose forward is written with nothing but such
modules and functions that work element by element or along the last dim.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Optional

import torch
from torch import nn

from lightning_autotp.introspection.layers import is_conv1d

_LAYERS = (nn.Linear, nn.Identity, nn.Dropout)

_NOT_BY_ELEMENT = ("MultiheadAttention", "Softmax2d", "Softmax", "LogSoftmax", "Softmin", "GLU", "PReLU")
"""Of the activations in torch."""

_BY_ELEMENT = {
    *(
        "abs",
        "add",
        "bfloat16",
        "celu",
        "clamp",
        "clone",
        "contiguous",
        "cos",
        "div",
        "double",
        "dropout",
        "elu",
        "erf",
    ),
    *("exp", "float", "gelu", "half", "hardswish", "leaky_relu", "log", "mish", "mul", "neg", "pow", "reciprocal"),
    *("relu", "relu6", "rsqrt", "selu", "sigmoid", "silu", "sin", "softplus", "sqrt", "square", "sub", "tanh", "to"),
    *("type", "type_as"),
}
"""Functions and methods of tensors that work element by element."""

_ALONG_A_DIM = {"chunk", "logsumexp", "mean", "norm", "softmax", "log_softmax", "std", "sum", "var"}
"""Those that work along a dim, which must be the last."""

_NORMS = frozenset(("layer_norm", "rms_norm"))

_STATEMENTS = (ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.If)

_EXPRESSIONS = (ast.Expr, ast.Name, ast.Attribute, ast.Constant, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.IfExp)

_PARTS = (ast.Load, ast.Store, ast.unaryop, ast.cmpop, ast.boolop, ast.Tuple, ast.keyword)

_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)

_NODES = (*_STATEMENTS, *_EXPRESSIONS, *_PARTS, *_OPERATORS, ast.BinOp, ast.Call)


def is_tokenwise(module: nn.Module) -> bool:
    """Whether the forward pass of ``module`` surely works on each token by itself."""
    if "forward" in vars(module):
        return False
    kind = type(module)
    known = _known(module, kind)
    if known is not None:
        return known
    if len(required_arguments(kind)) != 1:
        return False  # another one may be of sequences
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1
    own = (*module._parameters.values(), *module._buffers.values())
    if any(t is not None and any(size > 1 for size in t.shape[:-1]) for t in own):
        return False  # it may have an entry for each token
    children = list(module.children())
    if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
        return all(map(is_tokenwise, children))
    return all(map(is_tokenwise, children)) and _is_written_so(module, "forward", {"forward"})


def required_arguments(kind: type[nn.Module]) -> list[str]:
    """The arguments without which the forward of a class cannot be called, ``self`` left out."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    given = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.default is p.empty and p.kind in given]


def _known(module: Any, kind: type[Any]) -> Optional[bool]:
    """What is known of torch's own layers; None of other classes."""
    if kind in (nn.LayerNorm, nn.RMSNorm):
        return len(module.normalized_shape) == 1
    if kind in _LAYERS or is_conv1d(module):
        return True
    if kind.__module__ == "torch.nn.modules.activation":
        return kind.__name__ not in _NOT_BY_ELEMENT
    if kind.__module__.startswith("torch.nn.modules.") and kind is not nn.Sequential:
        return False
    return None


def _is_written_so(module: nn.Module, name: str, seen: set[str]) -> bool:
    """Whether a method of ``module`` is written with tokenwise steps only."""
    kind: Any = type(module)  # classes do hash
    tree = _source(kind, name)
    if tree is None:
        return False
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    # decorators and annotations are not run
    for node in (node for statement in tree.body for node in ast.walk(statement)):
        if not isinstance(node, _NODES):
            return False
        if isinstance(node, ast.Call) and not _is_call_so(module, node, name, seen):
            return False
        if isinstance(node, ast.Attribute) and id(node) not in functions and node.attr in ("T", "mT", "data", "shape"):
            return False
    return True


def _is_call_so(module: nn.Module, call: ast.Call, method: str, seen: set[str]) -> bool:
    func = call.func
    if isinstance(func, ast.Name):
        return func.id in ("super", "float", "int") or _is_function(_globals(module, method).get(func.id))
    if not isinstance(func, ast.Attribute):
        return False
    if isinstance(func.value, ast.Name) and func.value.id == "self":
        held = getattr(module, func.attr, None)
        if isinstance(held, nn.Module):
            return True  # all children are looked at
        if inspect.ismethod(held):
            if func.attr in seen:
                return True
            return _is_written_so(module, func.attr, seen | {func.attr})
        return _is_function(held)
    if isinstance(func.value, ast.Call) and ast.unparse(func.value.func) == "super":
        parents = type(module).__mro__[1:]
        return func.attr == "forward" and any(_known(module, parent) for parent in parents)
    if func.attr in _NORMS:
        return _norms_features(module, call)
    if func.attr in _ALONG_A_DIM:
        return _is_along_last(call, is_method=ast.unparse(func.value) not in ("torch", "F", "nn.functional"))
    return func.attr in _BY_ELEMENT


def _is_function(value: Any) -> bool:
    """Whether it is a function that works element by element, of torch's or an object of a class that is so."""
    if isinstance(value, nn.Module):
        return is_tokenwise(value)
    value = getattr(value, "func", value)  # of a partial
    name = getattr(value, "__name__", "")
    return name in _BY_ELEMENT and value in (getattr(nn.functional, name, None), getattr(torch, name, None))


def _is_along_last(call: ast.Call, is_method: bool) -> bool:
    """Whether the dim that a function works along is written as -1."""
    named = [word.value for word in call.keywords if word.arg == "dim"]
    place = (0 if is_method else 1) + (ast.unparse(call.func).endswith("chunk"))
    if ast.unparse(call.func).endswith("norm"):
        place += 1
    given = named or call.args[place : place + 1]
    return [ast.unparse(node) for node in given] == ["-1"]


def _norms_features(module: nn.Module, call: ast.Call) -> bool:
    """Whether ``F.layer_norm(x, shape)`` norms over one dim."""
    given = [word.value for word in call.keywords if word.arg == "normalized_shape"] or call.args[1:2]
    if len(given) != 1:
        return False
    if isinstance(given[0], (ast.Tuple, ast.List)):
        return len(given[0].elts) == 1
    text = ast.unparse(given[0])
    shape = getattr(module, text.removeprefix("self."), None) if text.startswith("self.") else None
    return isinstance(shape, (tuple, list, torch.Size)) and len(shape) == 1


def _globals(module: nn.Module, method: str) -> Mapping[str, Any]:
    names: Mapping[str, Any] = getattr(inspect.unwrap(getattr(type(module), method)), "__globals__", {})
    return names


@cache
def _source(cls: Any, name: str) -> Optional[ast.FunctionDef]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(cls, name)))))
    except (OSError, SyntaxError, TypeError, AttributeError):
        return None
    return next(_functions(tree), None)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
