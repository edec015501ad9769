"""ZeRO: what tensor parallelism leaves to a rank is sharded once more, over the data parallel ranks, by torch's FSDP2.

Source: Rajbhandari et al., "ZeRO", arXiv:1910.02054. The local tensors of tensor parallelism are to FSDP2 what the full
ones are without it, so that layers, plans and layouts know nothing of this.

=====  ===================  =======================================================================
stage  between steps        in a step
=====  ===================  =======================================================================
0      all is replicated    gradients are all-reduced (torch's ``DistributedDataParallel``)
1, 2   all is sharded       a block's parameters are gathered once, and freed after its backward pass
3      all is sharded       they are freed after the forward pass too, and gathered again
=====  ===================  =======================================================================

"All" are parameters, gradients and the optimizer's state: FSDP2 has no stage that keeps whole gradients, so 1 is 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_autotp.compat.fsdp import (
    before_reduction,
    discard_gradients,
    fsdp_modules,
    gathered_parameters,
    recover,
    reduce_after_backward,
)
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.dp_shards import local_rows
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.planning.blocks import children_of, lists_around
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.sharding.zero_hooks import OnDemand, with_own_memory

_HOOKED = (
    "zero_stage: {name} has a hook on its gradient, which sharding it over data parallel ranks would lose. Change the"
    " gradient in `on_before_optimizer_step`, or use zero_stage=0."
)

_numbers = itertools.count()
_ZERO, _CALL = "_autotp_zero", "_autotp_call"


class Zero:
    """A model whose parameters data parallel ranks share; made by :func:`shard_over_dp`.

    Args:
        model: the model, which FSDP2 has sharded.
        stage: 1, 2 or 3.
        mesh: this process's place.
        shard_group: the processes that share parameters; a part of the data parallel group where that is hybrid.
        host_group: all data parallel processes, for what is on the CPU.
        replicated: parameters that FSDP2 does not know, single numbers.
    """

    def __init__(
        self,
        model: FSDPModule,
        stage: int,
        mesh: Mesh,
        shard_group: dist.ProcessGroup,
        host_group: dist.ProcessGroup,
        replicated: list[nn.Parameter],
    ) -> None:
        self.model, self.stage, self.mesh = model, stage, mesh
        self.shard_group, self.host_group, self.replicated = shard_group, host_group, replicated
        self.unsharded: dict[nn.Parameter, nn.Parameter] = {}
        """By parameter, what the forward pass sees of it, whose gradient the backward pass computes."""
        self.on_reduction: Optional[Callable[[], None]] = None
        """Called before gradients are reduced over the data parallel ranks."""
        self._keeps = False
        """Whether there are gradients that the next backward pass is to reduce."""
        self._names: dict[str, nn.Parameter] = {}
        self._ran: list[int] = []
        """The blocks that were run for gradients since the last reduction, in order."""
        self._used: set[nn.Parameter] = set()
        self._call: Callable[..., Any] = vars(model)[_CALL]

    @property
    def modules(self) -> list[FSDPModule]:
        """The modules whose parameters are gathered together, the model first."""
        return fsdp_modules(self.model)  # type: ignore[arg-type]  # it is an nn.Module, too

    def call(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``step`` returns, a step of the model past its ``forward``, with its parameters gathered as it runs."""
        self.reshard()  # what was gathered in between may be older than the last optimizer's step
        self._refuse_later_hooks()
        if torch.is_grad_enabled() and self.model.training:  # type: ignore[attr-defined]
            self.share_buffers()
        try:
            return self._call(step, *args, **kwargs)
        except Exception:
            recover(self.model)
            raise

    def before_backward(self, loss: Tensor) -> None:
        """See to it that gradients are reduced by the backward pass of ``loss`` in a step (manual optimization)."""
        reduce_after_backward(self.model, loss)

    def discard(self, parameters: Optional[Iterable[nn.Parameter]] = None) -> None:
        """Forget gradients that are not reduced, of batches without a step; of all parameters by default."""
        of = set(self.unsharded if parameters is None else parameters)
        self._keeps = self._keeps and not self.unsharded.keys() <= of
        for module in self.modules:
            discard_gradients(module, of)

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Give replicas the buffers of the first of them, as torch's DDP does before each forward pass."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for buffer in self.model.buffers():  # type: ignore[attr-defined]
            if buffer.numel() and (buffer.numel() == 1 or 0 not in buffer.stride()):  # one that is expanded is constant
                kinds.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        for buffers in kinds.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            self.mesh.collectives.broadcast(flat, "replicas")
            for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
                buffer.copy_(part.view_as(buffer))

    def _refuse_later_hooks(self) -> None:
        for parameter, own in self.unsharded.items():
            if parameter._backward_hooks:
                name = next(name for name, p in self._names.items() if p is own)
                raise ValueError(_HOOKED.format(name=name))

    def agree(self, arrived: bool) -> bool:
        """Whether gradients have arrived since the last call, on any data parallel rank; every one must call it.

        Args:
            arrived: whether they have here.

        Raises:
            RuntimeError: on all of them, if one has gradients that came past the reduction, or has run other blocks.
        """
        names = [] if self._keeps else [name for name, p in self._names.items() if p.grad is not None]
        ran = hash(tuple(self._ran)) >> 2
        told = torch.tensor([bool(names), arrived, ran, -ran])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.host_group)
        passed, anywhere, most, least = told.tolist()
        if most != -least:
            raise RuntimeError(
                "zero_stage: data parallel ranks have run different blocks of the model, or in another order, and have"
                " gathered the wrong parameters. Draw which blocks are run (layerdrop, stochastic depth) from the same"
                " random numbers on all ranks, or use zero_stage=0."
            )
        if anywhere:
            self._ran.clear()
        if passed:
            raise RuntimeError(
                f"zero_stage: the gradients of {', '.join(names[:5]) or 'another rank'} were not reduced over the data"
                " parallel ranks:"
                " they did not come of a backward pass of what the model's `forward` or its step returns. In manual"
                " optimization call `self.manual_backward(loss)`; with `torch.func`, or gradients put into `.grad` by"
                " hand, use zero_stage=0."
            )
        return bool(anywhere)

    def reshard(self) -> None:
        """Free what is gathered: after a forward pass that no backward pass follows."""
        for module in self.modules:
            module.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather all parameters at once; every data parallel rank must call it."""
        for module in self.modules:
            module.unshard()
        try:
            yield
        finally:
            self.reshard()

    @contextmanager
    def without_reduction(self) -> Iterator[None]:
        """Keep whole gradients of the batches in here, to be reduced with the next one's."""
        self.model.set_requires_gradient_sync(False)
        self._keeps = True
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def sum_over_shards(self, x: Tensor) -> Tensor:
        """Sum ``x``, of the rows that a rank holds, over those that share them."""
        dist.all_reduce(x, group=self.shard_group)
        return x

    def max_over_shards(self, x: Tensor) -> Tensor:
        """The largest ``x`` of those that share rows."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.shard_group)
        return x

    @torch.no_grad()
    def forget_unused(self) -> None:
        """Let parameters that no data parallel rank has used have no gradient, as without ZeRO.

        To be called between the backward pass and the optimizer's step by every process.
        """
        parameters = [p for p in self.unsharded if p.requires_grad]
        used = torch.tensor([p in self._used for p in parameters], dtype=torch.uint8)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self.host_group)
        for parameter, anywhere in zip(parameters, used.tolist()):
            if not anywhere:
                parameter.grad = None

    @torch.no_grad()
    def average_replicated(self) -> None:
        """Average the gradients of what FSDP2 does not reduce; once is as good as twice."""
        trained = [p for p in self.replicated if p.requires_grad]
        if not trained:
            return
        there = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([torch.stack([g.reshape(()).to(torch.float64) for g in grads]), there.to(torch.float64)])
        dist.all_reduce(flat, group=self.mesh.replica_group)
        for p, total, ranks in zip(trained, *flat.split(len(trained))):
            if ranks:
                p.grad = (total / self.mesh.replicas).to(p.dtype).reshape(p.shape)

    def watch(self) -> None:
        """Gather everything once, so that what the forward pass sees is known, and see to unused parameters."""
        with torch.inference_mode(False), torch.no_grad():
            self.call(lambda: None)
            for module in self.modules:
                module.unshard()
                self.unsharded |= dict(gathered_parameters(module))
                module.reshard()
                before_reduction(module, self._see)
        names = {parameter: name for name, parameter in self.model.named_parameters()}  # type: ignore[attr-defined]
        self._names = {names[parameter]: own for parameter, own in self.unsharded.items()}
        for number, module in enumerate(self.modules[1:]):
            module.register_forward_hook(partial(self._note, number))  # type: ignore[attr-defined]
        on_demand = OnDemand(self.modules, {own: parameter for parameter, own in self.unsharded.items()})
        for owner in on_demand.owners:
            owner.register_forward_pre_hook(on_demand)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note(self, number: int, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._ran.append(number)

    def _see(self, parameters: list[nn.Parameter], unused: list[nn.Parameter]) -> None:
        if self.on_reduction is not None:
            self.on_reduction()
        self._keeps = False
        self._used -= {p for p in parameters if p.grad is None}  # what is added up begins anew
        self._used |= set(parameters) - set(unused)


def zero_of(model: nn.Module) -> Optional[Zero]:
    """How data parallel ranks share ``model``, None if each holds all of its shard."""
    return vars(model).get(_ZERO)


def shard_over_dp(model: nn.Module, plan: ShardingPlan, mesh: Mesh, stage: int, group_size: int = 0) -> Zero:
    """Shard over data parallel ranks what tensor parallelism left of ``model``, in place; every process must call it.

    Replicas start from the values of the first of them. Parameters are replaced: optimizers come after this.

    Args:
        model: a model that is sharded over tensor parallel ranks, and on its device.
        plan: how it was.
        mesh: this process's place.
        stage: 1, 2 or 3.
        group_size: data parallel ranks that share parameters, of which the others hold the same (hybrid sharding);
            0 takes all.

    Raises:
        ValueError: if a parameter has hooks, which would be lost, or the group size does not divide the replicas.
    """
    found = zero_of(model)
    if found is not None:
        return found
    _refuse_hooks(model)
    start_alike(model, mesh)
    device_mesh, shard_group = _device_mesh(mesh, group_size, next(model.parameters()).device.type)
    numbers = [p for p in model.parameters() if not p.ndim]
    attributes = {name: vars(p).copy() for name, p in model.named_parameters()}
    options: dict[str, Any] = {"mesh": device_mesh, "ignored_params": set(numbers)}
    for block in _blocks(model, plan):
        block.register_forward_hook(with_own_memory)  # before FSDP2's own
        fully_shard(block, reshard_after_forward=stage == 3, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    assert isinstance(model, FSDPModule)
    vars(model)[_CALL] = _call_step
    register_fsdp_forward_method(model, _CALL)
    zero = Zero(model, stage, mesh, shard_group, _on_hosts(mesh), numbers)
    vars(model)[_ZERO] = zero
    zero.watch()
    for name, parameter in model.named_parameters():  # what users have noted on them
        vars(parameter).update({n: value for n, value in attributes[name].items() if n not in vars(parameter)})
    return zero


def shard_as_asked(model: nn.Module, plan: ShardingPlan, mesh: Mesh, switches: TPTrainingConfig) -> Optional[Zero]:
    """:func:`shard_over_dp` as the config says; None without ZeRO, or without replicas.

    Raises:
        ValueError: see there; and if the model was sharded in another way by an earlier run.
    """
    found = zero_of(model)
    stage = switches.zero_stage if mesh.replicas > 1 else 0
    if found is not None and found.stage != stage:
        raise ValueError(
            f"zero_stage: this model was sharded for stage {found.stage} by an earlier run, and this one asks for"
            f" {stage}; build a new model and load its checkpoint."
        )
    if switches.zero_stage and not stage:
        rank_zero_info("lightning_autotp: zero_stage: there is one data parallel rank, so there is nothing to share.")
    return shard_over_dp(model, plan, mesh, stage, switches.zero_group_size) if stage else None


def _call_step(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return step(*args, **kwargs)


@torch.no_grad()
def start_alike(model: nn.Module, mesh: Mesh) -> None:
    """Give replicas the parameters and buffers of the first of them, as torch's DDP does."""
    for tensor in (*model.parameters(), *model.buffers()):
        held = local_rows(tensor).detach()
        if held.numel():
            mine = held if held.is_contiguous() else held.contiguous()
            mesh.collectives.broadcast(mine, "replicas")
            if mine is not held:
                held.copy_(mine)


