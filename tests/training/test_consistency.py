"""The net under every plan: ranks of one model that come to different numbers raise, on all ranks, with the fix."""

from __future__ import annotations

import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_autotp import AutoTPStrategy
from lightning_autotp.distributed.collectives import Over
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.recording import RecordingCollectives
from lightning_autotp.training.consistency import DisagreementError, FirstLook
from tests.helpers.closeness import assert_close
from tests.helpers.small_nets import RULES, Net, Regressor, Rows, parts_of, trainer, unsharded, weights
from tests.helpers.small_nets import strategy as proving_strategy


def strategy(size: int = 2, **options: Any) -> AutoTPStrategy:
    """The strategy without the proof, under which these comparisons are the net."""
    return proving_strategy(size, **({"proof": "off"} | options))


class Heads(Net):
    """Normalizes every hidden pair between the cuts with one weight ``[2]``, as Qwen3 does the heads of q and k."""

    def __init__(self, trains: bool = True) -> None:
        super().__init__(hidden=8)
        self.head_norm = nn.Parameter(torch.tensor([0.5, 1.5]), requires_grad=trains)

    def between(self, x: Tensor) -> Tensor:
        pairs = functional.gelu(self.up(self.norm(x))).unflatten(-1, (-1, 2))
        out: Tensor = self.down((pairs * self.head_norm).flatten(-2))
        return out


class CompiledHeads(Heads):
    """Something of it is compiled, so that gradients of whole parameters are averaged in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Identity()
        self.unused.compile(backend="eager")


class FrozenHeads(Heads):
    def __init__(self) -> None:
        super().__init__(trains=False)


def with_rule(**rule: Any) -> dict[str, Any]:
    return {"layer_specs": [*RULES["layer_specs"], {"patterns": [r".*head_norm"], "partition_type": "skip", **rule}]}


SUMMED = with_rule(grad_allreduce=True)


# ---- before the first optimizer step


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.ranks(4)
def test_a_partial_gradient_that_no_rule_sums_is_an_error_that_names_the_parameter(size: int, accumulate: int) -> None:
    model = Regressor(Heads)
    start = weights(model)
    with pytest.raises(DisagreementError, match=r"the gradient of net\.head_norm .*'grad_allreduce': true") as raised:
        trainer(strategy(size), accumulate_grad_batches=accumulate).fit(model)
    assert "net.norm" not in str(raised.value)  # its gradient is whole
    assert torch.equal(model.net.head_norm, start["net.head_norm"])  # type: ignore[arg-type]  # nothing was stepped


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.ranks(2)
def test_a_partial_gradient_is_found_before_those_of_a_compiled_model_are_averaged(clip: float | None) -> None:
    with pytest.raises(DisagreementError, match=r"the gradient of net\.head_norm .*'grad_allreduce': true"):
        trainer(strategy(2), gradient_clip_val=clip).fit(Regressor(CompiledHeads))
    model = Regressor(CompiledHeads)
    options: dict[str, Any] = {"gradient_clip_val": clip}
    trainer(strategy(2, partition_config=SUMMED), **options).fit(model)
    assert_close(weights(model), parts_of(model, unsharded(Regressor(Heads), **options)), 1e-4, "weight")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.ranks(4)
def test_a_partial_gradient_that_a_rule_sums_trains_as_on_one_process(size: int, accumulate: int) -> None:
    model = Regressor(Heads)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.05}
    trainer(strategy(size, partition_config=SUMMED), **options).fit(model)
    assert_close(weights(model), parts_of(model, unsharded(Regressor(Heads), **options)), 1e-4, "weight")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.ranks(2)
def test_a_partial_gradient_is_found_in_bf16_too_and_a_right_one_is_no_alarm(precision: Any) -> None:
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32

    class Cast(Regressor):
        def loss(self, batch: Tensor) -> Tensor:
            return super().loss(batch.to(dtype))

    with pytest.raises(DisagreementError, match=r"the gradient of net\.head_norm"):
        trainer(strategy(2), precision=precision).fit(Cast(Heads))
    right = Cast(Heads)
    trainer(strategy(2, partition_config=SUMMED), precision=precision).fit(right)
    assert right.trainer.global_step == 4


@pytest.mark.ranks(2)
def test_a_frozen_parameter_between_the_cuts_needs_no_rule_and_may_be_thawed_with_one() -> None:
    frozen = Regressor(FrozenHeads)
    trainer(strategy(2)).fit(frozen)
    assert_close(weights(frozen), parts_of(frozen, unsharded(Regressor(FrozenHeads))), 1e-4, "weight")

    def thaw(model: Regressor) -> Regressor:
        def on_train_start() -> None:
            model.net.get_parameter("head_norm").requires_grad_()

        model.on_train_start = on_train_start  # type: ignore[method-assign]
        return model

    thawed, reference = thaw(Regressor(FrozenHeads)), thaw(Regressor(FrozenHeads))
    trainer(strategy(2, partition_config=SUMMED)).fit(thawed)
    assert_close(weights(thawed), parts_of(thawed, unsharded(reference)), 1e-4, "weight")


@pytest.mark.ranks(2)
def test_check_agreement_false_lets_a_partial_gradient_pass() -> None:
    model = Regressor(Heads)
    trainer(strategy(2, check_agreement=False)).fit(model)
    assert model.trainer.global_step == 4


@pytest.mark.ranks(2)
def test_every_fit_compares_again() -> None:
    model = Regressor(Heads)
    run = trainer(strategy(2))
    model.net.get_parameter("head_norm").requires_grad_(False)
    run.fit(model)
    model.net.get_parameter("head_norm").requires_grad_(True)
    run.fit_loop.max_epochs = 2
    with pytest.raises(DisagreementError, match=r"net\.head_norm"):
        run.fit(model)


class Noisy(Regressor):
    """Ranks draw different numbers in what they hold alike."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch) * (1 + 0.1 * dist.get_rank())


