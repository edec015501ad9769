"""What ranks draw of sharded tensors: parts of the unsharded numbers, or streams of their own beside the shared one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.randomness.cut import Cut, OtherShapeError
from lightning_autotp.randomness.mode import RandomNumbers
from lightning_autotp.randomness.own_stream import own_stream
from lightning_autotp.randomness.places import Item
from lightning_autotp.randomness.sites import Drawn, Site, Sites

DRAWS = 200
HALVES = Cut(2, 1, (17,), (tuple(range(9)), tuple(range(9, 17))))


class Drops(nn.Module):
    """Dropout of what ranks have parts of, and of what all of them have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, part: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(part), self.outer(whole)


def drawn(site: Site) -> list[list[tuple[Tensor, Tensor]]]:
    """By rank, what is left of ones in 200 calls of a model that knows how its inner dropout is sharded."""

    def work(mesh: Mesh) -> list[tuple[Tensor, Tensor]]:
        model = Drops()
        RandomNumbers(model, mesh).learn(Sites((Drawn("dropout", (Item("inner", ""),), (), site),)))
        width = 9 - mesh.tp_rank
        return [model(torch.ones(4, width), torch.ones(4, 5)) for _ in range(DRAWS)]

    torch.manual_seed(0)
    return Lockstep[list[tuple[Tensor, Tensor]]](2).run(work)


def correlation(first: list[Tensor], second: list[Tensor]) -> float:
    a = torch.stack([one[:, :8] for one in first]).flatten()
    b = torch.stack([one[:, :8] for one in second]).flatten()
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


@pytest.mark.parametrize("site", [Site(HALVES), Site(own=True)], ids=["unsharded numbers", "own numbers"])
def test_sharded_masks_are_uncorrelated_and_replicated_ones_equal(site: Site) -> None:
    first, second = drawn(site)
    # 6400 pairs: a correlation of five standard deviations would be 0.06
    assert abs(correlation([one for one, _ in first], [one for one, _ in second])) < 0.06
    assert abs(float(torch.stack([one for one, _ in first]).mean()) - 1) < 0.05
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second))


def test_the_masks_are_the_parts_of_the_unsharded_ones() -> None:
    first, second = drawn(Site(HALVES))
    torch.manual_seed(0)
    for (one, whole), (two, _) in zip(first, second):
        assert torch.equal(torch.cat([one, two], 1), F.dropout(torch.ones(4, 17), 0.5))
        assert torch.equal(whole, F.dropout(torch.ones(4, 5), 0.5))


def test_a_stream_of_ones_own_follows_from_the_shared_one() -> None:
    def own(rank: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        with own_stream(torch.device("cpu"), rank):
            mine = torch.rand(5 + rank)
        return mine, torch.rand(3)

    (first, shared), (second, alike) = own(0), own(1)
    assert torch.equal(shared, alike)
    assert not torch.equal(first, second[:5])
    assert torch.equal(own(1)[0], second)


def test_a_cut_of_rows_times_heads_fits_other_batches() -> None:
    of_three = Cut(3, 0, (12,), ((0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11)))  # 3 rows of 4 heads
    part = of_three.of((4, 7, 7), 1, 2, 0)
    assert part.full == (8, 7, 7)
    assert part.index == (2, 3, 6, 7)
    with pytest.raises(OtherShapeError):
        of_three.of((3, 7, 7), 1, 2, 0)


def test_padding_of_tokens_is_no_token() -> None:
    part = Cut(3, 1, tokens=True).of((1, 4, 2), 1, 2, 7)
    full = torch.arange(14.0).view(1, 7, 2)
    assert part.full == (1, 7, 2)
    assert part.take(full, (1, 4, 2)).flatten().tolist() == [8, 9, 10, 11, 12, 13, 0, 0]
