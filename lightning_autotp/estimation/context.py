"""Context parallelism: what a rank does that has a part of a sequence's tokens, and all of them in attention.

Everything but attention works on each token by itself, so a rank of c does with b sequences what it would do with
b / c of them. In attention it has all tokens of a c-th of its heads, which is the same work and as many bytes: before
it the query, key and value are exchanged (all-to-all), and after it the output; and again for their gradients in the
backward pass, and where attention is computed twice. Key heads that are fewer than c are sent to several ranks, whose
copies are kept for the backward pass.

Source: Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from lightning_autotp.distributed.recording import Collective
from lightning_autotp.estimation.step import Step
from lightning_autotp.estimation.trace import Attention


def copies(kernel: Attention, cp: int) -> int:
    """How many ranks get the same key heads.

    Raises:
        ValueError: if heads cannot be shared by so many ranks.
    """
    if kernel.heads % cp:
        raise ValueError(f"cp: {cp} ranks cannot share {kernel.heads} query heads; give a number that divides them.")
    if kernel.key_heads % cp == 0:
        return 1
    if cp % kernel.key_heads:
        raise ValueError(f"cp: {cp} ranks cannot share {kernel.key_heads} key heads; give a multiple or a divisor.")
    return cp // kernel.key_heads


def in_context(step: Step, cp: int, *, checkpointing: bool) -> Step:
    """A context parallel rank's step, of ``step`` with a ``cp``-th of its sequences.

    Raises:
        ValueError: if heads cannot be shared, or there is no attention kernel that is known.
    """
    if cp == 1:
        return step
    if not step.attention:
        raise ValueError(
            "cp: no attention of this model goes through scaled_dot_product_attention, so its heads cannot be"
            " exchanged; leave it out."
        )
    several = {kernel: copies(kernel, cp) * (kernel.key + kernel.value) for kernel in step.attention}
    added = {kernel: several[kernel] - kernel.key - kernel.value for kernel in several}
    if checkpointing:
        kept = max(added.values())
    else:
        kept = sum(added[kernel] * count for kernel, count in step.attention.items())
    more = kept + max(kernel.query + size for kernel, size in several.items())  # what is sent, beside what comes
    return replace(
        step,
        forward=step.forward + more,
        kept=step.kept + kept,
        backward={gradients: others + more for gradients, others in step.backward.items()},
    )


def exchanges(attention: Iterable[tuple[Attention, int]], cp: int, *, checkpointing: bool) -> Counter[Collective]:
    """The all-to-alls of a batch; the size is of a rank's own tensor."""
    found: Counter[Collective] = Counter()
    passes = 3 if checkpointing else 2
    for kernel, count in attention:
        times = copies(kernel, cp)
        for size in (kernel.query, times * kernel.key, times * kernel.value, kernel.output):
            found[Collective("all-to-all", cp, size)] += passes * count
    return found
