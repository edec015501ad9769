"""Plan x mesh x model -> the model, sharded in place: parameters become parts, layers change their class."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.introspection.forward_source import changes_in_place
from lightning_autotp.introspection.layers import is_conv1d, is_convolution
from lightning_autotp.parallel.column_group import ColumnGroup, ColumnMember
from lightning_autotp.parallel.convolution import (
    ColumnParallelBatchNorm,
    ColumnParallelConvolution,
    RowParallelConvolution,
)
from lightning_autotp.parallel.embedding import ColumnParallelEmbedding, VocabParallelEmbedding
from lightning_autotp.parallel.head_arguments import take_own_heads
from lightning_autotp.parallel.linear import (
    ColumnParallel,
    ColumnParallelConv1D,
    ColumnParallelLinear,
    PartialOutputLinear,
    RowParallel,
    RowParallelConv1D,
    RowParallelLinear,
)
from lightning_autotp.parallel.overlap import Overlap
from lightning_autotp.parallel.reduced_module import Boundary
from lightning_autotp.parallel.sequence_parallel import Batch, apply_sequence
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.sharding.local_config import set_local
from lightning_autotp.sharding.materialize import load_parts
from lightning_autotp.sharding.state import SHARDED, Sharded


def apply_plan(model: nn.Module, plan: ShardingPlan, mesh: Mesh, device: torch.device, *, overlap: bool) -> Sharded:
    """Convert ``model`` in place and move it to ``device``; for :func:`~lightning_autotp.sharding.shard.shard` alone.

    All processes start from the weights of global rank 0, whatever their own were. Parameters on the meta device are
    created full, one module at a time, initialized as the model would do it, and cut at once; so a sharded model has
    the numbers of the unsharded one. Parameters that are not on the meta device stay the same objects.

    Raises:
        ValueError: if the plan has blockers, or a module on the meta device has no way to initialize itself.
    """
    if plan.blockers:
        raise ValueError("this model cannot be sharded exactly: " + " ".join(plan.blockers))
    load_parts(model, plan.layouts, mesh, device)
    beside = Overlap(mesh, overlap)
    columns = _convert_layers(model, plan, beside)
    for boundary in plan.boundaries:
        Boundary.convert(model.get_submodule(boundary.module), mesh, boundary.once, boundary.passing)
    for attribute in plan.attributes:
        set_local(model.get_submodule(attribute.module), attribute.name, attribute.local[mesh.tp_rank])
    for given in plan.head_inputs:
        take_own_heads(model.get_submodule(given.module), given, mesh.tp_rank)
    batch = Batch()
    if plan.sequence is not None:
        by_region = _columns_of_regions(plan, columns, beside)
        batch = apply_sequence(model, plan.sequence, by_region, beside)
    _keep_off_fast_paths(model)
    mesh.collectives.add_groups(_owners(plan, mesh))
    found = Sharded(plan, mesh, columns, batch, beside)
    setattr(model, SHARDED, found)
    return found


def _owners(plan: ShardingPlan, mesh: Mesh) -> set[tuple[int, ...]]:
    """Every set of tensor parallel ranks that hold the same run of some parameter, on any of them."""
    layouts = {layout for layout in plan.layouts.values() if layout.overlaps}
    return {share.owners for layout in layouts for rank in range(mesh.tp_size) for share in layout.shared(rank)}


def _convert_layers(model: nn.Module, plan: ShardingPlan, overlap: Overlap) -> tuple[ColumnGroup, ...]:
    mesh = overlap.mesh
    columns: dict[str, ColumnParallel] = {}
    done: set[int] = set()
    regions = plan.sequence.regions if plan.sequence is not None else ()
    module_reduces = {region.module: region.reduces for region in regions}
    for entry in plan.parameters.values():
        module = model.get_submodule(entry.module)
        if id(module) in done or not entry.name.endswith("weight"):
            continue
        done.add(id(module))
        reduces = module_reduces.get(entry.module.rpartition(".")[0], False)
        if entry.partial_outputs:
            PartialOutputLinear.convert(module, mesh, entry.layout, entry.partial_outputs)
        elif entry.kind == "vocabulary":
            VocabParallelEmbedding.convert(module, mesh, entry.layout)  # type: ignore[arg-type]
        elif entry.kind == "column" and isinstance(module, nn.Embedding):
            ColumnParallelEmbedding.convert(module, mesh, entry.layout)
        elif entry.kind == "column" and isinstance(module, _BatchNorm):
            ColumnParallelBatchNorm.convert(module, mesh, entry.layout)
        elif entry.features is None:
            continue
        elif is_convolution(module):
            if entry.kind == "row":
                RowParallelConvolution.convert(module, mesh, entry.layout)
            elif entry.kind == "column":
                ColumnParallelConvolution.convert(module, mesh, entry.layout, gather=entry.gather_output)
        elif entry.kind == "row":
            row = RowParallelConv1D if is_conv1d(module) else RowParallelLinear
            scatter = overlap if reduces else None
            converted = row.convert(module, mesh, entry.layout, split=entry.split_input, scatter=scatter)
            if reduces:
                after, before = converted.forms
                overlap.weights[after] = partial(_matrices, [converted])
                overlap.weights[before] = partial(_transposed, converted)
        elif entry.kind == "column":
            column = ColumnParallelConv1D if is_conv1d(module) else ColumnParallelLinear
            columns[entry.module] = column.convert(
                module, mesh, entry.layout, overlap=overlap.on, gather=entry.gather_output, reduce=not reduces
            )
    groups = []
    for paths in plan.siblings:
        members, parent = [columns[path] for path in paths], model.get_submodule(paths[0].rpartition(".")[0])
        # classes do hash
        steady = "forward" not in vars(parent) and not changes_in_place(type(parent))  # type: ignore[arg-type]
        groups.append(ColumnGroup(members, steady))
        for place, member in enumerate(members):
            member.group, member.place = groups[-1], place
    return tuple(groups)


def _matrices(linears: Sequence[Union[ColumnMember, RowParallel]]) -> list[Tensor]:
    return [linear.matrix for linear in linears]


def _transposed(row: RowParallel) -> list[Tensor]:
    return [row.matrix.t()]


def _columns_of_regions(plan: ShardingPlan, groups: tuple[ColumnGroup, ...], overlap: Overlap) -> dict[str, str]:
    """A column of each region whose columns can gather its input: one group, and nothing changes what they read.

    ``overlap`` gets to know the forms of these gathers.
    """
    assert plan.sequence is not None
    inside: dict[str, list[tuple[str, ColumnGroup]]] = defaultdict(list)
    for paths, group in zip(plan.siblings, groups):
        parent, _, name = paths[0].rpartition(".")
        inside[parent].append((name, group))
    found = {}
    for region in plan.sequence.regions:
        if region.reduces and len(inside[region.module]) == 1 and inside[region.module][0][1].steady:
            found[region.module], group = inside[region.module][0]
            overlap.weights[group.form] = partial(_matrices, group.members)
    return found


def _keep_off_fast_paths(model: nn.Module) -> None:
    """nn.TransformerEncoder's fused inference path reads the weights of its linears without calling them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
