"""What experts do to rows of tokens around their matmuls, as Triton kernels that read and write each row once.

Importing this needs Triton: :mod:`lightning_autotp.parallel.experts` does so for the first rows on CUDA. Rows are fp32,
bf16 or fp16; what is computed of them is fp32, rounded once.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

_LAUNCH = {"BLOCK": 2048, "num_warps": 4}


def spread(x: Tensor, place: Tensor) -> Tensor:
    """``y[place[t, j]] = x[t]``: ``[T, H]``, ``[T, k]`` -> ``[T k, H]``; ``place`` is a permutation."""
    x = x.contiguous()
    (count, width), k = x.shape, place.shape[1]
    y = x.new_empty(count * k, width)
    with torch.cuda.device_of(x):
        _spread_kernel[(count, triton.cdiv(width, _LAUNCH["BLOCK"]))](x, place, y, width, k, **_LAUNCH)
    return y


def join(rows: Tensor, weights: Optional[Tensor], place: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum_j weights[t, j] rows[place[t, j]]``: ``[T k, H]``, ``[T, k]``, ``[T, k]`` -> ``[T, H]``, of ``dtype``."""
    rows = rows.contiguous()
    (count, k), width = place.shape, rows.shape[1]
    weights = None if weights is None else weights.contiguous()
    x = rows.new_empty(count, width, dtype=dtype)
    with torch.cuda.device_of(rows):
        _join_kernel[(count, triton.cdiv(width, _LAUNCH["BLOCK"]))](rows, weights, place, x, width, k, **_LAUNCH)
    return x


def join_gradient(grad: Tensor, rows: Tensor, weights: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`join`: ``weights[t, j] grad[t]`` at ``place[t, j]``, and ``grad[t] . rows[place[t, j]]``.

    Args:
        grad: ``[T, H]``.
        rows: ``[T k, H]``.
        weights: ``[T, k]``.
        place: ``[T, k]``.

    Returns:
        ``[T k, H]``, of the dtype of ``rows``; ``[T, k]``, of the dtype of ``weights``.
    """
    grad, rows, weights = grad.contiguous(), rows.contiguous(), weights.contiguous()
    width = rows.shape[1]
    of_rows, of_weights = torch.empty_like(rows), torch.empty_like(weights)
    with torch.cuda.device_of(rows):
        _join_gradient_kernel[(rows.shape[0],)](
            grad, rows, weights, place, of_rows, of_weights, width, place.shape[1], **_LAUNCH
        )
    return of_rows, of_weights


def swiglu(rows: Tensor) -> Tensor:
    """``silu(gate) * up``: ``[S, 2 I]``, gates first, -> ``[S, I]``."""
    rows = rows.contiguous()
    count, width = rows.shape[0], rows.shape[1] // 2
    result = rows.new_empty(count, width)
    with torch.cuda.device_of(rows):
        _swiglu_kernel[(count, triton.cdiv(width, _LAUNCH["BLOCK"]))](rows, result, width, **_LAUNCH)
    return result


def swiglu_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """The gradient ``[S, 2 I]`` of :func:`swiglu` at ``rows [S, 2 I]``, of that of its result ``[S, I]``."""
    rows, grad = rows.contiguous(), grad.contiguous()
    count, width = grad.shape
    result = torch.empty_like(rows)
    with torch.cuda.device_of(rows):
        _swiglu_gradient_kernel[(count, triton.cdiv(width, _LAUNCH["BLOCK"]))](rows, grad, result, width, **_LAUNCH)
    return result


@triton.jit
def _spread_kernel(
    x: tl.tensor, place: tl.tensor, y: tl.tensor, width: tl.tensor, k: tl.tensor, BLOCK: tl.constexpr
) -> None:
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(x + token * width + at, mask=at < width)
    for j in range(0, k):
        tl.store(y + tl.load(place + token * k + j) * width + at, row, mask=at < width)


@triton.jit
def _join_kernel(
    rows: tl.tensor,
    weights: tl.tensor,
    place: tl.tensor,
    x: tl.tensor,
    width: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in range(0, k):
        row = tl.load(rows + tl.load(place + token * k + j) * width + at, mask=at < width).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + token * k + j).to(tl.float32)
        total += row
    tl.store(x + token * width + at, total.to(x.dtype.element_ty), mask=at < width)


@triton.jit
def _join_gradient_kernel(
    grad: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    place: tl.tensor,
    of_rows: tl.tensor,
    of_weights: tl.tensor,
    width: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    copy = tl.program_id(0).to(tl.int64)
    grad += copy // k * width
    row = tl.load(place + copy) * width
    weight = tl.load(weights + copy).to(tl.float32)
    products = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        of_x = tl.load(grad + at, mask=at < width, other=0.0).to(tl.float32)
        products += of_x * tl.load(rows + row + at, mask=at < width, other=0.0).to(tl.float32)
        tl.store(of_rows + row + at, (of_x * weight).to(of_rows.dtype.element_ty), mask=at < width)
    tl.store(of_weights + copy, tl.sum(products, 0).to(of_weights.dtype.element_ty))


@triton.jit
def _swiglu_kernel(rows: tl.tensor, result: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows += row * 2 * width
    gate = tl.load(rows + at, mask=at < width).to(tl.float32)
    up = tl.load(rows + width + at, mask=at < width).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(result + row * width + at, product.to(result.dtype.element_ty), mask=at < width)


@triton.jit
def _swiglu_gradient_kernel(
    rows: tl.tensor, grad: tl.tensor, result: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows += row * 2 * width
    result += row * 2 * width
    gate = tl.load(rows + at, mask=at < width).to(tl.float32)
    up = tl.load(rows + width + at, mask=at < width).to(tl.float32)
    of_product = tl.load(grad + row * width + at, mask=at < width).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = of_product * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(result + at, of_gate.to(result.dtype.element_ty), mask=at < width)
    tl.store(result + width + at, (of_product * gate * sigmoid).to(result.dtype.element_ty), mask=at < width)
