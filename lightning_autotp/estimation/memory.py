"""The memory of a rank at its peak: what one tensor parallel rank was seen to hold, and what ZeRO makes of it.

W, G and B are the bytes of a tensor parallel rank's weights, of its gradients and of its largest block's weights, R
those of the weights in no block (FSDP2's root group), A of activations and temporaries, n the ranks that share them.

- AdamW keeps two numbers of its parameter's dtype for each; its step is the fused one, which needs nothing besides.
- Without ZeRO a rank holds W + G + 2 G, and DDP's buckets hold G once more.
- With ZeRO, of any stage, it holds (W + G + 2 G) / n between steps, and in a step what is gathered and not yet reduced.
- Stages 1 and 2 gather W in the forward pass, and one block more in the buffer of its all-gather; a block is freed
  after its backward pass, so at the moment when gradients g have come, W - g of it are there (R to the end).
- Stage 3 gathers R and two blocks: one that is computed, and one in the buffer of an all-gather.
- Gradients are whole until they are reduced: those of two blocks, one being computed and one in the reduce-scatter's
  buffer, and of R to the end of the backward pass, where they are twice there for a moment.
- Batches that are accumulated keep all of G (G / n) from the second one on.

Source: Rajbhandari et al., "ZeRO", arXiv:1910.02054; the buffers are those of torch's FSDP2 (2.13).
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from lightning_autotp.estimation.job import Job
from lightning_autotp.estimation.step import Step

_ADAMW_STATES = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank at the moment when most is allocated; they sum up to :attr:`peak`.

    Args:
        weights: parameters and buffers that lie there between steps.
        gathered: other ranks' weights that are there at that moment, and the buffers they come in.
        optimizer: AdamW's state.
        buckets: DDP's.
        gradients: those there at that moment.
        activations: all that comes and goes: activations, logits, temporaries.
        all_gradients: those there once the backward pass is done; no part of the sum.
        kept: of activations, at the end of the forward pass; no part of the sum.
        moment: ``forward`` or ``backward``.
    """

    weights: int
    gathered: int
    optimizer: int
    buckets: int
    gradients: int
    activations: int
    all_gradients: int
    kept: int
    moment: str

    @property
    def peak(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` would be after a step."""
        there = self.weights + self.gathered + self.optimizer + self.buckets
        return there + self.gradients + self.activations


class _Moment(NamedTuple):
    gathered: int
    gradients: int
    others: int
    name: str

    @property
    def size(self) -> int:
        return self.gathered + self.gradients + self.others


def memory_of(step: Step, job: Job) -> Memory:
    """The memory of a rank when most is allocated."""
    held, shards = step.held, job.shards
    moments = _sharded(step, job) if shards > 1 else _whole(step, job)
    most = max(moments, key=lambda moment: moment.size)
    return Memory(
        weights=ceil(held.weights / shards) + held.buffers,
        gathered=most.gathered,
        optimizer=ceil(_ADAMW_STATES * held.trained / shards),
        buckets=held.trained if shards == 1 and job.replicas > 1 else 0,
        gradients=most.gradients,
        activations=most.others,
        all_gradients=ceil(held.trained / shards),
        kept=step.kept,
        moment=most.name,
    )


def _whole(step: Step, job: Job) -> list[_Moment]:
    trained, accumulates = step.held.trained, job.accumulate > 1
    before = 0 if job.own_loop and not accumulates else trained
    moments = [_Moment(0, before, step.forward, "forward")]
    moments += [_Moment(0, trained if accumulates else g, others, "backward") for g, others in step.backward.items()]
    return moments


def _sharded(step: Step, job: Job) -> list[_Moment]:
    held, shards = step.held, job.shards
    trained, accumulates = held.trained, job.accumulate > 1
    by_block = min(held.weights, held.outside + 2 * held.block)

    def gathered(gradients: int) -> int:
        if job.zero == 3:
            return by_block
        reduced = max(0, gradients - held.trained_outside - held.trained_block)
        freed = reduced * held.weights // trained if trained else 0
        return max(held.weights - freed, held.outside)

    def there(gradients: int) -> int:
        reduced = trained if accumulates else gradients
        return ceil(reduced / shards) + min(gradients, held.trained_outside + 2 * held.trained_block)

    before = 0 if job.own_loop and not accumulates else ceil(trained / shards)
    buffer = 0 if job.zero == 3 else min(held.block, held.weights)
    moments = [_Moment(gathered(0) + buffer, before, step.forward, "forward")]
    moments += [_Moment(gathered(g), there(g), others, "backward") for g, others in step.backward.items()]
    if step.backward:  # the root's gradients, and the buffer that they are reduced in
        left = step.backward[max(step.backward)]
        moments.append(_Moment(0, ceil(trained / shards) + 2 * held.trained_outside, left, "backward"))
    return moments
