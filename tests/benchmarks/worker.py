"""One rank of one mode of ``bench_tp.py``: a Llama is sharded in that mode's way, trained, and its steps are timed.

``torchrun --nproc_per_node N -m tests.benchmarks.worker MODE FOLDER SETTINGS``, SETTINGS being JSON. The rank waits for
the file ``MODE.round`` in FOLDER, and rank 0 answers with ``MODE.round.json``, so that modes can take turns.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of the run, as ``bench_tp.py`` was given them."""

    layers: int
    hidden: int
    inter: int
    heads: int
    kv: int
    seq: int
    batch: int
    vocab: int
    experts: int
    steps: int
    warmup: int
    rounds: int
    cpu: bool
    profile: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.cpu else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.cpu else torch.bfloat16

    @property
    def total_steps(self) -> int:
        return self.warmup + self.rounds * 2 * self.steps


@dataclass
class Clock:
    """Times steps, the same for a plain loop and for a Trainer: both call :meth:`start` and :meth:`end` around each.

    After the warm-up, a round is ``steps`` steps with a device synchronization before each (their median is what is
    reported), then as many with none inside (their mean). A round begins when its file appears in the folder.
    """

    settings: Settings
    mode: str
    folder: Path
    stamps: list[float] = field(default_factory=list)
    first_loss: float = float("nan")
    last_loss: float = float("nan")
    """After the first round, when all modes have made as many steps, however many rounds follow."""

    def _place(self, step: int) -> tuple[int, int]:
        """Which round a step belongs to, -1 being the warm-up, and where in it."""
        after = step - self.settings.warmup
        return (-1, step) if after < 0 else divmod(after, 2 * self.settings.steps)

    def start(self, step: int) -> None:
        number, at = self._place(step)
        if number < 0:
            return
        if at == 0:
            if number == 0:
                self._write("ready", {})
            self._wait(number)
            self.stamps = []
            if number == 0 and not self.settings.cpu:
                torch.cuda.reset_peak_memory_stats()
        if at <= self.settings.steps:
            self._stamp()

    def end(self, step: int, loss: Tensor) -> None:
        if step == 0:
            self.first_loss = self._value(loss)
        number, at = self._place(step)
        if number < 0 or at < 2 * self.settings.steps - 1:
            return
        self._stamp()
        if number == 0:
            self.last_loss = self._value(loss)
        synced = [after - before for before, after in zip(self.stamps[:-2], self.stamps[1:-1])]
        self._write(
            str(number),
            {
                "ms": statistics.median(synced) * 1e3,
                "free_ms": (self.stamps[-1] - self.stamps[-2]) / self.settings.steps * 1e3,
                "first_loss": self.first_loss,
                "loss": self.last_loss,
                "peak_gib": self._peak(),
                "device": "" if self.settings.cpu else torch.cuda.get_device_name(),
            },
        )

    def _stamp(self) -> None:
        if not self.settings.cpu:
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())

    def _wait(self, number: int) -> None:
        gate = self.folder / f"{self.mode}.{number}"
        while not gate.exists():
            time.sleep(0.02)
            if not self.folder.is_dir():  # the measurement was stopped; a Trainer's process survives SIGTERM
                os._exit(1)
        dist.barrier()

    def _write(self, name: str, found: dict[str, Any]) -> None:
        if RANK == 0:
            half = self.folder / f"{self.mode}.half"
            half.write_text(json.dumps(found))
            half.rename(self.folder / f"{self.mode}.{name}.json")

    def _peak(self) -> float | None:
        """Of allocated memory, the largest on any rank."""
        if self.settings.cpu:
            return None
        peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30, device=self.settings.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return float(peak)

    @staticmethod
    def _value(loss: Tensor) -> float:
        loss = loss.detach()
        return float(loss.full_tensor() if isinstance(loss, DTensor) else loss)


