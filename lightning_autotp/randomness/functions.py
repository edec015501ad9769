"""Which of torch's functions draw random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

DROPOUTS = {
    *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("native_dropout", "feature_dropout", "alpha_dropout_", "feature_dropout_", "feature_alpha_dropout_"),
}
ATTENTION = "scaled_dot_product_attention"
FACTORIES = {"rand", "randn", "randint", "normal"}
"""Those that are given a size."""

_OF_PYTHON = {"gumbel_softmax", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout", "rrelu_"}
_SHARED = {"randperm", "lstm", "gru", "rnn_tanh", "rnn_relu", "multinomial"}
"""What is not drawn entry by entry."""


@cache
def _may_draw(name: str) -> bool:
    if name in _OF_PYTHON or name in DROPOUTS:
        return True
    if name.startswith("__") or name in _SHARED:
        return False
    packet = getattr(torch.ops.aten, name, None)
    try:
        overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    except AttributeError:
        return False
    return any(torch.Tag.nondeterministic_seeded in one.tags for one in overloads)


def name_if_random(func: Any) -> str:
    """The name of a torch function if it may draw random numbers, of every entry its own; empty if it does not."""
    name = getattr(func, "__name__", "")
    return name if _may_draw(name) else ""


def draws(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the function ``name``, which may draw, does."""
    if name in DROPOUTS:
        # F.dropout(input, p, training, inplace) and torch.dropout(input, p, train)
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else "alpha" not in name))
        return bool(p) and bool(training)
    if name == ATTENTION:
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if name in ("rrelu", "rrelu_"):
        return bool(kwargs.get("training", args[3] if len(args) > 3 else False))
    return True
