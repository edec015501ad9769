"""What cannot be exact, or cannot work at all, around a sharded model: refused at setup, each with a sentence."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim import Optimizer

from lightning_autotp.layout import Layout

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


def refuse_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that copied the model before it was sharded.

    Raises:
        ValueError: with the callback's name.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise ValueError(
                f"{type(callback).__name__} keeps a copy of the model from before it was sharded, which does not fit"
                " its parts; it does not work with tensor parallelism."
            )


def refuse_for_ddp(module: LightningModule, options: Mapping[str, Any]) -> None:
    """Refuse what torch's DDP cannot do, before it says so in its own terms.

    Raises:
        ValueError: naming what to change.
    """
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train.")
    if options.get("static_graph") and module.trainer.accumulate_grad_batches > 1:
        raise ValueError("static_graph: it does not go with gradient accumulation in torch's DDP; leave it out.")


def explain_ddp_error(exception: BaseException, module: nn.Module) -> None:
    """Add to an error of DDP's what it means here."""
    if "finished reduction in the prior iteration" in str(exception):
        unused = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
        sentence = (
            f"These parameters took no part in the loss of the last step: {', '.join(unused) or 'unknown'}. Freeze"
            " them, or set AutoTPStrategy(find_unused_parameters=True)."
        )
    elif "ready only once" in str(exception):
        sentence = (
            "find_unused_parameters does not go with reentrant activation checkpointing: use `use_reentrant=False`, or"
            " leave find_unused_parameters out."
        )
    else:
        return
    exception.args = (f"{exception.args[0] if exception.args else ''}\n{sentence}", *exception.args[1:])
