"""Checkpoints in places that fsspec knows: written, read, replaced and refused as on a disk, in both forms."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_autotp.checkpoint.manifest import Manifest
from lightning_autotp.checkpoint.places import RemotePath, place_of
from lightning_autotp.checkpoint.tensors import open_checkpoint
from lightning_autotp.cli import export, inspect
from tests.helpers import objects  # registers objects://
from tests.helpers.checkpoints import Scheduled, trained
from tests.helpers.rank_pool import RankFailure, run_ranks
from tests.helpers.small_nets import Rows, everyones, full_weights, strategy, trainer, weights


def afar(*args: Any) -> Any:
    """``trained``, in a process that knows ``objects://`` because it knows this file."""
    assert objects.Objects.protocol == "objects"
    return trained(*args)


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
def test_a_run_resumes_from_afar_with_other_sizes(directory: bool, tmp_path: Path) -> None:
    path = f"objects://{tmp_path}/runs/first.ckpt"
    run_ranks(2, afar, 2, 1, None, path, directory)
    assert open_checkpoint(place_of(path), all_bytes=True).rest["global_step"] == 4
    got, want = run_ranks(1, afar, 0, 3, path)[0], run_ranks(2, trained, 2, 3)[0]
    assert all(torch.allclose(got[name], tensor, rtol=1e-5, atol=1e-6) for name, tensor in want.items())
    resumed = run_ranks(2, afar, 2, 3, path)[0]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("async_checkpoint", [True, False])
@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(2)
def test_lightnings_callback_keeps_the_best_and_the_last_afar(
    directory: bool, async_checkpoint: bool, tmp_path: Path
) -> None:
    callback = ModelCheckpoint(f"objects://{tmp_path}/runs", filename="{epoch}", save_last=True)
    options: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [callback], "max_epochs": 3}
    plugin = strategy(2, save_distributed_checkpoint=directory, async_checkpoint=async_checkpoint)
    run = trainer(plugin, **options)
    model = Scheduled()
    run.fit(model)
    dist.barrier()
    assert sorted(entry.name for entry in (tmp_path / "runs").iterdir()) == ["epoch=2.ckpt", "last.ckpt"]
    want = weights(model)
    for path in (callback.best_model_path, callback.last_model_path):
        other = Scheduled()
        trainer(strategy(2)).test(other, DataLoader(Rows(4)), ckpt_path=path, verbose=False)
        assert all(torch.equal(tensor, want[name]) for name, tensor in weights(other).items())
    everyones(None)


@pytest.mark.ranks(2)
def test_a_save_takes_the_place_of_the_last_one_when_it_is_complete(tmp_path: Path, monkeypatch: Any) -> None:
    url = f"objects://{tmp_path}/last.ckpt"
    model, run = Scheduled(), trainer(strategy(2))
    run.fit(model)
    run.save_checkpoint(url)
    before = everyones(_files(tmp_path))[0]
    assert len(before) == 5 and before[-1] == "last.ckpt/autotp.json"
    for rank in (0, 1):  # dead in the middle, then an error
        with monkeypatch.context() as patch:
            if dist.get_rank() == rank:
                patch.setattr(dcp.FileSystemWriter, "write_data", _fail)
            with pytest.raises(
                RuntimeError, match=rf"last\.ckpt could not be written. rank {rank}.*afar.*there before"
            ):
                run.save_checkpoint(url)
        dist.barrier()
        assert _files(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", _fail)
        with pytest.raises(RuntimeError, match="rank 0: OSError: afar"):
            run.save_checkpoint(url)
    dist.barrier()
    assert len(_files(tmp_path)) == 9  # nobody knows whether a manifest has arrived whose writing failed
    assert open_checkpoint(place_of(url), all_bytes=True).rest["global_step"] == 4
    everyones(None)
    run.save_checkpoint(url)
    dist.barrier()
    after = _files(tmp_path)
    assert len(after) == 5 and not set(after[:-1]) & set(before)
    everyones(None)


def _fail(*_: Any, **__: Any) -> Any:
    raise OSError("afar")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_that_was_copied_from_afar_is_one(tmp_path: Path, capsys: Any) -> None:
    url = f"objects://{tmp_path}/afar/one"
    want = run_ranks(2, afar, 2, 1, None, url)[0]
    shutil.copytree(tmp_path / "afar" / "one", tmp_path / "here")
    got = run_ranks(1, trained, 0, 1, str(tmp_path / "here"))[0]
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert inspect.main([url, "--checksums"]) == 0
    assert f"{url}: a directory" in capsys.readouterr().out.replace("\n", "")
    assert export.main([url, str(tmp_path / "one.ckpt"), "--format", "ckpt"]) == 0
    assert export.main([url, f"{url}.export"]) == 1
    plain = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(plain[name], tensor) for name, tensor in want.items())


FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "autotp.json", "meta.pt"]


@pytest.mark.ranks(2, timeout=120)
def test_every_damage_to_every_file_is_named(tmp_path: Path) -> None:
    model, run = Scheduled(), trainer(strategy(2, verify_checksums=True))
    run.fit(model)
    run.save_checkpoint(f"objects://{tmp_path}/good")
    for damage in ("missing", "cut", "flipped"):
        for name in FILES:
            folder = tmp_path / f"{damage}{name}"
            if dist.get_rank() == 0:
                shutil.copytree(tmp_path / "good", folder)
                file = next(folder.rglob(name))
                data = bytearray(file.read_bytes())
                data[len(data) // 3] ^= 1
                file.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
                if damage == "missing":
                    file.unlink()
            dist.barrier()
            with pytest.raises((ValueError, OSError, RuntimeError)) as caught:
                run.strategy.load_checkpoint(f"objects://{folder}")
            said = str(caught.value)
            # without a manifest nothing else is known to be there
            assert str(folder) in said and (name in said or (damage, name) == ("missing", "autotp.json")), said
            assert "Load another checkpoint, or copy this one again" in said, said


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("objects://{}/denied", "PermissionError.*Access Denied.*default_root_dir"),
        ("memory://runs", "memory of each process by itself.*a place that all of them see"),
    ],
)
@pytest.mark.ranks(2)
def test_where_nothing_can_be_written_a_run_ends_before_its_first_batch(
    where: str, said: str, directory: bool, tmp_path: Path
) -> None:
    where = where.format(tmp_path)
    options: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(where)]}
    model = Scheduled()
    with pytest.raises(ValueError, match=f"{where}: .*{said}"):
        trainer(strategy(2, save_distributed_checkpoint=directory), **options).fit(model)
    assert model.trainer.global_step == 0
    everyones(None)


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
def test_one_process_may_write_to_its_memory(directory: bool) -> None:
    run_ranks(1, _in_memory, directory)


def _in_memory(directory: bool) -> None:
    url = f"memory://runs/{directory}"
    model, run = Scheduled(), trainer(strategy(1, save_distributed_checkpoint=directory))
    run.fit(model)
    for _ in range(2):
        run.save_checkpoint(url)
    other = Scheduled()
    trainer(strategy(1)).test(other, DataLoader(Rows(4)), ckpt_path=url, verbose=False)
    want = full_weights(model)
    assert all(torch.equal(tensor, want[name]) for name, tensor in full_weights(other).items())


def test_a_url_that_pathlib_has_broken_is_named() -> None:
    with pytest.raises(ValueError, match=r"s3:/bucket/one was a URL before pathlib\.Path took it.*as a string"):
        place_of(Path("s3://bucket/one"))
    assert place_of("file:///tmp/one") == Path("/tmp/one")
    place = place_of("memory://a/b.ckpt")
    assert isinstance(place, RemotePath) and (place.name, place.suffix, str(place.parent)) == (
        "b.ckpt",
        ".ckpt",
        "memory:///a",
    )


def test_a_dead_process_leaves_what_was_afar(tmp_path: Path) -> None:
    url = f"objects://{tmp_path}/last.ckpt"
    run_ranks(2, afar, 2, 1, None, url)
    with pytest.raises(RankFailure, match="rank 0 died"):
        run_ranks(2, _killed, url)
    assert open_checkpoint(place_of(url), all_bytes=True).rest["global_step"] == 4
    run_ranks(2, afar, 2, 2, url, url)
    assert open_checkpoint(place_of(url), all_bytes=True).rest["global_step"] == 8
    assert len(_files(tmp_path)) == 5


def _killed(url: str) -> None:
    model, run = Scheduled(), trainer(strategy(2))
    run.fit(model)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(Manifest, "write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        run.save_checkpoint(url)