def _refuse_hooks(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(_HOOKED.format(name=name))


def _device_mesh(mesh: Mesh, group_size: int, device: str) -> tuple[DeviceMesh, dist.ProcessGroup]:
    """The data parallel ranks, and those of them that share parameters; every process must call it."""
    # DTensor remembers what it knows of a mesh under its ranks and names, though its groups may be gone
    name = f"zero_{next(_numbers)}"
    if group_size in (0, mesh.replicas):
        return DeviceMesh.from_group(mesh.replica_group, device, mesh_dim_names=(name,)), mesh.replica_group
    if group_size < 0 or mesh.replicas % group_size:
        raise ValueError(
            f"zero_group_size: {group_size} does not divide the {mesh.replicas} data parallel ranks of this run; give a"
            " number that does (the ranks of a node, say), or 0 for all."
        )
    ranks = torch.tensor(dist.get_process_group_ranks(mesh.replica_group)).view(-1, group_size)
    everyones = sorted({tuple(map(tuple, of.tolist())) for of in mesh.collectives.gather_objects(ranks, "world")})
    shards = [list(row) for of in everyones for row in of]
    replicas = [list(column) for of in everyones for column in zip(*of)]
    shard_group, _ = dist.new_subgroups_by_enumeration(shards)
    replica_group, _ = dist.new_subgroups_by_enumeration(replicas)
    names = (f"{name}_replicas", name)
    return DeviceMesh.from_group([replica_group, shard_group], device, ranks, mesh_dim_names=names), shard_group


def _on_hosts(mesh: Mesh) -> dist.ProcessGroup:
    """The data parallel ranks, to send what is on the CPU; every process must call it."""
    if "gloo" in str(dist.get_backend(mesh.replica_group)):
        return mesh.replica_group
    ranks = tuple(dist.get_process_group_ranks(mesh.replica_group))
    everyones = sorted(set(mesh.collectives.gather_objects(ranks, "world")))
    group, _ = dist.new_subgroups_by_enumeration([list(of) for of in everyones], backend="gloo")
    assert group is not None
    return group


def _blocks(model: nn.Module, plan: ShardingPlan) -> list[nn.Module]:
    """The blocks whose parameters are gathered together: those of the outermost lists that share none with others."""
    around = lists_around(model, [entry.module for entry in plan.parameters.values() if entry.module])
    blocks = [block for path in around for block in children_of(model, path).values()]
    blocks = [b for b in dict.fromkeys(blocks) if not isinstance(b, (nn.ModuleList, nn.ModuleDict))]
    uses: dict[nn.Parameter, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses[parameter] = uses.get(parameter, 0) + 1
        del name
    found = []
    for block in blocks:
        own: dict[nn.Parameter, int] = {}
        for _, parameter in block.named_parameters(remove_duplicate=False):
            own[parameter] = own.get(parameter, 0) + 1
        if own and all(uses[p] == times for p, times in own.items()):
            found.append(block)
    return found