@pytest.mark.ranks(2)
def test_a_loss_that_differs_is_an_error_that_speaks_of_the_loss() -> None:
    with pytest.raises(DisagreementError, match="disagree on the loss .*drew different random numbers"):
        trainer(strategy(2)).fit(Noisy())


class InDict(Noisy):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "extra": 1}


@pytest.mark.ranks(2)
def test_a_loss_in_a_dict_is_compared_too() -> None:
    with pytest.raises(DisagreementError, match="disagree on the loss"):
        trainer(strategy(2)).fit(InDict())


class NotANumber(Regressor):
    """Its first loss is not finite, on all ranks or on one."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self.only = rank

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        here = self.only is None or dist.get_rank() == self.only
        return self.loss(batch) * (float("nan") if batch_idx == 0 and here else 1.0)


@pytest.mark.ranks(2)
def test_a_loss_that_is_not_finite_anywhere_is_no_disagreement_but_on_one_rank_it_is() -> None:
    model = NotANumber()
    trainer(strategy(2)).fit(model)
    assert model.trainer.global_step == 4
    with pytest.raises(DisagreementError, match="not finite on one"):
        trainer(strategy(2)).fit(NotANumber(rank=1))


class Bypassing(Net):
    """Reads a cut weight without calling its layer."""

    def between(self, x: Tensor) -> Tensor:
        return super().between(x) + x * self.up.weight.mean()


@pytest.mark.ranks(2)
def test_code_that_reads_a_cut_weight_is_found() -> None:
    with pytest.raises(DisagreementError, match="disagree on the loss.*code outside a cut layer reads a cut weight"):
        trainer(strategy(2)).fit(Regressor(Bypassing))


# ---- before the first evaluation is believed


class Quiet(Regressor):
    """Its steps return nothing: only what the network gives can be compared."""

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.ranks(4)
def test_an_evaluation_that_differs_is_an_error_at_its_first_batch(stage: str) -> None:
    steps: list[int] = []

    class Counted(Quiet):
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            steps.append(1)
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    options = {} if stage == "predict" else {"verbose": False}
    with pytest.raises(DisagreementError, match=r"disagree on the model's output.*reads a cut weight"):
        getattr(trainer(strategy(2)), stage)(Counted(Bypassing), DataLoader(Rows(6), batch_size=2), **options)
    assert steps == [1]


@pytest.mark.ranks(2)
def test_the_sanity_check_of_fit_finds_it_before_training() -> None:
    class Validated(Regressor):
        def val_dataloader(self) -> Any:
            return DataLoader(Rows(4), batch_size=2)

    model = Validated(Bypassing)
    with pytest.raises(DisagreementError, match="disagree on the model's output"):
        trainer(strategy(2)).fit(model)
    assert model.trainer.global_step == 0


@pytest.mark.ranks(2)
def test_check_agreement_false_lets_an_evaluation_pass() -> None:
    predicted = trainer(strategy(2, check_agreement=False)).predict(Regressor(Bypassing), DataLoader(Rows(4)))
    assert predicted is not None and len(predicted) == 4


@pytest.mark.ranks(2)
def test_a_right_evaluation_is_compared_without_alarm_whatever_its_step_returns() -> None:
    class Returns(Regressor):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"rows": self.net(batch), "labels": ["a"], "of_rank": self.global_rank}

    predicted = trainer(strategy(2)).predict(Returns(), DataLoader(Rows(4), batch_size=2))
    assert predicted is not None and len(predicted) == 2


# ---- dropout


class Dropping(Net):
    """Dropout between the cuts, or on what every rank holds whole."""

    def __init__(self, inside: float = 0.0, outside: float = 0.0) -> None:
        super().__init__()
        self.mlp = nn.Sequential()
        self.mlp.up, self.mlp.down, self.mlp.dropout = self.up, self.down, nn.Dropout(inside)
        del self.up, self.down
        self.after = nn.Dropout(outside)

    def between(self, x: Tensor) -> Tensor:
        mlp: Any = self.mlp
        out: Tensor = self.after(mlp.down(mlp.dropout(functional.gelu(mlp.up(self.norm(x))))))
        return out


class Inside(Dropping):
    def __init__(self) -> None:
        super().__init__(inside=0.5)


class Outside(Dropping):
    def __init__(self) -> None:
        super().__init__(outside=0.5)


def dropout_warnings(make: Callable[[], nn.Module], **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(strategy(2, **options)).fit(Regressor(make))
    return [str(w.message) for w in caught if "dropout is active inside cut layers" in str(w.message)]


@pytest.mark.ranks(2)
def test_active_dropout_between_the_cuts_warns_once_without_a_proof_and_names_the_module() -> None:
    assert dropout_warnings(Inside, proof="on") == []  # the ranks drop what the unsharded model drops
    found = dropout_warnings(Inside)
    assert len(found) == (1 if dist.get_rank() == 0 else 0)
    assert all("(net.mlp)" in message for message in found)


@pytest.mark.ranks(2)
def test_dropout_elsewhere_does_not_warn_and_is_alike_on_all_ranks_without_a_seed() -> None:
    torch.manual_seed(dist.get_rank())
    assert dropout_warnings(Outside) == []  # and the loss, compared at the first step, was the same
    assert dropout_warnings(Dropping) == []


@pytest.mark.ranks(2)
def test_a_dropout_that_numpy_draws_is_alike_on_all_ranks_without_a_seed() -> None:
    import numpy

    numpy.random.seed(dist.get_rank())

    class ByNumpy(Regressor):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.loss(batch) * float(numpy.random.rand())

    model = ByNumpy()
    trainer(strategy(2)).fit(model)
    assert model.trainer.global_step == 4


class LateHeads(Heads):
    """Its output is multiplied by a number that starts at zero: no gradient says anything in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * (super().forward(x) - x)


