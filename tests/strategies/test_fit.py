"""A run through the Trainer is the unsharded run: initial weights, clipping, evaluation, repeated runs, optimizers."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _world
from torch.utils.data import DataLoader

from lightning_autotp import AutoTPStrategy
from lightning_autotp.training.gradients import shared_scaler
from tests.helpers import models
from tests.helpers.closeness import assert_close
from tests.helpers.small_nets import (
    RULES,
    WIDTH,
    Net,
    Regressor,
    Rows,
    alone,
    assert_replicas_equal,
    everyones,
    full_weights,
    parts_of,
    plugin_of,
    strategy,
    trainer,
    unsharded,
    weights,
)


def assert_unsharded_run(model: LightningModule, reference: LightningModule, **options: Any) -> None:
    """This rank's weights are its parts of what ``reference`` has after training alone."""
    assert_close(weights(model), parts_of(model, unsharded(reference, **options)), 1e-4, "weight")


# ---- initial weights


class Unseeded(Regressor):
    """Every rank draws weights of its own, here or in ``configure_model``."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())
        del self.net
        if not late:
            self.net = Net()

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = Net()


@pytest.mark.parametrize("late", [False, True], ids=["in-init", "in-configure_model"])
@pytest.mark.ranks(4)
def test_without_a_seed_all_ranks_start_from_the_weights_of_rank_zero(late: bool) -> None:
    model = Unseeded(late)
    trainer(strategy(2)).validate(model, DataLoader(Rows()), verbose=False)  # nothing trains
    torch.manual_seed(0)
    first = {f"net.{name}": tensor for name, tensor in weights(Net()).items()}
    assert full_weights(model).keys() == first.keys()
    assert all(torch.equal(tensor, first[name]) for name, tensor in full_weights(model).items())
    assert_replicas_equal(model)


@pytest.mark.ranks(4)
def test_a_buffer_starts_from_the_value_of_rank_zero() -> None:
    model = Regressor()
    model.net.register_buffer("scale", torch.tensor([float(dist.get_rank() + 1)]))
    model.net.register_buffer("absent", None)
    trainer(strategy(2)).fit(model)
    assert everyones(float(model.net.scale)) == [1.0] * 4  # type: ignore[arg-type]


# ---- clipping

CLIPS: dict[str, dict[str, Any]] = {
    "norm": {"gradient_clip_val": 0.05},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


class Stepping(models.LanguageModel):
    """SGD, so that a gradient's length matters, on batches that are cut by data parallel rank."""

    def train_dataloader(self) -> Any:
        rank, size = getattr(self.trainer.strategy, "dp_rank", 0), getattr(self.trainer.strategy, "dp_size", 1)
        rows = [row for batch in models.token_batches(n=3, vocab=64) for row in batch.chunk(size)[rank]]
        return DataLoader(rows, batch_size=4 // size)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def small(**options: Any) -> Stepping:
    return Stepping(models.tiny_llama, layers=1, hidden=32, heads=4, kv_heads=4, vocab=64, **options)


def moved(model: LightningModule, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far training took the weights from where they were."""
    return {name: tensor - start[name] for name, tensor in weights(model).items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.ranks(4)
def test_clipping_is_that_of_the_unsharded_run_and_is_active(clip: str, tied: bool) -> None:
    options = CLIPS[clip]
    reference, unclipped = small(tied=tied), small(tied=tied)
    start = weights(reference)
    unsharded(reference, **options)
    unsharded(unclipped)
    clipped_by = max(float(t.norm()) for t in moved(reference, start).values())
    assert clipped_by < 0.5 * max(float(t.norm()) for t in moved(unclipped, start).values())
    for size in (2, 4):
        model = small(tied=tied)
        trainer(AutoTPStrategy(autotp_size=size), **options).fit(model)
        # the way that the weights went, and not only where they are: the steps are small
        want = parts_of(model, moved(reference, start))
        assert_close(moved(model, parts_of(model, start)), want, 1e-3, "step")
        assert_replicas_equal(model)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.ranks(2)
def test_clipping_in_bf16_mixed_is_alike_on_all_ranks_and_near_the_unsharded_run(clip: str) -> None:
    options = CLIPS[clip] | {"precision": "bf16-mixed"}
    reference, model = small(), small()
    start = weights(reference)
    unsharded(reference, **options)
    trainer(AutoTPStrategy(autotp_size=2), **options).fit(model)
    assert_replicas_equal(model)
    want = parts_of(model, moved(reference, start))
    for name, step in moved(model, parts_of(model, start)).items():
        assert float((step - want[name]).norm()) < 0.1 * float(want[name].norm()), name


@pytest.mark.ranks(2)
def test_a_parameter_without_gradient_does_not_disturb_the_norm() -> None:
    model, reference = small(), small()
    for each in (model, reference):
        each.model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)  # type: ignore[union-attr,index]
    start = weights(reference)
    unsharded(reference, gradient_clip_val=0.05)
    trainer(AutoTPStrategy(autotp_size=2), gradient_clip_val=0.05).fit(model)
    steps = moved(model, parts_of(model, start))
    frozen = "model.model.layers.0.self_attn.k_proj.weight"
    assert not steps.pop(frozen).any()
    want = parts_of(model, moved(reference, start))
    del want[frozen]
    assert_close(steps, want, 1e-3, "step")


class ClipsByHand(Stepping):
    def __init__(self, **options: Any) -> None:
        super().__init__(models.tiny_llama, layers=1, hidden=32, heads=4, kv_heads=4, vocab=64, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()


@pytest.mark.ranks(4)
def test_clipping_by_hand_takes_the_true_norm_too() -> None:
    reference, model = small(), ClipsByHand()
    start = weights(reference)
    unsharded(reference, gradient_clip_val=0.05)
    trainer(AutoTPStrategy(autotp_size=2)).fit(model)
    assert_close(moved(model, parts_of(model, start)), parts_of(model, moved(reference, start)), 1e-3, "step by hand")


# ---- loss scaling


@pytest.mark.ranks(2)
def test_an_overflow_on_one_rank_skips_the_step_and_lowers_the_scale_on_all() -> None:
    model = Regressor()
    trainer(strategy(2)).fit(model)
    own = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, growth_factor=3.0, backoff_factor=0.25)
    scaler = shared_scaler(own, plugin_of(model).mesh)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)

    def step(gradient: float) -> tuple[float, float]:
        parameter.grad = None
        scaler.scale(parameter * gradient).sum().backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return float(parameter), float(scaler.get_scale())

    assert step(0.5) == (0.5, 8.0)
    assert step(float("inf") if dist.get_rank() == 1 else 0.5) == (0.5, 2.0)
    assert step(0.25) == (0.25, 2.0)
    assert step(0.25) == (0.0, 6.0)  # it grows as the Trainer's own would


@pytest.mark.ranks(2)
def test_a_shared_scaler_goes_on_from_the_state_of_the_trainers() -> None:
    model = Regressor()
    trainer(strategy(2)).fit(model)
    own = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=5)
    own.scale(torch.ones(1))  # makes its state
    state = own.state_dict() | {"scale": 32.0, "_growth_tracker": 3}
    own.load_state_dict(state)
    assert shared_scaler(own, plugin_of(model).mesh).state_dict() == state


# ---- evaluation


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.ranks(4)
def test_validate_test_and_predict_after_fit_leave_the_shards_and_compute_what_the_whole_model_does(size: int) -> None:
    model, loader = Regressor(), DataLoader(Rows(6, seed=3), batch_size=3)
    run = trainer(strategy(size))
    run.fit(model)
    before = weights(model)
    validated = run.validate(model, loader, verbose=False)
    tested = run.test(model, loader, verbose=False)
    predicted = run.predict(model, loader)
    assert predicted is not None
    assert all(torch.equal(after, before[name]) for name, after in weights(model).items())
    single = Net()
    single.load_state_dict({name.removeprefix("net."): tensor for name, tensor in full_weights(model).items()})
    rows = Rows(6, seed=3).rows
    torch.testing.assert_close(torch.cat(predicted), single(rows))  # type: ignore[arg-type]
    loss = float((single(rows) - rows.flip(-1)).square().mean())
    assert validated[0]["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert tested[0]["test_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.ranks(4)
def test_an_evaluation_without_fit_shards_the_model_and_each_rank_keeps_its_own_part(stage: str) -> None:
    model = Regressor()
    options = {} if stage == "predict" else {"verbose": False}
    getattr(trainer(strategy(2)), stage)(model, DataLoader(Rows(6), batch_size=3), **options)
    want = parts_of(model, weights(Regressor()))
    assert all(torch.equal(tensor, want[name]) for name, tensor in weights(model).items())


# ---- one run after another


def groups() -> int:
    return len(_world.pg_map)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.ranks(4)
def test_fit_validate_and_fit_again_is_what_the_unsharded_trainer_does(size: int) -> None:
    loader = DataLoader(Rows(6), batch_size=3)

    def runs(run: Any, model: Regressor) -> None:
        run.fit(model)
        run.validate(model, loader, verbose=False)
        run.fit_loop.max_epochs = 2
        run.fit(model)

    model, reference = Regressor(), Regressor()
    runs(trainer(strategy(size)), model)
    with alone():
        runs(trainer("auto", devices=1), reference)
    assert_close(weights(model), parts_of(model, weights(reference)), 1e-4, "weight")
    assert_replicas_equal(model)


@pytest.mark.ranks(4)
def test_entry_points_make_no_further_groups_and_a_second_model_is_sharded_by_the_same_trainer() -> None:
    first, second, loader = Regressor(), Regressor(), DataLoader(Rows(6), batch_size=3)
    run = trainer(strategy(2))
    run.fit(first)
    made = groups()
    trained = weights(first)
    run.validate(first, loader, verbose=False)
    run.test(second, loader, verbose=False)
    untrained = parts_of(second, weights(Regressor()))
    assert all(torch.equal(tensor, untrained[name]) for name, tensor in weights(second).items())
    run.fit_loop.max_epochs = 2
    run.fit(second)
    assert groups() == made
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(first).items())
    assert any(not torch.equal(tensor, untrained[name]) for name, tensor in weights(second).items())


@pytest.mark.parametrize("new_trainer", [False, True], ids=["same-trainer", "new-trainer"])
@pytest.mark.ranks(4)
def test_a_second_fit_does_not_scale_a_partial_gradient_twice(new_trainer: bool) -> None:
    model, reference = Partial(), Partial()
    run = trainer(strategy(2, partition_config=SUMMED))
    run.fit(model)
    if new_trainer:
        run = trainer(strategy(2, partition_config=SUMMED))
    else:
        run.fit_loop.max_epochs = 2
    run.fit(model)
    with alone():
        for _ in range(2):
            trainer("auto", devices=1).fit(reference)
    assert_close(weights(model), parts_of(model, weights(reference)), 1e-4, "weight")


class Scaled(Net):
    """Weighs every hidden unit, between the column and the row cut, with one weight per position in a rank's part."""

    def __init__(self) -> None:
        super().__init__(hidden=8)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 2))

    def between(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        out: Tensor = self.down((hidden.unflatten(-1, (-1, 2)) * self.gain).flatten(-2))
        return out


class Partial(Regressor):
    """``net.gain`` is whole on every rank, and its gradient is partial there."""

    def __init__(self) -> None:
        super().__init__(Scaled)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


SUMMED: dict[str, Any] = {
    "layer_specs": [
        *RULES["layer_specs"],
        {"patterns": [r".*\.gain"], "partition_type": "skip", "grad_allreduce": True},
    ]
}


@pytest.mark.ranks(4)
def test_a_model_sharded_for_another_size_is_an_error() -> None:
    model = Regressor()
    trainer(strategy(2)).fit(model)
    with pytest.raises(ValueError, match="sharded for a tensor parallel size of 2 by an earlier run, and autotp_size"):
        trainer(strategy(4)).fit(model)


@pytest.mark.ranks(2)
def test_a_fitted_model_can_be_copied() -> None:
    model = Regressor()
    trainer(strategy(2)).fit(model)
    net = copy.deepcopy(model.net)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(net.parameters(), model.net.parameters()))
    assert torch.equal(net(Rows().rows), model.net(Rows().rows))


