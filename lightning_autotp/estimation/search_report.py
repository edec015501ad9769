"""What a search found, as a table and a few lines for people."""

from rich.console import Console
from rich.table import Table

from lightning_autotp.estimation.cost import GIB, RESERVED, Estimate
from lightning_autotp.estimation.report import layout_name
from lightning_autotp.estimation.search import Choice, Found
from lightning_autotp.estimation.wanted import SWITCHES

_NAMED = 3


def print_search(found: Found) -> None:
    """Print what a search found, and what it assumes, to standard output."""
    console = Console()
    if not console.is_terminal:  # a log file wraps nothing
        console = Console(width=200)
    console.print(_headline(found), highlight=False, markup=False)
    if found.best:
        console.print(_table(found))
    for line in (*_held_back(found), *left_out(found)):
        console.print(line, highlight=False, markup=False)
    console.print(search_assumptions(found), highlight=False, markup=False, style="dim")


def search_assumptions(found: Found) -> str:
    """What the figures of a search stand on."""
    machine = found.machine
    return (
        f"Assumed: {found.wanted.precision}, fused AdamW, no torch.compile; matrix products reach"
        f" {machine.matmul_share:.0%} of {machine.gpu.upper()}'s peak, memory and links {machine.link_share:.0%} of"
        f" theirs; {RESERVED:.0f} GiB of a GPU are left to the CUDA context, NCCL and gaps. Data parallel communication"
        " goes on beside what is computed, other communication does not. Few blocks and small batches were traced, the"
        " rest is arithmetic: docs/estimate.md. `lightning-autotp estimate` with a layout traces all of it."
    )


def switches_of(found: Estimate) -> list[str]:
    """The switches that are on, in short."""
    given = {name: getattr(found.job, name) for name in SWITCHES}
    return [name if value is True else f"{name} {value}" for name, value in given.items() if value]


def left_out(found: Found) -> list[str]:
    """Why other layouts are not among the best, in a few lines."""
    lines = []
    if found.too_large:
        named = [f"{layout_name(one.job)} lacks {one.lacks / GIB:.1f} GiB" for one in found.too_large[:_NAMED]]
        lines.append(f"- {_many(len(found.too_large), 'layout')} not fit, whatever the switches: {_some(named, found)}")
    if found.slower:
        fastest = found.best[0].estimate.seconds
        named = [
            f"{layout_name(one.estimate.job)} by {one.estimate.seconds / fastest - 1:.0%}"
            for one in found.slower[:_NAMED]
        ]
        lines.append(f"- {_are(len(found.slower), 'layout')} slower than the best: {_some(named, found, slower=True)}")
    lines += [f"- {', '.join(what)}: {reason}" for reason, what in found.left_out.items()]
    lines += [f"- {switch} is off: {reason}" for switch, reason in found.refused.items()]
    return ["Left out:", *lines] if lines else []


def _some(named: list[str], found: Found, *, slower: bool = False) -> str:
    more = len(found.slower if slower else found.too_large) - len(named)
    return ", ".join(named) + (f", {more} others more" if more > 0 else "")


def _many(count: int, name: str) -> str:
    return f"1 {name} does" if count == 1 else f"{count} {name}s do"


def _are(count: int, name: str) -> str:
    return f"1 {name} is" if count == 1 else f"{count} {name}s are"


def _headline(found: Found) -> str:
    wanted = found.wanted
    which = f"the best of {len(found.best) + len(found.slower)} layouts that fit" if found.best else "nothing fits"
    tokens = found.best[0].estimate.tokens if found.best else 0
    read = f"{tokens:,} tokens" if tokens else f"{found.rows:,} rows"
    return f"{wanted.model} on {wanted.gpus} x {found.machine.gpu.upper()}, {read} a step: {which} ({found.took:.1f} s)"


def _table(found: Found) -> Table:
    table = Table()
    table.add_column("layout", no_wrap=True)
    table.add_column("batch", no_wrap=True)
    table.add_column("switches")
    for heading in ("GiB", "s a step", "tokens/s", "MFU"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("takes the most of it")
    for choice in found.best:
        table.add_row(*_row(choice))
    return table


def _row(choice: Choice) -> tuple[str, ...]:
    one = choice.estimate
    batches = f"{one.job.batch or 1}" + (f", {one.job.accumulate} times" if one.job.accumulate > 1 else "")
    bound, part = choice.bound
    speed = f"{one.tokens / one.seconds:,.0f}" if one.tokens else ""
    peak = f"{one.memory.peak / GIB:.1f}"
    switches = ", ".join(switches_of(one))
    return (
        layout_name(one.job),
        batches,
        switches,
        peak,
        f"{one.seconds:.3g}",
        speed,
        f"{choice.mfu:.0%}",
        f"{bound}, {part:.0%}",
    )


def _held_back(found: Found) -> list[str]:
    """What memory keeps from the best."""
    lines = []
    for choice in found.best:
        one = choice.larger
        if one is None:
            continue
        gain = 1 - one.seconds / choice.estimate.seconds
        how = [f"a batch of {one.job.batch}", *switches_of(one)]
        if choice.estimate.job.checkpointing and not one.job.checkpointing:
            how.append("no checkpointing")
        lines.append(
            f"Memory bounds {layout_name(one.job)}: with {', '.join(how)} a step would be {gain:.0%} shorter, and lacks"
            f" {one.lacks / GIB:.1f} GiB."
        )
    return lines
