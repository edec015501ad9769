"""Plan x mesh x model -> the model, sharded in place: parameters become parts, layers change their class."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_autotp.cutting import is_conv1d
from lightning_autotp.layout import Layout
from lightning_autotp.mesh import Mesh, Subgroups
from lightning_autotp.parallel.boundary import Boundary
from lightning_autotp.parallel.embedding import ColumnParallelEmbedding, VocabParallelEmbedding
from lightning_autotp.parallel.heads import take_own_heads
from lightning_autotp.parallel.linear import (
    ColumnGroup,
    ColumnParallel,
    ColumnParallelConv1D,
    ColumnParallelLinear,
    PartialOutputLinear,
    RowParallel,
    RowParallelConv1D,
    RowParallelLinear,
)
from lightning_autotp.parallel.overlap import Overlap
from lightning_autotp.parallel.sequence import Batch, apply_sequence
from lightning_autotp.plan import ShardingPlan
from lightning_autotp.reading import changes_in_place

_SHARDED = "_autotp_sharded"


@dataclass(frozen=True)
class Sharded:
    """What a sharded model keeps of how it was made."""

    plan: ShardingPlan
    mesh: Mesh
    columns: tuple[ColumnGroup, ...]
    subgroups: Subgroups
    batch: Batch
    overlap: Overlap

    def settle(self) -> None:
        """To be called between steps: column linears learn which of them share an input."""
        self.batch.seen.clear()
        for group in self.columns:
            group.settle()


def sharded(model: nn.Module) -> Optional[Sharded]:
    """How ``model`` was sharded, or None if it was not."""
    return getattr(model, _SHARDED, None)


def apply_plan(model: nn.Module, plan: ShardingPlan, mesh: Mesh, device: torch.device, *, overlap: bool) -> None:
    """Shard ``model`` in place and move it to ``device``; every process must call it.

    All processes start from the weights of global rank 0, whatever their own were. Parameters on the meta device are
    created full, one module at a time, initialized as the model would do it, and cut at once; so a sharded model has
    the numbers of the unsharded one. Parameters that are not on the meta device stay the same objects.

    Raises:
        ValueError: if the plan has blockers, or a module on the meta device has no way to initialize itself.
    """
    if plan.blockers:
        raise ValueError("this model cannot be sharded exactly: " + " ".join(plan.blockers))
    _load_parts(model, plan.layouts, mesh, device)
    beside = Overlap(mesh, overlap)
    columns = _convert_layers(model, plan, beside)
    for boundary in plan.boundaries:
        Boundary.convert(model.get_submodule(boundary.module), mesh, boundary.once, boundary.passing)
    for attribute in plan.attributes:
        _set_local(model.get_submodule(attribute.module), attribute.name, attribute.local[mesh.tp_rank])
    for given in plan.head_inputs:
        take_own_heads(model.get_submodule(given.module), given, mesh.tp_rank)
    batch = Batch()
    if plan.sequence is not None:
        by_region = _columns_of_regions(plan, columns, beside)
        batch = apply_sequence(model, plan.sequence, by_region, beside, whole_routing=bool(plan.boundaries))
    _keep_off_fast_paths(model)
    subgroups = Subgroups.of(_owners(plan, mesh), mesh)
    setattr(model, _SHARDED, Sharded(plan, mesh, columns, subgroups, batch, beside))


class LocalConfig:
    """A module's view of its model's config: some counts are this rank's, everything else is as it is there."""

    def __init__(self, original: Any) -> None:
        self.__dict__["_original"] = original

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_original" not in self.__dict__:  # copying asks before there is anything
            raise AttributeError(name)
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)


def _set_local(module: nn.Module, name: str, value: int) -> None:
    if not name.startswith("config."):
        setattr(module, name, value)
        return
    if not isinstance(module.config, LocalConfig):
        module.config = LocalConfig(module.config)  # type: ignore[assignment]
    vars(module.config)[name.removeprefix("config.")] = value


def _owners(plan: ShardingPlan, mesh: Mesh) -> set[tuple[int, ...]]:
    """Every set of tensor parallel ranks that hold the same run of some parameter, on any of them."""
    layouts = {layout for layout in plan.layouts.values() if layout.overlaps}
    return {share.owners for layout in layouts for rank in range(mesh.tp_size) for share in layout.shared(rank)}


