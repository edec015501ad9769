"""A module's own view of its model's config."""

from typing import Any

from torch import nn


class LocalConfig:
    """A module's view of its model's config: some counts are this rank's, everything else is as it is there."""

    def __init__(self, original: Any) -> None:
        self.__dict__["_original"] = original

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_original" not in self.__dict__:  # copying asks before there is anything
            raise AttributeError(name)
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)


def set_local(module: nn.Module, name: str, value: int) -> None:
    if not name.startswith("config."):
        setattr(module, name, value)
        return
    if not isinstance(module.config, LocalConfig):
        module.config = LocalConfig(module.config)  # type: ignore[assignment]
    vars(module.config)[name.removeprefix("config.")] = value
