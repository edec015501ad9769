"""Where weights are made: models on the meta device are created a module at a time, and equal the unsharded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_autotp import AutoTPStrategy
from tests.helpers import models
from tests.helpers.models import LanguageModel, next_token_loss, quiet_trainer, token_batches, token_loader
from tests.helpers.small_nets import WIDTH, Net, Regressor, Rows, everyones, parts_of, strategy, trainer, weights

SEED = 7


class OnMeta(LanguageModel):
    """Builds its model on the meta device; setup draws the weights from ``SEED``."""

    def __init__(self, factory: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__(nn.Identity)
        del self.model
        self.factory, self.options = factory, options

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            with torch.device("meta"):
                self.model = self.factory(**self.options)
            torch.manual_seed(SEED)


def hand_written(tied: bool = False) -> nn.Module:
    return models.Transformer(layers=2, hidden=32, heads=4, mlp=48, bias=True, tied=tied)


def llama(tied: bool = False) -> nn.Module:
    return models.tiny_llama(tied=tied, hidden=32, heads=4, kv_heads=4)


HAND_WRITTEN = {
    "layer_specs": [
        {"patterns": [r".*\.(q|k|v|gate|up)_proj\.weight"]},
        {"patterns": [r".*\.(o|down)_proj\.weight", r".*embed_tokens\.weight"], "partition_type": "row"},
        {"patterns": [r".*lm_head\.weight"], "gather_output": True},
    ]
}
CASES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "hand-written": (hand_written, {"partition_config": HAND_WRITTEN}),
    "llama": (llama, {"preset_model": "llama"}),
}


def unsharded_weights(factory: Callable[..., nn.Module], tied: bool) -> nn.Module:
    """The whole model after ``to_empty`` and the calls that initialize each module, children first."""
    with torch.device("meta"):
        model: Any = factory(tied=tied)
    model.to_empty(device="cpu")
    if tied:  # to_empty separates what was one parameter
        inner: Any = getattr(model, "model", model)
        model.lm_head.weight = inner.embed_tokens.weight
    torch.manual_seed(SEED)
    if hasattr(model, "_init_weights"):
        model.apply(model._init_weights)
    else:
        model.apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
    whole: nn.Module = model
    return whole


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(4)
def test_a_model_on_the_meta_device_starts_from_the_weights_of_the_unsharded_one(case: str, tied: bool) -> None:
    factory, rules = CASES[case]
    reference = unsharded_weights(factory, tied)
    batch = token_batches(n=1)[0]
    with torch.no_grad():
        want = next_token_loss(getattr(reference(batch), "logits", reference(batch)), batch)
    full = {f"model.{name}": tensor for name, tensor in weights(reference).items()}
    for size in (2, 4):
        model: Any = OnMeta(factory, tied=tied)
        run = quiet_trainer(strategy=AutoTPStrategy(autotp_size=size, **rules))
        validated = run.validate(model, token_loader(n=1), verbose=False)
        ours, theirs = weights(model), parts_of(model, full)
        wrong = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        assert ours.keys() == theirs.keys() and wrong == []
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        # buffers too, which are in no checkpoint: rotary frequencies for one
        assert validated[0]["val_loss"] == pytest.approx(float(want), rel=1e-5)
        if tied:
            inner: Any = getattr(model.model, "model", model.model)
            assert inner.embed_tokens.weight is model.model.lm_head.weight


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(2)
def test_a_model_from_the_meta_device_trains_saves_and_loads(case: str, tmp_path: Any) -> None:
    factory, rules = CASES[case]
    first, second = OnMeta(factory, tied=True), OnMeta(factory, tied=True)
    run = quiet_trainer(strategy=AutoTPStrategy(autotp_size=2, **rules))
    run.fit(first, token_loader())
    run.save_checkpoint(tmp_path / "checkpoint")
    other = quiet_trainer(strategy=AutoTPStrategy(autotp_size=2, **rules))
    other.validate(second, token_loader(n=1), ckpt_path=tmp_path / "checkpoint", verbose=False)
    trained = weights(first)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(second).items())


class Remembering(nn.Linear):
    """Notes, when it is initialized, how many numbers the whole model holds by then."""

    model: Any = None
    held: list[int] = []

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.model is not None:
            self.held.append(sum(p.numel() for p in self.model.parameters() if not p.is_meta))


class Deep(nn.Module):
    """Six blocks."""

    def __init__(self) -> None:
        super().__init__()
        blocks = []
        for _ in range(6):
            block = nn.Module()
            block.up, block.down = Remembering(WIDTH, 64), Remembering(64, WIDTH)
            blocks.append(block)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.down(block.up(x).relu())  # type: ignore[operator]
        return x


class Late(Regressor):
    """Builds ``make()`` on the meta device."""

    def __init__(self, make: Callable[[], nn.Module] = Net) -> None:
        super().__init__(nn.Identity)
        del self.net
        self.make = make

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            with torch.device("meta"):
                self.net = self.make()


@pytest.mark.ranks(4)
def test_no_rank_ever_holds_more_than_its_part_and_one_whole_module() -> None:
    model = Late(Deep)
    Remembering.model, Remembering.held = model, []
    trainer(strategy(4)).validate(model, DataLoader(Rows()), verbose=False)
    Remembering.model = None
    part = sum(p.numel() for p in model.parameters())
    one_module = WIDTH * 64 + 64
    while_creating = [count for count in Remembering.held if count]  # building on the meta device counts nothing
    assert len(while_creating) == 12
    assert max(while_creating) <= part + one_module < sum(p.numel() for p in Deep().parameters()) / 2


class Bare(nn.Module):
    """Has a parameter and nothing that initializes it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class WithBare(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Bare()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale(super().forward(x))
        return out


class WithBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(WIDTH))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (WithBare, r"net\.scale was built on the meta device, and Bare has no `reset_parameters\(\)`"),
        (WithBuffer, r"net was built on the meta device, and WithBuffer has no `reset_parameters\(\)`"),
    ],
)
@pytest.mark.ranks(2)
def test_a_module_on_the_meta_device_that_cannot_initialize_itself_is_an_error_that_names_it(
    make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(strategy(2)).fit(Late(make))


class Mixed(Late):
    """Only a part of it is on the meta device; the rest has been given its values."""

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "given"):
            self.given = nn.Linear(WIDTH, WIDTH)
            nn.init.constant_(self.given.weight, 0.25)
            self.given.bias.requires_grad_(False)


