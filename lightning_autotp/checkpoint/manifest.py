"""What a checkpoint directory says of itself (``autotp.json``): its files, their sizes and checksums, who wrote it."""

import json
import platform
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

from torch.distributed.checkpoint.metadata import Metadata

from lightning_autotp.checkpoint.checksums import Checksum, PlainChecksum
from lightning_autotp.checkpoint.places import AnyPath
from lightning_autotp.checkpoint.publish import synchronize
from lightning_autotp.checkpoint.safe_load import DamagedError, load_plain

NAME = "autotp.json"
METADATA, REST = ".metadata", "meta.pt"
"""The file of DCP's; and that for what is not a tensor of the model or an optimizer, by Lightning's name for it."""

SAVE_ID = "autotp_save_id"
"""An entry of the file with the rest: a directory that has it has a manifest, too."""

FOLDER = "autotp-"
"""How the folders begin in which files lie where nothing can be renamed."""

_FORMAT = 2
_CHECKSUM = {1: "crc32", _FORMAT: "checksum"}
"""What a manifest calls the checksums of files, by its format: 1 has those of all bytes."""
_SEAL = b"autotp-save:"
_SEALED = len(_SEAL) + 32
_FIX = "Load another checkpoint, or copy this one again from where it was complete."


@dataclass(frozen=True)
class Written:
    """A file as it was written: its length, and its :class:`~lightning_autotp.checkpoint.checksums.Checksum`."""

    size: int
    checksum: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint directory says of itself.

    Args:
        save_id: the name of the save, which is at the end of each shard, too.
        files: all files but this one, by name.
        written_by: versions, sizes and time.
        models: what :mod:`~lightning_autotp.checkpoint.hf_record` says of the Hugging Face models in it.
        folder: where in the directory the files are; empty for the directory itself. Where nothing can be renamed, each
            save has a folder of its own, and is there once this says so.
        format: which checksums ``files`` has.
    """

    save_id: str
    files: Mapping[str, Written]
    written_by: Mapping[str, Any] = field(default_factory=dict)
    models: Sequence[Mapping[str, Any]] = ()
    folder: str = ""
    format: int = _FORMAT

    def write(self, directory: AnyPath) -> None:
        """Write it, synchronized."""
        said: dict[str, Any] = {
            "format": _FORMAT,
            "save_id": self.save_id,
            "written_by": dict(self.written_by),
            "files": {name: vars(written) for name, written in sorted(self.files.items())},
            "models": list(self.models),
            **({"folder": self.folder} if self.folder else {}),
        }
        said["crc32"] = _crc_of(said)
        path = directory / NAME
        path.write_text(json.dumps(said, indent=1))
        if isinstance(path, Path):
            synchronize(path)

    @classmethod
    def read(cls, directory: AnyPath) -> "Optional[Manifest]":
        """Read it; None where there is none, as in checkpoints of version 0.1.0.

        Raises:
            DamagedError: if it is not what was written.
        """
        path = directory / NAME
        if not path.is_file():
            return None
        try:
            said = json.loads(path.read_bytes())
            crc = said.pop("crc32")
            if crc != _crc_of(said):
                raise ValueError("its checksum is another")
            if said["format"] not in _CHECKSUM:
                raise ValueError(f"its format is {said['format']}, and this version knows those up to {_FORMAT}")
            checksum = _CHECKSUM[said["format"]]
            files = {name: Written(written["size"], written[checksum]) for name, written in said["files"].items()}
            folder = said.get("folder", "")
            if any(Path(name).name != name or name == ".." for name in [*files, folder]):
                raise ValueError("it names files outside of the directory")
            return cls(said["save_id"], files, said["written_by"], said["models"], folder, said["format"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{directory}: {NAME} is damaged ({error}). {_FIX}") from error

    def check(self, directory: AnyPath) -> None:
        """Compare sizes and save ids of all files, and the checksums of the small ones.

        Raises:
            FileNotFoundError: if a file is missing.
            DamagedError: if one has another size, is of another save, or has other bytes.
        """
        for name, written in self.files.items():
            path = directory / name
            if not path.is_file():
                raise FileNotFoundError(f"{directory} is not a complete checkpoint: it lacks `{name}`. {_FIX}")
            size = path.stat().st_size
            if size != written.size:
                raise DamagedError(
                    f"{directory}: {name} has {size} bytes, and {written.size} were written: it is truncated, or of"
                    f" another save. {_FIX}"
                )
            if name in (METADATA, REST):
                self.check_bytes(directory, [name])
            elif seal_of(path) != self.save_id:
                raise DamagedError(
                    f"{directory}: {name} is of another save than {NAME}: the files of two checkpoints are mixed."
                    f" {_FIX}"
                )

    def check_bytes(self, directory: AnyPath, names: Iterable[str]) -> None:
        """Compare the checksums of some files.

        Raises:
            DamagedError: if one has other bytes than were written.
        """
        for name in names:
            if finished(directory / name, self.format) != self.files[name]:
                raise DamagedError(
                    f"{directory}: {name} does not have the bytes that were written: it is damaged, or of another save."
                    f" {_FIX}"
                )


def contents_of(path: AnyPath) -> tuple[AnyPath, Optional[Manifest]]:
    """Where the files of a checkpoint directory are, and what it says of itself.

    Raises:
        FileNotFoundError: if it is none, or not complete.
        DamagedError: if its manifest is not what was written.
    """
    found = Manifest.read(path)
    inside = path / found.folder if found is not None and found.folder else path
    for name in (METADATA, REST):
        if not (inside / name).is_file():
            raise FileNotFoundError(f"{path} is not a complete checkpoint: it lacks `{name}`. {_FIX}")
    return inside, found


def rest_of(inside: AnyPath, found: Optional[Manifest], unsafe: bool) -> dict[str, Any]:
    """What is no tensor of the model or an optimizer, with the save's id.

    Raises:
        FileNotFoundError: if the save had a manifest and there is none.
        DamagedError: if the file cannot be read.
        RefusedError: if it could run code.
    """
    file = inside / REST
    with file.open("rb") as stream:
        rest: dict[str, Any] = load_plain(stream, unsafe=unsafe, where=str(file))
    if found is None and SAVE_ID in rest:
        raise FileNotFoundError(f"{inside} is not a complete checkpoint: it lacks `{NAME}`. {_FIX}")
    return rest


def seal_for(save_id: str) -> bytes:
    """What stands behind what DCP reads of a shard."""
    return _SEAL + save_id.encode()


def seal_of(path: AnyPath) -> str:
    """The id of the save that a shard belongs to; empty if it has none."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _SEALED))
        end = stream.read()
    return end[len(_SEAL) :].decode(errors="replace") if end.startswith(_SEAL) else ""


