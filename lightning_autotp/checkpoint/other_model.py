"""Saying that a checkpoint is of another model, where that is what is wrong with it."""

from collections.abc import Mapping
from typing import Optional

from torch import nn

from lightning_autotp.checkpoint.foreign.names import listed
from lightning_autotp.checkpoint.tensors import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]


class OtherModelError(RuntimeError):
    """A checkpoint is of another model than the one that is to be loaded."""


def other_model(found: Checkpoint, theirs: Shapes, ours: Shapes, model: str) -> Optional[OtherModelError]:
    """The error that says so, None where most of what either has fits the other.

    Args:
        found: the checkpoint.
        theirs: full shapes by name, in the checkpoint.
        ours: likewise in this run's model.
        model: the class of this run's model.
    """
    fitting = [name for name, shape in theirs.items() if ours.get(name) == shape]
    if 2 * len(fitting) >= max(len(theirs), len(ours)):
        return None
    unknown, lacking = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    reshaped = [
        f"{name} {list(theirs[name])} instead of {list(ours[name])}"
        for name in sorted(theirs.keys() & ours.keys())
        if theirs[name] != ours[name]
    ]
    groups = {
        "in it and not in this model": unknown,
        "in this model and not in it": lacking,
        "of another shape": reshaped,
    }
    said = "; ".join(f"{len(names)} are {what}: {listed(names)}" for what, names in groups.items() if names)
    return OtherModelError(
        f"{found.path} is a checkpoint of another model: of its {len(theirs)} tensors {len(fitting)} fit the"
        f" {len(ours)} of {model}. {said}. {_writer(found)} Load a checkpoint of this model, or build the model that"
        " this one is of."
    )


def class_name(module: nn.Module) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _writer(found: Checkpoint) -> str:
    """A sentence on who wrote it, as far as it says so."""
    if found.manifest is not None:
        said = found.manifest.written_by
        return (
            f"It was written by a run of {said.get('module') or 'a class that it does not name'} at {said.get('at')}."
        )
    return f"It was written by {found.writer or 'Lightning ' + str(found.rest.get('pytorch-lightning_version'))}."
