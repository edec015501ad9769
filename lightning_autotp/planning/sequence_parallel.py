"""Sequence parallelism on top of a plan: between the regions of a block each rank holds its part of the tokens.

Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv:2205.05198). The
tokens of a batch are taken as one row, ``[B, S, H]`` as ``[B * S, H]``, and cut along it: norms, residuals and dropout
do not care which tokens they see, and every gather and scatter is one contiguous block. Whatever is not known to work
on each token by itself is a region, which is given ``[B, S, H]``. Pure.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from lightning_autotp.introspection.tokenwise import is_tokenwise, required_arguments
from lightning_autotp.planning.blocks import block_lists, children_of, closes, cut_of, opens
from lightning_autotp.plans.plan import ParameterPlan, Region, SequencePlan, ShardingPlan

_OTHER_INPUTS = (
    *("encoder_hidden_states", "key_value_states", "cross_attention_states", "context", "memory"),
    *("k", "key", "keys", "v", "value", "values", "kv"),
)
"""Arguments besides the hidden states that cut layers may read."""

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def parallel_sequence(model: nn.Module, plan: ShardingPlan) -> ShardingPlan:
    """``plan`` with sequence parallelism in the blocks of ``model``.

    Raises:
        ValueError: if the structure of the blocks is not known well enough to be exact; the message says what is.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    blocks = _blocks(model, plan)
    regions = [region for block in blocks for region in _regions(block, modules, plan)]
    inside, between = tuple(f"{region.module}." for region in regions), tuple(f"{block}." for block in blocks)
    partial = {
        name
        for name, entry in plan.parameters.items()
        if name.startswith(between) and entry.layout.is_replicated and not name.startswith(inside)
    }
    for region in regions:
        if region.reduces:  # biases that are added to a rank's own tokens
            partial |= {n for n, e in plan.parameters.items() if e.module in region.rows and e.layout.is_replicated}
    of_regions = {region.module for region in regions if region.reduces}
    entries = {}
    for name, entry in plan.parameters.items():
        beside = entry.features is not None and entry.module.rpartition(".")[0] in of_regions
        entries[name] = replace(entry, grad_allreduce=entry.grad_allreduce or name in partial, tokens=beside)
    return replace(plan, parameters=entries, sequence=SequencePlan(blocks, tuple(regions)))


def _blocks(model: nn.Module, plan: ShardingPlan) -> tuple[str, ...]:
    """The paths of the blocks, from the first to the last that holds cuts, of the one list around all row cuts."""
    outer, others = block_lists(model, plan)
    if len(outer) != 1 or others:
        raise ValueError(
            "sequence_parallel: it needs one list of blocks (nn.ModuleList or nn.Sequential) around all row cuts; here"
            f" are {', '.join(outer + others) or 'none'}. Leave it off for this model."
        )
    children = children_of(model, outer[0])
    paths = list(children)
    entries = cut_of(list(plan.parameters.values()))
    holding = [at for at, path in enumerate(paths) if any(f"{e.module}.".startswith(f"{path}.") for e in entries)]
    blocks = paths[holding[0] : holding[-1] + 1]
    for path in blocks:
        if isinstance(children[path], _NEVER_CALLED):
            raise ValueError(
                f"sequence_parallel: {path} is a {type(children[path]).__name__}, which is never called itself, and"
                " where its hidden states come from is not known; make blocks modules with a forward of their own, or"
                " leave sequence_parallel off for this model."
            )
    return tuple(blocks)


def _regions(block: str, modules: Mapping[str, nn.Module], plan: ShardingPlan) -> Iterator[Region]:
    """The parts of a block that get all tokens: what is between them gets a rank's own."""
    for path, module in _children(block, modules[block]):
        entries = [e for e in plan.parameters.values() if f"{e.module}.".startswith(f"{path}.")]
        cut = cut_of(entries)
        if not cut:
            if _may_mix(module):
                yield Region(path, block, reduces=False, sharded=False)
            continue
        if any(entry.module == path and entry.features is not None for entry in cut):
            raise ValueError(
                f"sequence_parallel: {path} is a cut layer directly in its block, and what it shares an input with is"
                " not known; leave sequence_parallel off for this model."
            )
        if opens(cut) != closes(cut):
            raise ValueError(
                f"sequence_parallel: {path} opens or closes a cut whose other half is elsewhere in its block, and the"
                " tokens between them are not known; leave sequence_parallel off for this model."
            )
        arguments = list(inspect.signature(type(module).forward).parameters)
        yield Region(path, block, _reduces(path, entries, plan, arguments), _rows(entries))


def _children(block: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, _NEVER_CALLED):
            yield from _children(f"{block}.{name}", child)
        else:
            yield f"{block}.{name}", child


def _may_mix(module: nn.Module) -> bool:
    """Whether a module that is not sharded may mix tokens; one that only makes positions out of them does not."""
    if is_tokenwise(module):
        return False
    return len(required_arguments(type(module))) == 1 or any(True for _ in module.parameters())


def _rows(entries: list[ParameterPlan]) -> tuple[str, ...]:
    return tuple(e.module for e in entries if e.kind == "row" and e.features is not None)


def _reduces(path: str, entries: list[ParameterPlan], plan: ShardingPlan, arguments: list[str]) -> bool:
    """Whether a region is columns that read its input and one row that makes its output, and nothing else.

    Then the gather of its input takes the all-reduce of the columns' gradients with it, and the row's output is
    scattered as it is summed. Otherwise its collectives stay, around it tokens are gathered and dropped.
    """
    linears = [entry for entry in entries if entry.features is not None]
    plain = all(
        entry.module.rpartition(".")[0] == path
        and not entry.layout.is_replicated
        and len(entry.layout.shape) == 2  # not a convolution
        and not entry.gather_output
        and not entry.split_input
        for entry in linears
    )
    bounded = any(f"{boundary.module}.".startswith(f"{path}.") for boundary in plan.boundaries)
    other_inputs = any(name in arguments for name in _OTHER_INPUTS)
    # a whole parameter that nobody sums might come before the columns, where gradients are partial
    rows = _rows(entries)
    summed = all(e.grad_allreduce or not e.layout.is_replicated or e.module in rows for e in entries)
    return plain and summed and not bounded and not other_inputs and len(rows) == 1