def build(settings: Settings) -> Any:
    """The whole model, the same in all modes and on all ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": settings.experts} if settings.experts else {}
    kind: Any = MixtralConfig if settings.experts else LlamaConfig
    config = kind(
        **experts,
        hidden_size=settings.hidden,
        intermediate_size=settings.inter,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv,
        num_hidden_layers=settings.layers,
        vocab_size=settings.vocab,
        max_position_embeddings=settings.seq,
        use_cache=False,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(settings.dtype)
    with settings.device:
        model = (MixtralForCausalLM if settings.experts else LlamaForCausalLM)(config)
    torch.set_default_dtype(default)
    return model


def tokens(settings: Settings) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, settings.vocab, (settings.batch, settings.seq), device=settings.device)


def compile_layers(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile()


# -- peers, as in tp_baseline.py ---------------------------------------------------------------------------------------


def _linears(layer: str) -> tuple[list[str], list[str]]:
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    return [layer + name for name in columns], [layer + name for name in ("self_attn.o_proj", "mlp.down_proj")]


def shard_dtensor(model: Any, settings: Settings) -> Any:
    """The idiom of Lightning's ModelParallelStrategy: parallelize_module with a plan for every layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {}
    for number in range(settings.layers):
        columns, rows = _linears(f"model.layers.{number}.")
        plan.update({name: ColwiseParallel() for name in columns})
        plan.update({name: RowwiseParallel() for name in rows})
    return parallelize_module(model, init_device_mesh(settings.device.type, (WORLD,)), plan)


def shard_dtensor_sp(model: Any, settings: Settings) -> Any:
    """What a tuned torch-native user writes by hand (torchtitan's plan): SequenceParallel and loss_parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {
        "model.layers.0": PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
        ),
        "model.norm": SequenceParallel(use_local_output=True),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    for number in range(settings.layers):
        layer = f"model.layers.{number}."
        plan[layer + "input_layernorm"] = SequenceParallel(use_local_output=True)
        plan[layer + "post_attention_layernorm"] = SequenceParallel(use_local_output=True)
        plan[layer + "self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
            use_local_output=True,
        )
        plan[layer + "mlp"] = PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True
        )
        columns, rows = _linears(layer)
        plan.update({name: ColwiseParallel() for name in columns})
        plan.update({name: RowwiseParallel(output_layouts=Shard(1)) for name in rows})
    model = parallelize_module(model, init_device_mesh(settings.device.type, (WORLD,)), plan)

    def loss_function(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        with loss_parallel():
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    model.loss_function = loss_function
    return model


def shard_hf(model: Any, settings: Settings, folder: Path) -> Any:
    """Transformers' own: from_pretrained(tp_plan="auto")."""
    kind, path = type(model), str(folder / "hf_checkpoint")
    if RANK == 0:
        model.save_pretrained(path)
    dist.barrier()
    del model
    if not settings.cpu:
        torch.cuda.empty_cache()
    model = kind.from_pretrained(path, tp_plan="auto", dtype=settings.dtype)
    model.config.use_cache = False
    return model


