"""The files of a DeepSpeed checkpoint, read without DeepSpeed and without running what is in them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.serialization import safe_globals

from lightning_autotp.checkpoint.foreign.names import listed
from lightning_autotp.checkpoint.places import AnyPath
from lightning_autotp.checkpoint.safe_load import DamagedError, load_plain

LATEST, UNIVERSAL, ZERO = "latest", "latest_universal", "zero"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_UNKNOWN = re.compile(r"layer_.*\.pt|.*expert.*\.pt")


class StandIn:
    """Holds what a class of DeepSpeed's would; nothing of DeepSpeed is imported and nothing is run."""

    def __init__(self, *args: Any) -> None:
        self.args = args


_HARMLESS: list[Any] = [
    (StandIn, name)
    for name in (
        "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    )
]
"""What its own files hold beside tensors and plain containers."""


@dataclass(frozen=True)
class Files:
    """The files of one save.

    Args:
        folder: where they are.
        models: those with the model, by (tensor parallel rank, data parallel rank); the latter is 0 below ZeRO 3.
        optimizers: those with ZeRO's parts of optimizers, likewise.
    """

    folder: AnyPath
    models: Mapping[tuple[int, int], AnyPath]
    optimizers: Mapping[tuple[int, int], AnyPath]

    @property
    def tp_size(self) -> int:
        """How many ranks share a model."""
        return 1 + max(tp for tp, _ in self.models)

    @property
    def dp_size(self) -> int:
        """Among how many replicas the optimizer's state is cut."""
        return 1 + max((dp for _, dp in self.optimizers), default=0)


def is_deepspeed(path: AnyPath) -> bool:
    """Whether ``path`` is a directory of DeepSpeed's: with the name of the latest save in it, or of one save."""
    if any((path / name).is_file() for name in (LATEST, UNIVERSAL)):
        return True
    return any(_MODEL.fullmatch(entry.name) for entry in path.iterdir())


def files_of(path: AnyPath) -> Files:
    """The files of ``path``, or of the latest save in it, a universal one before others.

    Raises:
        FileNotFoundError: if some are missing.
        ValueError: if there are files of a kind that is not known here.
    """
    folder = path
    for name in (LATEST, UNIVERSAL):
        if (path / name).is_file():
            folder = path / _inside((path / name).read_bytes().decode(errors="replace").strip(), path / name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it lacks the directory `{folder.name}`.")
    names = sorted(entry.name for entry in folder.iterdir())
    models = {(int(m[2]), int(m[1] or 0)): folder / m[0] for m in map(_MODEL.fullmatch, names) if m}
    optimizers = {(int(m[2]), int(m[1])): folder / m[0] for m in map(_OPTIMIZER.fullmatch, names) if m}
    unknown = [name for name in names if _UNKNOWN.fullmatch(name) and not _OPTIMIZER.fullmatch(name)]
    if unknown:
        raise ValueError(
            f"{folder} holds files of DeepSpeed's pipelines or experts, {listed(unknown)}, which are not read here."
        )
    found = Files(folder, models, optimizers)
    _require_all(found)
    return found


def _require_all(found: Files) -> None:
    for kind, there in (("model", found.models), ("optim", found.optimizers)):
        dps = 1 + max((dp for _, dp in there), default=-1)
        lacking = [(tp, dp) for tp in range(found.tp_size if found.models else 0) for dp in range(dps)]
        lacking = [pair for pair in lacking if pair not in there]
        if lacking or (kind == "model" and not there):
            tp, dp = lacking[0] if lacking else (0, 0)
            raise FileNotFoundError(
                f"{found.folder} is not a complete checkpoint: it lacks the `*{kind}_states.pt` of mp_rank {tp:02d}"
                + (f", zero_pp_rank {dp}." if dps > 1 else ".")
            )


def _inside(name: str, file: AnyPath) -> str:
    if not name or Path(name).name != name or name in (".", ".."):
        raise ValueError(f"{file} names {name!r}, which is no directory beside it; nothing was read.")
    return name


def load(file: AnyPath, unsafe: bool) -> Any:
    """What is in a file, tensors mapped where it is one of this machine's.

    Raises:
        ValueError: if it is damaged or could run code.
    """
    with safe_globals(_HARMLESS):
        if not isinstance(file, Path):
            with file.open("rb") as stream:
                return load_plain(stream, unsafe=unsafe, where=str(file))
        if file.is_symlink() and file.parent.resolve() not in file.resolve().parents:
            raise ValueError(f"{file} is a link to a file outside of its directory; nothing was read.")
        return load_plain(file, unsafe=unsafe, mmap=True)


def load_dict(file: AnyPath, unsafe: bool, *needed: str) -> dict[str, Any]:
    """What is in a file that must hold ``needed``.

    Raises:
        ValueError: if it is damaged or could run code.
    """
    held = load(file, unsafe)
    if not isinstance(held, dict) or any(name not in held for name in needed):
        raise DamagedError(f"{file} is no such file of DeepSpeed's: it does not hold {', '.join(needed)}.")
    return held
