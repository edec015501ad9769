"""The state of a run as ``torch.distributed.checkpoint`` (DCP) takes it: ``{"model": ..., "optimizer": ...}``.

Names, shapes and form are those of torch's ``get_state_dict`` for the unsharded model, so that one reads what the other
has written.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_autotp.checkpoint.distributed import (
    by_name,
    by_number,
    read_into,
    skeleton_of,
    target_of,
    view_of,
    with_own,
)
from lightning_autotp.checkpoint.safe_load import Reader
from lightning_autotp.checkpoint.sharded_view import ShardedView
from lightning_autotp.checkpoint.state_dict import Placement, optimizer_names, placed_state
from lightning_autotp.checkpoint.whole_state import for_owners, is_held, with_everyones
from lightning_autotp.distributed.dp_shards import as_rows, placed_as

_MODEL, _STATE, _GROUPS = "model.", "optimizer.state.", "optimizer.param_groups."


def unsharded_state(model: nn.Module, optimizer: Optional[Optimizer], placement: Placement) -> dict[str, Any]:
    """The state to give to ``dcp.save``: sharded tensors as views that know their place in the full ones.

    Nothing is copied: the views show what the model and the optimizer hold.
    """
    state: dict[str, Any] = {"model": {n: view_of(n, value, placement) for n, value in model.state_dict().items()}}
    if optimizer is not None:
        names, own = optimizer_names(model, optimizer), with_everyones(optimizer.state_dict(), optimizer)
        skeleton, tensors = skeleton_of(own, names), by_name(own, names, placement)
        skeleton["state"] = with_own(skeleton, own, tensors, names)
        state["optimizer"] = skeleton
    return state


def read_state(
    path: Union[str, os.PathLike[str]], model: nn.Module, optimizer: Optional[Optimizer], placement: Placement
) -> dict[str, Any]:
    """What ``dcp.save`` has written of :func:`unsharded_state`, at any sizes, as this run's views, on the CPU.

    Every process must call it.

    Raises:
        ValueError: if it is not such a checkpoint, or ``optimizer`` is given and there is no optimizer in it.
    """
    stored = Reader(Path(path)).read_metadata().state_dict_metadata
    if not any(key.startswith(_MODEL) for key in stored):
        raise ValueError(f"{path} is not a checkpoint of a run's state: nothing in it is called `{_MODEL}...`.")
    keys = [key for key in stored if key.startswith(_MODEL)]
    state: dict[str, Any] = {
        "model": {n: _target(n, stored[_MODEL + n], placement) for n in (key.removeprefix(_MODEL) for key in keys)}
    }
    if optimizer is not None:
        groups: dict[int, dict[str, Any]] = {}
        for key in (key.removeprefix(_GROUPS) for key in stored if key.startswith(_GROUPS)):
            number, _, entry = key.partition(".")
            groups.setdefault(int(number), {})[entry] = None
        if not groups:
            raise ValueError(f"{path} has no optimizer in it; save it with `state_dict(optimizer)`, or load without.")
        of_parameters: dict[str, dict[str, Any]] = {}
        for key in (key.removeprefix(_STATE) for key in stored if key.startswith(_STATE)):
            name, _, entry = key.rpartition(".")
            of_parameters.setdefault(name, {})[entry] = _target(name, stored[_STATE + key], placement)
        state["optimizer"] = {"state": of_parameters, "param_groups": [groups[number] for number in sorted(groups)]}
    read_into(state, Path(path))
    return state


def load_state(
    state: Mapping[str, Any], model: nn.Module, optimizer: Optional[Optimizer], placement: Placement
) -> None:
    """Put ``state``, of views or of full tensors, into a sharded model and its optimizer.

    Raises:
        ValueError: if the optimizer's parameters are not those of ``optimizer``.
        RuntimeError: if the model's names or shapes are not those of ``model``.
    """
    held = model.state_dict(keep_vars=True)
    model.load_state_dict({n: placed_as(held.get(n), _local(n, v, placement)) for n, v in state["model"].items()})
    if optimizer is not None:
        saved = state["optimizer"]
        found = {n: {e: _local(n, v, placement) for e, v in of_one.items()} for n, of_one in saved["state"].items()}
        numbered = by_number([{**saved, "state": found}], [optimizer_names(model, optimizer)])
        optimizer.load_state_dict(placed_state(optimizer, for_owners(numbered, [optimizer])[0]))


def _target(name: str, stored: Any, placement: Placement) -> Any:
    """What DCP is to read a stored value into."""
    return target_of(name, stored, placement)[1]


def _local(name: str, value: Any, placement: Placement) -> Any:
    if isinstance(value, ShardedView):
        return as_rows(value.local, value.rows)
    return placement.cut(name, value) if isinstance(value, Tensor) and not is_held(value) else value
