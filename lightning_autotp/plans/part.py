"""The plan of a module inside a model that has one."""

from collections.abc import Iterable
from dataclasses import replace

from lightning_autotp.plans.plan import ShardingPlan


def part_of(plan: ShardingPlan, path: str) -> ShardingPlan:
    """The plan of the module at ``path``, by its own names; the whole plan for the empty path."""
    if not path:
        return plan
    prefix = f"{path}."

    def own(name: str) -> str:
        return name.removeprefix(prefix) if name != path else ""

    def inside(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(own(name) for name in names if name.startswith(prefix))

    parameters = {
        own(name): replace(entry, name=own(name), module=own(entry.module))
        for name, entry in plan.parameters.items()
        if name.startswith(prefix)
    }
    return replace(
        plan,
        parameters=parameters,
        siblings=tuple(group for group in map(inside, plan.siblings) if len(group) > 1),
        attributes=tuple(replace(a, module=own(a.module)) for a in plan.attributes if _in(a.module, path)),
        boundaries=tuple(replace(b, module=own(b.module)) for b in plan.boundaries if _in(b.module, path)),
        head_inputs=tuple(replace(h, module=own(h.module)) for h in plan.head_inputs if _in(h.module, path)),
        sequence=None,
        warnings=(),
    )


def _in(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")
