"""Lower precision: as exact as the unsharded run in the same precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_autotp import AutoTPStrategy, TPTrainingConfig
from lightning_autotp.config.switches import LossParallel
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.losses.loss_parallel import set_loss_parallel
from lightning_autotp.planning.sequence_parallel import parallel_sequence
from lightning_autotp.recipe.make_plan import make_plan
from lightning_autotp.sharding.state import sharded
from lightning_autotp.training.gradients import TPGradients
from tests.helpers.closeness import relative_errors
from tests.helpers.corners import corners_of
from tests.helpers.fit_cases import CASES
from tests.helpers.loss_runs import LossModel
from tests.helpers.models import quiet_trainer
from tests.helpers.preset_runs import Steps, build, parts, train
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharded_runs import (
    ACCUMULATE,
    CLIP,
    RecordedModel,
    assert_replicas_equal,
    batches_for,
    part_of,
    reference_run,
    sharded_run,
)
from tests.helpers.sharding import apply_plan

RATIO = 1.5
"""How much larger than the unsharded low-precision run's own error, against fp32, the sharded run's may be."""


def whole_error(tensors: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The 2-norm of the error of all tensors together, relative to theirs."""
    apart = sum(float((tensors[n].double() - t.double()).square().sum()) for n, t in exact.items())
    return (apart / sum(float(t.double().square().sum()) for t in exact.values())) ** 0.5