def _load_parts(model: nn.Module, layouts: dict[str, Layout], mesh: Mesh, device: torch.device) -> None:
    """Give every parameter this rank's part and every buffer its place, in the order in which models initialize."""
    waiting = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    by_id = {id(p): layouts[name] for name, p in model.named_parameters(remove_duplicate=False)}
    created: dict[int, nn.Parameter] = {}
    for module, initialize in _with_initializers(model, None):
        old = {name: p for name, p in module._parameters.items() if p is not None}
        if any(t.is_meta for t in [*old.values(), *_buffers(module).values()]):
            _create(module, device, created)
            initialize()
        for name, original in old.items():
            waiting[id(original)] -= 1
            if not waiting[id(original)]:  # a tied parameter is initialized by each of its modules, then cut once
                _cut(module._parameters[name], by_id[id(original)], mesh, device)  # type: ignore[arg-type]
        for name, buffer in _buffers(module).items():
            module._buffers[name] = _from_rank_zero(buffer, device)


def _cut(parameter: nn.Parameter, layout: Layout, mesh: Mesh, device: torch.device) -> None:
    parameter.grad = None
    parameter.data = layout.shard(_from_rank_zero(parameter.data, device), mesh.tp_rank)


def _from_rank_zero(tensor: Tensor, device: torch.device) -> Tensor:
    tensor = tensor.to(device).contiguous()
    if dist.get_world_size() > 1 and tensor.numel():
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)  # bytes: backends know few dtypes
    return tensor


def _create(module: nn.Module, device: torch.device, created: dict[int, nn.Parameter]) -> None:
    """Empty full tensors for what ``module`` itself has on the meta device; a shared parameter is created once."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            if id(parameter) not in created:
                empty = torch.empty_like(parameter, device=device)
                created[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = created[id(parameter)]
    for name, buffer in _buffers(module).items():
        if buffer.is_meta:
            module._buffers[name] = torch.empty_like(buffer, device=device)


def _with_initializers(model: nn.Module, hf_model: Any, path: str = "") -> Iterator[tuple[nn.Module, Any]]:
    """Every module once, children first, with the call that initializes its own tensors.

    That is ``_init_weights`` of the Hugging Face model around it, or its own ``reset_parameters``.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, hf_model: Any, path: str) -> Iterator[tuple[nn.Module, Any]]:
        hf_model = module if hasattr(module, "_init_weights") else hf_model
        for name, child in module.named_children():
            yield from walk(child, hf_model, f"{path}.{name}" if path else name)
        if id(module) not in seen:
            seen.add(id(module))
            yield module, lambda: _initialize(module, hf_model, path)

    yield from walk(model, hf_model, path)


@torch.no_grad()
def _initialize(module: nn.Module, hf_model: Any, path: str) -> None:
    if hf_model is not None:
        hf_model._init_weights(module)
        return
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(module, name):
            getattr(module, name)()
            return
    raise ValueError(
        f"{path or type(module).__name__} was built on the meta device, and {type(module).__name__} has no"
        " `reset_parameters()` that could give its parameters and buffers their values; define it, or build the model"
        " on the CPU."
    )


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module._buffers.items() if buffer is not None}


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
        elif entry.features is None:
            continue
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


def _matrices(linears: Sequence[Union[ColumnParallel, RowParallel]]) -> list[Tensor]:
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


def warn_of_dropout(model: nn.Module, plan: ShardingPlan) -> None:
    """Warn of active dropout between a column and a row cut: ranks would drop the same places of different heads."""
    cut = [e for e in plan.parameters.values() if e.kind in ("row", "column") and not e.gather_output]
    around = {e.module.rpartition(".")[0] for e in cut}
    active = [path for path in sorted(around) if path and _drops(model.get_submodule(path))]
    if active:
        others = " and others" if len(active) > 1 else ""
        rank_zero_warn(
            f"dropout is active inside cut layers ({active[0]}{others}): the ranks draw one random stream, so what they"
            " drop is correlated and differs from the unsharded model's. Set it to 0 for exact numbers."
        )


def _drops(module: nn.Module) -> bool:
    names = ("attention_dropout", "attn_dropout", "dropout", "dropout_p")
    rates = [getattr(module, name, 0) for name in names]
    rates += [m.p for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
