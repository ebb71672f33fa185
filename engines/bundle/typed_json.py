"""Untrusted JSON, read as the dataclass that it should hold; an error names the field that is wrong."""

import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from engines.errors import VocabtrimError

MOST = (1 << 62) - 1  # the largest whole number that is accepted: sums of two fit into int64
MAX_BYTES = 1 << 24
_MOST_FLOAT = 1e300
_MOST_DEPTH = 16


def parse(text: str, where: str) -> Any:
    """Parse JSON into plain data.

    Args:
        text: The JSON.
        where: The file or field that holds it, for messages.

    Raises:
        VocabtrimError: It is not valid JSON, or is nested too deeply to read.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VocabtrimError(f"{where} is not valid JSON ({brief(error)})") from error


def read(path: Path) -> Any:
    """Read a small JSON file (UTF-8, 16 MiB at most).

    Raises:
        VocabtrimError: The file cannot be read, is too large, or is not valid JSON.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise VocabtrimError(f"{path} is larger than {MAX_BYTES >> 20} MiB, the most that is read: get it again")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VocabtrimError(f"cannot read {path} ({brief(error)})") from error
    return parse(text, str(path))


def decode(kind: Any, value: Any, where: str) -> Any:
    """Convert plain JSON data to a type.

    Args:
        kind: str, bool, int, float, Any, a Literal, a union with None, `tuple[T, ...]`, `Mapping[str, T]`, or a
            dataclass of such fields. Numbers must not be negative, and whole numbers must fit into int64.
        value: The data.
        where: The file or field that holds it, for messages.

    Raises:
        VocabtrimError: Names the field below `where` that is something else.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        if _depth(value) > _MOST_DEPTH:
            raise VocabtrimError(f"{where} is nested more than {_MOST_DEPTH} times, the most that is read")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return decode(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict) and all(map(_is_text, value)):
        return {name: decode(arguments[1], item, f"{where}.{name[:80]}") for name, item in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        return _dataclass(kind, value, where)
    if _is_scalar(kind, value):
        return value
    raise VocabtrimError(f"{where} is {brief(json.dumps(value))}; expected {_expected(kind)}")


def _dataclass(kind: Any, value: dict[str, Any], where: str) -> Any:
    names = {field.name for field in fields(kind)}
    if unknown := sorted(name[:80] for name in set(value) ^ names):
        raise VocabtrimError(f"{where} has missing or unknown fields: {', '.join(unknown[:8])}")
    hints = get_type_hints(kind)
    return kind(**{name: decode(hints[name], item, f"{where}: {name}") for name, item in value.items()})


def _is_scalar(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is int:
        return type(value) is int and 0 <= value <= MOST
    if kind is float:
        return type(value) in (int, float) and 0 <= value < _MOST_FLOAT
    return (kind is bool and type(value) is bool) or (kind is str and _is_text(value))


def _expected(kind: Any) -> str:
    """Returns in words what JSON must hold for a `kind`."""
    if get_origin(kind) is Literal:
        return " or ".join(map(json.dumps, get_args(kind)))
    words = {int: "a whole number, 0 or more", float: "a number, 0 or more", bool: "true or false", str: "a text"}
    return words.get(kind) or ("a list" if get_origin(kind) is tuple else "an object")


def _depth(value: Any) -> int:
    """Returns how deeply lists and objects are nested; counting stops beyond the depth that is allowed."""
    depth, level = 0, [value]
    while depth <= _MOST_DEPTH and (level := [item for item in level if isinstance(item, list | dict)]):
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _is_text(value: Any) -> bool:
    """Returns whether `value` is a string without lone surrogates, which no file name and no hash can hold."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def brief(what: object) -> str:
    """Returns the text of `what`, such as a library's error, in one line of at most about 100 characters."""
    text = " ".join(str(what).split())
    return text if len(text) <= 100 else f"{text[:100]}…"
