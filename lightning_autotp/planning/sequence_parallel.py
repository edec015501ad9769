"""Sequence parallelism on top of a plan: between the cut modules of a block each rank holds its part of the tokens.

Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv:2205.05198). The
tokens of a batch are taken as one row, ``[B, S, H]`` as ``[B * S, H]``, and cut along it: norms, residuals and dropout
do not care which tokens they see, and every gather and scatter is one contiguous block. Pure.
"""

import inspect
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from lightning_autotp.planning.blocks import block_lists, closes, cut_of, opens
from lightning_autotp.plans.plan import ParameterPlan, Region, SequencePlan, ShardingPlan

_SEQUENCES = ("attention_mask", "position_ids", "position_embeddings", "past_key_values", "cache_params", "layer_past")
"""Arguments of a module that mixes tokens: it must be given whole sequences."""

_OTHER_INPUTS = ("encoder_hidden_states", "key_value_states", "cross_attention_states")
"""Arguments besides the hidden states that cut layers may read."""


def parallel_sequence(model: nn.Module, plan: ShardingPlan) -> ShardingPlan:
    """``plan`` with sequence parallelism in the blocks of ``model``.

    Raises:
        ValueError: if the structure of the blocks is not known well enough to be exact; the message says what is.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    path = _blocks(model, plan)
    blocks = [f"{path}.{name}" for name, _ in modules[path].named_children()]
    regions = [region for block in blocks for region in _regions(block, modules, plan)]
    inside = tuple(f"{region.module}." for region in regions)
    partial = {
        name
        for name, entry in plan.parameters.items()
        if name.startswith(f"{path}.") and entry.layout.is_replicated and not name.startswith(inside)
    }
    for region in regions:
        if region.reduces:  # biases that are added to a rank's own tokens
            partial |= {n for n, e in plan.parameters.items() if e.module in region.rows and e.layout.is_replicated}
    of_regions = {region.module for region in regions if region.reduces}
    entries = {}
    for name, entry in plan.parameters.items():
        beside = entry.features is not None and entry.module.rpartition(".")[0] in of_regions
        entries[name] = replace(entry, grad_allreduce=entry.grad_allreduce or name in partial, tokens=beside)
    return replace(plan, parameters=entries, sequence=SequencePlan(blocks[0], blocks[-1], tuple(regions)))


def _blocks(model: nn.Module, plan: ShardingPlan) -> str:
    """The path of the one list of blocks that holds all row cuts."""
    outer, others = block_lists(model, plan)
    if len(outer) != 1 or others:
        raise ValueError(
            f"sequence_parallel: it needs one list of blocks (nn.ModuleList) around all row cuts; here are"
            f" {', '.join(outer + others) or 'none'}. Leave it off for this model."
        )
    return outer[0]


def _regions(block: str, modules: dict[str, nn.Module], plan: ShardingPlan) -> Iterator[Region]:
    """The parts of a block whose inside is cut: they get all tokens, what is between them gets a rank's own."""
    for path, module in _children(block, modules[block]):
        entries = [e for e in plan.parameters.values() if f"{e.module}.".startswith(f"{path}.")]
        cut = cut_of(entries)
        if not cut:
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
        arguments = inspect.signature(type(module).forward).parameters
        mixes = any(name in arguments for name in _SEQUENCES)
        yield Region(path, _reduces(path, entries, plan, list(arguments)), mixes, _rows(entries))


def _children(block: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(f"{block}.{name}", child)
        else:
            yield f"{block}.{name}", child


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
