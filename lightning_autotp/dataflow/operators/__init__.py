"""The table of operators: importing it registers the rules of all kinds."""

from lightning_autotp.dataflow.operators import (
    convolutions,
    factories,
    indexing,
    matmul,
    pointwise,
    reductions,
    slices,
    views,
)

__all__ = ["convolutions", "factories", "indexing", "matmul", "pointwise", "reductions", "slices", "views"]
