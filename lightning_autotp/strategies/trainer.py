"""The Lightning strategy: each hook is a few lines that call the rooms where the work is done."""

import inspect
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, Optional, Union

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_autotp.compat import optimizers_to_device
from lightning_autotp.config.switches import LossParallel, ProofMode
from lightning_autotp.config.training_config import TPConfig, TPTrainingConfig
from lightning_autotp.distributed.errors import raised_together
from lightning_autotp.distributed.mesh import build_mesh
from lightning_autotp.plans.plan_table import print_plan
from lightning_autotp.proof.prover import Look, Prover
from lightning_autotp.recipe.engine import Engine, plan_once
from lightning_autotp.recipe.proving import prover_of
from lightning_autotp.sharding.shard import shard
from lightning_autotp.sharding.state import sharded
from lightning_autotp.sharding.zero import shard_as_asked, zero_of
from lightning_autotp.strategies.arguments import takes_fields_of
from lightning_autotp.strategies.callbacks import share_copies
from lightning_autotp.strategies.sample import sample_of
from lightning_autotp.strategies.summary import summarize_the_full_model
from lightning_autotp.strategies.trainer_features import FeatureStrategy
from lightning_autotp.strategies.validation import (
    apply_dtype,
    check_processes,
    known_arguments,
    refuse_callbacks,
    refuse_for_zero,
    refuse_links,
    refuse_places,
)
from lightning_autotp.training.compile import compile_blocks
from lightning_autotp.training.consistency import FirstLook
from lightning_autotp.training.data_parallel import (
    explain_error,
    hook_state_over_dp,
    refuse_for_ddp,
    statistics_over_dp,
)


