"""A checkpoint is whole or it is not there: damaged files are named, dead and failed saves leave what was there."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from lightning_autotp.checkpoint import publish, saving, shard_files
from lightning_autotp.checkpoint.checksums import Checksum
from lightning_autotp.checkpoint.manifest import Manifest
from lightning_autotp.checkpoint.publish import beside, exchange, put_in_place, remove_leftovers, write_in_place
from lightning_autotp.checkpoint.tensors import open_checkpoint
from tests.helpers.checkpoints import Scheduled, trained
from tests.helpers.rank_pool import RankFailure, run_ranks
from tests.helpers.small_nets import everyones, plugin_of, strategy, trainer

FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "autotp.json", "meta.pt"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = len(data) // 3
    # in what an entry holds, and not in the padding between two; a .distcp file is zip files one after the other
    if path.suffix != ".distcp" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as held:
            largest = max(held.infolist(), key=lambda entry: entry.file_size)
            with held.open(largest) as entry:
                content = entry.read()
        at = data.index(content) + len(content) // 3
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.ranks(2, timeout=120)
def test_every_damage_to_every_file_is_named_on_every_rank(tmp_path: Path) -> None:
    """Each file missing, cut, with a flipped bit, and of another save."""
    model = Scheduled()
    run = trainer(strategy(2))
    run.fit(model)
    run.save_checkpoint(tmp_path / "good")
    run.save_checkpoint(tmp_path / "other")
    plugin = plugin_of(model)
    assert sorted(file.name for file in (tmp_path / "good").iterdir()) == FILES
    changes: dict[str, Callable[[Path], Any]] = {
        "missing": Path.unlink,
        "cut": cut,
        "flipped": flip,
        "mixed": lambda path: shutil.copy(tmp_path / "other" / path.name, path),
    }
    for change, apply in changes.items():
        for name in FILES:
            path = tmp_path / f"{change}{name}"
            if dist.get_rank() == 0:
                shutil.copytree(tmp_path / "good", path)
                apply(path / name)
            dist.barrier()
            plugin.config.verify_checksums = change == "flipped"
            with pytest.raises((ValueError, OSError, RuntimeError)) as caught:  # the last where another rank found it
                plugin.load_checkpoint(path)
            errors = [str(caught.value)]
            if dist.get_rank() == 0:  # without processes, as `inspect` and `export` read it
                with pytest.raises((ValueError, OSError)) as alone:
                    open_checkpoint(path, all_bytes=change == "flipped")
                errors.append(str(alone.value))
            for said in errors:
                assert str(path) in said, (change, name, said)
                # of another save's manifest, the first file that is not of that save is named
                assert name in said or (change, name) == ("mixed", "autotp.json"), (change, name, said)
                if change == "mixed":
                    assert "of another save" in said, (change, name, said)
                assert "oad another checkpoint, or copy this one again" in said, (change, name, said)
    plugin.config.verify_checksums = True
    assert plugin.load_checkpoint(tmp_path / "good")["global_step"] == 4


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink])
@pytest.mark.ranks(2)
def test_damage_to_an_ordinary_file_is_named_on_every_rank(damage: Any, tmp_path: Path) -> None:
    model = Scheduled()
    run = trainer(strategy(2, save_distributed_checkpoint=False, verify_checksums=True))
    run.fit(model)
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert plugin_of(model).load_checkpoint(tmp_path / "one.ckpt")["global_step"] == 4
    dist.barrier()
    if dist.get_rank() == 0:
        damage(tmp_path / "one.ckpt")
    dist.barrier()
    wanted = rf"{tmp_path}/one\.ckpt( is truncated| does not have the bytes|\Z|\.)"
    with pytest.raises((ValueError, OSError, RuntimeError), match=wanted) as caught:
        plugin_of(model).load_checkpoint(tmp_path / "one.ckpt")
    fix = "no checkpoint at" if damage is Path.unlink else "oad another checkpoint, or copy"
    assert fix in str(caught.value)
    assert len(set(everyones(str(caught.value).removeprefix("rank 0 failed: DamagedError: ")))) == 1


@pytest.mark.ranks(2)
def test_a_checkpoint_says_who_wrote_it_and_what(tmp_path: Path) -> None:
    trained(2, 1, save=tmp_path / "checkpoint")
    found = Manifest.read(tmp_path / "checkpoint")
    assert found is not None
    assert sorted([*found.files, "autotp.json"]) == FILES
    assert all((tmp_path / "checkpoint" / name).stat().st_size == file.size for name, file in found.files.items())
    assert found.written_by["processes"] == found.written_by["autotp_size"] == 2
    assert found.written_by["torch"] == torch.__version__
    assert json.loads((tmp_path / "checkpoint" / "autotp.json").read_text())["models"] == []


@pytest.mark.ranks(2)
def test_shards_on_a_disk_of_one_node_are_an_error_on_all_ranks(tmp_path: Path, monkeypatch: Any) -> None:
    trained(2, 1, save=tmp_path / "shared" / "checkpoint")
    before = everyones((tmp_path / "shared" / "checkpoint" / "autotp.json").read_text())[0]
    model, run = Scheduled(), trainer(strategy(2))
    run.fit(model)
    if dist.get_rank() == 1:  # the same path, on another disk
        own, writer = tmp_path / "other-node", saving.ShardWriter
        monkeypatch.setattr(saving, "ShardWriter", lambda made, save_id: writer(own, save_id))
    with pytest.raises(RuntimeError, match=r"rank 0 does not see `__1_0\.distcp` of rank 1.*disk of one node"):
        run.save_checkpoint(tmp_path / "shared" / "checkpoint")
    assert [entry.name for entry in (tmp_path / "shared").iterdir()] == ["checkpoint"]
    assert (tmp_path / "shared" / "checkpoint" / "autotp.json").read_text() == before


class Full(OSError):
    pass


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.ranks(2)
def test_a_full_disk_leaves_the_last_checkpoint_and_frees_what_was_written(
    directory: bool, rank: int, tmp_path: Path, monkeypatch: Any
) -> None:
    model, run = Scheduled(), trainer(strategy(2, save_distributed_checkpoint=directory))
    run.fit(model)
    run.save_checkpoint(tmp_path / "checkpoint")
    step = plugin_of(model).load_checkpoint(tmp_path / "checkpoint")["global_step"]
    dist.barrier()
    if not directory and rank == 1:
        rank = 0  # the first rank writes the file
    if dist.get_rank() == rank:

        def full(*_: Any, **__: Any) -> None:
            raise Full(28, "No space left on device")

        monkeypatch.setattr(*((shard_files._Sealing, "seal") if directory else (os, "fsync")), full)
    with pytest.raises((Full, RuntimeError), match="No space left"):
        run.save_checkpoint(tmp_path / "checkpoint")
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
    assert plugin_of(model).load_checkpoint(tmp_path / "checkpoint")["global_step"] == step


@pytest.mark.ranks(2)
def test_a_writer_that_fails_in_dcp_is_an_ordinary_error_that_names_the_rank(tmp_path: Path, monkeypatch: Any) -> None:
    model, run = Scheduled(), trainer(strategy(2))
    run.fit(model)
    if dist.get_rank() == 1:

        def full(*_: Any, **__: Any) -> None:
            raise Full(28, "No space left on device")

        monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(RuntimeError, match=r"could not be written.*rank 1: Full: \[Errno 28\] No space left"):
        run.save_checkpoint(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


# ---- kills

POINTS = ("write_data", "seal", "rest", "manifest", "synchronize", "exchange", "exchanged", "remove", "leftovers")


def killed(path: Path, point: str, directory: bool) -> None:
    """Save as if interrupted: the first rank dies at ``point`` of the second save."""
    model, run = Scheduled(), trainer(strategy(2, save_distributed_checkpoint=directory), max_epochs=2)
    run.fit(model)

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def then_die(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (call(*args, **kwargs), die())

    if dist.get_rank() == 0:
        with pytest.MonkeyPatch.context() as patch:
            where: dict[str, tuple[Any, str, Any]] = {
                "write_data": (dcp.FileSystemWriter, "write_data", then_die(dcp.FileSystemWriter.write_data)),
                "seal": (shard_files._Sealing, "seal", then_die(shard_files._Sealing.seal)),
                "rest": (saving, "_finish", die),
                "manifest": (Manifest, "write", die),
                "synchronize": (saving, "synchronize", die),
                "exchange": (publish, "exchange", die),
                "exchanged": (publish, "exchange", then_die(exchange)),
                "remove": (publish, "remove", die),
                "leftovers": (saving, "remove_leftovers", die),
                "write": (torch, "save", then_die(torch.save)),
                "replace": (os, "replace", die),
                "replaced": (os, "replace", then_die(os.replace)),
            }
            patch.setattr(*where[point])
            run.save_checkpoint(path)
    run.save_checkpoint(path)


def check_kill(folder: Path, point: str, directory: bool) -> None:
    path = folder / "last.ckpt"
    run_ranks(2, trained, 2, 1, None, path, directory)
    with pytest.raises(RankFailure, match="rank 0 died"):
        run_ranks(2, killed, path, point, directory)
    assert open_checkpoint(path, all_bytes=True).rest["global_step"] in (4, 8)  # never empty, and whole
    run_ranks(2, trained, 2, 2, path, path, directory)  # loads whichever it is, and saves again
    assert open_checkpoint(path, all_bytes=True).rest["global_step"] == 8
    assert [entry.name for entry in folder.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("point", ["write_data", "seal", "manifest", "synchronize", "exchanged", "remove", "leftovers"])
def test_a_save_killed_at_any_point_leaves_a_whole_checkpoint(point: str, tmp_path: Path) -> None:
    check_kill(tmp_path, point, True)


@pytest.mark.parametrize("point", ["write", "replace", "replaced"])
def test_a_save_of_one_file_killed_at_any_point_leaves_a_whole_file(point: str, tmp_path: Path) -> None:
    check_kill(tmp_path, point, False)


@pytest.mark.long
@pytest.mark.parametrize("again", range(12))
@pytest.mark.parametrize("point", POINTS)
def test_a_hundred_kills_leave_whole_checkpoints(point: str, again: int, tmp_path: Path) -> None:
    check_kill(tmp_path, point, True)


# ---- names and checksums


def checksum(data: bytes, pieces: int = 1) -> int:
    found = Checksum()
    size = -(-len(data) // pieces) or 1
    for start in range(0, len(data), size):
        found.update(data[start : start + size])
    assert found.size == len(data)
    return found.value()


def test_a_checksum_knows_each_bit_and_the_order_of_blocks_and_not_how_they_were_written() -> None:
    draw = random.Random(0)
    for size in (0, 1, 7, 8, 1000, 1 << 16, (1 << 16) + 1, (1 << 20) + 12345, 3 << 20):
        data = bytearray(draw.randbytes(size))
        want = checksum(bytes(data))
        assert all(checksum(bytes(data), pieces) == want for pieces in (2, 3, 17, 1000))
        for at in {0, size // 3, size // 2, size - 1} if size else ():
            changed = bytearray(data)
            changed[at] ^= 1 << draw.randrange(8)
            assert checksum(bytes(changed)) != want
    blocks = [draw.randbytes(1 << 16) for _ in range(3)]
    assert checksum(b"".join(blocks)) != checksum(b"".join(blocks[::-1]))


def directory_of(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_directory_takes_the_place_of_anything(exchanges: bool, tmp_path: Path, monkeypatch: Any) -> None:
    if not exchanges:
        monkeypatch.setattr(publish, "exchange", lambda one, other: False)
    path = tmp_path / "last"
    (tmp_path / "precious").mkdir()
    for before in ("nothing", "directory", "file", "link"):
        if before == "file":
            shutil.rmtree(path)
            path.write_text("old")
        elif before == "link":
            shutil.rmtree(path)
            path.symlink_to(tmp_path / "precious")
        put_in_place(directory_of(beside(path), f"after {before}"), path)
        assert (path / "file").read_text() == f"after {before}" and not path.is_symlink()
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last", "precious"]


def test_a_name_that_cannot_be_given_leaves_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    path = directory_of(tmp_path / "last", "old")
    monkeypatch.setattr(publish, "exchange", lambda one, other: False)
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "gone", path)
    assert (path / "file").read_text() == "old"


def test_leftovers_of_this_name_and_of_dead_processes_go_and_those_of_others_stay(tmp_path: Path) -> None:
    last, other = tmp_path / "last", tmp_path / "other"
    own, theirs = directory_of(beside(last), "own"), directory_of(beside(other), "of a process that runs")
    dead = directory_of(tmp_path / beside(other).name.replace(f"-{os.getpid()}-", "-99999999-"), "dead")
    far = directory_of(tmp_path / dead.name.replace(publish._machine(), "0" * 10), "of another machine")
    foreign = directory_of(tmp_path / ".autotp-tmp-of-somebody", "not ours")
    remove_leftovers(last)
    assert [path.exists() for path in (own, theirs, dead, far, foreign)] == [False, True, False, True, True]


def test_a_file_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    write_in_place(tmp_path / "new" / "one.ckpt", lambda stream: stream.write(b"first"))  # type: ignore[arg-type]

    def fail(stream: Any) -> None:
        stream.write(b"half")
        raise Full(28, "No space left on device")

    with pytest.raises(Full):
        write_in_place(tmp_path / "new" / "one.ckpt", fail)
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["one.ckpt"]
    assert (tmp_path / "new" / "one.ckpt").read_bytes() == b"first"
