"""Processes, groups and ranks: who shares a model with whom, however the processes were started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from lightning_autotp import AutoTPStrategy
from tests.helpers.closeness import assert_close
from tests.helpers.hygiene import lightning_rank
from tests.helpers.models import quiet_trainer
from tests.helpers.small_nets import (
    RULES,
    Regressor,
    alone,
    everyones,
    parts_of,
    plugin_of,
    strategy,
    trainer,
    unsharded,
    weights,
)


class Groups:
    """An mpu whose model parallel groups are interleaved: ranks 0 and 2, ranks 1 and 3."""

    def __init__(self) -> None:
        self.model, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
        self.data, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.model)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data)


def interleaved() -> dist.ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    return group


def fitted(plugin: Any, **options: Any) -> Regressor:
    model = Regressor()
    trainer(plugin, **options).fit(model)
    return model


def place(model: Regressor) -> tuple[int, int]:
    """(data parallel rank, tensor parallel rank)"""
    return plugin_of(model).dp_rank, plugin_of(model).tp_rank


# ---- sizes and ranks


@pytest.mark.ranks(4)
def test_ranks_that_share_a_model_are_side_by_side() -> None:
    model = fitted(strategy(2))
    assert everyones(place(model)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert everyones(plugin_of(model).mesh.tp_source) == [0, 0, 2, 2]


@pytest.mark.ranks(4, nodes=2)
def test_on_two_nodes_world_ranks_count_over_nodes_and_a_model_stays_inside_one() -> None:
    model = fitted(strategy(2), num_nodes=2)
    rank = dist.get_rank()
    assert (model.global_rank, model.local_rank, model.trainer.world_size) == (rank, rank % 2, 4)
    assert lightning_rank() == rank
    assert model.trainer.is_global_zero == (rank == 0)
    node = model.trainer.node_rank
    assert everyones((node, place(model))) == [(0, (0, 0)), (0, (0, 1)), (1, (1, 0)), (1, (1, 1))]


@pytest.mark.ranks(2, nodes=2)
def test_torchrun_with_another_number_of_processes_than_the_trainer_is_set_to_is_an_error() -> None:
    # the Trainer would otherwise train on some of the processes, or wait for some that do not exist
    with pytest.raises(ValueError, match=r"`devices=1` and `num_nodes=1`.* does not match the world size \(2\)"):
        fitted(strategy(1), plugins=[TorchElasticEnvironment()])


@pytest.mark.ranks(2)
def test_fitting_twice_in_one_process_with_new_trainers_works() -> None:
    first, second = fitted(strategy(2)), fitted(strategy(2))
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values()))


@pytest.mark.ranks(3)
def test_a_world_size_that_the_size_does_not_divide_is_an_error_on_every_rank() -> None:
    with pytest.raises(ValueError, match="autotp_size: 2 does not divide the 3 processes of this run"):
        fitted(strategy(2))


def test_the_mesh_before_processes_run_is_an_error_that_says_so() -> None:
    with pytest.raises(RuntimeError, match="the process groups are made when the Trainer starts"):
        strategy(2).tp_rank  # noqa: B018 - asking is the test


# ---- groups of the user's


@pytest.mark.parametrize("source", ["mpu", "tp_group", "callable"])
@pytest.mark.ranks(4)
def test_groups_of_the_users_are_the_ones_that_are_used(source: str) -> None:
    groups = Groups()
    given = {"mpu": {"mpu": groups}, "tp_group": {"tp_group": groups.model}, "callable": {"tp_group": interleaved}}
    model = fitted(strategy(2, tensor_parallel=given[source]))
    assert everyones(place(model)) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    used = plugin_of(model).mesh
    assert dist.get_process_group_ranks(used.tp_group) == dist.get_process_group_ranks(groups.model)
    assert dist.get_process_group_ranks(used.dp_group) == dist.get_process_group_ranks(groups.data)
    if source != "callable":
        assert used.tp_group is groups.model
    # a collective over any other ranks would not give the unsharded numbers
    assert_close(weights(model), parts_of(model, unsharded(Regressor())), 1e-4, "weight")


@pytest.mark.ranks(4)
def test_a_callable_tp_group_is_called_once_and_only_when_processes_run() -> None:
    calls: list[bool] = []

    def group() -> dist.ProcessGroup:
        calls.append(dist.is_initialized())
        return interleaved()

    plugin = strategy(2, tensor_parallel={"tp_group": group})
    assert calls == []
    run = trainer(plugin)
    model = Regressor()
    run.fit(model)
    run.test(model, model.train_dataloader(), verbose=False)
    assert calls == [True]


@pytest.mark.ranks(4)
def test_groups_of_another_size_than_autotp_size_are_an_error() -> None:
    groups = Groups()
    with pytest.raises(ValueError, match=r"tensor_parallel.mpu: its model parallel size is 2, autotp_size is 4"):
        fitted(strategy(4, tensor_parallel={"mpu": groups}))
    with pytest.raises(ValueError, match=r"tensor_parallel.tp_group: groups of \[2\] processes, but autotp_size is 4"):
        fitted(strategy(4, tensor_parallel={"tp_group": groups.model}))


@pytest.mark.ranks(4)
def test_a_tp_group_that_leaves_processes_out_is_an_error() -> None:
    halves = [dist.new_group([0, 1]), dist.new_group([1, 2, 3])]
    mine = halves[0] if dist.get_rank() < 2 else halves[1]
    with pytest.raises(ValueError, match=r"tensor_parallel.tp_group: the groups .* do not share out all 4 processes"):
        fitted(strategy(2, tensor_parallel={"tp_group": mine}))


# ---- decisions and sums over the right ranks


class Voting(Regressor):
    """Its validation loss gets worse on the last rank alone."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        epoch = float(self.trainer.current_epoch)
        self.log("mine", epoch if self.global_rank == self.trainer.world_size - 1 else -epoch)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


