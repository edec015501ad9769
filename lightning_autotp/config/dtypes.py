"""Dtypes by name."""

from typing import Annotated, Any, Union

import torch
from pydantic import BeforeValidator, PlainSerializer

_DTYPES = {
    "fp16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "float": torch.float32,
    "fp64": torch.float64,
    "double": torch.float64,
    **{str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)},
}


def parse_dtype(value: Any) -> torch.dtype:
    """A dtype from a ``torch.dtype`` or a name such as ``"bf16"``, ``"bfloat16"`` or ``"torch.bfloat16"``.

    Raises:
        ValueError: on anything else.
    """
    if isinstance(value, str):
        value = _DTYPES.get(value.lower().removeprefix("torch."), value)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(f"dtype: {value!r} is not a floating-point dtype; names are {', '.join(sorted(_DTYPES))}.")
    return value


DType = Annotated[
    torch.dtype,
    BeforeValidator(parse_dtype, json_schema_input_type=Union[str, torch.dtype]),
    PlainSerializer(lambda d: str(d).removeprefix("torch."), return_type=str),
]
