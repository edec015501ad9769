"""What the vocabulary parallel cross entropy does to its logits, as two Triton kernels that read them once each.

Written in torch it is several passes over ``[T, V_r]`` with fp32 copies between them; here those stay in registers.
Importing this needs Triton: :mod:`lightning_autotp.losses.vocab_parallel_cross_entropy` does so for the first logits
on CUDA.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

_LAUNCH = {"BLOCK": 4096, "num_warps": 4}
"""32 logits a thread, all loaded before the first is used, and small enough for several programs a multiprocessor."""


def statistics(logits: Tensor, here: Tensor, local: Tensor, *, with_sum: bool) -> Tensor:
    """Of each row of logits ``[T, V_r]`` the largest, m, ``sum_c exp(x_c - m)``, the target's, and ``sum_c x_c``.

    Args:
        logits: ``[T, V_r]``, fp32, bf16 or fp16.
        here: ``[T, 1]``, whether the row's target is among these logits; 0 stands for the others' logit.
        local: ``[T, 1]``, int64, its place among them.
        with_sum: whether ``sum_c x_c`` is wanted.

    Returns:
        ``[3 or 4, T]``, fp32.
    """
    logits = _with_rows(logits)
    count, width = logits.shape
    found = torch.empty(3 + with_sum, count, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _statistics_kernel[(count,)](logits, logits.stride(0), width, here, local, found, WITH_SUM=with_sum, **_LAUNCH)
    return found


def gradient(
    logits: Tensor,
    local: Tensor,
    log_sum: Tensor,
    of_softmax: Tensor,
    of_target: Tensor,
    of_all: Optional[Tensor],
    out: Optional[Tensor] = None,
) -> Tensor:
    """``exp(x_c - log_sum) of_softmax - of_all + [c = local] of_target``, fp32, rounded once to the logits' dtype.

    Args:
        logits: ``[T, V_r]``, fp32, bf16 or fp16; they stay as they are, unless they are ``out``.
        local: ``[T, 1]``, int64.
        log_sum: ``[T, 1]``, fp32 and contiguous, as are the following.
        of_softmax: ``[T, 1]``.
        of_target: ``[T, 1]``.
        of_all: ``[T, 1]``, or None for 0.
        out: where it goes, contiguous and of the logits' dtype; None for a new tensor.

    Returns:
        ``[T, V_r]``, contiguous.
    """
    logits = _with_rows(logits)
    count, width = logits.shape
    result = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    rows = (local, log_sum, of_softmax, of_target, of_all)
    with torch.cuda.device_of(logits):
        _gradient_kernel[(count,)](logits, logits.stride(0), width, *rows, result, **_LAUNCH)
    return result


def _with_rows(logits: Tensor) -> Tensor:
    """Logits whose rows may lie anywhere, but are each in one piece."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


@triton.jit
def _statistics_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    here: tl.tensor,
    local: tl.tensor,
    found: tl.tensor,
    WITH_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: the online softmax of Milakov & Gimelshein (arXiv:1805.02867), algorithm 3, a block at a time."""
    row = tl.program_id(0).to(tl.int64)  # T * V_r may exceed 2**31
    logits += row * stride
    largest = float("-inf")
    exponentials = 0.0
    total = 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < width, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        finite = tl.where(new == float("-inf"), 0.0, new)  # all of them masked so far: exp(-inf - 0) is 0
        exponentials = exponentials * tl.exp(largest - finite) + tl.sum(tl.exp(x - finite), 0)
        largest = new
        if WITH_SUM:
            total += tl.sum(tl.where(at < width, x, 0.0), 0)
    target = tl.load(logits + tl.load(local + row), mask=tl.load(here + row), other=0.0).to(tl.float32)
    count = tl.num_programs(0)
    found += row
    tl.store(found, largest)
    tl.store(found + count, exponentials)
    tl.store(found + 2 * count, target)
    if WITH_SUM:
        tl.store(found + 3 * count, total)


@triton.jit
def _gradient_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    local: tl.tensor,
    log_sum: tl.tensor,
    of_softmax: tl.tensor,
    of_target: tl.tensor,
    of_all: tl.tensor,
    result: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One row; a block is loaded before it is stored, and nothing else of it is read: the result may be the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    result += row * width
    place = tl.load(local + row).to(tl.int32)
    shift, scale, extra = tl.load(log_sum + row), tl.load(of_softmax + row), tl.load(of_target + row)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < width).to(tl.float32)
        part = tl.exp(x - shift) * scale
        if of_all is not None:
            part -= tl.load(of_all + row)
        part += tl.where(at == place, extra, 0.0)
        tl.store(result + at, part.to(result.dtype.element_ty), mask=at < width)
