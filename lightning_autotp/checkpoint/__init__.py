"""Checkpoints are the unsharded model's: names, shapes and dtypes on disk know nothing of the parallel layout."""

from lightning_autotp.checkpoint.distributed import is_directory_checkpoint, load_directory
from lightning_autotp.checkpoint.saving import save_directory
from lightning_autotp.checkpoint.state_dict import Placement

__all__ = ["Placement", "is_directory_checkpoint", "load_directory", "save_directory"]
