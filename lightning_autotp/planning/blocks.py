"""The blocks of a model: the lists of modules around its cuts, what is cut inside one, and compiling them."""

import os
from collections.abc import Iterator

from torch import nn

from lightning_autotp.plans.plan import ParameterPlan, ShardingPlan


def shared_blocks(model: nn.Module, plan: ShardingPlan) -> dict[str, nn.Module]:
    """The blocks of ``model`` by path, one list or several: what they hand on is the same on all ranks.

    Raises:
        ValueError: under sequence parallelism, without a list of blocks, or where a cut goes from one to another.
    """
    switch = "shard_saved_activations"
    if plan.sequence is not None:
        raise ValueError(
            f"{switch}: with sequence_parallel each rank keeps its own tokens of what blocks hand on already; leave"
            f" {switch} off, or sequence_parallel."
        )
    lists, _ = block_lists(model, plan)
    if not lists:
        raise ValueError(
            f"{switch}: it needs a list of blocks (nn.ModuleList or nn.Sequential) around row cuts, and"
            f" {type(model).__name__} has none; leave it off for this model."
        )
    blocks = {name: block for path in lists for name, block in children_of(model, path).items()}
    for path in blocks:
        inside = [e for e in plan.parameters.values() if f"{e.module}.".startswith(f"{path}.")]
        if opens(inside) != closes(inside):
            half = "opens" if opens(inside) else "closes"
            raise ValueError(
                f"{switch}: {path} {half} a cut whose other half is in another block, so what blocks hand on is not the"
                " same on all ranks; leave it off for this model."
            )
    return blocks


def block_lists(model: nn.Module, plan: ShardingPlan) -> tuple[list[str], list[str]]:
    """The paths of the outermost lists that hold row cuts, and of the row cuts in none of them."""
    rows = [e.module for e in cut_of(list(plan.parameters.values())) if e.kind == "row"]
    outer = lists_around(model, rows)
    return outer, [row for row in rows if not _holds(outer, row)]


def lists_around(model: nn.Module, modules: list[str]) -> list[str]:
    """The paths of the outermost ``nn.ModuleList`` that hold some of ``modules``, and for the rest ``nn.Sequential``.

    A ``nn.Sequential`` is one of blocks if what it holds of them lies deeper than its children; of those around each
    other it is the outermost whose blocks are several.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    found = _outermost([p for p, module in named.items() if p and isinstance(module, nn.ModuleList)], modules)
    rest = [module for module in modules if not _holds(found, module)]
    counts = {}
    for path, module in named.items() if rest else ():
        if isinstance(module, nn.Sequential):
            holding = [child for child in children_of(model, path) if any(_holds([child], one) for one in rest)]
            if not set(holding) & set(rest):
                counts[path] = len(holding)
    several = [path for path, count in counts.items() if count > 1]
    return found + _outermost(several or list(counts), rest)


def children_of(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """The children of the module at ``path``, by their own paths."""
    prefix = f"{path}." if path else ""
    return {f"{prefix}{name}": child for name, child in model.get_submodule(path).named_children()}


def _outermost(paths: list[str], modules: list[str]) -> list[str]:
    """Those that hold some of ``modules`` and are in no other such one."""
    found = [path for path in paths if any(_holds([path], module) for module in modules)]
    return [path for path in found if not any(_holds([other], path) for other in found if other != path)]


def _holds(paths: list[str], module: str) -> bool:
    """Whether ``module`` is in one of ``paths``, or one of them."""
    return any(not path or f"{module}.".startswith(f"{path}.") for path in paths)


def opens(entries: list[ParameterPlan]) -> bool:
    """Whether one of them is a column cut whose output stays in parts."""
    return any(e.kind == "column" and e.features is not None and not e.gather_output for e in cut_of(entries))


def closes(entries: list[ParameterPlan]) -> bool:
    """Whether one of them is a row cut that reads parts."""
    return any(e.kind == "row" and e.features is not None and not e.split_input for e in cut_of(entries))


def cut_of(entries: list[ParameterPlan]) -> list[ParameterPlan]:
    """Those of them that are cut."""
    return [entry for entry in entries if not entry.layout.is_replicated]


def called_around(module: nn.Module, plan: ShardingPlan) -> list[nn.Module]:
    """The innermost module around everything that is cut which a step calls.

    Lists are never called, and a step may use the parts of the root without calling it: then their children are.
    """
    paths = [e.module.split(".") for e in plan.parameters.values() if not e.layout.is_replicated]
    if plan.sequence is not None:  # blocks put out a rank's own tokens
        return []
    around = module.get_submodule(".".join(os.path.commonprefix([path[:-1] for path in paths])))
    sharded = {module.get_submodule(".".join(path)) for path in paths}  # what these put out may be a rank's own
    children = [child for child in _called_children(around) if child not in sharded]
    if around is module:
        return [module, *children]
    return children if isinstance(around, (nn.ModuleList, nn.ModuleDict)) else [around]


def _called_children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_children(child)
        else:
            yield child
