"""``lightning-autotp fit|validate|test|predict|plan --config FILE``: LightningCLI, and the plan without a run.

``lightning-autotp verify``, ``estimate``, ``export``, ``import`` and ``inspect`` are no part of LightningCLI: they need
no config, see :mod:`lightning_autotp.cli.verify` and its neighbours.
"""

import sys
from contextlib import nullcontext
from typing import Any, Optional

import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_autotp.cli import derive, estimate, export, import_checkpoint, inspect, verify
from lightning_autotp.config.files import check_keys
from lightning_autotp.plans.plan_table import print_plan
from lightning_autotp.recipe.make_plan import make_plan
from lightning_autotp.strategies.trainer import AutoTPStrategy

_ANYWHERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.precision=32-true"]
"""A plan needs none of the machine that the config is written for."""


_COMMANDS = {
    "verify": verify.main,
    "estimate": estimate.main,
    "export": export.main,
    "import": import_checkpoint.main,
    "inspect": inspect.main,
}

_MODE = "yaml_once"


def _load(text: str) -> Any:
    check_keys(text)
    return get_loader("yaml")(text)


class PlanningTrainer(Trainer):
    """Lightning's Trainer with one more entry point, which starts no processes and makes no weights."""

    def plan(self, model: LightningModule, datamodule: Optional[LightningDataModule] = None) -> None:
        """Print what the strategy would cut; exit with status 1 where strict mode or setup would refuse it.

        Args:
            model: the model to plan for.
            datamodule: not looked at; configs have one.
        """
        strategy = self.strategy
        if not isinstance(strategy, AutoTPStrategy):
            sys.exit(
                f"plan: the strategy is {type(strategy).__name__}; set trainer.strategy.class_path to"
                " lightning_autotp.AutoTPStrategy."
            )
        if strategy.config.size < 2:
            sys.exit("plan: tensor parallelism is off; set autotp_size to 2 or more.")
        with torch.device("meta"):
            model.configure_model()
        try:
            plan = make_plan(model, strategy.config)
        except ValueError as error:
            sys.exit(f"plan: {error}")
        print_plan(plan)
        if plan.warnings or plan.blockers:
            sys.exit(1)


class AutoTPCLI(LightningCLI):
    """LightningCLI with the ``plan`` subcommand, for YAML that says nothing twice."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        set_loader(_MODE, _load, exceptions=(yaml.YAMLError,))
        return super().init_parser(**kwargs, parser_mode=_MODE)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "plan": {"model", "datamodule"}}

    def instantiate_classes(self) -> None:
        with torch.device("meta") if self.subcommand == "plan" else nullcontext():
            super().instantiate_classes()


def main(args: Optional[list[str]] = None) -> None:
    """The console script.

    ``fit --resume`` continues from the last checkpoint, if there is one (``--ckpt_path last``).
    """
    given = list(sys.argv[1:] if args is None else args)
    for name, command in _COMMANDS.items():
        if given[:1] == [name]:
            sys.exit(command(given[1:]))
    if given[:1] == ["plan"] and "--derive" in given:
        sys.exit(derive.main([argument for argument in given[1:] if argument != "--derive"]))
    at = given.index("--resume") if "--resume" in given else None
    if at is not None:
        given[at : at + 1] = ["--ckpt_path", "last"]
    if given[:1] == ["plan"] and not {"-h", "--help", "--print_config"} & set(given):
        given += _ANYWHERE
    sys.argv[1:] = given  # not handed over as arguments: Lightning starts its other processes with this command line
    options: dict[str, Any] = {"overwrite": True}  # a requeued job writes where its first run did
    AutoTPCLI(trainer_class=PlanningTrainer, save_config_kwargs=options)