# ---- optimizers


class EarlyOptimizer(Regressor):
    """Makes its optimizer where the model is still whole."""

    def __init__(self) -> None:
        super().__init__()
        self.early = torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-5)

    def configure_optimizers(self) -> Any:
        return self.early


@pytest.mark.ranks(4)
def test_an_optimizer_made_in_init_trains_because_parameters_stay_the_same_objects() -> None:
    model = EarlyOptimizer()
    before = list(model.parameters())
    trainer(strategy(2)).fit(model)
    assert all(now is then for now, then in zip(model.parameters(), before))
    assert_unsharded_run(model, EarlyOptimizer())


class ForeignOptimizer(Regressor):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.ones(3, 5))], lr=0.1)


@pytest.mark.ranks(2)
def test_an_optimizer_of_parameters_that_are_not_the_models_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(SGD\) holds a parameter of shape \[3, 5\] that is not in the model"):
        trainer(strategy(2)).fit(ForeignOptimizer())


class StaleOptimizer(Regressor):
    """Its optimizer holds the parameters of a network that is replaced before training."""

    def __init__(self) -> None:
        super().__init__()
        self.early = torch.optim.AdamW(self.parameters())

    def configure_model(self) -> None:
        self.net = Net()

    def configure_optimizers(self) -> Any:
        return self.early