@pytest.mark.ranks(4)
def test_early_stopping_that_one_rank_asks_for_stops_all_at_the_same_epoch() -> None:
    stop = EarlyStopping("mine", patience=2)
    run = trainer(strategy(2), max_epochs=8, callbacks=[stop], num_sanity_val_steps=0)
    run.fit(Voting())
    assert everyones(run.current_epoch) == [3] * 4  # epoch 0 was the last rank's best


@pytest.mark.ranks(4)
def test_boolean_decisions_are_taken_over_all_ranks() -> None:
    plugin = plugin_of(fitted(strategy(2)))
    rank = dist.get_rank()
    assert plugin.reduce_boolean_decision(True) is True
    assert plugin.reduce_boolean_decision(rank != 3) is False
    assert plugin.reduce_boolean_decision(rank == 3, all=False) is True
    assert plugin.reduce_boolean_decision(False, all=False) is False


@pytest.mark.ranks(4)
def test_reduce_adds_data_parallel_ranks_only_and_takes_a_group() -> None:
    plugin = plugin_of(fitted(strategy(2)))
    mine = torch.tensor(float(plugin.dp_rank + 1))
    assert plugin.reduce(mine.clone(), reduce_op="sum") == 3
    assert plugin.reduce(mine.clone()) == 1.5
    assert plugin.reduce(mine.clone(), group=dist.group.WORLD, reduce_op="sum") == 6
    assert plugin.reduce("not a tensor") == "not a tensor"


# ---- SLURM

SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}


