"""Marks and fixtures of all tests.

``@pytest.mark.ranks(n, pg="reinit", timeout=60, device=None, nodes=1)`` runs the body of a plain test function on n
ranks (``rank_pool.run_ranks``, which tests may also call, explains the options). Parameters and fixtures are made in
the main process and pickled; ``monkeypatch`` is each rank's own, and ``tmp_path`` is one directory for all.

``@pytest.mark.gpu(n)`` needs n CUDA devices (for a ranks test: as many as ranks), or the test is skipped; a ranks test
so marked runs on CUDA over NCCL. With AUTOTP_TEST_DEVICE=cuda every ranks test that does not name a device counts as
marked so: ``AUTOTP_TEST_DEVICE=cuda pytest -m gpu``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Set before torch is imported: ranks share the cores, and asking CUDA whether it is there must not initialise it,
# because ranks are forked.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LIGHTNING_AUTOTP_CACHE", "off")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# Else every rank that compiles starts a pool of processes, which import torch again.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

from tests.helpers import rank_pool
from tests.helpers.hygiene import LIGHTNING_NOISE, isolated, leave_process_group

_STARTED_FIRST = (
    *("tests/slurm/", "tests/cli/", "tests/strategies/test_processes", "tests/recipe/"),
    "tests/checkpoint/test_pretrained_memory",
)
_OPTIONS = {"pg", "timeout", "device", "nodes"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fresh-ranks", action="store_true", help="fork new ranks for every test that runs on ranks")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(n, pg, timeout, device, nodes): run the test's body on n ranks")
    config.addinivalue_line("markers", "gpu(n): needs n CUDA devices (default: one, or one per rank)")
    for message in LIGHTNING_NOISE:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
    rank_pool.session_pool().fresh = config.getoption("--fresh-ranks")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("ranks") and _device(item) == "cuda" and not item.get_closest_marker("gpu"):
        item.add_marker(pytest.mark.gpu)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # files that start processes and jobs wait most of their time: begun first, others run beside them
    items.sort(key=lambda item: not any(name in item.nodeid for name in _STARTED_FIRST))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly and any(item.get_closest_marker("ranks") for item in session.items):
        rank_pool.session_pool().warm_up()


def pytest_runtest_setup(item: pytest.Item) -> None:
    ranks, gpu = item.get_closest_marker("ranks"), item.get_closest_marker("gpu")
    if gpu is None:
        return
    default = ranks.args[0] if ranks is not None else 1
    needed = gpu.args[0] if gpu.args else default
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} CUDA devices, has {torch.cuda.device_count()}")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    marker = pyfuncitem.get_closest_marker("ranks")
    if marker is None:
        return None
    if pyfuncitem.cls is not None or len(marker.args) != 1 or not set(marker.kwargs) <= _OPTIONS:
        raise pytest.UsageError(f"{pyfuncitem.nodeid}: ranks(n, {', '.join(sorted(_OPTIONS))}) marks plain functions")
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names if name != "monkeypatch"}
    call = (pyfuncitem.module.__name__, pyfuncitem.originalname, arguments, "monkeypatch" in names)
    try:
        rank_pool.run_ranks(marker.args[0], rank_pool.call_test, *call, **marker.kwargs)
    except rank_pool.RankFailure as failure:
        pytest.fail(str(failure), pytrace=False)
    return True


@pytest.fixture(autouse=True)
def _isolated(request: pytest.FixtureRequest) -> Iterator[None]:
    with isolated():
        # How run_ranks, called by the test or by its mark, learns where this test's ranks run.
        os.environ[rank_pool.DEVICE_VARIABLE] = _device(request.node)
        yield
    leave_process_group()


def _device(item: pytest.Item) -> str:
    ranks = item.get_closest_marker("ranks")
    named = ranks.kwargs.get("device") if ranks is not None else None
    return named or ("cuda" if item.get_closest_marker("gpu") else rank_pool.default_device())
