"""The whole recipe: mesh, plan, shard, compile, data parallel, gradients.

``AutoTPStrategy`` makes the same calls in the same order from its own hooks, and does not call this: between them
Lightning converts the module's precision, wraps it for data parallelism and sets up optimizers.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.distributed.mesh import Mesh, build_mesh
from lightning_autotp.distributed.same import require_same
from lightning_autotp.proof.prover import Look
from lightning_autotp.proof.step import loss_of_batch
from lightning_autotp.recipe.engine import Engine, plan_once
from lightning_autotp.recipe.facts import SAME_JOB, job_facts
from lightning_autotp.recipe.parallelized import Parallelized
from lightning_autotp.recipe.proving import prove_sample, prover_of
from lightning_autotp.sharding.shard import shard
from lightning_autotp.sharding.state import sharded
from lightning_autotp.sharding.zero import shard_as_asked
from lightning_autotp.training.compile import compile_blocks
from lightning_autotp.training.consistency import FirstLook
from lightning_autotp.training.data_parallel import replicate, statistics_over_dp


def parallelize(
    model: nn.Module,
    config: Union[TPTrainingConfig, Mapping[str, Any], str, os.PathLike[str], None] = None,
    *,
    mesh: Optional[Mesh] = None,
    device: Union[torch.device, str, None] = None,
    autocast: Optional[torch.dtype] = None,
    ddp: Optional[Mapping[str, Any]] = None,
    sample_batch: Any = None,
    loss_fn: Optional[Callable[[nn.Module, Any], Tensor]] = None,
    **fields: Any,
) -> Parallelized:
    """Parallelize ``model`` in place for a training loop of one's own; every process must call it.

    Processes are started, and ``torch.distributed`` initialized, by the user. All of them start from the weights of
    global rank 0. Losses are not scaled: train halves in bfloat16.

    Args:
        model: the unsharded model; on the CPU, or on the meta device if its modules can initialize themselves.
        config: as :class:`~lightning_autotp.AutoTPStrategy` takes it.
        mesh: that of another model, to use its groups; None makes some.
        device: where to train; None takes this process's GPU, or the CPU where the backend is gloo.
        autocast: the dtype of ``torch.autocast``, for a loop that runs under it.
        ddp: more arguments of torch's ``DistributedDataParallel``.
        sample_batch: a batch to prove the plan with before anything is sharded, together with ``loss_fn``; and to
            derive it from where there are no rules.
        loss_fn: ``(model, batch) -> loss``; None calls ``model(**batch)``, or ``model(*batch)``, and takes what it
            returns, or its ``loss``. Without a sample nothing is proved before the loop calls
            :meth:`~lightning_autotp.recipe.parallelized.Parallelized.prove`.
        **fields: fields of the config, such as ``autotp_size``; they win over it.

    Raises:
        RuntimeError: if ``torch.distributed`` is not initialized.
        ValueError: on anything wrong in the configuration, or what cannot be exact; the message names the fix.
    """
    switches = TPTrainingConfig.load(config, **fields)
    _require_processes(model)
    require_same(job_facts(switches), SAME_JOB)
    mesh = _agreeing(mesh, switches) if mesh is not None else _made(switches)
    device = torch.device(device) if device is not None else _own_device()
    if "dtype" in switches.model_fields_set:
        model.to(switches.dtype)

    sample = None if sample_batch is None else Look("training", (sample_batch,), call=loss_fn or loss_of_batch)
    planned = plan_once(model, switches, mesh, lambda: sample)
    plan = planned.plan
    look = FirstLook(mesh, switches.check_agreement, switches.check_every_n_steps)
    prover = prover_of(model, planned, switches, mesh)
    if prover is not None:
        if sample is None:
            rank_zero_info("lightning_autotp: no sample_batch was given, so the loss is not proved; call `prove`.")
        else:
            prover.sharded(model)
            plan = prove_sample(prover, model, sample, mesh)
    found = shard(model, plan, mesh, switches, device=device, compare=look.shared)
    if switches.compile:
        compile_blocks(model, plan)
    statistics_over_dp(model.to(device), mesh)
    shard_as_asked(model, plan, mesh, switches)
    engine = Engine(model, found, look, prover)
    engine.begin_training(device, autocast)
    engine.watch_calls()
    return Parallelized(replicate(model, mesh, device, ddp or {}), model, mesh, plan, engine)


def _require_processes(model: nn.Module) -> None:
    if not dist.is_initialized():
        raise RuntimeError(
            "parallelize: torch.distributed is not initialized; start the script with `torchrun --nproc_per_node N"
            " SCRIPT`, and call `torch.distributed.init_process_group()` in it before this."
        )
    if sharded(model) is not None:
        raise ValueError("parallelize: this model is sharded already; use what the first call returned.")


def _made(switches: TPTrainingConfig) -> Mesh:
    return build_mesh(switches.size, switches.tensor_parallel, cp_size=switches.context_parallel_size)


def _agreeing(mesh: Mesh, switches: TPTrainingConfig) -> Mesh:
    if mesh.cp_size != switches.context_parallel_size:
        raise ValueError(
            f"mesh: its context parallel size is {mesh.cp_size}, and context_parallel_size is"
            f" {switches.context_parallel_size}."
        )
    if mesh.tp_size != switches.size:
        raise ValueError(f"mesh: its tensor parallel size is {mesh.tp_size}, and autotp_size is {switches.size}.")
    return mesh


def _own_device() -> torch.device:
    if dist.get_backend() == "gloo" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
