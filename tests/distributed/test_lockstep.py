"""All ranks in one process: real numbers, mistakes that are errors at once, nothing left behind."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_autotp.config.training_config import TPConfig
from lightning_autotp.distributed.lockstep import CollectiveMismatchError, Lockstep
from lightning_autotp.distributed.mesh import Mesh, build_mesh
from lightning_autotp.training.consistency import FirstLook


def test_random_numbers_are_each_ranks_own_and_afterwards_what_they_were() -> None:
    torch.manual_seed(3)
    want = torch.rand(2).tolist(), random.random()
    torch.manual_seed(3)
    before = torch.get_rng_state()

    def draw(mesh: Mesh) -> tuple[list[float], list[float], float]:
        first = torch.rand(1)
        mesh.collectives.all_reduce(torch.zeros(1))  # the other rank draws in between
        return first.tolist(), torch.rand(1).tolist(), 0.0

    found = Lockstep[Any](3).run(draw)
    assert [a + b for a, b, _ in found] == [want[0]] * 3
    assert torch.equal(torch.get_rng_state(), before)


def test_only_one_rank_runs_at_a_time() -> None:
    running: list[int] = []

    def work(mesh: Mesh) -> int:
        for _ in range(5):
            running.append(mesh.tp_rank)
            time.sleep(0.001)
            assert running[-1] == mesh.tp_rank, "another rank ran"
            mesh.collectives.all_reduce(torch.zeros(1))
        return mesh.tp_rank

    assert Lockstep[int](4).run(work) == [0, 1, 2, 3]
    assert threading.active_count() == len(threading.enumerate()) and not [
        thread for thread in threading.enumerate() if thread.name.startswith("rank ")
    ]


def test_ranks_of_other_groups_come_later() -> None:
    """Some ranks wait for all, while the others first finish among themselves."""

    def work(mesh: Mesh) -> float:
        x = torch.ones(2)
        if mesh.tp_rank >= 2:
            mesh.collectives.all_reduce(x, (2, 3))
        mesh.collectives.all_reduce(x)
        return float(x[0])

    assert Lockstep[float](4).run(work) == [6.0] * 4


def by_kind(mesh: Mesh) -> None:
    x = torch.zeros(4)
    _ = mesh.collectives.all_reduce(x) if mesh.tp_rank else mesh.collectives.all_gather(x)


def by_operation(mesh: Mesh) -> None:
    mesh.collectives.all_reduce(torch.zeros(4), op="max" if mesh.tp_rank else "sum")


def by_shape(mesh: Mesh) -> None:
    mesh.collectives.all_reduce(torch.zeros(4 + mesh.tp_rank))


def by_dtype(mesh: Mesh) -> None:
    mesh.collectives.all_reduce(torch.zeros(4, dtype=torch.float64 if mesh.tp_rank else torch.float32))


def by_ending(mesh: Mesh) -> None:
    if mesh.tp_rank:
        mesh.collectives.all_reduce(torch.zeros(4))


def by_members(mesh: Mesh) -> None:
    mesh.collectives.all_reduce(torch.zeros(4), "tp" if mesh.tp_rank == 1 else (0, 2))


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (by_kind, r"different collectives: rank 0 waits in all-gather.*rank 1 waits in all-reduce"),
        (by_operation, r"all-reduce \(sum\).*all-reduce \(max\)"),
        (by_shape, r"of \[4\].*of \[5\]"),
        (by_dtype, r"float32.*float64"),
        (by_ending, r"for ever: rank 0 has ended; rank 1 waits in all-reduce"),
        (by_members, r"for ever: .*rank 1 waits in all-reduce \(sum\) of \[4\] torch.float32 of ranks \[0, 1, 2\]"),
    ],
)
def test_ranks_that_ask_for_different_collectives_are_an_error_at_once_with_their_lines(
    work: Any, message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(CollectiveMismatchError, match=message) as raised:
        Lockstep[None](3 if work is by_members else 2).run(work)
    assert time.monotonic() - started < 5
    assert "test_lockstep.py:" in str(raised.value)


def test_the_error_of_a_rank_is_raised_as_it_is_and_ends_those_that_wait() -> None:
    stopped: list[int] = []

    def work(mesh: Mesh) -> None:
        try:
            if mesh.tp_rank == 2:
                raise KeyError("no such thing")
            mesh.collectives.all_reduce(torch.zeros(1))
        except KeyError:
            raise
        except BaseException:
            stopped.append(mesh.tp_rank)
            raise

    lockstep = Lockstep[None](4)
    with pytest.raises(KeyError, match="no such thing"):
        lockstep.run(work)
    assert sorted(stopped) == [0, 1, 3]
    assert lockstep.run(lambda mesh: None) == [None] * 4, "and it runs again"


def test_a_rank_that_catches_everything_ends_all_the_same() -> None:
    def work(mesh: Mesh) -> str:
        if mesh.tp_rank == 0:
            raise ValueError("first")
        for _ in range(3):
            with suppress(BaseException):  # as careless code does
                mesh.collectives.all_reduce(torch.zeros(1))
        return "went on"

    with pytest.raises(ValueError, match="first"):
        Lockstep[str](2).run(work)


def test_gradients_flow_through_collectives_in_each_ranks_own_thread() -> None:
    from lightning_autotp.distributed.functions import copy_input, reduce_output

    torch.manual_seed(0)
    x, up, down = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 6), (8, 6), (6, 8)))

    def whole(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        ((x @ up.t()).tanh() @ down.t()).square().sum().backward()
        assert x.grad is not None
        return x.grad

    def sharded(mesh: Mesh) -> Tensor:
        mine = slice(mesh.tp_rank * 2, mesh.tp_rank * 2 + 2)
        copy = x.clone().requires_grad_()
        hidden = (copy_input(copy, mesh) @ up[mine].t()).tanh()
        reduce_output(hidden @ down[:, mine].t(), mesh).square().sum().backward()
        assert copy.grad is not None
        return copy.grad

    for gradient in Lockstep[Tensor](4).run(sharded):
        torch.testing.assert_close(gradient, whole(x), rtol=1e-12, atol=1e-12)


@pytest.mark.ranks(2)
def test_it_works_in_the_middle_of_a_job_at_another_size() -> None:
    mesh = build_mesh(2, TPConfig())
    x = torch.full((3,), float(mesh.tp_rank + 1))
    first = deepcopy(x)
    mesh.collectives.all_reduce(first)

    def work(inner: Mesh) -> list[float]:
        total = inner.collectives.all_reduce(torch.full((2,), float(inner.tp_rank)))
        return [*total.tolist(), float(inner.tp_size)]

    if mesh.tp_rank == 0:  # the other process goes on and waits in its own next collective
        assert Lockstep[list[float]](5).run(work) == [[10.0, 10.0, 5.0]] * 5
    again = deepcopy(x)
    mesh.collectives.all_reduce(again)
    assert torch.equal(first, again) and first.tolist() == [3.0] * 3


def test_a_mesh_that_outlives_its_run_says_so() -> None:
    (mesh, _) = Lockstep[Mesh](2).run(lambda mesh: mesh)
    with pytest.raises(RuntimeError, match="all-reduce.*have ended.*inside of `Lockstep.run`"):
        mesh.collectives.all_reduce(torch.zeros(1))


def test_rows_that_ranks_do_not_divide_cannot_be_scattered() -> None:
    with pytest.raises(ValueError, match="reduce-scatter: 5 rows do not divide among 2 ranks"):
        Lockstep[Tensor](2).run(lambda mesh: mesh.collectives.reduce_scatter(torch.zeros(5, 2)))


@pytest.mark.parametrize("alike", [True, False])
def test_ranks_that_share_a_model_are_compared_whatever_their_data_parallel_ranks(alike: bool) -> None:
    """As an mpu of the user's may number them."""

    def work(mesh: Mesh) -> None:
        look = FirstLook(replace(mesh, dp_rank=mesh.tp_rank), True)
        look.batch(torch.full((2,), 0.0 if alike else float(mesh.tp_rank)), "train")

    if alike:
        assert Lockstep[None](2).run(work) == [None, None]
    else:
        with pytest.raises(RuntimeError, match="disagree on batch .*between ranks 0 and 1"):
            Lockstep[None](2).run(work)
