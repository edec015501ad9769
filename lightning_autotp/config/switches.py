"""What the switches of the config may be set to."""

from typing import Literal, Union

LossParallel = Union[bool, Literal["fused"]]
"""What ``AutoTPStrategy(loss_parallel=...)`` takes."""

FUSED = "fused"


def check_loss_parallel(value: object) -> None:
    """Raise a ValueError unless ``value`` is a :data:`LossParallel`."""
    if not isinstance(value, bool) and value != FUSED:
        raise ValueError(f"loss_parallel: {value!r} is none of True, False and {FUSED!r}.")