@takes_fields_of(TPTrainingConfig)
class AutoTPStrategy(FeatureStrategy):
    """Tensor parallel training of any LightningModule, with data parallelism over the remaining processes.

    Args:
        config: a :class:`~lightning_autotp.TPTrainingConfig`, a dict of its fields, or the path of a YAML or JSON file
            (a DeepSpeed config is read as it is). Its fields are arguments, too, which win over it.
        sample_batch: a batch to derive a plan from where there are no rules; without it an attribute or a method of
            that name of the module is used, or the first items of the data.
        save_distributed_checkpoint: save a directory, each rank its part (True), or gather into one ordinary file that
            a plain Trainer reads (False).
        exclude_frozen_parameters: leave parameters that do not train out of checkpoints (those of a LoRA run then hold
            its adapters); a resumed run takes them from the model as it was built.
        process_group_backend: the backend of all groups; by default gloo on CPU and nccl on CUDA.
        timeout: how long a collective may wait for its peers.
        start_method: how Lightning starts processes where nothing else does.
        find_unused_parameters: for data parallelism over models whose parameters are not all used in each step.
        static_graph: tell data parallelism that every step uses the same parameters in the same order.
        gradient_as_bucket_view: keep gradients in the buffers of the data parallel reduction.
        **kwargs: anything else that :class:`~lightning.pytorch.strategies.DDPStrategy` and torch's
            ``DistributedDataParallel`` take.

    Raises:
        ValueError: on anything wrong in the configuration; the message names the field and the fix.
    """

    strategy_name = "autotp"

    def __init__(
        self,
        config: Union[TPTrainingConfig, dict[str, Any], str, os.PathLike[str], None] = None,
        autotp_size: Optional[int] = None,
        dtype: Union[str, torch.dtype, None] = None,
        tp_overlap_comm: Optional[bool] = None,
        partition_config: Optional[dict[str, Any]] = None,
        preset_model: Optional[str] = None,
        tensor_parallel: Union[TPConfig, dict[str, Any], None] = None,
        sequence_parallel: Optional[bool] = None,
        loss_parallel: Optional[LossParallel] = None,
        compile: Optional[bool] = None,  # noqa: A002 - torch's name for it
        shard_saved_activations: Optional[bool] = None,
        save_distributed_checkpoint: bool = True,
        exclude_frozen_parameters: bool = False,
        check_agreement: Optional[bool] = None,
        check_every_n_steps: Optional[int] = None,
        proof: Optional[ProofMode] = None,
        process_group_backend: Optional[str] = None,
        timeout: timedelta = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        unsafe_checkpoint_load: Optional[bool] = None,
        verify_checksums: Optional[bool] = None,
        async_checkpoint: Optional[bool] = None,
        sample_batch: Any = None,
        broadcast_batch: Optional[bool] = None,
        zero_stage: Optional[int] = None,
        zero_group_size: Optional[int] = None,
        zero_accumulate_unsharded: Optional[bool] = None,
        context_parallel_size: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        ours = inspect.signature(AutoTPStrategy.__init__).parameters
        others = known_arguments([name for name in ours if name not in ("self", "kwargs")], kwargs)
        # the decorator has merged the arguments that are fields into `config`; they are listed for editors
        self.config = TPTrainingConfig.load(config)
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            **others,
        )
        self._sample_batch = sample_batch
        self._save_distributed_checkpoint = save_distributed_checkpoint
        self._exclude_frozen_parameters = exclude_frozen_parameters
        self._all_devices = self._is_sharded = False
        self._engine: Optional[Engine] = None
        self._prover: Optional[Prover] = None

    def __repr__(self) -> str:
        # other Trainers (pytorch_lightning's) show this when they refuse the strategy
        return (
            f"{type(self).__name__}(autotp_size={self.config.size}), a strategy for `lightning.pytorch.Trainer`"
            " (not for the Trainer of `pytorch_lightning`)"
        )

    # -- processes ----------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        nodes, devices = self.num_nodes, self.num_processes
        check_processes(self.world_size, nodes, devices, self.config, self.cluster_environment)
        super().setup_environment()
        if self._all_devices and self._mesh is None:
            self.config = TPTrainingConfig.load(self.config, autotp_size=self.num_processes)
        self._require_one_job()
        if self._mesh is None:
            cp_size = self.config.context_parallel_size
            self._mesh = build_mesh(self.config.size, self.config.tensor_parallel, self._timeout, cp_size=cp_size)
            self._ddp_kwargs["process_group"] = self._mesh.replica_group
            if self._ddp_comm_hook is not None:
                self._ddp_comm_state = hook_state_over_dp(self._ddp_comm_state, self._mesh)

    # -- the model ----------------------------------------------------------------------------------------------------

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: Optional[bool] = None) -> Generator[None, None, None]:
        # the whole model must not go to the device: setup moves only this rank's part
        with torch.device("meta") if empty_init else nullcontext(), self.precision_plugin.tensor_init_context():
            yield

    @override
    def connect(self, model: LightningModule) -> None:
        if self._engine is not None and self._engine.model is not model:
            self._engine = self._prover = None  # or they would keep the last run's model while this one is made
        self._is_sharded = self._has_optimizers = False
        super().connect(model)

    @override
    def _shard_for_this_run(self) -> None:
        if self._is_sharded:
            return
        self.model = module = self._module
        assert self.accelerator is not None
        self.accelerator.setup(module.trainer)
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        if fitting and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        self.precision_plugin.convert_module(module)
        apply_dtype(module, self.config, str(self.precision_plugin.precision))
        self._engine = self._shard(module.trainer, module, fitting)
        share_copies(module.trainer, module, self.mesh, self.config, self.root_device)
        statistics_over_dp(module, self.mesh)
        self._is_sharded = True

    @override
    def setup(self, trainer: Trainer) -> None:
        self._shard_for_this_run()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._begin_fit(trainer, self._module, self.engine)
        self.setup_precision_plugin()
        if fitting:
            optimizers_to_device(self.optimizers, self.root_device)

    def _shard(self, trainer: Trainer, module: LightningModule, fitting: bool) -> Engine:
        """Shard and compile the module, unless an earlier run has done it."""
        look = FirstLook(self.mesh, self.config.check_agreement, self.config.check_every_n_steps)
        is_new = sharded(module) is None
        planned = plan_once(module, self.config, self.mesh, lambda: sample_of(module, trainer, self._sample_batch))
        if is_new and self.tp_size > 1 and self.is_global_zero:
            print_plan(planned.plan)
        if is_new:
            self._prover = prover_of(module, planned, self.config, self.mesh)
        found = shard(
            module, planned.plan, self.mesh, self.config, device=self.root_device, training=fitting, compare=look.shared
        )
        if self.config.compile:
            compile_blocks(module, planned.plan)
        if zero_of(module) is None:  # moving its parameters would take off what users have noted on them
            self.model_to_device()
        shard_as_asked(module, planned.plan, self.mesh, self.config)
        return Engine(module, found, look, self._prover)

    def _begin_fit(self, trainer: Trainer, module: LightningModule, engine: Engine) -> None:
        if self.config.async_checkpoint:
            refuse_links(trainer)
        raised_together(lambda: refuse_places(trainer))
        if engine.zero is not None:
            refuse_for_zero(trainer, module, self._ddp_comm_hook)
        if self.tp_size > 1:
            refuse_callbacks(trainer)
            summarize_the_full_model(trainer, module, engine.sharded.plan)
        halves = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        engine.begin_training(self.root_device, halves.get(str(self.precision_plugin.precision)))
        if self.mesh.replicas > 1 and engine.zero is None:
            refuse_for_ddp(module, self._ddp_kwargs, accumulates=trainer.accumulate_grad_batches > 1)
            self.configure_ddp()
        self._reset_optimizers_and_schedulers()
        raised_together(lambda: self.setup_optimizers(trainer))
        self._has_optimizers = True
        engine.accept(self.optimizers, self.lr_scheduler_configs)
        if not module.automatic_optimization:
            for optimizer in self.optimizers:  # users may step the bare optimizer, past `optimizer_step`
                optimizer.register_step_pre_hook(lambda stepping, *_: engine.complete(stepping))

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.lightning_module is not None:
            explain_error(exception, self.lightning_module)

    # -- a step -------------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._prove("training", args)
        return self.engine.training_step(super().training_step, *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._prove("validation", args)
        return self.engine.evaluation_step(super().validation_step, *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._prove("test", args)
        return self.engine.evaluation_step(super().test_step, *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._prove("predict", args)
        return self.engine.evaluation_step(super().predict_step, *args, **kwargs)

    def _prove(self, stage: str, args: tuple[Any, ...]) -> None:
        self.engine.prove(Look(stage, args, self._module.trainer))

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Union[LightningModule, nn.Module, None] = None,
        **kwargs: Any,
    ) -> Any:
        def with_complete_gradients() -> Any:
            result = closure()
            self.engine.complete(optimizer)
            return result

        output = super().optimizer_step(optimizer, with_complete_gradients, model, **kwargs)
        self.engine.stepped(optimizer)
        return output

    @property
    @override
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Optional[Precision]) -> None:
        # Lightning picks the plugin by the strategy's class and gives no other place for a norm over all ranks
        DDPStrategy.precision_plugin.fset(self, precision_plugin)  # type: ignore[attr-defined]
        if precision_plugin is not None:
            precision_plugin.clip_grad_by_norm = self._clip_grad_by_norm  # type: ignore[method-assign]
            precision_plugin.clip_grad_by_value = self._clip_grad_by_value  # type: ignore[method-assign]

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        plugin = self.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            plugin.scaler = self.engine.loss_scaler(plugin.scaler)

    @override
    def teardown(self) -> None:
        if self._engine is not None:
            self._engine.end_training()
        # the model stays sharded and where it is, so that saving, validating and fitting again work after fit;
        # the base class would move it to the CPU, from where its collectives cannot run
        if isinstance(self.model, DistributedDataParallel):
            self.model = self.lightning_module
        trainer = None if self.lightning_module is None else self.lightning_module._trainer
        if self._layer_sync and self.model is not None and trainer and trainer.state.fn == TrainerFn.FITTING:
            self.model = self._layer_sync.revert(self.model)
        assert self.cluster_environment is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()
        self.finish_saving()

    @classmethod
    def from_environment(cls) -> "AutoTPStrategy":
        """The strategy behind ``Trainer(strategy="autotp")``.

        The size comes from ``LIGHTNING_AUTOTP_SIZE``, or everything from the file that ``LIGHTNING_AUTOTP_CONFIG``
        names; with neither, all devices of a node share one model.
        """
        size, config = os.environ.get("LIGHTNING_AUTOTP_SIZE"), os.environ.get("LIGHTNING_AUTOTP_CONFIG")
        if size is not None and not size.isdecimal():
            raise ValueError(f"LIGHTNING_AUTOTP_SIZE: {size!r} is not a number of ranks.")
        if config == "":
            raise ValueError("LIGHTNING_AUTOTP_CONFIG: it is empty; give the path of a YAML or JSON file, or unset it.")
        strategy = cls(config=config, autotp_size=None if size is None else int(size))
        strategy._all_devices = size is None and config is None
        return strategy


def register() -> None:
    """Make ``Trainer(strategy="autotp")`` known; importing twice is no error."""
    if AutoTPStrategy.strategy_name not in StrategyRegistry:
        StrategyRegistry.register(
            AutoTPStrategy.strategy_name,
            AutoTPStrategy.from_environment,
            description="Tensor parallelism; its size from LIGHTNING_AUTOTP_SIZE or LIGHTNING_AUTOTP_CONFIG",
        )
