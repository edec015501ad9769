"""A checkpoint of another model is called that, on every rank, whatever form it has and whoever wrote it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.checkpoints import trained
from tests.helpers.lightning_writers import write_with_model_parallel
from tests.helpers.rank_pool import run_ranks
from tests.helpers.small_nets import WIDTH, Net, Regressor, strategy, trainer


class Others(nn.Module):
    """As many matrices as one likes, of which rules know some by ``Net``'s names."""

    def __init__(self, count: int = 20) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Net() for _ in range(count)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.blocks(x)
        return out


class Wide(Regressor):
    """``Net`` with another width."""

    def __init__(self) -> None:
        super().__init__(make=partial(Net, hidden=2 * WIDTH))


def refused(path: Path, make: Any, stage: str = "fit") -> str:
    run = trainer(strategy(2), max_epochs=1)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        getattr(run, stage)(make(), ckpt_path=path)
    return str(caught.value)


@pytest.mark.parametrize("form", ["directory", "file", "foreign"])
def test_it_is_called_that(form: str, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    if form == "foreign":
        run_ranks(2, write_with_model_parallel, path)
    else:
        run_ranks(2, trained, 2, 1, None, path, form == "directory")
    by = {
        "directory": "It was written by a run of tests.helpers.checkpoints.Scheduled at 20",
        "file": "It was written by Lightning 2.",
        "foreign": "It was written by Lightning's ModelParallelStrategy.",
    }[form]
    for said in run_ranks(2, refused, path, partial(Regressor, Others)):
        assert f"{path} is a checkpoint of another model: of its 6 tensors 0 fit the 120 of tests.helpers" in said, said
        assert "6 are in it and not in this model: net.down.bias, net.down.weight, net.norm.bias and 3 more; " in said
        assert "120 are in this model and not in it: net.blocks.0.down.bias, " in said and "and 117 more." in said
        assert by in said and len(said) < 1000
    for said in run_ranks(2, refused, path, Wide, "test"):  # half of it fits: torch's own words say what does not
        assert "another model" not in said and "size mismatch for net.up.weight" in said


def test_where_most_has_another_shape_that_is_said(tmp_path: Path) -> None:
    run_ranks(2, trained, 2, 1, None, tmp_path / "saved")
    for said in run_ranks(2, refused, tmp_path / "saved", partial(Regressor, Narrow), "test"):
        assert "of its 6 tensors 0 fit the 6" in said, said
        assert "6 are of another shape: net.down.bias [8] instead of [6], net.down.weight [8, 10] instead of" in said
        assert "Scheduled" in said


class Narrow(nn.Module):
    """``Net``'s names in other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.cat([self.down(self.up(self.norm(x[..., :6]))), x[..., 6:]], -1)
        return out
