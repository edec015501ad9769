"""Checkpoints that are written while training goes on: what was copied is what is written, and nothing gets lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_autotp.checkpoint.host_copies import HostCopies
from lightning_autotp.checkpoint.manifest import Manifest
from lightning_autotp.checkpoint.tensors import open_checkpoint
from tests.helpers.checkpoints import Scheduled, trained
from tests.helpers.rank_pool import RankFailure, run_ranks
from tests.helpers.small_nets import everyones, full_weights, plugin_of, strategy, trainer


class Gate:
    """Holds writers back until it is opened."""

    def __init__(self, monkeypatch: Any, directory: bool = True) -> None:
        self.opened = threading.Event()
        self.error: Exception | None = None
        self.threads: list[threading.Thread] = []
        where: Any
        where, name = (dcp.FileSystemWriter, "write_data") if directory else (torch, "save")
        write = getattr(where, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                self.threads.append(threading.current_thread())
                assert self.opened.wait(30)
                if self.error is not None:
                    raise self.error
            return write(*args, **kwargs)

        monkeypatch.setattr(where, name, held)


class Saves(Callback):
    """Saves after some steps, and does something later."""

    def __init__(self, path: Path, at: dict[int, Any]) -> None:
        self.path, self.at = path, at

    def on_train_batch_end(self, run: Trainer, module: LightningModule, *_: Any) -> None:
        action = self.at.get(run.global_step)
        if action == "save":
            run.save_checkpoint(self.path / f"step{run.global_step}")
        elif action is not None:
            action()


def everything(path: Path) -> dict[str, Any]:
    """All that is in a checkpoint, flat: tensors by name, and the rest."""
    found = open_checkpoint(path, all_bytes=True)
    flat: dict[str, Any] = {name: found.tensors.read(name) for name in found.tensors.shapes}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, of_key in value.items():
                walk(of_key, f"{name}.{key}")
        elif isinstance(value, (list, tuple)):
            for at, entry in enumerate(value):
                walk(entry, f"{name}.{at}")
        elif not name.endswith("autotp_save_id"):
            flat[name] = value

    walk(dict(found.rest), "rest")
    return flat


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(2, timeout=60)
def test_what_is_written_while_training_goes_on_is_bit_equal_to_a_save_that_it_waited_for(
    directory: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    seed_everything(0, verbose=False)
    run = trainer(
        strategy(2, save_distributed_checkpoint=directory), callbacks=[Saves(tmp_path / "one", {2: "save", 3: "save"})]
    )
    run.fit(Scheduled())
    gate, seen = Gate(monkeypatch, directory), []

    def look() -> None:  # two steps later; at the second save the first is let go
        seen.append([(tmp_path / "two" / "step2").exists(), len(gate.threads)])
        gate.opened.set()

    seed_everything(0, verbose=False)
    run = trainer(
        strategy(2, save_distributed_checkpoint=directory, async_checkpoint=True),
        callbacks=[Saves(tmp_path / "two", {1: lambda: None, 2: "save", 4: look, 5: "save"})],
        max_epochs=2,
    )
    model = Scheduled()
    run.fit(model)
    assert [exists for exists, _ in seen] == [False]
    assert len(gate.threads) == (2 if directory or dist.get_rank() == 0 else 0)
    dist.barrier()
    one, two, later = (everything(tmp_path / which) for which in ("one/step2", "two/step2", "two/step5"))
    assert equal(one, two)
    assert not torch.equal(two["state_dict.net.up.weight"], later["state_dict.net.up.weight"])
    final = full_weights(model)
    assert not torch.equal(two["state_dict.net.up.weight"], final["net.up.weight"])
    everyones(None)  # nobody goes while others read


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.parametrize("when", ["next save", "end"])
@pytest.mark.ranks(2, timeout=60)
def test_an_error_of_the_thread_is_one_on_all_ranks(
    when: str, directory: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    gate, reached = Gate(monkeypatch, directory), []
    if dist.get_rank() == 0 or not directory:
        gate.error = OSError(28, "No space left on device")
    gate.opened.set()
    actions: dict[int, Any] = {1: "save", 4: lambda: reached.append(4)}
    if when == "next save":
        actions[3] = "save"
    run = trainer(
        strategy(2, save_distributed_checkpoint=directory, async_checkpoint=True),
        callbacks=[Saves(tmp_path, actions)],
    )
    with pytest.raises(
        RuntimeError, match=r"step1 could not be written. rank 0: OSError: \[Errno 28\] No space"
    ) as caught:
        run.fit(Scheduled())
    assert len(set(everyones(str(caught.value)))) == 1
    assert reached == ([] if when == "next save" else [4])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks(2, timeout=60)
def test_an_exception_in_training_waits_for_the_save_and_is_the_one_that_is_raised(
    tmp_path: Path, monkeypatch: Any
) -> None:
    gate = Gate(monkeypatch)

    def fail() -> None:
        threading.Timer(0.3, gate.opened.set).start()
        raise ZeroDivisionError("in training")

    run = trainer(strategy(2, async_checkpoint=True), callbacks=[Saves(tmp_path, {1: "save", 2: fail})])
    with pytest.raises(ZeroDivisionError):
        run.fit(Scheduled())
    assert everything(tmp_path / "step1")["rest.global_step"] == 1
    run.save_checkpoint(tmp_path / "after")  # not in training: it is there when the call returns
    assert everything(tmp_path / "after")["rest.global_step"] == 2
    everyones(None)


@pytest.mark.ranks(2, timeout=60)
def test_a_checkpoint_is_removed_only_when_the_one_in_its_place_stands(tmp_path: Path, monkeypatch: Any) -> None:
    gate = Gate(monkeypatch)
    gate.opened.set()
    seen: list[list[str]] = []

    def look() -> None:
        seen.append(sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("step")))

    def close() -> None:
        plugin_of(model)._background.wait()
        gate.opened.clear()

    def opens() -> None:
        look()
        gate.opened.set()

    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=1)
    between = Saves(tmp_path, {3: close, 5: opens})
    model = Scheduled()
    options: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": [saves, between]}
    trainer(strategy(2, async_checkpoint=True), **options).fit(model)
    dist.barrier()
    assert seen == [["step=2.ckpt"]]
    assert [path.name for path in tmp_path.iterdir()] == ["step=8.ckpt"]
    assert everything(tmp_path / "step=8.ckpt")["rest.global_step"] == 8
    everyones(None)


def dies_while_it_writes(path: Path) -> None:
    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(Manifest, "write", die)
        saves = Saves(path, {1: "save", 4: lambda: time.sleep(20)})
        trainer(strategy(2, async_checkpoint=True), callbacks=[saves]).fit(Scheduled())


def test_a_process_that_dies_while_it_writes_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run_ranks(2, trained, 2, 1, None, tmp_path / "step1")
    with pytest.raises(RankFailure, match="rank 0 died"):
        run_ranks(2, dies_while_it_writes, tmp_path)
    assert everything(tmp_path / "step1")["rest.global_step"] == 4
    run_ranks(2, trained, 2, 2, tmp_path / "step1", tmp_path / "step1")
    assert everything(tmp_path / "step1")["rest.global_step"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["step1"]


@pytest.mark.ranks(1)
def test_a_link_to_what_is_not_there_yet_is_refused_before_training(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "enable_checkpointing": True,
        "callbacks": [ModelCheckpoint(tmp_path, save_last="link")],
    }
    with pytest.raises(ValueError, match=r"async_checkpoint: ModelCheckpoint\(save_last='link'\).*save_last=True"):
        trainer(strategy(1, async_checkpoint=True), **options).fit(Scheduled())


def test_copies_are_of_their_moment_and_their_memory_is_kept() -> None:
    weight = torch.arange(6.0).view(2, 3)
    state = {"a": weight, "same": weight, "row": weight[0], "groups": [{"lr": 0.1, "betas": (1, 2)}], "other": {1, 2}}
    copies = HostCopies()
    first = copies.of(state)
    assert first["a"] is first["same"] and first["a"].data_ptr() != weight.data_ptr()
    kept = first["a"].data_ptr()
    state["groups"][0]["lr"] = 0.5  # type: ignore[index]
    weight.add_(1)
    assert first["groups"] == [{"lr": 0.1, "betas": (1, 2)}] and first["row"].tolist() == [0, 1, 2]
    second = copies.of(state)
    assert second["a"].data_ptr() == kept and torch.equal(second["a"], weight)
    fresh = weight + 1
    assert copies.of({"b": fresh}, live=state)["b"].data_ptr() == fresh.data_ptr()
    assert copies.of({"a": weight.t()}, live=state)["a"].tolist() == weight.t().tolist()
