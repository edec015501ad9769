"""The same Hugging Face Llama trained with tensor parallelism by this package and by its peers: one command, one table.

    python tests/benchmarks/bench_tp.py [--nproc N] [--cpu] [--modes single,hf,ours,...] [--compile-too] [--json FILE]

Every mode runs in processes of its own, because some keep process-wide state. On a CPU all are kept alive and take
turns, a round at a time, so that whatever else the machine does falls on all of them; on GPUs one follows the other.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Optional

ROOT = Path(__file__).resolve().parents[2]

PEERS = ("deepspeed", "deepspeed_noclip", "dtensor", "dtensor_sp", "hf")
OURS = ("ours", "ours_lp", "ours_sp", "ours_sp_lp", "ours_sp_fused")
MODES = ("single", *PEERS, *OURS, "ours_trainer")

WITHOUT_EXPERTS = ("deepspeed", "dtensor")
"""Modes whose layer rules are written for Llama."""

OTHER_STEPS = {"deepspeed": "clips the gradients to a norm of 1, its default"}
"""Modes that train otherwise than the rest, so that their loss says nothing."""

# Llama-3-8B's layer on GPUs; what takes some tens of milliseconds a step on a CPU core.
GPU = {"layers": 8, "hidden": 4096, "inter": 14336, "heads": 32, "kv": 8, "seq": 4096, "batch": 4, "vocab": 128256}
CPU = {"layers": 4, "hidden": 256, "inter": 768, "heads": 8, "kv": 4, "seq": 128, "batch": 4, "vocab": 4096}
GPU["experts"] = CPU["experts"] = 0  # a Llama; a Mixtral if there are any, of which a token sees two

PEAK_FLOPS = 989e12
"""A second, of an H100 (SXM) and an H200, bf16, dense: NVIDIA's data sheets."""

Row = dict[str, Any]


def arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nproc", type=int, help="ranks that share a model; by default all GPUs, 2 on a CPU")
    parser.add_argument("--cpu", action="store_true", help="gloo, fp32, one thread a process, a small model")
    parser.add_argument("--modes", default=",".join(MODES), help="some of %(default)s; +compile after one compiles it")
    parser.add_argument("--compile-too", action="store_true", help="each mode that can also compiled, layer by layer")
    for name in GPU:
        parser.add_argument(f"--{name}", type=int, help=f"{GPU[name]}, on a CPU {CPU[name]}")
    parser.add_argument("--steps", type=int, default=10, help="twice in a round: synchronized one by one, and freely")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--rounds", type=int, help="5 on a CPU, 1 on GPUs")
    parser.add_argument("--json", type=Path, help="keep rows here; what it has for the same run is not run again")
    parser.add_argument("--profile", action="store_true", help="print where the time of three more steps goes")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a mode may take to get ready")
    given = parser.parse_args(argv)
    if not given.cpu or given.nproc is None:
        import torch

        gpus = torch.cuda.device_count()
        if not given.cpu and not gpus:
            parser.error("there is no GPU here; --cpu measures a small model without one")
        given.nproc = given.nproc or (2 if given.cpu else gpus)
    for name, value in (CPU if given.cpu else GPU).items():
        setattr(given, name, value if getattr(given, name) is None else getattr(given, name))
    given.rounds = given.rounds or (5 if given.cpu else 1)
    given.modes = [mode for mode in given.modes.split(",") if mode]
    unknown = [mode for mode in given.modes if mode.partition("+")[0].removesuffix("_trainer") not in MODES]
    if unknown:
        parser.error(f"--modes: {', '.join(unknown)}: there are {', '.join(MODES)}")
    if given.compile_too:
        eager = [mode for mode in given.modes if "+" not in mode and not mode.startswith("deepspeed")]
        given.modes += [f"{mode}+compile" for mode in eager if f"{mode}+compile" not in given.modes]
    return given


def settings(given: argparse.Namespace) -> dict[str, Any]:
    names = (*GPU, "steps", "warmup", "rounds", "cpu", "profile")
    return {name: getattr(given, name) for name in names}


# -- processes -----------------------------------------------------------------------------------------------------


