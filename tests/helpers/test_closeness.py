"""The models, data and comparison that the parity tests stand on."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.closeness import assert_close, relative_errors
from tests.helpers.models import (
    LanguageModel,
    next_token_loss,
    packed_state,
    packed_transformer,
    quiet_trainer,
    tiny_llama,
    token_batches,
    token_loader,
    transformer,
)


def test_error_is_relative_to_the_largest_element() -> None:
    want = {"a": torch.tensor([1.0, -4.0])}
    assert relative_errors({"a": torch.tensor([1.5, -4.0])}, want) == {"a": 0.125}


def test_error_of_a_zero_tensor_is_relative_to_the_model() -> None:
    want = {"zero": torch.zeros(2), "other": torch.tensor([3.0, 4.0])}
    got = {"zero": torch.tensor([0.0, 1e-6]), "other": want["other"]}
    assert relative_errors(got, want)["zero"] == pytest.approx(1e-6 / (1e-6 * 5.0))


def test_error_is_computed_in_float64() -> None:
    want = {"a": torch.tensor([1.0], dtype=torch.float64)}
    assert relative_errors({"a": want["a"] + 1e-12}, want)["a"] == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_never_close(bad: float) -> None:
    with pytest.raises(AssertionError, match="1 of 1 tensors"):
        assert_close({"a": torch.tensor([bad, 1.0])}, {"a": torch.ones(2)}, tol=1e9)


def test_all_zero_and_empty_tensors() -> None:
    zero, empty = torch.zeros(2), torch.zeros(0)
    assert relative_errors({"a": zero, "b": empty}, {"a": zero, "b": empty}) == {"a": 0.0, "b": 0.0}
    assert relative_errors({"a": torch.ones(2)}, {"a": zero}) == {"a": math.inf}


def test_message_lists_the_worst_first() -> None:
    want = {name: torch.ones(2, 3) for name in ("fine", "bad", "worst", "nan")}
    got = {"fine": want["fine"], "bad": want["bad"] + 0.1, "worst": want["worst"] + 1, "nan": want["nan"] * math.nan}
    with pytest.raises(AssertionError) as caught:
        assert_close(got, want, what="weight")
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 of 4 tensors differ in weight by more than 0.0001, the worst first:"
    assert [line.split()[1] for line in lines[1:]] == ["nan", "worst", "bad"]


def test_names_and_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"missing \['b'\], unexpected \['c'\]"):
        relative_errors({"a": torch.ones(1), "c": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(AssertionError, match=r"a \(1,\) instead of \(2,\)"):
        relative_errors({"a": torch.ones(1)}, {"a": torch.ones(2)})


@pytest.mark.parametrize("factory", [transformer, packed_transformer, tiny_llama])
def test_factories_are_deterministic_and_leave_the_random_state(factory: Callable[..., nn.Module]) -> None:
    state = torch.get_rng_state()
    first, second, other = factory(), factory(), factory(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_state(first, second)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_model_computes_what_the_plain_one_does(kv_heads: int, tied: bool) -> None:
    plain = transformer(bias=True, kv_heads=kv_heads, tied=tied)
    packed = packed_transformer(seed=1, kv_heads=kv_heads, tied=tied)
    packed.load_state_dict(packed_state(plain.state_dict()))
    (tokens,) = token_batches(n=1)
    losses = [next_token_loss(model(tokens), tokens) for model in (plain, packed)]
    torch.testing.assert_close(losses[1], losses[0])
    torch.autograd.backward(losses)
    assert_close(gradients(packed), packed_state(gradients(plain)))


def test_attention_is_causal_and_sees_positions() -> None:
    model = transformer(kv_heads=4)
    tokens = token_batches(n=1)[0]
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 128
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :8], before[:, :8])
    assert not torch.allclose(after[:, 8:], before[:, 8:])
    constant = model(torch.zeros_like(tokens))
    assert not torch.allclose(constant[:, 0], constant[:, 1])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("factory", [transformer, tiny_llama])
def test_tied_heads_share_one_parameter(factory: Callable[..., nn.Module], tied: bool) -> None:
    names = {name for name, _ in factory(tied=tied).named_parameters()}
    assert ("lm_head.weight" in names) is not tied


def test_llama_options() -> None:
    model = tiny_llama(tied=False, kv_heads=2, layers=1, hidden=32, heads=4, vocab=131, attention="eager")
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 131)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)


def test_batches_are_fixed_and_the_loader_yields_them() -> None:
    batches = token_batches(seed=3, n=2, batch=2, seq=5, vocab=7)
    assert [batch.shape for batch in batches] == [(2, 5), (2, 5)]
    assert all(map(torch.equal, batches, token_loader(seed=3, n=2, batch=2, seq=5, vocab=7)))
    assert not torch.equal(batches[0], token_batches(seed=4, n=2, batch=2, seq=5, vocab=7)[0])


@pytest.mark.parametrize("factory", [transformer, tiny_llama])
def test_language_model_pickles_and_trains(factory: Callable[..., nn.Module]) -> None:
    module = pickle.loads(pickle.dumps(LanguageModel(factory, lr=1e-2, layers=1, vocab=32)))
    trainer = quiet_trainer(max_epochs=3, accelerator="cpu")
    before = trainer.validate(module, token_loader(vocab=32), verbose=False)[0]["val_loss"]
    trainer.fit(module, token_loader(vocab=32), token_loader(vocab=32))
    assert trainer.callback_metrics["val_loss"] < before
    assert "train_loss" in trainer.callback_metrics


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    for (name, a), (other, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
