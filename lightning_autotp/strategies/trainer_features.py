"""What a Lightning strategy does for features of the Trainer that look at a whole model: norms, logs, predictions."""

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any, Optional, Union

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_autotp.recipe.engine import Engine
from lightning_autotp.strategies.callbacks import average_later, write_once
from lightning_autotp.strategies.logged import LoggedLook
from lightning_autotp.strategies.trainer_checkpoint import CheckpointStrategy
from lightning_autotp.training.norms import Norms, Of
from lightning_autotp.training.random_state import share_random_state


class FeatureStrategy(CheckpointStrategy):
    """Gives norms of the whole model, compares what is logged, and lets one rank of those that predict the same write.

    ``AutoTPStrategy`` is this and all the rest.
    """

    _engine: Optional[Engine]
    _averaged: set[int]
    """The ids of the parameters whose gradients data parallelism averages."""
    _logged: Optional[LoggedLook] = None
    _write_again: Optional[Callable[[], None]] = None

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        if model._trainer is not None:
            average_later(model._trainer)

    @property
    def engine(self) -> Engine:
        """What happens around the steps of this run; known once setup has sharded the model."""
        assert self._engine is not None
        return self._engine

    def _clip_grad_by_norm(self, optimizer: Optimizer, clip_val: Union[int, float]) -> None:
        self.engine.clip_norm(optimizer, self.precision_plugin.main_params(optimizer), clip_val)

    def _clip_grad_by_value(self, optimizer: Optimizer, clip_val: Union[int, float]) -> None:
        self.engine.clip_value(optimizer, self.precision_plugin.main_params(optimizer), clip_val)

    @property
    def _norms(self) -> Norms:
        if self._engine is None:
            raise RuntimeError("the model is not sharded yet; ask for norms in a hook or a step of a run.")
        return self._engine.norms

    def grad_norm(self, of: Of = None, norm_type: float = 2.0) -> Tensor:
        """The norm of the unsharded model's gradient, the same on every rank; all of them must call it.

        As in a plain Trainer, it is that of what ``.grad`` holds: between the backward pass and the optimizer, in
        ``on_before_optimizer_step`` say, or after ``manual_backward``.

        Args:
            of: a module, a parameter or some of them; None takes all of the model. Those without a gradient are left
                out.
            norm_type: of the p-norm; ``inf`` is the largest element.
        """
        return self._norms.grad_norm(of, norm_type)

    def grad_norms(
        self, of: Optional[nn.Module] = None, norm_type: float = 2.0, separator: str = "/"
    ) -> dict[str, Tensor]:
        """What ``lightning.pytorch.utilities.grad_norm`` gives, under its names, of the unsharded model; to be logged.

        Args:
            of: a module; None takes all of the model.
            norm_type: of the p-norm.
            separator: stands before the name of a parameter.
        """
        return self._norms.grad_norms(of, norm_type, separator)

    def parameter_norm(self, of: Of = None, norm_type: float = 2.0) -> Tensor:
        """The norm of the unsharded model's weights, the same on every rank; see :meth:`grad_norm`."""
        return self._norms.parameter_norm(of, norm_type)

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        if self.engine.zero is not None and not self._module.automatic_optimization:
            self.engine.zero.before_backward(closure_loss)

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        zero = self.engine.zero
        if zero is None:
            with super().block_backward_sync():
                yield
        else:
            with zero.without_reduction() if self.config.zero_accumulate_unsharded else nullcontext():
                yield

    # -- what thaws

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        self._averaged = self._trainable()

    def _trainable(self) -> set[int]:
        return {id(parameter) for parameter in self._module.parameters() if parameter.requires_grad}

    def _average_what_thawed(self) -> None:
        """Wrap the model for data parallelism anew if parameters train that were frozen then: it leaves those out."""
        if isinstance(self.model, DistributedDataParallel) and not self._trainable() <= self._averaged:
            self.model = self._module
            self.configure_ddp()

    # -- what is logged

    @property
    def _look_at_logs(self) -> LoggedLook:
        if self._logged is None:
            self._logged = LoggedLook(self.mesh, self.config.check_agreement)
        return self._logged

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._average_what_thawed()
        self._look_at_logs.before_step(self._module.trainer)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._look_at_logs.at_end(self._module.trainer, "train")

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._draw_alike()

    @override
    def on_test_start(self) -> None:
        super().on_test_start()
        self._draw_alike()

    def _draw_alike(self) -> None:
        """Ranks that share a model draw the same numbers, sampled tokens say; a fit sees to that itself."""
        if self._module.trainer.state.fn != TrainerFn.FITTING:
            share_random_state(self.mesh, self.root_device)

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        self._look_at_logs.at_end(self._module.trainer, "validation")

    @override
    def on_test_end(self) -> None:
        super().on_test_end()
        self._look_at_logs.at_end(self._module.trainer, "test")

    # -- what is predicted

    @override
    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._draw_alike()
        self._write_again = write_once(self._module.trainer, self.mesh)

    @override
    def on_predict_end(self) -> None:
        super().on_predict_end()
        if self._write_again is not None:
            self._write_again()