@pytest.mark.ranks(2)
def test_an_optimizer_of_replaced_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="Create it in `configure_optimizers`"):
        trainer(strategy(2)).fit(StaleOptimizer())


@pytest.mark.parametrize("factory", [models.transformer, models.tiny_llama])
@pytest.mark.ranks(2)
def test_tied_weights_are_one_parameter_after_sharding(factory: Callable[..., nn.Module]) -> None:
    model: Any = Stepping(factory, tied=True, layers=1)
    rules = {
        "layer_specs": [
            {"patterns": [r".*\.(q|k|v|gate|up)_proj\.weight"]},
            {"patterns": [r".*\.(o|down)_proj\.weight", r".*embed_tokens\.weight"], "partition_type": "row"},
            {"patterns": [r".*lm_head\.weight"], "gather_output": True},
        ]
    }
    trainer(AutoTPStrategy(autotp_size=2, partition_config=rules)).fit(model)
    inner = getattr(model.model, "model", model.model)
    assert inner.embed_tokens.weight is model.model.lm_head.weight
    assert inner.embed_tokens.weight.shape == (64, 64)


# ---- compile


@pytest.mark.parametrize("what", ["submodule", "module", "in-configure_model"])
@pytest.mark.ranks(4)
def test_compiled_models_are_accepted_and_train_as_others_do(what: str) -> None:
    model: Any = CompilesLate() if what == "in-configure_model" else Regressor()
    if what == "submodule":
        model.net.compile(backend="eager")
    passed: Any = torch.compile(model, backend="eager") if what == "module" else model
    trainer(strategy(2)).fit(passed)
    names = {name.replace("._orig_mod", ""): tensor for name, tensor in weights(model).items()}
    plain = Regressor()
    trainer(strategy(2)).fit(plain)
    assert_close(names, parts_of(plain, unsharded(Regressor())), 1e-4, "weight")


