"""What ZeRO refuses, and what it must not lose: in runs through the Trainer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp import AutoTPStrategy, TPTrainingConfig, parallelize
from lightning_autotp.distributed.dp_shards import is_dp_sharded, local_rows
from lightning_autotp.model_sources.small import small_config, small_model
from tests.helpers.closeness import assert_close
from tests.helpers.models import LanguageModel, token_batches
from tests.helpers.own_optimizers import Lars
from tests.helpers.sharded_runs import assert_parity, batches_for, reference_run, sharded_run
from tests.helpers.small_nets import Net, Regressor, Rows, full_weights, strategy, trainer, unsharded


def fit(model: Any, **options: Any) -> None:
    trainer(strategy(options.pop("size", 1), **options)).fit(model)


class ByNorm(Regressor):
    def configure_optimizers(self) -> Any:
        return Lars(self.parameters(), lr=0.1)


@pytest.mark.ranks(2)
def test_an_optimizer_that_looks_at_more_than_elements_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Lars looks at more than single elements.*Use zero_stage=0"):
        fit(ByNorm(), zero_stage=2)


@pytest.mark.ranks(2)
def test_hooks_on_gradients_are_refused_and_what_users_note_on_parameters_stays() -> None:
    model = Regressor()
    model.net.up.weight.register_hook(lambda grad: grad * 2)  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match=r"zero_stage: net\.up\.weight has a hook on its gradient"):
        fit(model, zero_stage=3)
    model = Regressor()
    model.net.up.weight.no_decay = True  # type: ignore[union-attr]
    fit(model, zero_stage=3)
    assert model.net.up.weight.no_decay  # type: ignore[union-attr]
    assert is_dp_sharded(model.net.up.weight)  # type: ignore[union-attr]


@pytest.mark.ranks(4)
def test_a_group_size_that_does_not_divide_the_replicas_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zero_group_size: 3 does not divide the 4 data parallel ranks"):
        fit(Regressor(), zero_stage=2, zero_group_size=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zero_stage": 4}, "zero_stage: 4 is none of 0, 1, 2 and 3"),
        ({"zero_stage": True}, "zero_stage: True is none of"),
        ({"zero_group_size": 2}, "zero_group_size: it goes with zero_stage"),
        ({"zero_accumulate_unsharded": True}, "zero_accumulate_unsharded: it goes with zero_stage"),
        ({"zero_stage": 2, "zero_group_size": -1}, "zero_group_size: -1 is negative"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TPTrainingConfig(**fields)


def test_deepspeed_says_the_stage() -> None:
    document = {"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}, "train_batch_size": 8}
    assert TPTrainingConfig.load(document).zero_stage == 2
    assert TPTrainingConfig.load({**document, "zero_optimization": {"stage": 0}}).zero_stage == 0
    document["zero_optimization"] = {"stage": 3, "offload_param": {"device": "cpu"}}
    with pytest.warns(UserWarning, match=r"`zero_optimization.offload_param` has no effect here"):
        assert TPTrainingConfig.load(document).zero_stage == 3


class Inside(nn.Module):
    """Two blocks of which one is never called: its layers are; and the other returns a view that is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Net(), Viewed()])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        x = x + first.down(first.up(first.norm(x)).tanh())  # type: ignore[operator]
        y: Tensor = second(x)
        y += x
        return y


class Viewed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, x.shape[-1])


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.ranks(4)
def test_blocks_that_are_never_called_and_views_that_are_changed_in_place(size: int) -> None:
    model = Regressor(Inside)
    fit(model, size=size, zero_stage=3)
    assert_close(full_weights(model), unsharded(Regressor(Inside)), 1e-4, "weight")