@pytest.mark.ranks(2)
def test_what_is_not_on_the_meta_device_keeps_its_values() -> None:
    model = Mixed()
    trainer(strategy(2)).validate(model, DataLoader(Rows()), verbose=False)
    assert bool((model.given.weight == 0.25).all())
    assert not model.given.bias.requires_grad


@pytest.mark.ranks(2)
def test_frozen_parameters_and_dtypes_survive_the_way_from_the_meta_device() -> None:
    def build() -> Net:
        net = Net()
        net.up.requires_grad_(False)
        net.norm.to(torch.float64)
        net.norm.forward = lambda x: nn.LayerNorm.forward(net.norm, x.double()).float()  # type: ignore[method-assign,assignment]
        return net

    model = Late(build)
    trainer(strategy(2)).fit(model)
    net: Any = model.net
    assert [net.up.weight.requires_grad, net.up.bias.requires_grad, net.down.weight.requires_grad] == [
        False,
        False,
        True,
    ]
    assert (net.norm.weight.dtype, net.up.weight.dtype) == (torch.float64, torch.float32)


# ---- where a model is built that asks the Trainer


class Where(Regressor):
    """Notes on what device its weights are made."""

    def configure_model(self) -> None:
        if not hasattr(self, "made_on"):
            self.made_on = nn.Linear(WIDTH, WIDTH).weight.device.type


@pytest.mark.ranks(2)
def test_configure_model_builds_on_the_cpu() -> None:
    model = Where()
    trainer(strategy(2)).fit(model)
    assert model.made_on == "cpu"


@pytest.mark.ranks(2)
def test_init_module_builds_on_the_cpu_or_if_asked_for_empty_weights_on_the_meta_device() -> None:
    run = trainer(strategy(2))
    with run.init_module():
        there = Regressor()
    with run.init_module(empty_init=True):
        empty = Regressor()
    assert {p.device.type for p in there.parameters()} == {"cpu"}
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    run.validate(empty, DataLoader(Rows()), verbose=False)
    assert not any(p.is_meta for p in empty.parameters())


@pytest.mark.ranks(2)
def test_configure_model_builds_in_the_dtype_of_the_precision() -> None:
    class Half(Where):
        def loss(self, batch: Tensor) -> Tensor:
            return super().loss(batch.bfloat16())

    model = Half()
    trainer(strategy(2), precision="bf16-true").fit(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.ranks(2)
def test_different_seeds_on_the_ranks_give_the_weights_of_rank_zero_from_the_meta_device_too() -> None:
    class Reseeded(Late):
        def configure_model(self) -> None:
            super().configure_model()
            torch.manual_seed(dist.get_rank())

    model = Reseeded()
    trainer(strategy(2)).validate(model, DataLoader(Rows()), verbose=False)
    torch.manual_seed(0)
    with torch.device("meta"):
        reference = Net()
    reference.to_empty(device="cpu").apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
    want = parts_of(model, {f"net.{name}": tensor for name, tensor in weights(reference).items()})
    assert everyones(all(torch.equal(t, want[n]) for n, t in weights(model).items())) == [True, True]
