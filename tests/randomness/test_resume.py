"""A resumed run draws what the run that was not interrupted draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.helpers.dropping import ODD_RULES, Dropping, Oddities, llama
from tests.helpers.small_nets import strategy, trainer


@pytest.mark.parametrize(
    ("save", "at"), [(True, 3), (False, 2), pytest.param(True, 2, marks=pytest.mark.long)], ids=str
)
@pytest.mark.ranks(2)
def test_a_resumed_run_goes_on_with_the_masks(save: bool, at: int, tmp_path: Path) -> None:
    rules = {"partition_config": ODD_RULES, "save_distributed_checkpoint": save}
    torch.manual_seed(5)
    through = Dropping(Oddities)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=at, save_top_k=-1)
    trainer(strategy(2, **rules), max_epochs=2, callbacks=[keep], enable_checkpointing=True).fit(through)
    torch.manual_seed(77)
    resumed = Dropping(Oddities)
    trainer(strategy(2, **rules), max_epochs=2).fit(resumed, ckpt_path=tmp_path / f"step={at}.ckpt")
    assert len(resumed.states) == 6 - at
    assert all(map(torch.equal, resumed.states, through.states[at:]))
    if at == 3:  # within an epoch Lightning begins its data anew
        assert resumed.losses == through.losses[at:]


@pytest.mark.long
@pytest.mark.ranks(4)
def test_a_run_is_resumed_with_another_switch_and_the_same_masks(tmp_path: Path) -> None:
    torch.manual_seed(5)
    through = Dropping(llama)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    options = {"partition_config": None}
    trainer(strategy(4, **options), max_epochs=2, callbacks=[keep], enable_checkpointing=True).fit(through)
    torch.manual_seed(77)
    resumed = Dropping(llama)
    plugin = strategy(4, **options, sequence_parallel=True)
    trainer(plugin, max_epochs=2).fit(resumed, ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed.losses == pytest.approx(through.losses[3:], rel=1e-5)
