"""A strategy's arguments are the config's fields and its own: signature, docstring and options follow the fields."""

import functools
import inspect
from collections.abc import Callable, Mapping
from datetime import timedelta
from inspect import Parameter
from typing import Any, Literal, Optional, TypeVar, Union, get_args, get_origin

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from torch.nn.parallel import DistributedDataParallel

from lightning_autotp.config.descriptions import describe, with_entries
from lightning_autotp.config.switches import check_switch
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.specs.layer_spec import nearest

S = TypeVar("S", bound=DDPStrategy)


def takes_fields_of(config_class: type[TPTrainingConfig]) -> Callable[[type[S]], type[S]]:
    """Give a strategy class an argument for each field of ``config_class``; None stands for not given.

    ``__init__`` must have a parameter ``config``, which gets a ``config_class`` that has all of them merged in.
    Parameters for fields that it names are there for editors and type checkers, and for their place in the order; at
    run time their types are the fields', and fields that it does not name are keywords.
    """

    def decorate(cls: type[S]) -> type[S]:
        written = cls.__init__
        signature = _signature(written, config_class)

        @functools.wraps(written)
        def __init__(self: S, *args: Any, **kwargs: Any) -> None:
            arguments = signature.bind(self, *args, **kwargs).arguments
            others = arguments.pop("kwargs", {})
            given = {name: arguments.pop(name, None) for name in config_class.model_fields}
            given = {name: value for name, value in given.items() if value is not None}
            config = config_class.load(arguments.pop("config", None), **given)
            _check_types({**others, **arguments}, signature)
            written(**arguments, config=config, **others)

        __init__.__signature__ = signature  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[assignment]
        doc = inspect.getdoc(cls) or ""  # none under python -OO
        missing = [name for name in config_class.model_fields if f"\n    {name}: " not in doc]
        cls.__doc__ = with_entries(doc, describe(config_class, missing), after="config")
        return cls

    return decorate


def _signature(written: Callable[..., Any], config_class: type[BaseModel]) -> inspect.Signature:
    """The signature of ``written`` with the fields' types, and with keywords for fields that it does not name."""
    parameters = dict(inspect.signature(written).parameters)
    rest = parameters.popitem()[1]  # **kwargs
    for name, info in config_class.model_fields.items():
        place = parameters[name].kind if name in parameters else Parameter.KEYWORD_ONLY
        parameters[name] = Parameter(name, place, default=None, annotation=_accepted(info))
    return inspect.signature(written).replace(parameters=[*parameters.values(), rest])


def _accepted(info: FieldInfo) -> Any:
    """The type of what a field may be given as, or None."""
    inputs = [m.json_schema_input_type for m in info.metadata if isinstance(m, BeforeValidator)]
    kind = next((kind for kind in inputs if kind is not PydanticUndefined), info.annotation)
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        kind = Union[kind, dict[str, Any]]
    return Optional[kind]


def _check_types(arguments: Mapping[str, Any], signature: inspect.Signature) -> None:
    """Refuse values of another type than the argument's: ``"false"`` would be taken for true.

    Raises:
        ValueError: with the argument's name.
    """
    known = {**inspect.signature(DistributedDataParallel.__init__).parameters, **signature.parameters}
    for name in known.keys() & arguments.keys():
        value, choices = arguments[name], known[name].annotation
        # torch has no default for `broadcast_buffers`
        if isinstance(known[name].default, bool) or (name == "broadcast_buffers" and value is not None):
            check_switch(name, value)
        if get_origin(choices) is Literal and value not in get_args(choices):
            raise ValueError(f"{name}: {value!r} is none of {', '.join(map(repr, get_args(choices)))}.")
    timeout, backend = arguments.get("timeout"), arguments.get("process_group_backend")
    if timeout is not None and not isinstance(timeout, timedelta):
        raise ValueError(f"timeout: {timeout!r} is not a timedelta; write timedelta(minutes=30), say.")
    if backend is not None:
        _check_backend(backend)


def _check_backend(backend: object) -> None:
    known = [name for name in dist.Backend.backend_list if name != dist.Backend.UNDEFINED]
    # one name, or one a kind of device: "cpu:gloo,cuda:nccl"
    names = [part.rpartition(":")[2].lower() for part in backend.split(",")] if isinstance(backend, str) else [backend]
    for name in names:
        if name not in known:
            raise ValueError(
                f"process_group_backend: there is no backend {name!r}.{nearest(str(name), known)} Backends:"
                f" {', '.join(known)}; leave it out for gloo on CPU and nccl on CUDA."
            )
