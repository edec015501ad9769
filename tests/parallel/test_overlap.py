"""Matmuls fused with the collective beside them: the same numbers, chosen by measured size; no wait for the GPU."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_autotp import AutoTPStrategy, TPTrainingConfig
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.losses.loss_parallel import set_loss_parallel
from lightning_autotp.parallel import overlap
from lightning_autotp.parallel.overlap import SIZES, Overlap
from lightning_autotp.planning.sequence_parallel import parallel_sequence
from lightning_autotp.recipe.make_plan import make_plan
from lightning_autotp.sharding.state import sharded
from lightning_autotp.training.gradients import TPGradients
from tests.helpers import models
from tests.helpers.models import TokenDataset, quiet_trainer, token_batches
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharding import apply_plan

SLOW, FAST = [1.0] * len(SIZES), [0.5] * len(SIZES)


def sharded_llama(dtype: torch.dtype, *, on: bool = True, compiled: bool = False) -> Any:
    model: Any = models.tiny_llama(kv_heads=4, hidden=256, vocab=256, max_position_embeddings=4096)
    model.to(rank_device(), dtype)
    plan = parallel_sequence(model, make_plan(model, TPTrainingConfig(autotp_size=2)))
    apply_plan(model, plan, build_mesh(2, TPTrainingConfig().tensor_parallel), rank_device(), overlap=on)
    set_loss_parallel(model, plan, True)
    if compiled:
        for layer in model.model.layers:
            layer.compile(fullgraph=True)
    return model


def forms(model: nn.Module) -> Overlap:
    found = sharded(model)
    assert found is not None
    return found.overlap


def gradients(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    found = sharded(model)
    assert found is not None
    complete = TPGradients(model, found)
    model(input_ids=tokens, labels=tokens).loss.backward()
    complete.complete()
    complete.remove()
    return {name: p.grad.detach().double() for name, p in model.named_parameters()}


def distance(some: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum(float((some[name] - other[name]).square().sum()) for name in other) ** 0.5


@pytest.mark.ranks(2)
def test_every_region_has_its_forms_by_full_sizes() -> None:
    model = sharded_llama(torch.float32)
    names = {
        "gather 256 -> 256 + 128 + 128": [(128, 256), (64, 256), (64, 256)],
        "gather 256 -> 512 + 512": [(256, 256), (256, 256)],
        "scatter 256 -> 256": [(256, 128)],
        "scatter 512 -> 256": [(256, 256)],
        "gather 256 -> 256": [(128, 256)],
        "gather 256 -> 512": [(256, 256)],
    }
    assert {name: [tuple(w.shape) for w in weights()] for name, weights in forms(model).weights.items()} == names
    forms(model).measure()
    assert forms(model).fused_from == {}  # fp32, and on a CPU


@pytest.mark.parametrize(
    ("fused", "found"),
    [
        (FAST, SIZES[0]),
        (SLOW, None),
        ([2.0, 0.9, 0.5], SIZES[1]),
        ([0.5, 0.9, 1.1], None),
        ([0.9, 1.0, 0.96], SIZES[2]),
    ],
)
def test_a_form_is_fused_from_where_it_stays_faster(fused: list[float], found: int | None) -> None:
    assert overlap._fastest_from({"nccl": SLOW, "fused": fused}) == found


def test_the_cache_keeps_what_other_machines_measured(tmp_path: Path) -> None:
    path = tmp_path / "new" / "overlap.json"
    assert overlap._read(path) == {}
    overlap._write(path, "a", {"scatter 1 -> 2": {"nccl": SLOW, "fused": FAST}})
    overlap._write(path, "b", {"scatter 1 -> 2": {"nccl": FAST, "fused": SLOW}})
    overlap._write(path, "a", {"gather 1 -> 2": {"nccl": FAST, "fused": SLOW}})
    found = json.loads(path.read_text())
    assert found["tokens"] == list(SIZES) and set(found["a"]) == {"scatter 1 -> 2", "gather 1 -> 2"}
    assert overlap._read(path)["b"] == {"scatter 1 -> 2": {"nccl": FAST, "fused": SLOW}}
    path.write_text(json.dumps({**found, "tokens": [1]}))
    assert overlap._read(path) == {}  # measured at other sizes
    path.write_text("{")
    assert overlap._read(path) == {}
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="could not be written"):
        overlap._write(tmp_path / "file" / "overlap.json", "a", {})


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compile"])
@pytest.mark.gpu
@pytest.mark.ranks(2, device="cuda", timeout=240)
def test_fused_forms_give_the_numbers_of_nccl(compiled: bool) -> None:
    torch._dynamo.reset()
    tokens = token_batches(n=1, batch=2, seq=2048, vocab=256)[0].to(rank_device())
    exact = gradients(sharded_llama(torch.float32), tokens)
    plain = gradients(sharded_llama(torch.bfloat16, compiled=compiled), tokens)
    model = sharded_llama(torch.bfloat16, compiled=compiled)
    forms(model).fused_from = dict.fromkeys(forms(model).weights, 0)
    gradients(model, tokens)  # compiles
    operators = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        fused = gradients(model, tokens)
    called = [event.name for event in profiler.events() or [] if event.name in [f"symm_mem::{o}" for o in operators]]
    # a block: two gathers and two scatters forward, two gathers of the rows' gradients backward
    assert [called.count(f"symm_mem::{name}") for name in operators] == [8, 4]
    assert distance(fused, exact) <= 1.5 * distance(plain, exact)


@pytest.mark.gpu
@pytest.mark.ranks(2, device="cuda", timeout=240)
def test_forms_are_measured_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = sharded_llama(torch.bfloat16)
    forms(model).measure()
    path = tmp_path / "lightning_autotp" / "overlap.json"
    machine = f"2 x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    torch.distributed.barrier()
    measured = json.loads(path.read_text())[machine]
    assert measured.keys() == forms(model).weights.keys()
    assert all(time > 0 for form in measured.values() for times in form.values() for time in times)
    monkeypatch.setattr(Overlap, "_times", None)  # another run asks the file
    again = sharded_llama(torch.bfloat16)
    forms(again).measure()
    assert forms(again).fused_from == forms(model).fused_from
    off = sharded_llama(torch.bfloat16, on=False)
    forms(off).measure()
    assert forms(off).fused_from == {}


# -- nothing waits for the GPU ----------------------------------------------------------------------------------------


class Watched(models.LanguageModel):
    """Notes which lines make the host wait for the GPU from the third step on."""

    def __init__(self) -> None:
        super().__init__(models.tiny_llama, kv_heads=4, vocab=256)
        self.seen: set[str] = set()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.catcher = warnings.catch_warnings(record=True)
            self.caught = self.catcher.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.seen = {f"{w.filename}:{w.lineno}" for w in self.caught if "synchroniz" in str(w.message)}
        self.catcher.__exit__(None, None, None)

    def train_dataloader(self) -> Any:
        return DataLoader(TokenDataset(token_batches(n=6, batch=4, seq=64, vocab=256)), batch_size=4)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compile"])
@pytest.mark.gpu
@pytest.mark.ranks(2, device="cuda", timeout=240)
def test_no_step_waits_for_the_gpu_because_of_us(compiled: bool) -> None:
    torch._dynamo.reset()
    strategy = AutoTPStrategy(
        autotp_size=2, sequence_parallel=True, loss_parallel=True, tp_overlap_comm=True, compile=compiled
    )
    model = Watched()
    trainer = quiet_trainer(strategy=strategy, precision="bf16-true", gradient_clip_val=0.5, max_steps=6)
    trainer.fit(model)
    print("\n".join(sorted(model.seen)))
    ours = str(Path(overlap.__file__).parents[1])
    assert not [place for place in model.seen if place.startswith(ours)]
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="synchroniz"):  # the mode does see it
        torch.ones(1, device=rank_device()).item()
    torch.cuda.set_sync_debug_mode("default")
