"""What the switches and sizes of the config may be set to; nothing is converted, so that no typo turns one on."""

from numbers import Integral
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import BeforeValidator, ValidationInfo

LossParallel = Union[bool, Literal["fused"]]
"""What ``AutoTPStrategy(loss_parallel=...)`` takes."""

FUSED = "fused"

ProofMode = Literal["on", "warn", "require", "off"]
"""What ``AutoTPStrategy(proof=...)`` takes."""


def check_loss_parallel(value: object) -> None:
    """Raise a ValueError unless ``value`` is a :data:`LossParallel`."""
    if not isinstance(value, bool) and value != FUSED:
        raise ValueError(f"loss_parallel: {value!r} is none of True, False and {FUSED!r}.")


def as_proof_mode(value: object) -> ProofMode:
    """A :data:`ProofMode`; YAML reads ``on`` and ``off`` without quotes as true and false.

    Raises:
        ValueError: if it is none; the message names the field.
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    for mode in get_args(ProofMode):
        if value == mode:
            return mode
    raise ValueError(f"proof: {value!r} is none of {', '.join(map(repr, get_args(ProofMode)))}.")


def check_switch(name: str, value: object) -> None:
    """Raise a ValueError, which names the field, unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {value!r} is neither true nor false; write true or false, without quotes.")


def check_size(name: str, value: object) -> None:
    """Raise a ValueError, which names the field, unless ``value`` is a whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's are, too
        raise ValueError(f"{name}: {value!r} is not a whole number of ranks; write a number such as 4, without quotes.")


def _switch(value: Any, info: ValidationInfo) -> Any:
    check_switch(str(info.field_name), value)
    return value


def _size(value: Any, info: ValidationInfo) -> Any:
    check_size(str(info.field_name), value)
    return int(value)


def _count(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ValueError(
            f"{info.field_name}: {value!r} is not a number of steps; write one such as 1000, or 0 for never."
        )
    return int(value)


def _stage(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, Integral) or value not in range(4):
        raise ValueError(f"zero_stage: {value!r} is none of 0, 1, 2 and 3.")
    return int(value)


def _loss_parallel(value: Any) -> Any:
    check_loss_parallel(value)
    return value


def _proof(value: Any) -> Any:
    return as_proof_mode(value)


ProofSwitch = Annotated[ProofMode, BeforeValidator(_proof)]
Switch = Annotated[bool, BeforeValidator(_switch)]
Size = Annotated[int, BeforeValidator(_size)]
Stage = Annotated[int, BeforeValidator(_stage)]
Steps = Annotated[int, BeforeValidator(_count)]
LossSwitch = Annotated[LossParallel, BeforeValidator(_loss_parallel)]