class Mode:
    """The processes that run one mode."""

    def __init__(self, name: str, given: argparse.Namespace, folder: Path) -> None:
        self.name, self.folder, self.timeout = name, folder, given.timeout
        self.log: IO[bytes] = (folder / f"{name}.log").open("wb")
        self.rounds: list[Row] = []
        self.total: int = given.rounds
        world = 1 if name.partition("+")[0] == "single" else given.nproc
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command += ["-m", "tests.benchmarks.worker", name, str(folder), json.dumps(settings(given))]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        if given.cpu:
            env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, name: str) -> Row:
        """What rank 0 wrote under ``name``.

        Raises:
            RuntimeError: if the processes end before, or take too long.
        """
        path, until = self.folder / f"{self.name}.{name}.json", time.monotonic() + self.timeout
        while not path.exists():
            if self.process.poll() is not None and not path.exists():
                raise RuntimeError(self.reason())
            if time.monotonic() > until:
                raise RuntimeError(f"failed: took longer than {self.timeout:.0f} s")
            time.sleep(0.02)
        found: Row = json.loads(path.read_text())
        return found

    def measure(self, number: int) -> None:
        (self.folder / f"{self.name}.{number}").touch()
        self.rounds.append(self.wait(str(number)))

    def end(self) -> None:
        """Let the processes finish if they have done all rounds, and end them if not."""
        if len(self.rounds) == self.total:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(120)
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)  # torchrun ends its ranks, which have sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        self.log.close()

    def reason(self) -> str:
        """The error that a rank ended with, from the log."""
        text = (self.folder / f"{self.name}.log").read_text(errors="replace")
        errors = re.findall(r"^(?:\[rank\d+\]: *)?((?:\w+\.)*\w*(?:Error|Exception|Refused): .+)$", text, re.MULTILINE)
        ours = [error for error in errors if not error.startswith("torch.distributed.elastic")]
        error = ours[0] if ours else f"exit code {self.process.returncode}"
        missing = error.startswith(("ModuleNotFoundError", "ImportError"))
        return f"{'skipped' if missing else 'failed'}: {error[:160]}"


def run(given: argparse.Namespace, folder: Path, rows: dict[str, Row]) -> None:
    """Add a row to ``rows`` for each mode that has none, and write them to ``--json`` round by round."""
    waiting = [mode for mode in given.modes if mode not in rows]
    for names in [waiting] if given.cpu else [[name] for name in waiting]:
        alive: dict[str, Mode] = {}
        try:
            for name in names:
                if given.experts and name.startswith(WITHOUT_EXPERTS):
                    rows[name] = {"note": "skipped: its plan here is for models without experts"}
                    continue
                if name.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
                    rows[name] = {"note": "skipped: deepspeed is not installed"}
                    continue
                say(f"{name}: starting")
                mode = alive[name] = Mode(name, given, folder)
                attempt(mode, "ready", None, rows, alive)
            for number in range(given.rounds):
                say(f"round {number + 1} of {given.rounds}: {', '.join(alive)}")
                for name in turn(list(alive), number):
                    attempt(alive[name], "measure", number, rows, alive)
                rows |= {name: row(mode) for name, mode in alive.items()}
                store(given, rows)
        finally:
            for mode in alive.values():
                mode.end()
        store(given, rows)
        for name in names:
            profile = folder / f"{name}.profile"
            if profile.exists():
                print(f"\n{name}\n{profile.read_text()}", flush=True)


def attempt(mode: Mode, what: str, number: Optional[int], rows: dict[str, Row], alive: dict[str, Mode]) -> None:
    """Wait for a mode or let it run a round; one that fails leaves the others and says why."""
    try:
        mode.wait(what) if number is None else mode.measure(number)
    except RuntimeError as error:
        rows[mode.name] = {"note": str(error)}
        say(f"{mode.name}: {error}")
        mode.end()
        del alive[mode.name]


def turn(names: list[str], number: int) -> list[str]:
    """Another one begins each round, and every other round goes backwards."""
    names = names[number % len(names) :] + names[: number % len(names)] if names else []
    return names[::-1] if number % 2 else names


def row(mode: Mode) -> Row:
    first = mode.rounds[0]
    return {
        "ms": [found["ms"] for found in mode.rounds],
        "free_ms": [found["free_ms"] for found in mode.rounds],
        "first_loss": first["first_loss"],
        "loss": first["loss"],
        "peak_gib": None if first["peak_gib"] is None else max(found["peak_gib"] for found in mode.rounds),
        "device": first["device"],
        "note": "",
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def stored(given: argparse.Namespace) -> dict[str, Row]:
    if given.json is None or not given.json.exists():
        return {}
    kept = json.loads(given.json.read_text())
    if kept["run"] != described(given):
        return {}
    # what failed may have been put right, and what was cut off is done again
    return {name: found for name, found in kept["rows"].items() if len(found.get("ms", [])) == given.rounds}


def store(given: argparse.Namespace, rows: dict[str, Row]) -> None:
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"run": described(given), "rows": rows}, indent=1) + "\n")


def described(given: argparse.Namespace) -> dict[str, Any]:
    return {"nproc": given.nproc, **settings(given), "profile": False, "machine": machine(), "versions": versions()}


def machine() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
        return f"{name}, {len(os.sched_getaffinity(0))} cores"
    return platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "lightning", "transformers", "deepspeed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# -- the table -----------------------------------------------------------------------------------------------------


def flops_per_token(given: argparse.Namespace) -> float:
    """Of a training step, forward and backward.

    6 a weight of a matmul (2 forward, 4 backward; the embedding is a lookup, the head is a matmul), and attention's
    two matmuls, of which a causal mask needs half: 6 * layers * hidden * seq. (PaLM, arXiv:2204.02311, appendix B,
    counts the masked half, too.)
    """
    head_dim = given.hidden // given.heads
    attention = 2 * given.hidden * given.hidden + 2 * given.hidden * given.kv * head_dim
    gated = 3 * given.hidden * given.inter * min(2, given.experts or 1)
    weights = given.layers * (attention + gated) + given.hidden * given.vocab
    return 6.0 * weights + 6.0 * given.layers * given.hidden * given.seq


