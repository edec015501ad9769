"""The blocks of a model: the lists of modules around its cuts, what is cut inside one, and compiling them."""

from torch import nn

from lightning_autotp.plan import ParameterPlan, ShardingPlan


def shared_blocks(model: nn.Module, plan: ShardingPlan) -> dict[str, nn.Module]:
    """The blocks of ``model`` by path, one list or several: what they hand on is the same on all ranks.

    Raises:
        ValueError: under sequence parallelism, without a list of blocks, or where a cut goes from one to another.
    """
    switch = "shard_saved_activations"
    if plan.sequence is not None:
        raise ValueError(
            f"{switch}: with sequence_parallel each rank keeps its own tokens of what blocks hand on already; leave"
            f" {switch} off, or sequence_parallel."
        )
    lists, _ = block_lists(model, plan)
    if not lists:
        raise ValueError(
            f"{switch}: it needs a list of blocks (nn.ModuleList) around row cuts, and {type(model).__name__} has none;"
            " leave it off for this model."
        )
    blocks = {f"{path}.{name}": block for path in lists for name, block in model.get_submodule(path).named_children()}
    for path in blocks:
        inside = [e for e in plan.parameters.values() if f"{e.module}.".startswith(f"{path}.")]
        if opens(inside) != closes(inside):
            half = "opens" if opens(inside) else "closes"
            raise ValueError(
                f"{switch}: {path} {half} a cut whose other half is in another block, so what blocks hand on is not the"
                " same on all ranks; leave it off for this model."
            )
    return blocks


def is_compiled(model: nn.Module) -> bool:
    """Whether some of it is, by ``compile=True`` or by the user: a module, its forward, or a LightningModule."""
    if getattr(model, "_compiler_ctx", None) is not None:
        return True
    return any(
        "_orig_mod" in m._modules or m._compiled_call_impl is not None or hasattr(m.forward, "get_compiler_config")
        for m in model.modules()
    )


def block_lists(model: nn.Module, plan: ShardingPlan) -> tuple[list[str], list[str]]:
    """The paths of the outermost lists that hold row cuts, and of the row cuts in none of them."""
    rows = [e.module for e in cut_of(list(plan.parameters.values())) if e.kind == "row"]
    outer = _lists_around(model, rows)
    return outer, [row for row in rows if not row.startswith(tuple(f"{path}." for path in outer))]


def _lists_around(model: nn.Module, modules: list[str]) -> list[str]:
    """The paths of the outermost ``nn.ModuleList`` that hold some of ``modules``."""
    lists = [path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.ModuleList)]
    found = [path for path in lists if path and any(module.startswith(f"{path}.") for module in modules)]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found if other != path)]


def opens(entries: list[ParameterPlan]) -> bool:
    """Whether one of them is a column cut whose output stays in parts."""
    return any(e.kind == "column" and e.features is not None and not e.gather_output for e in cut_of(entries))


def closes(entries: list[ParameterPlan]) -> bool:
    """Whether one of them is a row cut that reads parts."""
    return any(e.kind == "row" and e.features is not None and not e.split_input for e in cut_of(entries))


def cut_of(entries: list[ParameterPlan]) -> list[ParameterPlan]:
    """Those of them that are cut."""
    return [entry for entry in entries if not entry.layout.is_replicated]


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
    lists = _lists_around(model, [entry.module for entry in (cut_of(entries) if plan.tp_size > 1 else entries)])
    if not lists:
        raise ValueError(
            "compile: it needs lists of blocks (nn.ModuleList) around the layers that are cut, and here are none; leave"
            " it off, and call `.compile()` on the modules to compile in `configure_model`."
        )
    routed = [f"{boundary.module}." for boundary in plan.boundaries] if plan.sequence is None else []
    for path in lists:
        for name, block in model.get_submodule(path).named_children():
            if block._compiled_call_impl is None:
                routes = any(module.startswith(f"{path}.{name}.") for module in routed)
                block.compile(options={"deterministic": True} if routes else None)
