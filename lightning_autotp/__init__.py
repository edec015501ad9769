"""Tensor parallel training in PyTorch Lightning: ``Trainer(strategy=AutoTPStrategy(autotp_size=4))``."""

from lightning_autotp.checkpoint.pretrained import from_pretrained
from lightning_autotp.checkpoint.save_pretrained import save_pretrained
from lightning_autotp.config.training_config import TPConfig, TPTrainingConfig
from lightning_autotp.losses.functional import cross_entropy, linear_cross_entropy
from lightning_autotp.plans.plan import ShardingPlan
from lightning_autotp.presets import AutoTPPresets
from lightning_autotp.recipe.make_plan import make_plan
from lightning_autotp.recipe.parallelize import parallelize
from lightning_autotp.specs.layer_spec import AutoTPConfig, PartitionType, TPLayerSpec, merge_autotp_configs
from lightning_autotp.strategies.trainer import AutoTPStrategy, register
from lightning_autotp.verification import verify

__all__ = [
    "AutoTPConfig",
    "AutoTPPresets",
    "AutoTPStrategy",
    "PartitionType",
    "ShardingPlan",
    "TPConfig",
    "TPLayerSpec",
    "TPTrainingConfig",
    "cross_entropy",
    "from_pretrained",
    "linear_cross_entropy",
    "make_plan",
    "merge_autotp_configs",
    "parallelize",
    "save_pretrained",
    "verify",
]

register()
