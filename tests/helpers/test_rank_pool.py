"""The pool of ranks itself: what reaches the ranks, what comes back, and that no failure outlives its test."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from tests.helpers.closeness import assert_close
from tests.helpers.hygiene import isolated, lightning_rank, set_lightning_rank
from tests.helpers.models import LanguageModel, TokenDataset, quiet_trainer, token_batches, token_loader, transformer
from tests.helpers.rank_pool import ProcessGroupMode, RankFailure, rank_device, run_ranks, session_pool

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def _reused_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse is what is tested here, --fresh-ranks or not."""
    monkeypatch.setattr(session_pool(), "fresh", False)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("value", [1.0, 2.0])
def test_marked_test_runs_on_ranks(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_IN_RANK", "1")
    total = torch.full((), value * (dist.get_rank() + 1), device=rank_device())
    dist.all_reduce(total)
    assert total == 3 * value
    (tmp_path / str(dist.get_rank())).touch()
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.ranks(4, nodes=2, device="cpu")
def test_ranks_have_a_launchers_environment() -> None:
    rank = dist.get_rank()
    assert "SET_IN_RANK" not in os.environ
    assert dist.get_world_size() == int(os.environ["WORLD_SIZE"]) == 4
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == (str(rank), str(rank % 2))
    assert os.environ["NODE_RANK"] == os.environ["GROUP_RANK"] == str(rank // 2)
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"
    assert lightning_rank() == rank
    assert torch.get_num_threads() == 1


def test_return_values_come_in_rank_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FROM_MAIN", "yes")
    monkeypatch.chdir(tmp_path)
    values = run_ranks(3, answer, 10)
    assert [value["sum"] for value in values] == [10, 11, 12]
    assert all(torch.equal(value["tensor"], torch.full((2,), float(rank))) for rank, value in enumerate(values))
    assert {(value["environ"], value["cwd"]) for value in values} == {("yes", str(tmp_path))}
    assert len({value["random"] for value in values}) == 1


def test_processes_are_reused_and_their_state_is_not() -> None:
    first = run_ranks(2, change_state)
    assert run_ranks(2, change_state) == first


def test_kept_process_groups() -> None:
    assert [run_ranks(2, count_uses, pg="keep") for _ in range(3)] == [[1, 1], [2, 2], [3, 3]]
    assert run_ranks(2, count_uses) == [1, 1]
    assert run_ranks(2, count_uses, pg="keep") == [1, 1]
    assert run_ranks(3, count_uses, pg="keep") == [1, 1, 1]
    assert run_ranks(2, dist.is_initialized, pg="none") == [False, False]


def test_raising_rank_is_reported_with_its_values_and_output() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, fail_on_last_rank)
    assert time.monotonic() - start < 15
    message = str(caught.value)
    assert message.index("--- rank 1 failed") < message.index("--- rank 0 hung")
    assert "assert 41 == 42" in message
    assert "no answer 1 s after another rank had failed" in message
    assert "written by rank 1" in message
    assert "to the file descriptor of rank 0" in message
    assert "tests/helpers/rank_pool.py" not in message.split("--- rank 1 output")[0]
    assert run_ranks(2, dist.get_rank) == [0, 1]


def test_dead_rank_is_reported() -> None:
    with pytest.raises(RankFailure, match="rank 0 died\nexit code 7"):
        run_ranks(2, die_on_first_rank)
    assert run_ranks(2, dist.get_rank) == [0, 1]


def test_hanging_rank_is_reported_with_its_stack() -> None:
    run_ranks(2, dist.get_rank)  # so that the time is not spent on starting ranks
    with pytest.raises(RankFailure, match="rank 1 hung\nno answer within 2 s") as caught:
        run_ranks(2, hang_on_last_rank, timeout=2)
    assert "in hang_on_last_rank" in str(caught.value)
    assert "rank 0 passed" in str(caught.value)
    assert run_ranks(2, dist.get_rank) == [0, 1]


def test_rank_may_skip() -> None:
    with pytest.raises(pytest.skip.Exception, match="not here"):
        run_ranks(2, pytest.skip, "not here")


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(TypeError, match="must be picklable and importable"):
        run_ranks(2, lambda: None)
    with pytest.raises(ValueError, match="3 ranks cannot be dealt evenly to 2 nodes"):
        run_ranks(3, dist.get_rank, nodes=2)


@pytest.mark.parametrize("pg", ["reinit", "none"])
def test_lightning_trains_on_ranks(pg: ProcessGroupMode) -> None:
    first, second = run_ranks(2, fit_ddp, pg, pg=pg)
    assert_close(first, second, tol=0.0)
    whole = LanguageModel(transformer, layers=1)
    quiet_trainer(accelerator="cpu").fit(whole, token_loader(n=4, batch=4))
    assert_close(first, dict(whole.named_parameters()), what="weight")


@pytest.mark.ranks(4, nodes=2, pg="none", device="cpu")
def test_lightning_trains_on_pretended_nodes() -> None:
    trainer = quiet_trainer(strategy="ddp", num_nodes=2, max_steps=1)
    trainer.fit(LanguageModel(transformer, layers=1), token_loader(batch=1))
    assert (trainer.world_size, trainer.node_rank, trainer.local_rank) == (4, dist.get_rank() // 2, dist.get_rank() % 2)


@pytest.mark.gpu
@pytest.mark.ranks(2)
def test_ranks_on_cuda() -> None:
    assert dist.get_backend() == "nccl"
    assert torch.cuda.current_device() == rank_device().index == dist.get_rank()
    assert not torch.backends.cuda.matmul.allow_tf32
    total = torch.ones(3, device=rank_device())
    dist.all_reduce(total)
    assert total.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.gpu(2)
@pytest.mark.parametrize("pg", ["reinit", "none"])
def test_lightning_trains_on_cuda(pg: ProcessGroupMode) -> None:
    first, second = run_ranks(2, fit_ddp, pg, pg=pg)
    assert_close(first, second, tol=0.0)


def test_isolated_puts_state_back() -> None:
    environ, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    with isolated(), warnings.catch_warnings():
        change_state()
    assert dict(os.environ) == environ
    assert signal.getsignal(signal.SIGTERM) == handler
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.is_grad_enabled()
    assert lightning_rank() == 0


def test_marks_and_options_in_a_session_of_its_own(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_pool(), "fresh", False)  # to put it back: the inner session shares the pool
    pytester.makepyfile(SESSION)
    result = pytester.runpytest_inprocess("-p", "tests.conftest", "--fresh-ranks", "-rs")
    result.assert_outcomes(passed=2, failed=2, skipped=2)
    result.stdout.fnmatch_lines(["*--- rank 0 failed*", "*assert 1 == 2*", "*marks plain functions*"])
    result.stdout.fnmatch_lines(["*--- rank 0 output*", "*seen in the report*"])
    result.stdout.fnmatch_lines(["SKIPPED*needs 1000 CUDA devices*"])


SESSION = """
import os
import pytest

PIDS = set()

@pytest.mark.ranks(1, pg="none")
def test_fails():
    print("seen in the report")
    assert 1 == 2

@pytest.mark.ranks(1, pg="none")
@pytest.mark.parametrize("fresh", [1, 2])
def test_process_is_new(fresh):
    PIDS.add(fresh)
    assert PIDS == {fresh}

class TestMethod:
    @pytest.mark.ranks(1)
    def test_is_refused(self):
        pass

@pytest.mark.gpu(1000)
def test_needs_devices():
    pass

@pytest.mark.ranks(1, pg="none")
def test_skips():
    pytest.skip("in the rank")
"""


def answer(base: int) -> dict[str, object]:
    rank = dist.get_rank()
    return {
        "sum": base + rank,
        "tensor": torch.full((2,), float(rank), device=rank_device()),
        "environ": os.environ["FROM_MAIN"],
        "cwd": os.getcwd(),
        "random": torch.rand(()).item(),
    }


def change_state() -> tuple[int, float, dict[str, str], object, torch.dtype]:
    """What a careless test changes; returns its process and what it found."""
    found = os.getpid(), torch.rand(()).item(), signal.getsignal(signal.SIGTERM), torch.get_default_dtype()
    leaked = {name: value for name, value in os.environ.items() if name == "PL_GLOBAL_SEED"}
    os.environ["PL_GLOBAL_SEED"] = "7"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    set_lightning_rank(5)
    return found[0], found[1], leaked, found[2], found[3]


_uses: dict[object, int] = {}


def count_uses() -> int:
    """How many jobs this process group has served."""
    group = dist.group.WORLD
    _uses[group] = _uses.get(group, 0) + 1
    dist.barrier()
    return _uses[group]


def fail_on_last_rank() -> None:
    if dist.get_rank() == 0:
        os.write(1, b"to the file descriptor of rank 0\n")
        time.sleep(60)
    print("written by rank 1", file=sys.stderr)
    found = 41
    assert found == 42


def die_on_first_rank() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def hang_on_last_rank() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def fit_ddp(pg: str) -> dict[str, Tensor]:
    """Two DDP ranks of batch 2 are one process of batch 4: the sampler deals rows to ranks in turn."""
    assert dist.is_initialized() is (pg == "reinit")
    group = dist.group.WORLD
    module = LanguageModel(transformer, layers=1)
    trainer = quiet_trainer(strategy=DDPStrategy(), use_distributed_sampler=False)
    rows = TokenDataset(token_batches(n=4, batch=4))
    sampler: DistributedSampler[Tensor] = DistributedSampler(
        rows, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False
    )
    trainer.fit(module, DataLoader(rows, batch_size=2, sampler=sampler))
    assert trainer.world_size == dist.get_world_size() == 2
    assert trainer.global_rank == dist.get_rank()
    assert pg == "none" or dist.group.WORLD is group
    return {name: parameter.detach().cpu() for name, parameter in module.named_parameters()}
