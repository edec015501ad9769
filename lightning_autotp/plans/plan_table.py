"""A plan as a table for people."""

from rich.console import Console
from rich.table import Table

from lightning_autotp.plans.plan import PlanRow, ShardingPlan


def plan_table(plan: ShardingPlan) -> Table:
    """One line per distinct parameter pattern."""
    table = Table(title=f"Tensor parallel plan for {plan.tp_size} ranks", title_justify="left")
    for heading in ("parameter", "full shape", "a rank holds", "cut", "communication", "decided by"):
        table.add_column(heading, overflow="fold")
    for row in plan.explain():
        table.add_row(*_cells(row))
    return table


def print_plan(plan: ShardingPlan) -> None:
    """Print the plan, and what stands in its way, to standard output."""
    console = Console()
    if not console.is_terminal:  # a log file wraps nothing
        console = Console(width=200)
    console.print(plan_table(plan))
    for attribute in plan.attributes[:1]:
        console.print(f"head counts become local ones in {len(plan.attributes)} places, {attribute.module} for one")
    for blocker in plan.blockers:
        console.print(f"setup will refuse: {blocker}", markup=False)


def _cells(row: PlanRow) -> tuple[str, ...]:
    name = f"{row.name} x{row.count}" if row.count > 1 else row.name
    local = " | ".join(str(list(shape)) for shape in row.local_shapes)
    decided = f"{row.source}: {row.rule}" if row.rule else row.reason
    cells = (name, str(list(row.shape)), "all" if row.cut == "whole" else local, row.cut, row.communication, decided)
    return tuple(cell.replace("[", r"\[") for cell in cells)