class Odd(nn.Module):
    """A block that hides its output in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return Hidden(self.linear(x))


class Hidden:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class OddNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Odd(), Odd()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).x
        return x


@pytest.mark.ranks(2)
def test_a_block_whose_output_cannot_be_seen_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zero_stage: a block \(.*Odd\) returns Hidden, in which its tensors are not"):
        fit(Regressor(OddNet), zero_stage=3)


def of_type(model_type: str) -> nn.Module:
    return small_model(small_config(model_type))


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(of_type("llama"), LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "factory", [partial(of_type, "mixtral"), pytest.param(adapted, marks=pytest.mark.long)], ids=["mixtral", "lora"]
)
@pytest.mark.ranks(4, timeout=120)
def test_experts_and_adapters_are_the_unsharded_run_at_tp2_dp2(factory: Any, stage: int) -> None:
    batches = batches_for(131)
    model = sharded_run(AutoTPStrategy(autotp_size=2, zero_stage=stage), factory, batches)
    assert_parity(model, partial(reference_run, factory, batches))


@pytest.mark.parametrize("precision", [pytest.param("bf16-true", marks=pytest.mark.long), "bf16-mixed"])
@pytest.mark.ranks(2)
def test_halves_are_as_near_as_the_unsharded_halves(precision: str) -> None:
    batches = batches_for(128)
    factory = partial(of_type, "llama")
    options: Any = {"mixed": True} if precision == "bf16-mixed" else {"dtype": torch.bfloat16}
    exact, halves = reference_run(factory, batches), reference_run(factory, batches, **options)
    model = sharded_run(AutoTPStrategy(zero_stage=3), factory, batches, trainer={"precision": precision})

    def error(weights: dict[str, Tensor]) -> float:
        differences = [(weights[n].float() - w).norm() ** 2 for n, w in exact.weights.items()]
        return float(torch.stack(differences).sum().sqrt())

    assert 0 < error(model.record.weights) <= 1.5 * error(halves.weights)


@pytest.mark.ranks(2)
def test_generate_after_a_fit_and_the_next_steps_use_the_weights_of_now() -> None:
    batches = token_batches(n=2, vocab=131)
    model = LanguageModel(partial(of_type, "llama"))
    model.train_dataloader = lambda: torch.utils.data.DataLoader(torch.cat(batches), batch_size=2)  # type: ignore[method-assign,arg-type]
    plugin = AutoTPStrategy(zero_stage=3)
    trainer(plugin).fit(model)
    tokens = model.model.generate(batches[0][:1, :4], max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    plain = of_type("llama")
    plain.load_state_dict({n.removeprefix("model."): t for n, t in full_weights(model).items()}, strict=False)
    assert torch.equal(tokens, plain.generate(batches[0][:1, :4], max_new_tokens=4, do_sample=False))  # type: ignore[operator]
    plugin.engine.zero.reshard()  # type: ignore[union-attr]
    assert sum(local_rows(p).numel() for p in model.parameters()) < sum(p.numel() for p in plain.parameters())


class Hooked(Regressor):
    def on_train_start(self) -> None:
        self.net.up.weight.register_hook(lambda grad: grad * 2)  # type: ignore[union-attr,operator]


@pytest.mark.ranks(2)
def test_a_hook_that_comes_after_sharding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zero_stage: net\.up\.weight has a hook on its gradient"):
        fit(Hooked(), zero_stage=3)


class Skips(nn.Module):
    """Runs another block on each replica."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Net() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[torch.distributed.get_rank()](x)
        return y


@pytest.mark.ranks(2)
def test_replicas_that_run_different_blocks_are_told() -> None:
    with pytest.raises(RuntimeError, match="zero_stage: data parallel ranks have run different blocks"):
        trainer(strategy(1, zero_stage=3, proof="off")).fit(Regressor(Skips))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.ranks(2)
def test_statistics_are_the_first_replicas_as_without_zero() -> None:
    found = []
    for stage in (0, 3):
        model = Regressor(Normed)
        fit(model, zero_stage=stage)
        found.append(
            {**full_weights(model), **{n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}}
        )
    assert_close(found[1], found[0], 1e-5, "weight or statistic")


@pytest.mark.ranks(2)
def test_gradients_of_batches_without_a_step_do_not_come_back() -> None:
    def weights_of(wasted: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        found = parallelize(nn.Sequential(Net()), zero_stage=2)
        optimizer = torch.optim.AdamW(found.module.parameters(), lr=0.02, eps=1e-5)
        rows = Rows(8).rows.chunk(2)[found.mesh.dp_rank]
        for number in range(3):
            if wasted and number == 1:
                with found.no_sync():
                    (100 * found.model(rows).square().mean()).backward()
                optimizer.zero_grad()
            (found.model(rows) - rows.flip(-1)).square().mean().backward()
            found.step(optimizer)
            optimizer.zero_grad()
        return full_weights(found.module)

    assert_close(weights_of(True), weights_of(False), 1e-6, "weight")
