"""What lies around a sharded model: hooks, optimizers, callbacks, users' own clipping and checkpoint contents."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader

from lightning_autotp import AutoTPStrategy
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.sharding.state import sharded
from lightning_autotp.training.consistency import DisagreementError
from tests.helpers.closeness import assert_close
from tests.helpers.models import LanguageModel, quiet_trainer, tiny_llama, token_loader
from tests.helpers.small_nets import (
    WIDTH,
    Net,
    Regressor,
    Rows,
    alone,
    parts_of,
    plugin_of,
    strategy,
    trainer,
    unsharded,
    weights,
)


class Wrapped(nn.Module):
    """Activation checkpointing whose wrapper takes itself out of the names in a state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.block = checkpoint_wrapper(Net())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(2)
def test_a_checkpoint_holds_all_parts_though_its_names_are_not_the_parameters(directory: bool, tmp_path: Path) -> None:
    model = Regressor(Wrapped)
    run = trainer(strategy(2, save_distributed_checkpoint=directory))
    run.fit(model)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = Regressor(Wrapped)
    trainer(strategy(2), max_epochs=1).fit(resumed, ckpt_path=tmp_path / "saved.ckpt")
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(model).items())
    if not directory and dist.get_rank() == 0:
        saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)["state_dict"]
        assert {name: tuple(t.shape) for name, t in saved.items()}["net.block.up.weight"] == (10, WIDTH)


@pytest.mark.ranks(4)
def test_a_communication_hook_averages_over_data_parallel_ranks_only() -> None:
    plugin = strategy(2, ddp_comm_hook=default_hooks.fp16_compress_hook)
    trainer(plugin).fit(Regressor())
    assert plugin._ddp_comm_state is plugin.mesh.dp_group


@pytest.mark.ranks(2)
def test_a_part_that_was_sharded_by_another_run_is_refused_with_what_to_do() -> None:
    teacher, student = Regressor(), Regressor()
    trainer(strategy(2)).fit(teacher)
    student.teacher = teacher
    with pytest.raises(ValueError, match=r"teacher was sharded .* by a run of its own.*`self.teacher = \[teacher\]`"):
        trainer(strategy(2)).fit(student)


class OwnClipping(Regressor):
    """Clips by the norm of this rank's parts."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.01)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.ranks(2)
def test_clipping_by_a_ranks_own_norm_is_warned_of() -> None:
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match="drift apart in net.*clip with `gradient_clip_val`"):
            trainer(strategy(2, proof="off")).fit(OwnClipping())
    else:
        trainer(strategy(2, proof="off")).fit(OwnClipping())


class Scaled(Net):
    """A parameter between the two cuts sees only its rank's part of what flows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def between(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(self.norm(x))) * self.scale)
        return out


SUMMED: dict[str, Any] = {
    "layer_specs": [
        {"patterns": [r".*\.up\.weight"], "partition_type": "column"},
        {"patterns": [r".*\.down\.weight"], "partition_type": "row"},
        {"patterns": [r".*\.scale"], "partition_type": "skip", "grad_allreduce": True},
    ]
}


class ManualByValue(Regressor):
    def __init__(self) -> None:
        super().__init__(Scaled)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 0.01, "value")
        optimizer.step()


@pytest.mark.ranks(2)
def test_clipping_by_value_in_manual_optimization_sees_complete_gradients() -> None:
    model = ManualByValue()
    trainer(strategy(2, partition_config=SUMMED)).fit(model)
    assert_close(weights(model), parts_of(model, unsharded(ManualByValue())), 1e-4, "weight")


@pytest.mark.ranks(2)
def test_a_complete_gradient_that_a_rule_would_sum_is_an_error() -> None:
    rules = {"layer_specs": [*SUMMED["layer_specs"][:2], {**SUMMED["layer_specs"][2], "patterns": [r".*\.norm\."]}]}
    with pytest.raises(DisagreementError, match=r"net\.norm\.weight.* is complete.*Remove `grad_allreduce: true`"):
        trainer(strategy(2, partition_config=rules, proof="off")).fit(Regressor())


