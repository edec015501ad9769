"""Many models verified one after the other, and the table of what was found."""

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_autotp.verification.report import Report
from lightning_autotp.verification.verify import verify

_NOTE = 160


def sweep(types: Iterable[str], sizes: Sequence[int], **settings: Any) -> dict[str, list[Report]]:
    """The reports of every model type, one a tensor parallel size; a line is printed as each type is done.

    A type that is known not to run unsharded has reports that say so.
    """
    from lightning_autotp.model_sources.small import NOT_RUNNABLE

    found: dict[str, list[Report]] = {}
    for name in dict.fromkeys(types):
        if name in NOT_RUNNABLE:
            found[name] = [Report(name, size, "error", message=NOT_RUNNABLE[name], unsharded=True) for size in sizes]
        else:
            found[name] = [verify(name, size, **settings) for size in sizes]
        seconds = sum(report.seconds for report in found[name])
        cells = ", ".join(f"TP={report.tp_size} {_cell(report)}" for report in found[name])
        print(f"{name}: {cells} ({seconds:.1f} s) {_note(found[name])}".rstrip(), flush=True)
    return found


def table(found: dict[str, list[Report]]) -> str:
    """A markdown table, and a line that counts."""
    sizes = [report.tp_size for report in next(iter(found.values()), [])]
    first = f"parameters a rank (TP={sizes[0]})" if sizes else "parameters a rank"
    heading = ["model type", *(f"TP={size}" for size in sizes), first, "note"]
    lines = [heading, ["---"] * len(heading)]
    for name, reports in found.items():
        share = f"{reports[0].share:.0%}" if reports[0].rows else ""
        lines.append([f"`{name}`", *map(_cell, reports), share, _note(reports).replace("|", r"\|")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{summary(found)}\n"


def summary(found: dict[str, list[Report]]) -> str:
    """How many model types there are of each kind."""
    kinds = [kind_of(reports) for reports in found.values()]
    counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    return f"{len(kinds)} model types: {', '.join(counts)}."


def kind_of(reports: Sequence[Report]) -> str:
    """The worst verdict of a model type."""
    if any(report.unsharded for report in reports):
        return "not run"
    verdicts = [report.verdict for report in reports]
    return next((kind for kind in ("error", "fail", "refused") if kind in verdicts), "pass")


def _cell(report: Report) -> str:
    if report.unsharded:
        return "not run"
    return f"fail, {report.failed[0].worst:.0e}" if report.failed else str(report.verdict)


def _note(reports: Sequence[Report]) -> str:
    """Why a type did not pass; for one that did, what is to be known of it."""
    notes: dict[str, list[int]] = {}
    for report in reports:
        if report.unsharded:
            note = f"does not run unsharded: {report.message}"
        elif report.message:
            note = report.message
        elif report.failed:
            row = report.failed[0]
            note = f"{row.name} differs from step {row.since}"
            note = f"the forward pass differs first in {report.forward}" if report.forward else note
        elif report.verdict == "fail":
            note = f"the loss differs by {report.loss:.0e}"
        else:
            note = " ".join(report.warnings)
        note = " ".join(note.split())
        if note:
            notes.setdefault(note if len(note) <= _NOTE else f"{note[:_NOTE]}...", []).append(report.tp_size)
    everywhere = len(notes) == 1 and len(next(iter(notes.values()))) == len(reports)
    return "; ".join(note if everywhere else f"TP={'/'.join(map(str, at))}: {note}" for note, at in notes.items())
