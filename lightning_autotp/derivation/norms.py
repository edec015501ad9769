"""What norms ask of atoms."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
from torch import Tensor

from lightning_autotp.derivation.atoms import Ids
from lightning_autotp.derivation.labels import narrowed


def layer_norm(call: Any) -> Optional[list[Optional[Ids]]]:
    """What is normed over is on one rank."""
    ids = call.labels(call.x)
    if ids is None:
        return None
    for k in range(len(call.given["normalized_shape"])):
        ids = call.atoms.along(ids, call.x.ndim - 1 - k)
    return [ids, ids, ids][: len(call.outs)]


def group_norm(call: Any) -> Optional[list[Optional[Ids]]]:
    """Channels of a group are on one rank, with the weights of each."""
    ids = call.labels(call.x)
    if ids is None or any(n > 1 for n in ids.shape[2:]):
        return None
    channels = np.broadcast_to(ids, (*ids.shape[:1], call.x.shape[1], *ids.shape[2:])).reshape(len(ids), -1)
    call.atoms.along(channels.reshape(len(ids), call.given["group"], -1), 2)
    channels = _with_weights(call, channels)
    return [channels.reshape(*channels.shape, *(1,) * (call.x.ndim - 2)), None, None]


def batch_norm(call: Any) -> Optional[list[Optional[Ids]]]:
    """Each channel stands apart, with its weight and its statistics, which follow the weight."""
    ids, weight = call.labels(call.x), call.given["weight"]
    follows = weight is not None and call.labels(weight) is not None
    if ids is None or not follows and call.given["running_mean"] is not None:
        return None
    for d in (0, *range(2, call.x.ndim)):
        ids = call.atoms.along(ids, d)
    channels = _with_weights(call, np.broadcast_to(ids.reshape(1, -1), (1, call.x.shape[1])))
    made = channels.reshape(*channels.shape, *(1,) * (call.x.ndim - 2))
    statistics = [channels[0] if t.ndim == 1 and t.numel() == channels.size else None for t in call.outs[1:]]
    return [narrowed(made), *statistics]


def _with_weights(call: Any, channels: Ids) -> Ids:
    """Channels ``[rows, C]`` that have met the weight and the bias of each."""
    for name in ("weight", "bias"):
        held: Optional[Tensor] = call.given[name]
        if held is not None and call.labels(held) is not None:
            channels = call.atoms.meet(channels, call.labels(held)[None])
    return channels


NORMS = {
    "native_layer_norm": layer_norm,
    "_fused_rms_norm": layer_norm,
    "native_group_norm": group_norm,
    "native_batch_norm": batch_norm,
    "cudnn_batch_norm": batch_norm,
    "_native_batch_norm_legit": batch_norm,
    "_batch_norm_with_update": batch_norm,
}