class Keeping(Regressor):
    """Puts something into its checkpoints."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        part = self.net.get_parameter("up.weight").detach().clone()
        checkpoint["kept"] = part if self.kept is None else self.kept


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(2)
def test_a_part_of_a_tensor_in_a_checkpoint_is_an_error(directory: bool, tmp_path: Path) -> None:
    run = trainer(strategy(2, save_distributed_checkpoint=directory))
    run.fit(Keeping(None))
    with pytest.raises(DisagreementError, match=r"checkpoint\['kept'\].*put full tensors into a checkpoint"):
        run.save_checkpoint(tmp_path / "saved.ckpt")


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
@pytest.mark.ranks(2, timeout=30)
def test_a_save_that_fails_on_one_rank_fails_on_all(directory: bool, tmp_path: Path) -> None:
    run = trainer(strategy(2, save_distributed_checkpoint=directory))
    run.fit(Keeping(lambda: None))  # cannot be pickled
    with pytest.raises(Exception, match="pickle|rank 0 failed"):
        run.save_checkpoint(tmp_path / "saved.ckpt")
    assert not (tmp_path / "saved.ckpt").exists()


@pytest.mark.ranks(2)
def test_the_groups_have_the_timeout_that_was_asked_for() -> None:
    plugin = strategy(2, timeout=timedelta(seconds=33))
    trainer(plugin).fit(Regressor())
    collectives = plugin.mesh.collectives
    collectives.add_groups({(0,), (0, 1)})
    if dist.get_rank() == 0:
        later = [collectives.process_group((0,))]
    else:
        later = []
        with pytest.raises(RuntimeError, match=r"this rank is in no process group of the tensor parallel ranks \(0,\)"):
            collectives.process_group((0,))
    assert collectives.process_group((0, 1)) is plugin.mesh.tp_group
    for group in (plugin.mesh.tp_group, plugin.mesh.dp_group, *later):
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=33)


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.ranks(2)
def test_clipping_in_double_precision(precision: Any) -> None:
    model = Regressor()
    trainer(strategy(2), precision=precision, gradient_clip_val=0.01).fit(model)
    want = unsharded(Regressor(), precision=precision, gradient_clip_val=0.01)
    assert_close(weights(model), parts_of(model, want), 1e-4, "weight")


class OddBuffers(Net):
    def __init__(self) -> None:
        super().__init__()
        for at, dtype in enumerate((torch.int16, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)):
            self.register_buffer(f"odd{at}", torch.ones(3).to(dtype))
        self.register_buffer("empty", torch.ones(0))
        self.register_buffer("number", torch.tensor(3))


@pytest.mark.ranks(2)
def test_buffers_of_any_dtype_are_those_of_rank_zero() -> None:
    model = Regressor(OddBuffers)
    assert isinstance(model.net.odd0, Tensor)
    model.net.odd0 += dist.get_rank()
    trainer(strategy(2)).fit(model)
    assert model.net.odd0.tolist() == [1, 1, 1] and plugin_of(model).tp_size == 2


class TwoOptimizers(Regressor):
    """The second network's whole parameter has a partial gradient, and is stepped by the second optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.second = Scaled()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for net, optimizer in zip((self.net, self.second), optimizers):
            optimizer.zero_grad()
            self.manual_backward((net(batch) - batch.flip(-1)).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.net, self.second)]


@pytest.mark.ranks(2)
def test_every_optimizers_gradients_are_compared() -> None:
    with pytest.raises(DisagreementError, match=r"the gradient of second\.scale"):
        trainer(strategy(2, proof="off")).fit(TwoOptimizers())


class ListOfBlocks(Regressor):
    """Its blocks are in a list, which is never called, and one of them draws a random number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([Net(), Net()])

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        torch.manual_seed(dist.get_rank())
        self.net[1](self.net[0](batch) + torch.randn(WIDTH))  # type: ignore[index]


@pytest.mark.ranks(2)
def test_blocks_in_a_list_are_compared_in_an_evaluation() -> None:
    with pytest.raises(DisagreementError, match="the model's output"):
        trainer(strategy(2)).validate(ListOfBlocks(), DataLoader(Rows(4), batch_size=2), verbose=False)


def interleaved_bigcode() -> nn.Module:
    """Its c_attn holds the parts of each head one behind the other, which the preset would cut across."""
    config = small_config("gpt_bigcode")
    config.multi_query = False
    return small_model(config)


@pytest.mark.ranks(2)
def test_setup_refuses_what_a_plan_can_only_show() -> None:
    model = LanguageModel(interleaved_bigcode)
    before = weights(model)
    with pytest.raises(ValueError, match=r"cannot be sharded exactly.*c_attn.*`multi_query` false"):
        quiet_trainer(strategy=AutoTPStrategy(autotp_size=2, proof="off")).fit(model, token_loader())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items()), "and leaves the model"


@pytest.mark.ranks(2)
def test_what_a_preset_cannot_shard_is_derived_where_it_can_be_proved() -> None:
    torch.manual_seed(0)
    model, full = LanguageModel(interleaved_bigcode), LanguageModel(interleaved_bigcode)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer(AutoTPStrategy(autotp_size=2), max_steps=2).fit(model, token_loader())
    found = sharded(model)
    assert found is not None
    assert not found.plan.layouts["model.transformer.h.0.attn.c_attn.weight"].is_replicated
    full.load_state_dict(before)
    with alone():
        trainer("auto", devices=1, max_steps=2).fit(full, token_loader())
    assert_close(weights(model), parts_of(model, weights(full)), 1e-4, "weight")


@pytest.mark.ranks(4)
def test_key_heads_fewer_than_the_ranks_are_no_longer_refused() -> None:
    model = LanguageModel(tiny_llama, kv_heads=2)
    quiet_trainer(strategy=AutoTPStrategy(autotp_size=4), max_steps=1).fit(model, token_loader())
    shapes = [model.get_parameter(f"model.model.layers.0.self_attn.{n}_proj.weight").shape for n in "qkv"]
    assert shapes == [(16, 64), (8, 64), (8, 64)]


def test_one_size_is_enough_and_two_must_agree() -> None:
    assert AutoTPStrategy(tensor_parallel={"tp_size": 4}).config.size == 4
    with pytest.raises(ValueError, match="tp_size"):
        AutoTPStrategy(autotp_size=2, tensor_parallel={"tp_size": 4})