def slurm_task(
    monkeypatch: pytest.MonkeyPatch, tasks: int, per_node: int, nodes: int, rank: int = 0, local: int | None = None
) -> None:
    """What SLURM sets for task ``rank``; no launcher's variables beside it."""
    for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    place = {"PROCID": rank, "LOCALID": rank % per_node if local is None else local, "NODEID": rank // per_node}
    counts = {"NTASKS": tasks, "NTASKS_PER_NODE": per_node, "NNODES": nodes}
    for name, value in (SLURM | {f"SLURM_{n}": str(v) for n, v in (place | counts).items()}).items():
        monkeypatch.setenv(name, value)


def test_slurm_with_other_tasks_per_node_than_devices_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_task(monkeypatch, tasks=1, per_node=1, nodes=1)
    with pytest.raises(ValueError, match="`devices=2` in Lightning, but the number of tasks per node"):
        trainer(strategy(2), devices=2).fit(Regressor())


def test_slurm_with_another_number_of_nodes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_task(monkeypatch, tasks=4, per_node=2, nodes=2)
    with pytest.raises(ValueError, match="`num_nodes=1` in Lightning, but the number of nodes"):
        trainer(strategy(2), devices=2).fit(Regressor())


@pytest.mark.ranks(3)
def test_slurm_with_fewer_tasks_than_devices_x_nodes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_task(monkeypatch, tasks=3, per_node=2, nodes=2, rank=dist.get_rank())
    with pytest.raises(ValueError, match="SLURM started 3 processes, but the Trainer is set to 2 nodes x 2 devices"):
        trainer(strategy(2), devices=2, num_nodes=2).fit(Regressor())


@pytest.mark.ranks(3)
def test_slurm_with_more_tasks_than_devices_is_an_error_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = dist.get_rank()
    slurm_task(monkeypatch, tasks=3, per_node=2, nodes=1, rank=rank, local=rank)
    with pytest.raises(ValueError, match="SLURM started 3 processes, but the Trainer is set to 1 nodes x 2 devices"):
        trainer(strategy(2), devices=2).fit(Regressor())


@pytest.mark.ranks(4)
def test_slurm_with_agreeing_counts_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_task(monkeypatch, tasks=4, per_node=2, nodes=2, rank=dist.get_rank())
    model = fitted(strategy(2), devices=2, num_nodes=2)
    assert isinstance(plugin_of(model).cluster_environment, SLURMEnvironment)
    assert everyones(place(model)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


# ---- by name


def sizes_by_name(name: str = "autotp") -> tuple[int, int]:
    run = quiet_trainer(strategy=name, use_distributed_sampler=False)
    plugin = run.strategy
    assert isinstance(plugin, AutoTPStrategy)
    # the short name leaves no room for rules; a config file has them
    if plugin.config.partition_config is None:
        plugin.config = plugin.config.model_copy(update={"partition_config": RULES})
    run.fit(Regressor())
    return plugin.tp_size, plugin.dp_size


@pytest.mark.parametrize("name", ["autotp", "AutoTP"])
@pytest.mark.ranks(4)
def test_the_short_name_takes_its_size_from_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_AUTOTP_SIZE", "2")
    assert sizes_by_name(name) == (2, 2)


@pytest.mark.ranks(4)
def test_the_short_name_takes_a_config_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / f"config{dist.get_rank()}.yaml"
    path.write_text(
        "autotp_size: 2\npartition_config: {layer_specs: [{patterns: ['.*up.weight']}, {patterns: ['.*down.weight'],"
        " partition_type: row}]}\n"
    )
    monkeypatch.setenv("LIGHTNING_AUTOTP_CONFIG", str(path))
    assert sizes_by_name() == (2, 2)


@pytest.mark.ranks(4)
def test_the_size_in_the_environment_wins_over_the_config_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / f"config{dist.get_rank()}.yaml"
    path.write_text("autotp_size: 4\n")
    monkeypatch.setenv("LIGHTNING_AUTOTP_CONFIG", str(path))
    monkeypatch.setenv("LIGHTNING_AUTOTP_SIZE", "2")
    assert sizes_by_name() == (2, 2)


@pytest.mark.ranks(4)
def test_the_short_name_alone_takes_all_devices() -> None:
    assert sizes_by_name() == (4, 1)


@pytest.mark.ranks(4, nodes=2)
def test_the_short_name_alone_takes_all_devices_of_a_node() -> None:
    run = quiet_trainer(strategy="autotp", num_nodes=2, use_distributed_sampler=False)
    plugin = run.strategy
    assert isinstance(plugin, AutoTPStrategy)
    plugin.config = plugin.config.model_copy(update={"partition_config": RULES})
    run.fit(Regressor())
    assert (plugin.tp_size, plugin.dp_size) == (2, 2)


@pytest.mark.parametrize("value", ["two", "-1", ""])
def test_a_size_in_the_environment_that_is_no_number_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_AUTOTP_SIZE", value)
    with pytest.raises(ValueError, match="LIGHTNING_AUTOTP_SIZE"):
        quiet_trainer(strategy="autotp")


# ---- misuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"autotp_sise": 2}, "unknown argument 'autotp_sise'. Did you mean 'autotp_size'"),
        ({"bucket_cap": 1}, "unknown argument 'bucket_cap'. Did you mean 'bucket_cap_mb'"),
        ({"process_group": object()}, "process_group: the groups are made here"),
        ({"device_mesh": object()}, "device_mesh: the groups are made here"),
    ],
)
def test_arguments_that_mean_nothing_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        AutoTPStrategy(**arguments)


@pytest.mark.ranks(2)
def test_arguments_of_ddp_reach_it() -> None:
    model = Regressor()
    seen: list[Any] = []
    model.on_train_start = lambda: seen.append(model.trainer.strategy.model)  # type: ignore[method-assign]
    trainer(AutoTPStrategy(bucket_cap_mb=3, gradient_as_bucket_view=True, find_unused_parameters=True)).fit(model)
    assert seen[0].bucket_bytes_cap == 3 * 1024 * 1024
    assert seen[0].gradient_as_bucket_view and seen[0].find_unused_parameters


def test_the_trainer_of_the_other_package_refuses_with_a_text_that_names_the_right_one() -> None:
    other = pytest.importorskip("pytorch_lightning")
    with alone(), pytest.raises(ValueError, match=r"AutoTPStrategy\(autotp_size=2\).*`lightning\.pytorch\.Trainer`"):
        other.Trainer(strategy=AutoTPStrategy(autotp_size=2), accelerator="cpu", logger=False)


def test_lightning_starts_the_processes_itself(tmp_path: Path) -> None:
    """From a plain script; the second process is made by running it again."""
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "from tests.helpers.small_nets import Regressor, strategy, trainer\n"
        "model = Regressor()\n"
        "trainer(strategy(2), devices=2).fit(model)\n"
        f"torch.save(model.net.up.weight, f'{tmp_path}/{{model.global_rank}}.pt')\n"
    )
    root = Path(__file__).parents[2]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
    shapes = [tuple(torch.load(tmp_path / f"{rank}.pt").shape) for rank in range(2)]
    assert shapes == [(5, 8), (5, 8)]