class CompilesLate(Regressor):
    def configure_model(self) -> None:
        if not isinstance(self.net, torch._dynamo.OptimizedModule):
            self.net: Any = torch.compile(self.net, backend="eager")


# ---- dtype


@pytest.mark.parametrize(
    ("dtype", "precision", "parameters"),
    [
        ("bfloat16", "32-true", torch.bfloat16),
        (torch.float64, "32-true", torch.float64),
        ("bf16", "bf16-true", torch.bfloat16),
        ("float32", "bf16-mixed", torch.float32),
        (None, "32-true", torch.float32),
        (None, "bf16-true", torch.bfloat16),
        (None, "64-true", torch.float64),
    ],
)
@pytest.mark.ranks(2)
def test_dtype_is_applied_where_it_is_set(dtype: Any, precision: Any, parameters: torch.dtype) -> None:
    model = Regressor()
    rows: Any = Rows(4).rows.to(parameters)
    trainer(strategy(2, dtype=dtype), precision=precision).fit(model, DataLoader(rows, batch_size=2))
    assert {tensor.dtype for tensor in model.parameters()} == {parameters}


@pytest.mark.parametrize(
    ("dtype", "precision", "in_force"),
    [("bf16", "bf16-mixed", "float32"), ("fp16", "bf16-true", "bfloat16"), ("bf16", "64-true", "float64")],
)
@pytest.mark.ranks(2)
def test_a_dtype_that_contradicts_the_precision_is_an_error(dtype: str, precision: Any, in_force: str) -> None:
    with pytest.raises(ValueError, match=rf"contradicts Trainer\(precision='{precision}'\).*torch.{in_force}"):
        trainer(strategy(2, dtype=dtype), precision=precision).fit(Regressor())


@pytest.mark.ranks(2)
def test_weights_that_the_model_brought_in_another_dtype_keep_it() -> None:
    model = Regressor(partial(_half_norm))
    trainer(strategy(2)).fit(model)
    assert (model.net.norm.weight.dtype, model.net.up.weight.dtype) == (torch.float64, torch.float32)  # type: ignore[union-attr]


def _half_norm() -> Net:
    net = Net()
    net.norm = DoubleNorm(WIDTH)
    return net


class DoubleNorm(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.LayerNorm's name for it
        return super().forward(input.double()).float()


@pytest.mark.ranks(1)
def test_the_last_runs_model_is_gone_when_the_next_one_is_made() -> None:
    run = trainer(strategy(1))
    first = Regressor()
    run.validate(first, DataLoader(Rows(4)), verbose=False)
    gone = weakref.ref(first)
    del first
    alive: list[bool] = []

    class Next(Regressor):
        def configure_model(self) -> None:
            gc.collect()
            alive.append(gone() is not None)

    run.validate(Next(), DataLoader(Rows(4)), verbose=False)
    assert alive and not any(alive)
