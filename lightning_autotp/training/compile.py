"""Compiling the blocks of a sharded model."""

from torch import nn

from lightning_autotp.compat import is_compiled_in_place, is_compiled_module
from lightning_autotp.planning.blocks import children_of, cut_of, lists_around
from lightning_autotp.plans.plan import ShardingPlan


def is_compiled(model: nn.Module) -> bool:
    """Whether some of it is, by ``compile=True`` or by the user: a module, its forward, or a LightningModule."""
    return any(map(is_compiled_module, model.modules()))


def compile_blocks(model: nn.Module, plan: ShardingPlan) -> None:
    """Compile the blocks of a sharded model in place, one by one, unless they are compiled already.

    Blocks that are alike share what is compiled, so that this takes as long as one of each kind. What is between them
    stays eager. Source: torch's guide to regional compilation.

    Kernels are picked by timing them, on each rank for itself, and may round otherwise. That is rounding, but where a
    router makes choices of it, which must be the same on all ranks: so not there. With sequence parallelism what a
    router reads was computed on one rank.

    Raises:
        ValueError: if there are no blocks around what is cut.
    """
    entries = list(plan.parameters.values())
    lists = lists_around(model, [entry.module for entry in (cut_of(entries) if plan.tp_size > 1 else entries)])
    if not lists:
        raise ValueError(
            "compile: it needs lists of blocks (nn.ModuleList or nn.Sequential) around the layers that are cut, and"
            " here are none; leave it off, and call `.compile()` on the modules to compile in `configure_model`."
        )
    routed = [f"{boundary.module}." for boundary in plan.boundaries] if plan.sequence is None else []
    for path in lists:
        for name, block in children_of(model, path).items():
            if not is_compiled_in_place(block):
                routes = any(module.startswith(f"{name}.") for module in routed)
                block.compile(options={"deterministic": True} if routes else None)