def mean_error(tensors: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The mean over tensors of the error in the terms of ``closeness``: in one tensor a run's noise is luck.

    Gradients that are truly zero (those of key biases) hold nothing but noise and are left out.
    """
    zero = [n for n in exact if n.endswith("k_proj.bias")]
    kept, want = ({n: t.float() for n, t in some.items() if n not in zero} for some in (tensors, exact))
    errors = relative_errors(kept, want)
    return sum(errors.values()) / len(errors)


def own_loss_run(
    strategy: AutoTPStrategy, factory: Callable[..., nn.Module], batches: list[Tensor], **options: Any
) -> RecordedModel:
    """The run of a Hugging Face model that computes its loss itself."""
    trainer = {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP} | options.pop("trainer")
    model = LossModel(batches, factory, "hf", **options)
    quiet_trainer(strategy=strategy, use_distributed_sampler=False, limit_val_batches=0, **trainer).fit(model)
    return model


def check(
    case: str,
    tp_size: int,
    precision: str = "bf16-true",
    run: Callable[..., RecordedModel] = sharded_run,
    **strategy: Any,
) -> None:
    """One optimizer step's gradients and the weights after it."""
    factory, options, rules = CASES[case]
    batches = batches_for(options.get("vocab", 128), steps=1)
    exact = reference_run(factory, batches, **options)
    own_precision: dict[str, Any] = {"mixed": True} if precision == "bf16-mixed" else {"dtype": torch.bfloat16}
    unsharded = reference_run(factory, batches, **own_precision, **options)
    plugins = AutoTPStrategy(autotp_size=tp_size, **rules, **strategy)
    model = run(plugins, factory, batches, trainer={"precision": precision}, **options)
    for measure, got, own, want in (
        (mean_error, model.record.gradients[0], unsharded.gradients[0], exact.gradients[0]),
        (whole_error, model.record.gradients[0], unsharded.gradients[0], exact.gradients[0]),
        (whole_error, model.record.weights, unsharded.weights, exact.weights),
    ):
        own_error = measure(part_of(model, own), part_of(model, want))
        error = measure(got, part_of(model, want))
        print(f"{measure.__name__}: {error:.5f}, unsharded {own_error:.5f}, ratio {error / own_error:.2f}")
        assert 0 < own_error < 0.1 and error <= RATIO * own_error, f"{measure.__name__}: {error} against {own_error}"
    assert_replicas_equal(model)


PRESETS = ["llama", "qwen3", "mixtral", "deepseek_v2", "phi3", "gpt_oss"]


@lru_cache(maxsize=2 * len(PRESETS))
def unsharded_step(case: str, dtype: torch.dtype) -> Steps:
    model, batches = build(case)
    return train(model.to(dtype), batches[:1])


def check_preset(
    case: str, tp_size: int, overlap: bool, sequence_parallel: bool = False, loss_parallel: LossParallel = False
) -> None:
    """A preset's model in bfloat16: one step's gradients and the weights after it, against the fp32 run."""

    exact, unsharded = unsharded_step(case, torch.float32), unsharded_step(case, torch.bfloat16)
    model, batches = build(case)
    plan = make_plan(model, TPTrainingConfig(autotp_size=tp_size))
    plan = parallel_sequence(model, plan) if sequence_parallel else plan
    mesh = build_mesh(tp_size, TPTrainingConfig().tensor_parallel)
    apply_plan(model, plan, mesh, rank_device(), overlap=overlap)
    set_loss_parallel(model, plan, loss_parallel)
    found = sharded(model)
    assert found is not None
    got = train(model.to(torch.bfloat16), batches[:1], TPGradients(model, found))
    for measure, ours, own, want in (
        (mean_error, got.gradients[0], unsharded.gradients[0], exact.gradients[0]),
        (whole_error, got.gradients[0], unsharded.gradients[0], exact.gradients[0]),
        (whole_error, got.weights, unsharded.weights, exact.weights),
    ):
        reference = parts(plan, mesh.tp_rank, want)
        own_error = measure(parts(plan, mesh.tp_rank, own), reference)
        error = measure(ours, reference)
        print(f"{case} {measure.__name__}: {error:.5f}, unsharded {own_error:.5f}, ratio {error / own_error:.2f}")
        assert 0 < own_error < 0.2 and error <= RATIO * own_error, f"{measure.__name__}: {error} against {own_error}"
    for name, layout in plan.layouts.items():
        if layout.is_replicated:
            first = got.weights[name].clone()
            dist.broadcast(first, src=0)
            assert torch.equal(got.weights[name], first), f"{name} is not bit-equal to rank 0's"


@pytest.mark.parametrize("case", PRESETS)
@pytest.mark.ranks(2)
def test_bf16_preset_tp2(case: str) -> None:
    check_preset(case, 2, overlap=True)


@pytest.mark.parametrize("case", corners_of(PRESETS, ["qwen3", "gpt_oss"]))
@pytest.mark.ranks(4)
def test_bf16_preset_tp4(case: str) -> None:
    check_preset(case, 4, overlap=False)


@pytest.mark.parametrize("case", PRESETS)
@pytest.mark.ranks(4)
def test_bf16_preset_tp4_with_sequence_and_loss_parallelism(case: str) -> None:
    check_preset(case, 4, overlap=True, sequence_parallel=True, loss_parallel=True)


@pytest.mark.parametrize("case", PRESETS)
@pytest.mark.ranks(2)
def test_bf16_preset_tp2_with_a_fused_loss(case: str) -> None:
    check_preset(case, 2, overlap=True, loss_parallel="fused")


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.ranks(2)
def test_a_run_with_a_fused_loss(precision: str) -> None:
    check("llama-tied", 2, precision, own_loss_run, tp_overlap_comm=True, loss_parallel="fused")


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.ranks(4)
def test_bf16_mixed_tp4(sequence_parallel: bool) -> None:
    check("llama-tied", 4, "bf16-mixed", tp_overlap_comm=True, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(2)
def test_bf16_tp2(case: str) -> None:
    check(case, 2, tp_overlap_comm=True)


@pytest.mark.parametrize("case", corners_of(CASES, ["llama-tied", "packed-qkv"]))
@pytest.mark.ranks(4)
def test_bf16_tp4(case: str) -> None:
    check(case, 4)


@pytest.mark.ranks(2)
def test_bf16_mixed_keeps_float32_parameters() -> None:
    factory, options, rules = CASES["llama-tied"]
    batches = batches_for(128, steps=1)
    exact = reference_run(factory, batches, **options)
    model = sharded_run(
        AutoTPStrategy(autotp_size=2, **rules), factory, batches, trainer={"precision": "bf16-mixed"}, **options
    )
    want = part_of(model, exact.gradients[0])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 0 < whole_error(model.record.gradients[0], want) < 0.02
    assert_replicas_equal(model)


class Overflowing(RecordedModel):
    """Plants an infinity into one rank's part of one gradient, at the second optimizer step."""

    scales: list[float]
    steps: list[dict[str, Tensor]]

    def on_train_start(self) -> None:
        self.scales, self.steps = [], []

    def on_after_backward(self) -> None:
        last = (self.trainer.fit_loop.epoch_loop.batch_progress.current.ready) % 2 == 0
        if last and len(self.scales) == 1 and dist.get_rank() == 1:
            name, parameter = next((n, p) for n, p in self.named_parameters() if "q_proj" in n)
            assert parameter.grad is not None
            parameter.grad[0, 0] = float("inf")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 1:
            scaler = self.trainer.precision_plugin.scaler  # type: ignore[attr-defined]
            self.scales.append(float(scaler.get_scale()))
            self.steps.append({n: p.detach().clone() for n, p in self.named_parameters()})


@pytest.mark.gpu(2)
@pytest.mark.ranks(2)
def test_16_mixed_skips_a_step_on_all_ranks_when_one_overflows() -> None:
    factory, options, rules = CASES["llama-tied"]
    batches = batches_for(128, steps=4)
    model = Overflowing(batches, factory, **options)
    trainer = quiet_trainer(
        strategy=AutoTPStrategy(autotp_size=2, **rules),
        precision="16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
    )
    trainer.fit(model)
    assert model.scales[1] == model.scales[0] / 2 and model.scales[2] == model.scales[3] == model.scales[1]
    assert all(torch.equal(model.steps[0][n], t) for n, t in model.steps[1].items()), "the second step was taken"
    assert not all(torch.equal(model.steps[1][n], t) for n, t in model.steps[2].items()), "the third was not"
    everyones: list[Any] = [None, None]
    dist.all_gather_object(everyones, model.scales)
    assert everyones[0] == everyones[1]
    assert_replicas_equal(model)


@pytest.mark.gpu(2)
@pytest.mark.ranks(2)
def test_16_mixed_trains_as_the_unsharded_run_does() -> None:
    factory, options, rules = CASES["llama-tied"]
    batches = batches_for(128, steps=3)
    exact = reference_run(factory, batches, **options)
    model = sharded_run(
        AutoTPStrategy(autotp_size=2, **rules), factory, batches, trainer={"precision": "16-mixed"}, **options
    )
    assert 0 < whole_error(model.record.gradients[0], part_of(model, exact.gradients[0])) < 5e-3
    assert whole_error(model.record.weights, part_of(model, exact.weights)) < 5e-3
    assert_replicas_equal(model)
