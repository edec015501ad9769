"""Many models verified one after the other, and the table of what was found."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.verification.report import Report
from lightning_autotp.verification.verify import verify

_NOTE = 160


@dataclass(frozen=True)
class Swept:
    """The reports of a model type, one a tensor parallel size.

    Args:
        preset: by its rules, as a run takes them.
        derived: without any rules.
    """

    preset: list[Report]
    derived: list[Report]


def sweep(types: Iterable[str], sizes: Sequence[int], config: TPTrainingConfig, **settings: Any) -> dict[str, Swept]:
    """The reports of every model type, by its rules and derived; a line is printed as each type is done.

    A type that is known not to run unsharded has reports that say so.
    """
    from lightning_autotp.model_sources.small import NOT_RUNNABLE

    derived = config.model_copy(update={"preset_model": "auto", "partition_config": None})
    found: dict[str, Swept] = {}
    for name in dict.fromkeys(types):
        if name in NOT_RUNNABLE:
            reports = [Report(name, size, "error", message=NOT_RUNNABLE[name], unsharded=True) for size in sizes]
            found[name] = Swept(reports, reports)
        else:
            found[name] = Swept(*([verify(name, size, c, **settings) for size in sizes] for c in (config, derived)))
        seconds = sum(report.seconds for report in (*found[name].preset, *found[name].derived))
        told = "; ".join(
            f"{how} {', '.join(f'TP={report.tp_size} {_cell(report)}' for report in reports)}"
            for how, reports in (("rules", found[name].preset), ("derived", found[name].derived))
        )
        print(f"{name}: {told} ({seconds:.1f} s) {_note(found[name].preset)}".rstrip(), flush=True)
    return found


def table(found: dict[str, Swept]) -> str:
    """A markdown table, and a line that counts."""
    sizes = [report.tp_size for report in next((swept.preset for swept in found.values()), [])]
    columns = [f"{how}, TP={size}" for how in ("rules", "derived") for size in sizes]
    heading = ["model type", *columns, "note"]
    lines = [heading, ["---"] * len(heading)]
    for name, swept in found.items():
        cells = [_cell(report) for report in (*swept.preset, *swept.derived)]
        lines.append([f"`{name}`", *cells, _note(swept.preset).replace("|", r"\|")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{summary(found)}\n"


def summary(found: dict[str, Swept]) -> str:
    """How many model types there are of each kind, by rules and derived, and what a rank holds on average."""
    told = []
    for how, of_all in (
        ("by rules", [s.preset for s in found.values()]),
        ("derived", [s.derived for s in found.values()]),
    ):
        kinds = [kind_of(reports) for reports in of_all]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        shares = [
            f"{mean(held):.1%} at TP={of_size[0].tp_size}"
            for of_size in zip(*of_all)
            if (held := [report.share for report in of_size if report.rows])
        ]
        told.append(f"{how} {counts}" + (f"; on average a rank holds {', '.join(shares)}" if shares else ""))
    return f"{len(found)} model types: {'; '.join(told)}."


def kind_of(reports: Sequence[Report]) -> str:
    """The worst verdict of a model type."""
    if any(report.unsharded for report in reports):
        return "not run"
    verdicts = [report.verdict for report in reports]
    return next((kind for kind in ("error", "fail", "refused") if kind in verdicts), "pass")


def _cell(report: Report) -> str:
    """The verdict of the numbers, that of the proof, and what a rank holds."""
    if report.unsharded:
        return "not run"
    if not report.rows:
        return str(report.verdict)
    numbers = f"fail, {report.failed[0].worst:.0e}" if report.failed else str(report.verdict)
    return f"{numbers}, {report.proof}, {report.share:.0%}"


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
