"""The order of the rooms: a file imports only from its own room and from rooms above it, and never in a circle.

And no file is too long to be one idea, and no test file imports another one.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_autotp

ROOMS = (
    *("compat", "diagnostics", "layout", "specs", "presets", "config", "kernels", "model_sources", "introspection"),
    *("plans", "dataflow", "planning", "distributed", "randomness", "parallel", "losses", "sharding", "optimizers"),
    *("training", "checkpoint", "proof", "derivation", "recipe", "verification", "estimation", "strategies", "cli"),
    "examples",
)
"""By stage: data goes one way, from the first to the last."""

LONGEST = 400
"""Lines that a file may have."""

PACKAGE = "lightning_autotp"
ROOT = Path(lightning_autotp.__file__).parent


def imports(source: str, module: str, package: str = PACKAGE) -> Iterator[str]:
    """The modules of ``package`` that ``source`` imports, inside functions and under TYPE_CHECKING, too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == package)
        elif isinstance(node, ast.ImportFrom):
            # a relative import starts at the package that holds `module`
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            name = ".".join(filter(None, (base, node.module)))
            if name.split(".")[0] == package:
                yield from (f"{name}.{alias.name}" for alias in node.names)


def files() -> dict[str, Path]:
    """Every file of the package but its own ``__init__.py``, by module name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[PACKAGE]
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def wrong_imports(modules: dict[str, str]) -> list[str]:
    """A sentence for each import, of modules given as source by name, that goes against the order of the rooms."""
    wrong = []
    for module, source in modules.items():
        for imported in imports(source, module):
            if imported == PACKAGE or room(imported) not in ROOMS:
                wrong.append(
                    f"{module} imports from {PACKAGE} itself, which imports everything; name the file it is in."
                )
            elif ROOMS.index(room(imported)) > ROOMS.index(room(module)):
                wrong.append(f"{module} imports {imported}, whose room {room(imported)!r} comes after its own.")
    return wrong


def test_every_file_is_in_a_room_that_has_a_place() -> None:
    strangers = {module for module in files() if room(module) not in ROOMS}
    assert not strangers, f"these files are in no room of {ROOMS}: {sorted(strangers)}"


def test_imports_go_one_way_through_the_rooms() -> None:
    wrong = wrong_imports({module: path.read_text() for module, path in files().items()})
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "from lightning_autotp.cli.main import main",
        "def f():\n    import lightning_autotp.cli.main",
        "if TYPE_CHECKING:\n    from lightning_autotp.cli import main",
        "from ..cli import main",
        "from lightning_autotp import cli",
    ],
)
def test_an_import_of_a_later_room_is_named_with_both_files(line: str) -> None:
    modules = {f"{PACKAGE}.layout.layout": line, f"{PACKAGE}.cli.main": "", f"{PACKAGE}.cli": ""}
    wrong = wrong_imports(modules)
    assert wrong and all(
        "lightning_autotp.layout.layout imports lightning_autotp.cli" in sentence for sentence in wrong
    )


def test_no_circle_joins_files() -> None:
    modules = files()
    edges = {}
    for module, path in modules.items():
        found = {name for i in imports(path.read_text(), module) for name in (i, i.rpartition(".")[0])}
        # a package's own __init__ may list what is in it
        edges[module] = {i for i in found if i in modules and i != module and not module.startswith(f"{i}.")}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(f"these files import each other: {' -> '.join(error.args[1])}")


def test_no_file_is_longer_than_one_idea() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in files().items()}
    long = [f"{module} has {lines} lines" for module, lines in lengths.items() if lines > LONGEST]
    assert not long, f"more than {LONGEST} lines: {', '.join(long)}; split it by subject."


def test_the_strategy_is_hooks_of_a_few_lines() -> None:
    lines = len(inspect.getsource(lightning_autotp.AutoTPStrategy).splitlines())
    assert lines < 300, f"AutoTPStrategy has {lines} lines; what is done around a step belongs into recipe/engine.py."


def imports_of_test_files(modules: dict[str, str]) -> list[str]:
    """A sentence for each import, in files of tests/ given as source by name, of a file that holds tests."""
    return [
        f"{module} imports {found.group()}; what both need goes into tests/helpers."
        for module, source in modules.items()
        for imported in imports(source, module, package="tests")
        if (found := re.match(r"tests\.(\w+\.)*test_\w+", imported))
    ]


def test_no_test_file_imports_another() -> None:
    folder = Path(__file__).parent
    modules = {
        ".".join(("tests", *path.relative_to(folder).with_suffix("").parts)): path.read_text()
        for path in sorted(folder.rglob("*.py"))
    }
    wrong = imports_of_test_files(modules)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "from tests.parity.test_fit import CASES",
        "from tests.parity import test_fit as fit",
        "import tests.parity.test_fit",
        "def f():\n    from .test_fit import CASES",
        "from ..parity.test_fit import CASES",
    ],
)
def test_an_import_of_a_test_file_is_named_with_both_files(line: str) -> None:
    (wrong,) = imports_of_test_files({"tests.parity.test_presets": line})
    assert wrong.startswith("tests.parity.test_presets imports tests.parity.test_fit;")
