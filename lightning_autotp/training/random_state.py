"""Randomness of ranks that share a model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_autotp.compat import AnyDropout, collect_random_state, set_random_state
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.randomness.places import Item, shown
from lightning_autotp.randomness.sites import Key


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put the states of all random number generators back afterwards."""
    before = collect_random_state(include_cuda=torch.cuda.is_initialized())
    try:
        yield
    finally:
        set_random_state(before)


def share_random_state(mesh: Mesh, device: torch.device) -> None:
    """Ranks that see the same batches draw the same numbers from here on: dropout in whole layers must be alike."""
    cuda = device.type == "cuda"
    mine = collect_random_state(include_cuda=False), torch.cuda.get_rng_state(device) if cuda else None
    shared, shared_cuda = mesh.collectives.broadcast_object(mine, "batch")
    set_random_state(shared)
    if cuda:
        torch.cuda.set_rng_state(shared_cuda, device)


def warn_of_dropout(model: nn.Module, plan: ShardingPlan, *, compiled: bool = False) -> None:
    """Warn of active dropout between a column and a row cut, where it is not known what ranks hold of what is drawn."""
    cut = [e for e in plan.parameters.values() if e.kind in ("row", "column") and not e.gather_output]
    around = {e.module.rpartition(".")[0] for e in cut}
    active = [path for path in sorted(around) if path and _drops(model.get_submodule(path))]
    if active:
        others = " and others" if len(active) > 1 else ""
        why = "compiled code draws by itself" if compiled else "the step was not proved"
        fix = "Set it to 0 for exact numbers." if compiled else "Set it to 0, or see to that the step is proved."
        rank_zero_warn(
            f"dropout is active inside cut layers ({active[0]}{others}), and {why}: the ranks draw one random stream,"
            f" so what they drop is correlated and differs from the unsharded model's. {fix}"
        )


def warn_of_dropout_in_blocks(model: nn.Module, blocks: Iterable[str]) -> None:
    """Warn of active dropout in blocks whose tokens are split over context parallel ranks."""
    inside = (name for path in blocks for name, _ in model.get_submodule(path).named_modules(prefix=path))
    active = next((name for name in inside if _drops(model.get_submodule(name))), None)
    if active is not None:
        rank_zero_warn(
            f"dropout is active in blocks ({active}), where context parallel ranks draw random numbers of their own,"
            " and not those of the unsharded model; tensor parallel ranks drop alike. Set it to 0 for exact numbers."
        )


def warn_of_draw(place: Key, why: str) -> None:
    """Tell that the ranks draw random numbers of their own in a place, and not the unsharded model's."""
    where = shown(tuple(item for item in place if isinstance(item, Item)))
    rank_zero_warn(
        f"{place[0]} in {where} draws numbers of each rank's own, and not those of the unsharded model: {why}."
    )


def _drops(module: nn.Module) -> bool:
    names = ("attention_dropout", "attn_dropout", "dropout", "dropout_p")
    rates = [getattr(module, name, 0) for name in names]
    rates += [m.p for m in module.modules() if isinstance(m, AnyDropout)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
