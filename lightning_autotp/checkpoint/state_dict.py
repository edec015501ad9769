"""Model and optimizer state between its local form (in memory) and its full form (in a file)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_autotp.checkpoint.whole_state import Held, as_part
from lightning_autotp.distributed.dp_shards import all_rows, is_dp_sharded, placed_as, rows_of
from lightning_autotp.distributed.functions import gather_parts
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Interval, Layout


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model's state lie: a layout for every parameter name, and this process's mesh.

    Under ZeRO, ``rows`` has those that this rank holds, by the names of the parameters that are sharded so.
    """

    layouts: Mapping[str, Layout]
    mesh: Mesh
    rows: Mapping[str, Interval] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, layouts: Mapping[str, Layout], mesh: Mesh) -> "Placement":
        """That of ``model``, whose parameters have these layouts."""
        # a state dict may know a parameter by another name than the module does: wrappers rename, users do
        by_id = {id(p): layouts[name] for name, p in model.named_parameters(remove_duplicate=False)}
        stored = model.state_dict(keep_vars=True)
        rows = {name: rows_of(p) for name, p in (*model.named_parameters(), *stored.items()) if is_dp_sharded(p)}
        return cls({**layouts} | {name: by_id[id(p)] for name, p in stored.items() if id(p) in by_id}, mesh, rows)

    def cut(self, name: str, full: Any) -> Any:
        """This rank's part of a full tensor called ``name``; what has another shape than the parameter stays whole."""
        layout = self.layouts.get(name)
        if layout is None or layout.is_replicated or not isinstance(full, Tensor) or tuple(full.shape) != layout.shape:
            return full
        return as_part(layout.shard(full, self.mesh.tp_rank))

    def gather(self, name: str, local: Any) -> Any:
        """The full tensor called ``name``, on the CPU; every tensor parallel rank must call it."""
        if isinstance(local, Held):
            mine = local.tensor if self.mesh.tp_rank == local.owner else None
            return self.mesh.collectives.gather_objects(None if mine is None else mine.cpu())[local.owner]
        if not isinstance(local, Tensor):
            return local
        local = all_rows(local)
        layout = self.layout_of(name, local)
        return (local.detach() if layout is None else gather_parts(local.detach(), layout, self.mesh)).cpu()

    def layout_of(self, name: str, local: Tensor) -> "Layout | None":
        """The layout of a local tensor that belongs to parameter ``name``, None where it is no part of a larger one.

        Raises:
            ValueError: if it is neither like the parameter nor a single number, so that nobody knows what it holds.
        """
        layout = self.layouts.get(name)
        if layout is None or layout.is_replicated:
            return None
        if tuple(local.shape) == layout.local_shape(self.mesh.tp_rank):
            return layout
        if local.numel() == 1:
            return None
        raise ValueError(
            f"the state of {name} has shape {list(local.shape)}, which is neither that of its part"
            f" {list(layout.local_shape(self.mesh.tp_rank))} nor a single number. Optimizers whose state is not shaped"
            " like the parameters (factored or blockwise ones) cannot be saved with tensor parallelism."
        )


def optimizer_names(module: nn.Module, optimizer: Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in the order in which its ``state_dict`` numbers them.

    Raises:
        ValueError: if it has a parameter that is not the module's.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    ordered = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"an optimizer ({type(optimizer).__name__}) holds a parameter of shape {list(parameter.shape)} that"
                    " is not in the model. Was it created from other parameters than the model trains with? Create it"
                    " in `configure_optimizers`, from `self.parameters()`."
                )
            ordered.append(names[parameter])
    return ordered


def placed_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` whose tensors are placed as its parameters are, where ZeRO shards these."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if "state" not in state:
        return dict(state)
    placed = {at: {e: placed_as(parameters[at], v) for e, v in of.items()} for at, of in state["state"].items()}
    return {**state, "state": placed}


def map_optimizer_state(
    state: Mapping[str, Any], names: list[str], change: Callable[[str, str, Any], Any]
) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with ``change(parameter name, entry name, value)`` in place of every value."""
    if "state" not in state:  # Lightning's stand-in for a module without optimizers
        return dict(state)
    return {
        **state,
        "state": {
            number: {entry: change(names[number], entry, value) for entry, value in entries.items()}
            for number, entries in state["state"].items()
        },
    }


def full_checkpoint(checkpoint: Mapping[str, Any], names: list[list[str]], placement: Placement) -> dict[str, Any]:
    """``checkpoint`` with full tensors, as an unsharded run writes it, on the first tensor parallel rank.

    Every rank must call it; the others get None in place of tensors.
    """
    gather = partial(of_first_rank, placement)
    full = dict(checkpoint)
    full["state_dict"] = {name: gather(name, value) for name, value in checkpoint["state_dict"].items()}
    if "optimizer_states" in checkpoint:
        full["optimizer_states"] = [
            map_optimizer_state(state, names[at], lambda name, _, value: gather(name, value))
            for at, state in enumerate(checkpoint["optimizer_states"])
        ]
    return full


def of_first_rank(placement: Placement, name: str, value: Any) -> Any:
    """The full tensor on the first tensor parallel rank, None on others: one copy of the model is enough for a host."""
    full = placement.gather(name, value)
    return full if placement.mesh.tp_rank == 0 else None


def empty_part(size: torch.Size, dtype: torch.dtype, layout: "Layout | None", rank: int) -> Tensor:
    """An uninitialized local tensor to read a saved one of ``size`` into."""
    shape = tuple(size) if layout is None else layout.local_shape(rank)
    return torch.empty(shape, dtype=dtype)
