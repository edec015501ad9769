"""Checkpoints that version 0.1.0 wrote: a directory and a file of one run of two ranks, and a loop's own directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_autotp import parallelize
from lightning_autotp.checkpoint.safe_load import Reader
from lightning_autotp.checkpoint.tensors import open_checkpoint
from tests.helpers.checkpoints import Scheduled, trained
from tests.helpers.closeness import assert_close
from tests.helpers.small_nets import RULES, Net, full_weights, plugin_of, strategy, trainer

FIXTURES = Path(__file__).parent / "fixtures"
FORMAT_1 = FIXTURES / "directory-format-1"
"""Of the same run, with the first manifest: CRC-32s of all bytes."""

DIRECTORY, FILE, OWN_LOOP = FIXTURES / "directory-0.1.0", FIXTURES / "file-0.1.0.pt", FIXTURES / "own-loop-0.1.0"


def weights_in(path: Path) -> dict[str, Tensor]:
    """The full weights that a model has once it has loaded ``path``."""
    model = Scheduled()
    run = trainer(strategy(dist.get_world_size()), max_epochs=1)
    run.fit(model, ckpt_path=path)  # the epoch is over: nothing is trained
    assert run.global_step == 4
    loaded = plugin_of(model).load_checkpoint(path)
    assert len(loaded["optimizer_states"]) == 1 and set(loaded["optimizer_states"][0]["state"]) == set(range(6))
    return full_weights(model)


@pytest.mark.ranks(3)
def test_directory_and_file_load_the_same_weights_at_another_size() -> None:
    want = torch.load(FILE, weights_only=True)["state_dict"]
    for path in (DIRECTORY, FORMAT_1, FILE):
        got = weights_in(path)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("path", [DIRECTORY, FORMAT_1, FILE], ids=["directory", "format 1", "file"])
@pytest.mark.ranks(2)
def test_a_run_resumes_from_them(path: Path) -> None:
    got, want = trained(2, 2, resume=path), trained(2, 2)
    assert_close(got, want, 1e-5, "weight")  # what another machine has trained


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@pytest.mark.ranks(2)
def test_the_state_of_a_loop_of_ones_own_loads() -> None:
    run = parallelize(Holder(), autotp_size=2, partition_config=RULES)
    optimizer = torch.optim.AdamW(run.module.parameters(), lr=0.02)
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    run.load_state_dict(OWN_LOOP, optimizer)
    assert all(not torch.equal(p, before[name]) for name, p in run.module.named_parameters())
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
    stored = Reader(OWN_LOOP).read_metadata().state_dict_metadata
    assert {name.removeprefix("model.") for name in stored if name.startswith("model.")} == set(before)


def test_checksums_of_the_first_manifest_are_compared(tmp_path: Path) -> None:
    assert open_checkpoint(FORMAT_1, all_bytes=True).manifest is not None
    shutil.copytree(FORMAT_1, tmp_path / "damaged")
    file = tmp_path / "damaged" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="__0_0.distcp does not have the bytes that were written"):
        open_checkpoint(tmp_path / "damaged", all_bytes=True)
