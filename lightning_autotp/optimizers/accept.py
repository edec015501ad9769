"""What is done about an optimizer of a sharded model: nothing if it is elementwise, else owners of whole tensors."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_autotp.distributed.dp_shards import is_dp_sharded
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout
from lightning_autotp.optimizers.samples import Kind
from lightning_autotp.optimizers.trial import Sees, Verdict, tried
from lightning_autotp.optimizers.whole import WholeSteps, whole_steps

_known: "weakref.WeakKeyDictionary[type, dict[str, Verdict]]" = weakref.WeakKeyDictionary()


def accept_optimizers(
    optimizers: Iterable[Any],
    layouts: Mapping[nn.Parameter, Layout],
    mesh: Mesh,
    complete: Callable[[], None],
    *,
    closures: bool = True,
) -> None:
    """Let optimizers step as unsharded; every process must call it, and it may be called again.

    Args:
        optimizers: the optimizers, which stay the same objects.
        layouts: how the model's parameters lie.
        mesh: this process's place.
        complete: makes the gradients those of the unsharded model, if they are not yet.
        closures: whether steps get a closure that computes the loss and the gradients again.

    Raises:
        ValueError: on all processes alike, if one can neither step parts nor whole tensors; with the reason.
    """
    if mesh.tp_size == 1 and not any(map(is_dp_sharded, layouts)):
        return
    for optimizer in optimizers:
        found = whole_steps(optimizer)
        if found is None or found.layouts is not layouts:
            if found is not None:
                found.layouts, found._complete = layouts, complete
            else:
                found = WholeSteps(optimizer, layouts, mesh, complete, partial(_look, optimizer))
        _look(optimizer)
        if found.verdict.needs_closure and not closures:
            raise ValueError(
                f"{type(optimizer).__name__} evaluates the loss within its step, for which it needs a closure that this"
                " loop does not give. Train with a Trainer and `AutoTPStrategy`, or use another optimizer."
            )


def _look(optimizer: Any) -> None:
    steps = whole_steps(optimizer)
    assert steps is not None
    layouts, mesh = steps.layouts, steps.mesh
    kinds = [_kinds(group, layouts) for group in optimizer.param_groups]
    if not any(kind.sharded for group in kinds for kind in group):
        steps.own(Verdict(tuple(Sees.ELEMENT for _ in kinds)))
        return
    # only one tries: a trial ends after some time, and all must do the same
    verdict = _verdict(optimizer, kinds, steps) if mesh.collectives.world_rank == 0 else None
    verdict = mesh.collectives.broadcast_object(verdict, "world")
    name = type(optimizer).__name__
    if any(map(is_dp_sharded, layouts)) and (verdict.wrong or set(verdict.sees) != {Sees.ELEMENT}):
        raise ValueError(
            f"{name} looks at more than single elements, and with zero_stage each rank holds rows of a parameter only."
            " Use zero_stage=0, with which the rank that owns a parameter steps all of it, or an elementwise optimizer"
            " such as AdamW."
        )
    if verdict.wrong:
        raise ValueError(
            f"{name} is refused with tensor parallelism: {verdict.wrong}. Use another optimizer, such as AdamW, for the"
            " parameters that are sharded."
        )
    if not steps.owned:
        _tell(name, verdict)
    steps.own(verdict)


def _tell(name: str, verdict: Verdict) -> None:
    if Sees.EVERYTHING in verdict.sees:
        rank_zero_warn(
            f"{name} looks at all parameters at once (or draws random numbers): every tensor parallel rank steps the"
            " whole model and holds the optimizer's whole state, as an unsharded run does. An elementwise optimizer"
            " needs a part of that memory."
        )
    elif Sees.TENSOR in verdict.sees:
        rank_zero_info(
            f"lightning_autotp: {name} looks at whole tensors; each sharded one is stepped by the rank that owns it."
        )


def _kinds(group: Mapping[str, Any], layouts: Mapping[nn.Parameter, Layout]) -> list[Kind]:
    found: dict[str, Kind] = {}
    for place, p in enumerate(group["params"]):
        sharded = not layouts[p].is_replicated or is_dp_sharded(p)
        attributes = tuple((k, v) for k, v in vars(p).items() if isinstance(v, (bool, int, float, str)))
        kind = Kind(place, p.ndim, p.dtype, p.device, sharded, attributes)
        known = found.setdefault(repr((p.ndim, p.dtype, p.device, attributes)), kind)
        if sharded and not known.sharded:
            found[repr((p.ndim, p.dtype, p.device, attributes))] = kind
    return list(found.values())[:6]


def _verdict(optimizer: Any, kinds: list[list[Kind]], steps: WholeSteps) -> Verdict:
    if steps.verdict.sees:  # it has new param groups; what it has learned of the old ones lies where they are owned
        verdict = tried(optimizer, kinds, with_state=False)
        return verdict if not verdict.wrong else tried(optimizer, kinds)
    options = [{k: _shown(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    own = {k: _shown(v) for k, v in vars(optimizer).items() if not k.startswith("_") and k != "param_groups"}
    key = repr((options, own, [[(k.ndim, k.dtype, k.device, k.sharded, k.attributes) for k in g] for g in kinds]))
    verdicts = _known.setdefault(type(optimizer), {})
    if key not in verdicts:
        verdicts[key] = tried(optimizer, kinds)
    return verdicts[key]


def _shown(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else tuple(value.shape)
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_shown(entry) for entry in value][:16]
    return str(type(value))
