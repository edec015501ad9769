"""Checkpoints of ZeRO are the unsharded ones: written at any layout, read at any other one, or by a plain Trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from lightning_autotp import parallelize
from lightning_autotp.distributed.dp_shards import local_rows, rows_of
from lightning_autotp.layout.layout import Layout, chunk, even_widths
from tests.helpers.checkpoints import Scheduled, fit
from tests.helpers.closeness import assert_close
from tests.helpers.small_nets import RULES, Net, Rows, alone, full_weights, strategy, trainer

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tp4": {"size": 4},
    "tp2": {"size": 2},
    "tp2-zero2": {"size": 2, "zero_stage": 2},
    "tp2-zero3": {"size": 2, "zero_stage": 3},
    "dp4-zero3": {"size": 1, "zero_stage": 3},
    "hybrid": {"size": 1, "zero_stage": 2, "zero_group_size": 2},
}

PAIRS = [
    *(("plain", "tp2-zero3"), ("plain", "hybrid"), ("tp4", "tp2-zero2"), ("tp2", "dp4-zero3"), ("tp2-zero2", "tp4")),
    *(("tp2-zero3", "plain"), ("tp2-zero3", "tp2"), ("tp2-zero3", "dp4-zero3"), ("dp4-zero3", "plain")),
    *(("dp4-zero3", "tp2-zero3"), ("hybrid", "tp4"), ("hybrid", "tp2-zero3")),
]


def run(layout: str, epochs: int, resume: Any = None, save: Any = None, directory: bool = True) -> dict[str, Any]:
    options = dict(LAYOUTS[layout])
    model = Scheduled()
    if not options:
        with alone():
            fit(trainer("auto", devices=1, max_epochs=epochs), model, resume, save)
    else:
        plugin = strategy(options.pop("size"), save_distributed_checkpoint=directory, **options)
        fit(trainer(plugin, max_epochs=epochs), model, resume, save)
    return full_weights(model)


QUICK = [("plain", "tp2-zero3"), ("tp2-zero3", "dp4-zero3"), ("dp4-zero3", "tp2-zero3"), ("hybrid", "tp4")]


@pytest.mark.parametrize(
    ("pairs", "directory"),
    [
        (QUICK, True),
        pytest.param(PAIRS, True, marks=pytest.mark.long),
        pytest.param(PAIRS, False, marks=pytest.mark.long),
    ],
    ids=["quick", "directories", "files"],
)
@pytest.mark.ranks(4, timeout=240)
def test_what_one_layout_saves_another_resumes(tmp_path: Path, pairs: list[tuple[str, str]], directory: bool) -> None:
    want = run("plain", 3)
    for layout in dict.fromkeys(before for before, _ in pairs):
        place = tmp_path / (layout if layout != "plain" else f"plain{dist.get_rank()}.ckpt")
        run(layout, 1, save=place if directory or layout == "plain" else f"{place}.ckpt", directory=directory)
        dist.barrier()
    for before, after in pairs:
        place = tmp_path / (before if before != "plain" else "plain0.ckpt")
        if after == "plain" and directory:
            continue  # a plain Trainer reads ordinary files; that they are right is what the other pairs show
        got = run(after, 3, resume=place if directory or before == "plain" else f"{place}.ckpt")
        assert_close(got, want, 1e-4, f"weight of {before} -> {after}")


def test_rows_of_a_shard_are_boxes_of_the_full_tensor() -> None:
    full = torch.arange(7 * 6).view(7, 6)
    for dim in (None, 0, 1):
        widths = [even_widths(7 if dim == 0 else 6, 2)]
        layout = Layout.replicated((7, 6), 2) if dim is None else Layout.cut((7, 6), dim, 2, widths)
        for rank in range(2):
            local = layout.shard(full, rank)
            for number in range(3):
                rows = chunk(local.shape[0], 3, number)
                found = torch.full((rows[1], local.shape[1]), -1)
                for box, inside in layout.row_boxes(rank, rows):
                    inside.view(found).copy_(box.view(full))
                assert torch.equal(found, local.narrow(0, *rows))


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(batch), batch.flip(-1))


@pytest.mark.ranks(4, timeout=120)
def test_the_state_of_an_own_loop(tmp_path: Path) -> None:
    """What one with ZeRO saves through DCP one without loads, and the other way round."""
    batches = Rows(16).rows.split(4)

    def steps(found: Any, optimizer: Any) -> dict[str, torch.Tensor]:
        for batch in batches:
            loss_of(found.model, batch.chunk(found.mesh.dp_size)[found.mesh.dp_rank]).backward()
            found.step(optimizer, max_norm=0.1)
            optimizer.zero_grad()
        return full_weights(found.module)

    def made(size: int, stage: int) -> tuple[Any, Any]:
        torch.manual_seed(0)
        rules = RULES if size > 1 else None
        found = parallelize(nn.Sequential(Net()), autotp_size=size, partition_config=rules, zero_stage=stage)
        return found, torch.optim.AdamW(found.module.parameters(), lr=0.02, eps=1e-5)

    runs = {"tp2": (2, 0), "tp2-zero3": (2, 3), "dp4-zero2": (1, 2)}
    begun = {name: made(*sizes) for name, sizes in runs.items()}
    after = {name: steps(*of) for name, of in begun.items()}
    for name, (found, optimizer) in begun.items():
        assert_close(after[name], after["tp2"], 1e-4, f"weight of {name}")
        dcp.save(found.state_dict(optimizer), checkpoint_id=tmp_path / name)
    want = steps(*begun["tp2"])
    for before, name in (("tp2", "tp2-zero3"), ("tp2-zero3", "dp4-zero2"), ("dp4-zero2", "tp2")):
        found, optimizer = made(*runs[name])
        found.load_state_dict(tmp_path / before, optimizer)
        for parameter in found.module.parameters() if runs[name][1] else ():
            assert local_rows(parameter).shape[0] == rows_of(parameter)[1]
        assert_close(steps(found, optimizer), want, 1e-4, f"weight of {before} -> {name}")


@pytest.mark.ranks(2, timeout=120)
def test_an_asynchronous_save_and_a_validation_in_between(tmp_path: Path) -> None:
    want = run("plain", 2)
    model = Scheduled()
    model.val_dataloader = partial(model.train_dataloader)  # type: ignore[method-assign]
    plugin = strategy(1, zero_stage=3, async_checkpoint=True)
    fit(trainer(plugin, max_epochs=1), model, None, tmp_path / "one")
    again = Scheduled()
    fit(trainer(strategy(1, zero_stage=2), max_epochs=2), again, tmp_path / "one", None)
    assert_close(full_weights(again), want, 1e-4, "weight")
