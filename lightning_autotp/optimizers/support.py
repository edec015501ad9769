"""What cannot be exact, or cannot work at all, around a sharded model: refused at setup, each with a sentence."""

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from lightning_autotp.layout.layout import Layout

_WHOLE_TENSOR_OPTIMIZERS = ("LBFGS", "Adafactor", "Muon", "Shampoo", "SOAP", "Lamb", "LAMB", "LARS")
"""Optimizers whose update of one element depends on others of the same tensor, of which a rank sees only a part."""


def refuse_optimizers(optimizers: Iterable[Optimizer], layouts: Mapping[nn.Parameter, Layout]) -> None:
    """Refuse optimizers that are not elementwise, where they hold a cut parameter.

    Raises:
        ValueError: with the optimizer's name.
    """
    for optimizer in optimizers:
        names = {kind.__name__ for kind in type(optimizer).__mro__}
        if not names & set(_WHOLE_TENSOR_OPTIMIZERS):
            continue
        held = (p for group in optimizer.param_groups for p in group["params"])
        if any(p in layouts and not layouts[p].is_replicated for p in held):
            raise ValueError(
                f"{type(optimizer).__name__} looks at whole tensors, and with tensor parallelism a rank has only parts"
                " of them: its updates would not be the unsharded run's. Use an elementwise optimizer, such as AdamW,"
                " for the parameters that are cut."
            )
