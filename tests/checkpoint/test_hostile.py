"""Checkpoints that would run code when they are read: none of it runs, and the file and the name are in the error."""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.utils.data import DataLoader

from lightning_autotp.checkpoint import safe_load
from lightning_autotp.checkpoint.distributed import read_into
from lightning_autotp.checkpoint.manifest import Manifest
from lightning_autotp.checkpoint.safe_load import DamagedError, Reader, RefusedError
from lightning_autotp.checkpoint.tensors import open_checkpoint
from tests.helpers.checkpoints import Scheduled
from tests.helpers.small_nets import Rows, everyones, plugin_of, strategy, trainer

FIXTURES = Path(__file__).parent / "fixtures"


class Runs:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.marker),)


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def change(path: Path, edit: Callable[[Metadata], Any]) -> None:
    """Rewrite ``.metadata`` as it is after ``edit``."""
    with (path / ".metadata").open("rb") as stream:
        found = pickle.load(stream)
    edit(found)
    (path / ".metadata").write_bytes(pickle.dumps(found))


def first_shard(found: Metadata) -> tuple[Any, Any]:
    return next((index, info) for index, info in found.storage_data.items() if index.fqn == "state_dict.net.up.weight")


# ---- what makes a copy of a fixture hostile, given the directory and what to run


def rest(path: Path, code: Runs) -> None:
    held = torch.load(path / "meta.pt", weights_only=True)
    (path / "meta.pt").write_bytes(saved({**held, "callbacks": {"one": code}}))


def rest_old_pickle(path: Path, code: Runs) -> None:
    torch.save(code, path / "meta.pt", _use_new_zipfile_serialization=False)


def rest_new_pickle(path: Path, code: Runs) -> None:
    (path / "meta.pt").write_bytes(pickle.dumps(code))


def metadata(path: Path, code: Runs) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(code))


def planner_data(path: Path, code: Runs) -> None:
    change(path, lambda found: setattr(found, "planner_data", code))


def shard(path: Path, code: Runs) -> None:
    hostile = saved(code)

    def edit(found: Metadata) -> None:
        _, info = first_shard(found)
        with (path / info.relative_path).open("ab") as stream:
            info.offset, info.length = stream.tell(), len(hostile)
            stream.write(hostile)

    change(path, edit)


def value(path: Path, code: Runs) -> None:
    hostile = saved(code)

    def edit(found: Metadata) -> None:
        index, info = first_shard(found)
        found.state_dict_metadata[index.fqn] = BytesStorageMetadata()
        del found.storage_data[index]
        with (path / info.relative_path).open("ab") as stream:
            made = type(info)(info.relative_path, stream.tell(), len(hostile))
            stream.write(hostile)
        found.storage_data[type(index)(index.fqn)] = made

    change(path, edit)


