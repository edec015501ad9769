"""Text to train on: files of the user's, or the English that comes with every CPython."""

import ast
import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Union

_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}

_SHORTEST_DOCSTRING = 80
"""In characters. Shorter ones are mostly a signature or a phrase that many functions share."""

_Documented = Union[ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef]


def python_prose() -> str:
    """About 2 MB of English: the topics of ``help()`` and the standard library's docstrings, read without importing it.

    The same text for the same Python version. Documents (a topic, a module) come in the order of their digests: any
    part of the text, such as a tail held out for validation, is then a fair sample of the whole.
    """
    documents = [*topics.values(), *_module_docstrings(Path(sysconfig.get_path("stdlib")))]
    return "\n\n".join(sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest()))


def _module_docstrings(root: Path) -> Iterator[str]:
    """For each module below ``root`` its longer docstrings, joined."""
    modules = (path for path in root.rglob("*.py") if _NOT_PROSE.isdisjoint(path.relative_to(root).parts))
    for path in modules:
        docstrings = [text for text in _docstrings(ast.parse(path.read_bytes())) if len(text) > _SHORTEST_DOCSTRING]
        if docstrings:
            yield "\n\n".join(docstrings)


def _docstrings(node: _Documented) -> Iterator[str]:
    """The docstrings of a module, class or function and of those inside it, in the order of the source."""
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child)


def read_text(path: Path) -> bytes:
    """The bytes of a file, or of all text files in a folder and below, in the order of their paths.

    In a folder, a file that holds a NUL byte is taken for binary and left out.

    Raises:
        FileNotFoundError: if there is no such path, or no text file in it.
    """
    if path.is_file():
        return path.read_bytes()
    if not path.is_dir():
        raise FileNotFoundError(f"path: {str(path)!r} does not exist; give a text file or a folder of text files.")
    files = (file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file())
    text = b"\n\n".join(content for content in files if b"\0" not in content)
    if not text:
        raise FileNotFoundError(f"path: there is no text file in the folder {str(path)!r}.")
    return text


def write_whole(path: Path, text: str) -> None:
    """Write ``path`` by renaming a finished file: a reader, or a second writer, never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(partial, path)