@pytest.mark.ranks(2)
def test_a_gradient_that_was_zero_at_first_is_compared_later() -> None:
    model = Regressor(LateHeads)
    with pytest.raises(DisagreementError, match=r"the gradient of net\.head_norm"):
        trainer(strategy(2)).fit(model)
    assert model.trainer.global_step == 1


class Drifts(Regressor):
    """One rank changes a replicated weight by itself, after the third step."""

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 2 and dist.get_rank() == 1:
            with torch.no_grad():
                self.net.get_parameter("norm.weight").add_(1e-3)


@pytest.mark.parametrize("every", [0, 4])
@pytest.mark.ranks(2)
def test_weights_are_compared_every_so_many_steps(every: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(strategy(2, check_every_n_steps=every)).fit(Drifts())
    told = [str(one.message) for one in caught if "drift apart in net.norm.weight" in str(one.message)]
    assert len(told) == (1 if every and dist.get_rank() == 0 else 0)


@pytest.mark.parametrize("drifts", [False, True])
def test_a_later_comparison_of_weights_is_one_small_collective_unless_they_differ(drifts: bool) -> None:
    class Counting(RecordingCollectives):
        sent: list[int]

        def gather_objects(self, value: Any, over: Over = "tp") -> list[Any]:
            self.sent.append(len(pickle.dumps(value)))
            return super().gather_objects(value, over)

    def check(mesh: Mesh) -> tuple[list[int], Counter[Any]]:
        counting = Counting(mesh.collectives)
        counting.sent = []
        look = FirstLook(replace(mesh, collectives=counting), True, every=1)
        weights = {f"{name}.weight": torch.zeros(64) for name in range(200)}
        look.weights(lambda: weights, "optimizer")
        counting.sent.clear()
        weights["7.weight"] += drifts and mesh.tp_rank == 1
        look.weights(lambda: weights, "optimizer")
        return counting.sent, counting.counts

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sent, counts in Lockstep[Any](2).run(check):
            assert not counts
            assert len(sent) == 1 + drifts
            assert sent[0] < 100