def load(path: Path, **options: Any) -> Any:
    model = Scheduled()
    trainer(strategy(dist.get_world_size(), **options)).test(model, DataLoader(Rows(4)), ckpt_path=path, verbose=False)
    return model


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (rest, r"meta\.pt holds posix\.mkdir"),
        (rest_old_pickle, r"meta\.pt holds posix\.mkdir"),
        (rest_new_pickle, r"meta\.pt is truncated or damaged \(UnpicklingError: Unsupported operand 149\)"),
        (metadata, r"\.metadata names posix\.mkdir"),
        (planner_data, r"\.metadata names posix\.mkdir"),
        (shard, r"checkpoint could not be read.*posix\.mkdir"),
        (value, r"net\.up\.weight in the checkpoint holds posix\.mkdir"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.ranks(1)
def test_no_file_of_a_directory_runs_code(make: Any, named: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "checkpoint", tmp_path / "ran"
    shutil.copytree(FIXTURES / "directory-0.1.0", path)
    make(path, Runs(marker))
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){named}"):
        load(path)
    assert not marker.exists()


@pytest.mark.ranks(2)
def test_every_rank_hears_of_the_class_the_switch_and_the_way_to_allow_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    if dist.get_rank() == 0:
        shutil.copytree(FIXTURES / "directory-0.1.0", path)
        rest(path, Runs(tmp_path / "ran"))
    dist.barrier()
    with pytest.raises(RefusedError) as caught:
        load(path)
    for part in ("meta.pt", "posix.mkdir", "unsafe_checkpoint_load=True", "add_safe_globals([posix.mkdir])"):
        assert part in str(caught.value)
    assert everyones((tmp_path / "ran").exists()) == [False, False]


@pytest.mark.parametrize("form", ["zip", "pickle"])
@pytest.mark.ranks(1)
def test_no_ordinary_file_runs_code(form: str, tmp_path: Path) -> None:
    held = torch.load(FIXTURES / "file-0.1.0.pt", weights_only=True) | {"hyper_parameters": Runs(tmp_path / "ran")}
    torch.save(held, tmp_path / "one.ckpt", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(RefusedError, match=r"one\.ckpt holds posix\.mkdir.*unsafe_checkpoint_load"):
        load(tmp_path / "one.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.ranks(1)
def test_the_state_of_a_loop_of_ones_own_runs_no_code(tmp_path: Path) -> None:
    path, marker = tmp_path / "own", tmp_path / "ran"
    shutil.copytree(FIXTURES / "own-loop-0.1.0", path)
    planner_data(path, Runs(marker))
    with pytest.raises(RefusedError, match=r"posix\.mkdir"):
        Reader(path).read_metadata()
    dcp.save({"bytes": Runs(marker)}, checkpoint_id=tmp_path / "bytes")
    with pytest.raises(RuntimeError, match=r"bytes in the checkpoint holds posix\.mkdir"):
        read_into({"bytes": None}, tmp_path / "bytes")
    assert not marker.exists()


@pytest.mark.parametrize("relative", ["../elsewhere/x", "/etc/passwd", "a/../../x", "", "..\\x", "file://x"])
def test_a_path_that_leaves_the_directory_is_refused(relative: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / "directory-0.1.0", path)
    change(path, lambda found: setattr(first_shard(found)[1], "relative_path", relative))
    with pytest.raises(RefusedError, match="names a file outside of its directory"):
        Reader(path).read_metadata()


@pytest.mark.parametrize("folder", ["..", "../elsewhere", "/etc", "a/b"])
def test_a_manifest_that_leaves_the_directory_is_refused(folder: str, tmp_path: Path) -> None:
    Manifest("id", {}, folder=folder).write(tmp_path)
    with pytest.raises(DamagedError, match="it names files outside of the directory"):
        open_checkpoint(tmp_path)


@dataclass
class Setting:
    """Something that nobody but its owner can load."""

    size: int = 3


class WithSettings(Scheduled):
    def __init__(self, setting: Any = Setting(7), rate: Any = numpy.float64(0.5)) -> None:  # noqa: B008
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(1)
def test_what_a_load_refuses_is_named_when_it_is_saved_and_the_switch_loads_it(directory: bool, tmp_path: Path) -> None:
    safe_load._named.clear()
    run = trainer(strategy(1, save_distributed_checkpoint=directory))
    run.fit(WithSettings())
    with pytest.warns(UserWarning, match=r"holds .*test_hostile\.Setting, which loading refuses"):
        run.save_checkpoint(tmp_path / "first")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*which loading refuses")
        run.save_checkpoint(tmp_path / "second")  # it was said
    with pytest.raises(RefusedError, match=r"test_hostile\.Setting"):
        load(tmp_path / "second")
    model = load(tmp_path / "second", unsafe_checkpoint_load=True)
    held = plugin_of(model).load_checkpoint(tmp_path / "second")["hyper_parameters"]
    assert held == {"setting": Setting(7), "rate": 0.5} and type(held["rate"]) is float


def test_the_restricted_reader_knows_all_that_dcp_writes() -> None:
    found = Reader(FIXTURES / "directory-0.1.0").read_metadata()
    with (FIXTURES / "directory-0.1.0" / ".metadata").open("rb") as stream:
        want = pickle.load(stream)
    assert found.state_dict_metadata == want.state_dict_metadata and found.storage_data == want.storage_data
