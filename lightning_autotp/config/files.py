"""YAML and JSON files, read strictly: what one file says twice, or does not say at all, is an error with its path."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Plain YAML whose mappings have each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _refuse_double(node, self.construct_object)
        return super().construct_mapping(node, deep)


class _DoubleKeyError(yaml.YAMLError):
    def __init__(self, name: Any, where: str = "") -> None:
        super().__init__(f"says {name!r} twice{where}; leave one of them out.")


def _refuse_double(node: yaml.MappingNode, name_of: Callable[[yaml.Node], Any]) -> None:
    seen: dict[Any, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            name, line = name_of(key), key.start_mark.line + 1
            if name in seen:
                raise _DoubleKeyError(name, f" (lines {seen[name]} and {line})")
            seen[name] = line


def check_keys(text: str) -> None:
    """Raise a ``yaml.YAMLError`` unless ``text`` is YAML that has each key of a mapping once.

    Values are not looked at: who reads them may know other types than plain YAML does.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    waiting, known = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in known or not isinstance(node, yaml.CollectionNode):  # an anchor may be used often
            continue
        known.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _refuse_double(node, lambda key: key.value)
            waiting += [value for _, value in node.value]
        else:
            waiting += node.value


def read_document(path: Path, what: str) -> Any:
    """What a YAML file, or one whose name ends in ``.json``, holds; ``what`` it is read for is in the messages.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it is a directory or may not be read.
        ValueError: if its content is none of the two formats, is nothing, or says one thing twice.
    """
    text = _text(path, what)
    try:
        if path.suffix.lower() == ".json":
            document = json.loads(text, object_pairs_hook=_once) if text.strip() else None
        else:
            document = yaml.load(text, _Loader)
    except _DoubleKeyError as error:
        raise ValueError(f"{what}: {str(path)!r} {error}") from None
    except (ValueError, yaml.YAMLError) as error:  # also of a date that is none
        raise ValueError(f"{what}: {str(path)!r} cannot be read: {error}") from None
    except RecursionError:
        raise ValueError(f"{what}: {str(path)!r} is nested too deep; no field needs more than a few levels.") from None
    if document is None:
        raise ValueError(f"{what}: {str(path)!r} is empty; write fields into it, such as autotp_size.")
    return document


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        folder = str(path.absolute().parent)
        raise FileNotFoundError(f"{what}: there is no file {str(path)!r} (looked in {folder!r}).") from None
    except IsADirectoryError:
        raise IsADirectoryError(
            f"{what}: {str(path)!r} is a directory; give the path of a YAML or JSON file."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what}: {str(path)!r} is not a text file (byte {error.start} is no UTF-8); give the path of a YAML or"
            " JSON file."
        ) from None
    except OSError as error:
        raise type(error)(
            f"{what}: {str(path)!r} cannot be read ({error.strerror}); give the path of a YAML or JSON file that this"
            " user may read."
        ) from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DoubleKeyError(next(name for name in names if names.count(name) > 1))
    return found
