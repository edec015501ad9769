"""``shard`` is all that changes a model: nobody else converts one, and calling it again changes only switches."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import lightning_autotp
from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.sharding.shard import shard
from lightning_autotp.sharding.state import Sharded, sharded
from tests.helpers.models import tiny_llama, token_batches
from tests.helpers.rank_pool import rank_device

PACKAGE, TESTS = Path(lightning_autotp.__file__).parent, Path(__file__).parents[1]


def mentions_apply(source: str) -> bool:
    """Whether ``source`` imports ``sharding.apply``, or names ``apply_plan``, in any way."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, (ast.Name, ast.Attribute)):
            names = [node.id if isinstance(node, ast.Name) else node.attr]
        if any(name.endswith(("sharding.apply", "apply_plan")) or "sharding.apply." in name for name in names):
            return True
    return False


def callers(*folders: Path) -> Iterator[str]:
    for folder in folders:
        for path in folder.rglob("*.py"):
            if mentions_apply(path.read_text()):
                yield str(path.relative_to(folder.parent))


def test_nobody_but_shard_converts_a_model() -> None:
    others = set(callers(PACKAGE, TESTS / "benchmarks")) - {"lightning_autotp/sharding/shard.py"}
    assert not others, f"these convert models past sharding.shard.shard: {sorted(others)}"


@pytest.mark.parametrize(
    "line",
    [
        "from lightning_autotp.sharding.apply import apply_plan",
        "from lightning_autotp.sharding import apply",
        "import lightning_autotp.sharding.apply as a",
        "def f():\n    anything.apply_plan(model)",
    ],
)
def test_every_way_of_converting_is_seen(line: str) -> None:
    assert mentions_apply(line)


def shard_again(model: nn.Module, tp_size: int = 2, **switches: Any) -> Sharded:
    config = TPTrainingConfig(autotp_size=tp_size, **switches)
    found = sharded(model)
    plan = make_plan(model, config) if found is None else found.plan
    return shard(model, plan, build_mesh(tp_size, config.tensor_parallel), config, device=rank_device())


@pytest.mark.ranks(2)
def test_a_second_call_changes_switches_and_nothing_else() -> None:
    model = tiny_llama()
    first = shard_again(model, loss_parallel=True, shard_saved_activations=True)
    parameters = [(id(p), p.shape) for p in model.parameters()]
    assert first.saved is not None and model.lm_head.keeps_part
    hooked = len(model.model.layers[0]._forward_hooks)
    again = shard_again(model, loss_parallel=False, shard_saved_activations=True)
    assert [(id(p), p.shape) for p in model.parameters()] == parameters
    assert again is sharded(model) and again.plan is first.plan and again.columns is first.columns
    assert not model.lm_head.keeps_part
    assert len(model.model.layers[0]._forward_hooks) == hooked
    assert shard_again(model).saved is None and len(model.model.layers[0]._forward_hooks) == hooked - 1


@pytest.mark.ranks(2)
def test_a_model_that_was_sharded_for_another_size_is_refused() -> None:
    model = tiny_llama()
    shard_again(model)
    with pytest.raises(ValueError, match=r"sharded for a tensor parallel size of 2 .*autotp_size is now 1"):
        shard_again(model, 1)


@pytest.mark.ranks(2)
def test_what_checkpointed_blocks_keep_is_given_to_compare() -> None:
    model = tiny_llama().train()
    model.gradient_checkpointing_enable()
    config = TPTrainingConfig(autotp_size=2, shard_saved_activations=True)
    seen: dict[str, Tensor] = {}
    mesh = build_mesh(2, config.tensor_parallel)
    plan = make_plan(model, config)
    found = shard(model, plan, mesh, config, device=rank_device(), compare=lambda place, x: seen.update({place: x}))
    assert found.saved is not None
    tokens = token_batches(n=1)[0].to(rank_device())
    with found.saved.step():
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert any("layers.0" in place for place in seen)


@pytest.mark.ranks(2)
def test_saved_activations_are_of_training_only() -> None:
    config = TPTrainingConfig(autotp_size=2, shard_saved_activations=True)
    mesh, device = build_mesh(2, config.tensor_parallel), rank_device()
    model = tiny_llama()
    plan = make_plan(model, config)
    assert shard(model, plan, mesh, config, device=device, training=False).saved is None
    assert not any(block._forward_pre_hooks for block in model.model.layers)
    assert shard(model, plan, mesh, config, device=device).saved is not None