def finished(path: AnyPath, format_: int = _FORMAT) -> Written:
    """The size and checksum of a file that is complete, as manifests of this format have it."""
    checksum = Checksum() if format_ == _FORMAT else PlainChecksum()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            checksum.update(block)
    return Written(checksum.size, checksum.value())


def check_file(path: AnyPath) -> None:
    """Compare the bytes of an ordinary file with the checksums that ``torch.save`` put in it.

    Raises:
        DamagedError: if they are others; files in torch's older format have none.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(2) != b"PK":
                return
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            wrong = archive.testzip()
    except zipfile.BadZipFile as error:
        raise DamagedError(f"{path} is truncated or damaged ({error}). {_FIX}") from error
    if wrong is not None:
        raise DamagedError(f"{path} does not have the bytes that were written, in {wrong}. {_FIX}")


def check_lengths(directory: AnyPath, metadata: Metadata) -> None:
    """Require the shards of a directory without a manifest to be there, and as long as ``metadata`` needs them.

    Raises:
        FileNotFoundError: if one is missing.
        DamagedError: if one is too short.
    """
    needed: dict[str, int] = {}
    for info in metadata.storage_data.values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in sorted(needed.items()):
        path = directory / name
        if not path.is_file():
            raise FileNotFoundError(f"{directory} is not a complete checkpoint: it lacks `{name}`. {_FIX}")
        if path.stat().st_size < size:
            raise DamagedError(
                f"{directory}: {name} has {path.stat().st_size} bytes, and at least {size} were written: it is"
                f" truncated. {_FIX}"
            )


def writer(**more: Any) -> dict[str, Any]:
    """Who writes, and when."""
    versions = {}
    for package in ("lightning-autotp", "torch", "lightning", "transformers", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**versions, "python": platform.python_version(), **more, "at": now}


def _crc_of(said: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())