def is_wrong(found: Row, single: Row, tolerance: float) -> bool:
    """Whether the loss before the first update, or after as many as the first round makes, is not the unsharded one."""
    pairs = [(found[name], single[name]) for name in ("first_loss", "loss")]
    return not all(abs(loss - want) <= tolerance * max(1.0, abs(want)) for loss, want in pairs)  # NaN is wrong, too


def over(some: Row, other: Row, what: str = "ms") -> float:
    """The median over rounds of the ratio of two modes' step times."""
    return statistics.median(a / b for a, b in zip(some[what], other[what]))


def suffix(mode: str) -> str:
    return mode[mode.index("+") :] if "+" in mode else ""


def table(given: argparse.Namespace, rows: dict[str, Row]) -> str:
    heads = ["mode", "ms/step", "free-running", "tokens/s"]
    heads += [] if given.cpu else ["MFU"]
    heads += [f"of {given.nproc} x single"]
    heads += [] if given.cpu else ["peak GiB"]
    heads += ["loss", "ours / it", "best / it", "note"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    measured = {mode: found for mode, found in rows.items() if "ms" in found}
    notes, tolerance = {}, 1e-4 if given.cpu else 2e-2
    for mode, found in measured.items():
        if mode in OTHER_STEPS:
            notes[mode] = OTHER_STEPS[mode]
        elif "single" in measured:
            notes[mode] = "WRONG" if is_wrong(found, measured["single"], tolerance) else ""
        else:
            notes[mode] = "loss not compared: no single"
    best = {kind: fastest(measured, notes, kind) for kind in ("", "+compile")}
    for mode in sorted(rows, key=place):
        if mode not in measured:
            lines.append("| " + " | ".join([mode, *["-"] * (len(heads) - 2), rows[mode]["note"]]) + " |")
            continue
        found, kind = measured[mode], suffix(mode)
        ms, single = statistics.median(found["ms"]), measured.get("single" + kind)
        per_second = given.batch * given.seq / ms * 1e3
        ranks = 1 if mode.startswith("single") else given.nproc
        cells = [mode, f"{ms:.2f}", f"{statistics.median(found['free_ms']):.2f}", f"{per_second:,.0f}"]
        cells += [] if given.cpu else [f"{per_second * flops_per_token(given) / ranks / PEAK_FLOPS:.1%}"]
        cells += [f"{over(single, found) / given.nproc:.0%}" if single and ranks > 1 else "-"]
        cells += [] if given.cpu else [f"{found['peak_gib']:.1f}"]
        cells += [f"{found['loss']:.4f}"]
        for other in ("ours" + kind, best[kind]):
            peer = not mode.startswith(("ours", "single"))
            cells.append(f"{over(measured[other], found):.2f}" if peer and other in measured else "-")
        lines.append("| " + " | ".join([*cells, notes[mode]]) + " |")
    named = [f"`{mode}`" for mode in best.values() if mode]
    if named:
        lines += ["", f"Best: {', '.join(named)}. Ratios are of step times, modes compiled or not alike."]
    for mode in measured:
        raw = mode.replace("_trainer", "")
        if raw != mode and raw in measured:
            more = over(measured[mode], measured[raw], "free_ms") - 1
            lines.append(f"`{mode}` against `{raw}`, free-running: {more:+.1%} time.")
    return "\n".join(lines)


def fastest(measured: dict[str, Row], notes: dict[str, str], kind: str) -> str:
    """Of our modes, the name of the one with the shortest step whose loss is right; empty if there is none."""
    ours = [name + kind for name in OURS if name + kind in measured and notes[name + kind] != "WRONG"]
    return min(ours, key=lambda mode: over(measured[mode], measured[ours[0]]), default="")


def place(mode: str) -> tuple[bool, int, str]:
    name = mode.partition("+")[0]
    return "+" in mode, MODES.index(name) if name in MODES else len(MODES), name


def main() -> None:
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here are ended
    rows = stored(given)
    try:
        with tempfile.TemporaryDirectory(prefix="bench_tp_") as folder:
            run(given, Path(folder), rows)
    finally:  # what there is, if it is stopped before the end
        report(given, rows)


def report(given: argparse.Namespace, rows: dict[str, Row]) -> None:
    devices = {found["device"] for found in rows.values() if found.get("device")}
    where = f"{given.nproc} x {', '.join(sorted(devices))}" if devices else machine()
    print(f"{where}; {', '.join(f'{name} {version}' for name, version in versions().items())}")
    sizes = ", ".join(f"{name} {getattr(given, name)}" for name in GPU)
    done = min((len(found["ms"]) for found in rows.values() if "ms" in found), default=0)
    print(f"{given.nproc} ranks; {sizes}; {given.steps} steps a round, {done} of {given.rounds} rounds\n")
    print(table(given, rows))


if __name__ == "__main__":
    main()
