"""An estimate as tables for people."""

from rich.console import Console
from rich.table import Table

from lightning_autotp.estimation.cost import GIB, RESERVED, Estimate
from lightning_autotp.estimation.job import Job


def print_estimate(found: Estimate) -> None:
    """Print an estimate, and what it assumes, to standard output."""
    console = Console()
    if not console.is_terminal:  # a log file wraps nothing
        console = Console(width=200)
    console.print(_headline(found), highlight=False, markup=False)
    console.print(_memory(found))
    console.print(_fits(found), highlight=False, markup=False)
    if found.traffic:
        console.print(_traffic(found))
    console.print(_times(found), highlight=False, markup=False)
    console.print(assumptions(found), highlight=False, markup=False, style="dim")


def assumptions(found: Estimate) -> str:
    """What the figures of an estimate stand on."""
    job, machine = found.job, found.machine
    zeroed = "before the forward pass (a loop of one's own)" if job.own_loop else "after the forward pass (Lightning)"
    lines = [
        f"{job.precision}, fused AdamW; gradients are freed {zeroed}; no torch.compile.",
        f"Matrix products reach {machine.matmul_share:.0%} of {machine.gpu.upper()}'s peak, memory and links"
        f" {machine.link_share:.0%} of theirs; latencies and the launches of kernels cost nothing.",
        "Rank 0, which holds the most where a cut is uneven.",
    ]
    if job.dp * job.cp > 1:
        zero = f"ZeRO {job.zero} by FSDP2" if job.zero else "DDP, with gradients once more in its buckets"
        lines.append(f"Data and context parallelism are computed and not run: {zero}.")
    return "Assumed: " + " ".join(lines)


def _headline(found: Estimate) -> str:
    job = found.job
    given = {name: getattr(job, name) for name in ("sequence_parallel", "loss_parallel", "checkpointing")}
    switches = [name if value is True else f"{name} {value}" for name, value in given.items() if value]
    read = f", {found.tokens // job.dp // job.accumulate:,} tokens a data parallel rank" if found.tokens else ""
    batches = f" and batch, {job.accumulate} batches" if job.accumulate > 1 else ""
    return (
        f"{job.model}: {_count(found.parameters)} parameters, {layout_name(job)} on {job.ranks} x"
        f" {found.machine.gpu.upper()}{read}{batches}{''.join(f', {name}' for name in switches)} ({found.took:.1f} s)"
    )


def layout_name(job: Job) -> str:
    """What ranks are to each other, in short."""
    parts = [f"TP {job.tp}", *([f"CP {job.cp}"] if job.cp > 1 else []), f"DP {job.dp}"]
    group = f" in groups of {job.zero_group}" if job.shards < job.dp and job.zero else ""
    return " x ".join(parts) + (f", ZeRO {job.zero}{group}" if job.zero else "")


def _memory(found: Estimate) -> Table:
    memory = found.memory
    table = Table(title=f"Memory of a rank at its peak, in the {memory.moment} pass", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    table.add_column("of that")
    after = f"{memory.all_gradients / GIB:.2f} once the backward pass is done"
    rows = [
        ("weights", memory.weights, ""),
        ("weights gathered", memory.gathered, "with the buffers of all-gathers"),
        ("gradients", memory.gradients, after if memory.gradients != memory.all_gradients else ""),
        ("optimizer state", memory.optimizer, ""),
        ("DDP's buckets", memory.buckets, ""),
        ("activations and temporaries", memory.activations, f"{memory.kept / GIB:.2f} kept for the backward pass"),
    ]
    for name, size, note in rows:
        if size:
            table.add_row(name, f"{size / GIB:.2f}", note)
    table.add_section()
    table.add_row("peak", f"{memory.peak / GIB:.2f}", "")
    return table


def _fits(found: Estimate) -> str:
    room = found.machine.sheet.memory
    answer = "fits" if found.fits else "does NOT fit"
    return (
        f"It {answer} into {found.machine.gpu.upper()}'s {room:.0f} GiB, of which {RESERVED:.0f} are left to the CUDA"
        " context, NCCL and gaps."
    )


def _traffic(found: Estimate) -> Table:
    table = Table(title="Communication of a rank in a step", title_justify="left")
    for heading in ("collective", "over"):
        table.add_column(heading)
    for heading in ("count", "GiB", "ms"):
        table.add_column(heading, justify="right")
    table.add_column("through")
    for line in found.traffic:
        over = f"{line.group} ({line.ranks} ranks)"
        cells = (f"{line.count}", f"{line.size / GIB:.3f}", f"{line.seconds * 1e3:,.1f}")
        table.add_row(line.kind, over, *cells, line.link)
    return table


def _times(found: Estimate) -> str:
    times = (
        f"Compute {found.compute * 1e3:,.1f} ms ({found.flops / 1e12:,.1f} TFLOP), communication"
        f" {found.communication * 1e3:,.1f} ms. A step takes {found.shortest * 1e3:,.1f} ms with one hidden behind the"
        f" other, {found.longest * 1e3:,.1f} ms one after the other"
    )
    if found.job.dp * found.job.cp > 1:
        times += f", {found.seconds * 1e3:,.1f} ms with what goes on beside the computation"
    if not found.tokens:
        return f"{times}."
    slowest, fastest = found.tokens / found.longest, found.tokens / found.shortest
    return f"{times}: {slowest:,.0f} to {fastest:,.0f} tokens/s on all ranks."


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return f"{number:,}"
