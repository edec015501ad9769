"""What would a layout cost? Memory, communication and time of a training step, without weights and without GPUs.

One step of one rank runs with the package's own code, sharded by its own plan, on tensors that have shapes and no
memory and between processes that are pretended (:mod:`~lightning_autotp.estimation.step`); a tracker sees what it
allocates, computes and sends. Data and context parallelism, ZeRO and times are arithmetic on that
(:mod:`~lightning_autotp.estimation.cost`). :mod:`~lightning_autotp.estimation.search` finds the best layout: few
blocks and small batches are traced, the rest is continued (:mod:`~lightning_autotp.estimation.extrapolate`).
``lightning-autotp estimate`` is :mod:`~lightning_autotp.cli.estimate`; docs/estimate.md has the arithmetic.

GPU memory as ``torch.cuda.max_memory_allocated`` has it, in GiB, on H200s (tests/benchmarks/README.md: Llama-3-8B's
layers x 8, vocabulary 128256, 1 x 4096 tokens, bf16, TP=2) and as estimated, without a GPU:

==================================================  ========  =========
run                                                 measured  estimated
==================================================  ========  =========
one GPU                                                 27.8       27.7
TP=2                                                    17.9       17.9
TP=2, loss_parallel                                     13.2       13.1
TP=2, sequence_parallel, loss_parallel                  12.4       12.4
TP=2, in ``Trainer.fit``                                19.6       19.5
TP=2, both, 4 x 4096 tokens                             25.6       25.6
the same, hidden 2048, 16 layers, vocabulary 32000      26.4       26.4
the same, Mixtral, 4 layers, vocabulary 32000           31.2       31.0
==================================================  ========  =========
"""

from lightning_autotp.estimation.cost import Estimate, estimate
from lightning_autotp.estimation.hardware import Machine
from lightning_autotp.estimation.job import Job
from lightning_autotp.estimation.search import Choice, Found, search
from lightning_autotp.estimation.wanted import Wanted

__all__ = ["Choice", "Estimate", "Found", "Job", "Machine", "Wanted", "estimate", "search"]
