"""The table of operators: importing it registers the rules of all kinds."""

from lightning_autotp.dataflow.operators import (
    attention,
    convolutions,
    factories,
    indexing,
    losses,
    matmul,
    mixing,
    norms,
    pointwise,
    reductions,
    slices,
    strides,
    views,
)

__all__ = [
    "attention",
    "convolutions",
    "factories",
    "indexing",
    "losses",
    "matmul",
    "mixing",
    "norms",
    "pointwise",
    "reductions",
    "slices",
    "strides",
    "views",
]
