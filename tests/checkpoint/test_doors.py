"""Checkpoints that Lightning's own strategies and torch wrote, resumed as they are or imported first."""

from __future__ import annotations

import os
import pickle
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from lightning_autotp.checkpoint.tensors import open_checkpoint
from lightning_autotp.cli.import_checkpoint import main as import_
from tests.helpers.checkpoints import Scheduled, trained
from tests.helpers.closeness import assert_close
from tests.helpers.lightning_writers import Whole, write_with_fsdp, write_with_model_parallel
from tests.helpers.rank_pool import run_ranks
from tests.helpers.small_nets import Rows, full_weights, strategy, trainer

WRITERS = {"ModelParallelStrategy": write_with_model_parallel, "FSDPStrategy": write_with_fsdp}


def resumed(size: int | None, path: Path) -> dict[str, Tensor]:
    return trained(size, 2, resume=path)


def straight(size: int | None) -> dict[str, Tensor]:
    return trained(size, 2)


@pytest.mark.parametrize("writer", WRITERS)
def test_lightnings_directories_resume_as_they_are_and_imported(writer: str, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    run_ranks(2, WRITERS[writer], theirs)
    want = run_ranks(1, straight, None)[0]  # two epochs, without anything in between
    assert import_([str(theirs), str(tmp_path / "ours")]) == 0
    assert import_([str(theirs), str(tmp_path / "one.ckpt"), "--format", "ckpt"]) == 0
    for size, path in ((2, theirs), (2, tmp_path / "ours"), (2, tmp_path / "one.ckpt"), (None, tmp_path / "one.ckpt")):
        got = run_ranks(size or 1, resumed, size, path)[0]
        assert_close(got, want, 1e-5, path.name)
    found = open_checkpoint(tmp_path / "ours", all_bytes=True)
    assert found.manifest is not None and writer in found.manifest.written_by["imported_from"]


def saved_by_a_loop(path: Path) -> dict[str, Tensor]:
    """An epoch of FSDP2 in a loop of one's own, saved as PyTorch's tutorial does; the weights after another one."""
    torch.manual_seed(dist.get_rank())
    net = Scheduled().net
    fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, eps=1e-5)
    loader = list(Rows(16).rows.split(4))

    def step(batch: Tensor) -> None:
        functional.mse_loss(net(batch), batch.flip(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for batch in loader:
        step(batch)
    model, optim = get_state_dict(net, optimizer)
    dcp.save({"app": {"model": model, "optim": optim}, "step": 4}, checkpoint_id=path / "nested")
    dcp.save({"model": model}, checkpoint_id=path / "weights")
    dcp.save({"student": model, "teacher": model}, checkpoint_id=path / "two")
    for batch in loader:
        step(batch)
    return {f"net.{name}": full_tensor(p) for name, p in net.named_parameters()}


def full_tensor(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor().detach()
    return full


class Continued(Whole):
    """Whose optimizer is that of the loop."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-5)


def continued(path: Path, epochs: int = 1) -> dict[str, Tensor]:
    model = Continued()
    first = dist.get_rank() == 0
    with pytest.warns(UserWarning, match="no state of Lightning's loops") if first else nullcontext():
        trainer(strategy(2), max_epochs=epochs).fit(model, ckpt_path=path)
    return full_weights(model)


def test_directories_of_loops_of_ones_own_are_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    want = run_ranks(2, saved_by_a_loop, tmp_path)[0]
    got = run_ranks(2, continued, tmp_path / "nested")[0]
    assert_close(got, want, 1e-5, "weight")
    # by hand, and where the model has another name around it
    assert import_([str(tmp_path / "nested"), str(tmp_path / "ours"), "--submodule", "net"]) == 0
    held = open_checkpoint(tmp_path / "ours").model
    assert set(held.shapes) == set(want)
    before = run_ranks(2, continued, tmp_path / "weights", 0)[0]
    assert all(torch.equal(held.read(name), before[name]) for name in want)
    capsys.readouterr()
    assert import_([str(tmp_path / "two"), str(tmp_path / "wrong")]) == 1
    assert "under student, teacher, and does not say which of them are the model" in capsys.readouterr().err
    assert import_([str(tmp_path), str(tmp_path / "wrong")]) == 1
    assert "is no checkpoint that is known here: it holds nested, ours, two" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


class Harm:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("harm-was-done",))


def test_hostile_directories_of_others_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, harm in {"plain": {"x": torch.ones(2), "note": Harm()}, "rest": {"x": torch.ones(2)}}.items():
        dcp.save({"model": harm}, checkpoint_id=name, no_dist=True)
    torch.save({"callbacks": Harm()}, "rest/meta.pt")
    dcp.save({"model": {"x": torch.ones(2)}}, checkpoint_id="outside", no_dist=True)
    metadata = pickle.loads(Path("outside/.metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../plain/__0_0.distcp"
    Path("outside/.metadata").write_bytes(pickle.dumps(metadata))
    dcp.save({"model": {"x": torch.ones(2)}}, checkpoint_id="metadata", no_dist=True)
    Path("metadata/.metadata").write_bytes(pickle.dumps(Harm()))
    said = {
        "rest": "meta.pt holds posix.mkdir, which is neither",
        "outside": "names a file outside of its directory",
        "metadata": "names posix.mkdir, which is no part of",
    }
    for name, message in said.items():
        assert import_([name, "out"]) == 1
        assert message in capsys.readouterr().err
    assert import_(["plain", "out"]) == 0  # what is not the model's is not looked at
    assert not Path("harm-was-done").exists()
    assert import_(["rest", "trusted", "--unsafe"]) == 0
    assert Path("harm-was-done").exists()


def consolidated(path: Path, out: Path) -> None:
    module = "lightning.pytorch.utilities.consolidate_checkpoint"
    with mock.patch.object(sys, "argv", [module, str(path), "--output_file", str(out)]):
        runpy.run_module(module, run_name="__main__")


def test_lightnings_consolidation_gives_a_file_that_resumes(tmp_path: Path) -> None:
    run_ranks(2, trained, 2, 1, None, tmp_path / "saved")
    want = run_ranks(1, straight, None)[0]
    assert import_([str(tmp_path / "saved"), str(tmp_path / "copied")]) == 0
    for name in ("saved", "copied"):
        consolidated(tmp_path / name, tmp_path / f"{name}.ckpt")
        for size in (None, 2):
            assert_close(run_ranks(size or 1, resumed, size, tmp_path / f"{name}.ckpt")[0], want, 1e-5, name)


def test_directories_of_others_may_be_remote(tmp_path: Path) -> None:
    weights = {"up.weight": torch.randn(4, 3), "up.bias": torch.randn(4)}
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    fsspec.filesystem("memory").put(str(tmp_path / "theirs"), "/theirs", recursive=True)
    assert import_(["memory://theirs", str(tmp_path / "ours")]) == 0
    held = open_checkpoint(tmp_path / "ours").model
    assert all(torch.equal(held.read(name), value) for name, value in weights.items())


def test_of_an_ordinary_file_only_weights_are_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, trained, 2, 1, None, tmp_path / "one.ckpt", False)
    arguments = [str(tmp_path / "one.ckpt"), str(tmp_path / "ours")]
    assert import_(arguments) == 1
    assert "which `fit(ckpt_path=...)` resumes from as it is" in capsys.readouterr().err
    assert import_([*arguments, "--weights-only"]) == 0
    found, want = open_checkpoint(tmp_path / "ours"), torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert found.rest["global_step"] == 4 and "state_dict" not in found.rest and found.rest["optimizer_states"] == []
    assert all(torch.equal(found.model.read(name), value) for name, value in want["state_dict"].items())
    assert import_([*arguments[:1], str(tmp_path / "two.ckpt"), "--format", "ckpt", "--weights-only"]) == 1
    assert "is an ordinary file already" in capsys.readouterr().err


def test_numbers_of_an_optimizers_parameters_are_not_taken_for_names(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 4)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    dcp.save({"model": net.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=tmp_path / "a", no_dist=True)
    with pytest.warns(UserWarning, match="it numbers parameters, and no names were recorded.*optimizers begin anew"):
        assert import_([str(tmp_path / "a"), str(tmp_path / "ours")]) == 0
    found = open_checkpoint(tmp_path / "ours")
    assert found.rest["optimizer_states"] == [] and torch.equal(found.model.read("bias"), net.bias)