def deepspeed_engine(model: Any, settings: Settings, clip: bool) -> Any:
    """DeepSpeed AutoTP: llama preset, tp_overlap_comm, ZeRO 0, torch's AdamW. By default it clips to a norm of 1."""
    config: dict[str, Any] = {} if clip else {"gradient_clipping": 0.0}
    config |= {
        "train_micro_batch_size_per_gpu": settings.batch,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": not settings.cpu},
        "zero_optimization": {"stage": 0},
        "tensor_parallel": {"autotp_size": WORLD, "preset_model": "llama", "tp_overlap_comm": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": not settings.cpu}},
    }
    engine, *_ = importlib.import_module("deepspeed").initialize(model=model, config=config)
    return engine


# -- ours ----------------------------------------------------------------------------------------------------------


def shard_ours(model: Any, settings: Settings, options: set[str]) -> Callable[[], None]:
    """What AutoTPStrategy does in setup; returns what it does after the backward pass."""
    from lightning_autotp.config.training_config import TPTrainingConfig
    from lightning_autotp.distributed.mesh import build_mesh
    from lightning_autotp.recipe.make_plan import make_plan
    from lightning_autotp.sharding.shard import shard
    from lightning_autotp.training.gradients import TPGradients

    config = TPTrainingConfig(
        autotp_size=WORLD,
        tp_overlap_comm=True,
        sequence_parallel="sp" in options,
        loss_parallel="fused" if "fused" in options else "lp" in options,
    )
    mesh = build_mesh(WORLD, config.tensor_parallel)
    found = shard(model, make_plan(model, config), mesh, config, device=settings.device)
    found.overlap.measure()
    gradients = TPGradients(model, found)

    def complete() -> None:
        gradients.complete()
        found.settle()

    return complete


def fit(model: Any, settings: Settings, options: set[str], clock: Clock) -> None:
    """The same steps through Trainer.fit with AutoTPStrategy."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.utils.data import DataLoader

    from lightning_autotp import AutoTPStrategy

    class Timed(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            clock.start(batch_idx)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            clock.end(batch_idx, outputs["loss"])

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(input_ids=batch, labels=batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=not settings.cpu)

    names = {"sp": "sequence_parallel", "lp": "loss_parallel"}
    switches: dict[str, Any] = {name: True for option, name in names.items() if option in options}
    switches |= {"loss_parallel": "fused"} if "fused" in options else {}
    trainer = Trainer(
        accelerator="cpu" if settings.cpu else "cuda",
        devices=WORLD,
        strategy=AutoTPStrategy(autotp_size=WORLD, tp_overlap_comm=True, **switches),
        # the model has its dtype already; "bf16-true" would also round its rotary frequencies, as no other mode does
        max_steps=settings.total_steps,
        callbacks=[Timed()],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ids = tokens(settings).cpu()
    trainer.fit(Module(), DataLoader([ids] * settings.total_steps, batch_size=None))  # type: ignore[arg-type]


# -- the run -------------------------------------------------------------------------------------------------------


def run(mode: str, folder: Path, settings: Settings) -> None:
    if not settings.cpu:
        torch.cuda.set_device(settings.device)
    kind, *extras = mode.split("+")
    kind, *options = kind.split("_") if kind.startswith("ours") else [kind]
    compiled = "compile" in extras
    if not kind.startswith("deepspeed") and "trainer" not in options:
        dist.init_process_group("gloo" if settings.cpu else "nccl")
    clock = Clock(settings, mode, folder)
    model, engine = build(settings), None
    if "trainer" in options:
        if compiled:
            compile_layers(model)
        fit(model, settings, set(options), clock)
        return
    complete: Callable[[], None] = _nothing
    if kind == "dtensor":
        model = shard_dtensor(model, settings)
    elif kind == "dtensor_sp":
        model = shard_dtensor_sp(model, settings)
    elif kind == "hf":
        model = shard_hf(model, settings, folder)
    elif kind in ("deepspeed", "deepspeed_noclip"):
        model = engine = deepspeed_engine(model, settings, clip=kind == "deepspeed")
    elif kind == "ours":
        complete = shard_ours(model, settings, set(options))
    elif kind != "single":
        raise ValueError(f"{mode} is no mode")
    if compiled:
        compile_layers(model)
    step = _step(kind, model, engine, complete, settings)
    for number in range(settings.total_steps):
        clock.start(number)
        clock.end(number, step())
    if settings.profile:
        _profile(step, settings, folder / f"{mode}.profile")


def _nothing() -> None:
    pass


def _step(kind: str, model: Any, engine: Any, complete: Callable[[], None], settings: Settings) -> Callable[[], Tensor]:
    from torch.distributed.tensor.parallel import loss_parallel

    ids = tokens(settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # DTensors and tensors do not go into one fused step
    groups = [[p for p in parameters if isinstance(p, DTensor) is is_dtensor] for is_dtensor in (True, False)]
    optimizers = [torch.optim.AdamW(g, lr=1e-4, fused=not settings.cpu) for g in groups if g and engine is None]

    def step() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        if engine is not None:
            engine.backward(loss)
            engine.step()
            return loss
        if kind == "dtensor_sp":
            with loss_parallel():
                loss.backward()
        else:
            loss.backward()
        complete()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return step


# What a CUDA kernel's name says about it; the first that matches.
_KERNELS = (
    ("nccl", ("nccl",)),
    ("attention", ("flash", "fmha", "sdpa")),
    ("gemm", ("gemm", "nvjet", "cutlass", "xmma")),
    ("optimizer", ("multi_tensor", "fused_adam")),
    ("triton", ("triton",)),
    ("memory", ("mem",)),
    ("elementwise", ("",)),
)


def _profile(step: Callable[[], Tensor], settings: Settings, path: Path) -> None:
    """Three more steps; rank 0 writes where their time went."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([] if settings.cpu else [ProfilerActivity.CUDA])
    with profile(activities=activities) as profiler:
        for _ in range(3):
            step()
        if not settings.cpu:
            torch.cuda.synchronize()
    if RANK != 0:
        return
    if settings.cpu:
        path.write_text(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
        return
    kinds: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    for event in profiler.events() or []:
        if str(event.device_type).endswith("CUDA"):
            kind = next(kind for kind, words in _KERNELS if any(word in event.name.lower() for word in words))
            kinds[kind] += event.device_time_total / 3e3
            kernels[event.name[:100]] += event.device_time_total / 3e3
    largest = sorted(kernels.items(), key=lambda item: -item[1])[:16]
    lines = [f"{ms:8.2f} ms a step  {name}" for name, ms in [*sorted(kinds.items(), key=lambda i: -i[1]), *largest]]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Settings(**json.loads(sys.argv[3])))
    if dist.is_initialized():
        dist.destroy_process_group()
