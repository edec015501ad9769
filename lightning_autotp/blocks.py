"""The repeated blocks of a model: what sequence parallelism surrounds and what is compiled one by one."""

from torch import nn

from lightning_autotp.plan import ShardingPlan


def lists_of_blocks(model: nn.Module, plan: ShardingPlan, kinds: tuple[str, ...]) -> list[str]:
    """The paths of the outermost ``nn.ModuleList`` around layers that are cut in one of these ways."""
    cut = [e.module for e in plan.parameters.values() if e.kind in kinds and not e.layout.is_replicated]
    lists = [path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.ModuleList)]
    found = [path for path in lists if path and any(module.startswith(f"{path}.") for module in cut)]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found if other != path)]


def compile_blocks(model: nn.Module, plan: ShardingPlan) -> None:
    """Compile the blocks of a sharded model in place, one by one, unless they are compiled already.

    Blocks that are alike share what is compiled, so that this takes as long as one of each kind. What is between them
    stays eager. Source: torch's guide to regional compilation.

    Raises:
        ValueError: if there are no blocks around what is cut.
    """
    lists = lists_of_blocks(model, plan, ("row", "column"))
    if not lists:
        raise ValueError(
            "compile: it needs lists of blocks (nn.ModuleList) around the layers that are cut, and here are none; leave"
            " it off, and call `.compile()` on the modules to compile in `configure_model`."
        )
    for path in lists:
        for block in model.get_submodule(path).children():
            if block._compiled_call_impl is None:
                block.compile()
