"""From the tree of nodes to a Spec: unknown keys, missing keys and wrong types, each with its own line.

It walks the fields of the structs, so that one mistake does not hide the next; a value that cannot be had is
replaced by a stand-in, and the caller gives up once everything was looked at.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import msgspec

from slurmfork.spec import sbatch
from slurmfork.spec.model import Plain, Spec
from slurmfork.spec.report import Report
from slurmfork.spec.yamlnodes import Broken, Listing, Mapping, Node, Scalar, Where, resolve, short

T = TypeVar("T")

_BAD: Any = object()  # no value; the problem is reported
_STAND_INS: dict[str, Any] = {"name": "x", "path": ".", "roles": {}}
_EXPECTED = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def convert(root: Mapping, report: Report) -> Spec:
    """The spec that ``root`` describes; complete only where ``report`` has no problem."""
    return _Walk(report).struct(root, Spec, "")


def describe(node: Node) -> str:
    """What stands there, for messages."""
    if isinstance(node, Mapping):
        return "keys and values"
    if isinstance(node, Listing):
        return "a list"
    if isinstance(node, Broken) or node.value is None:
        return "nothing"
    if isinstance(node.value, bool):
        return "true" if node.value else "false"
    return f"the text {short(node.text)}" if isinstance(node.value, str) else f"the number {node.text}"


class _Walk:
    """One pass over a tree. Each method returns a value, or ``_BAD`` after reporting why there is none."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def struct(self, node: Mapping, kind: type[T], path: str) -> T:
        fields = _fields(cast(type, kind))
        values: dict[str, Any] = {}
        for key, child in node.entries.items():
            here = _join(path, key)
            self._report.place(here, child.at if isinstance(child, Scalar) else node.keys[key])
            if key in fields:
                values[fields[key].name] = self._value(child, fields[key].type, here)
            else:
                self._unknown(key, kind, fields, here, node.keys[key])
        for name, info in fields.items():
            if info.required and info.name not in values:
                self._report.add(_join(path, name), "missing; it has no default")
        given = {name: value for name, value in values.items() if value is not _BAD}
        missing = {name: value for name, value in _STAND_INS.items() if name in fields and name not in given}
        return kind(**missing, **given)

    def _unknown(self, key: str, kind: type, fields: dict[str, Any], path: str, at: Where) -> None:
        hint = ""
        if kind is Spec and key in sbatch.ALLOWED | sbatch.REFUSED.keys() - sbatch.NO_OPTIONS:
            hint = "; options of sbatch go under `slurm:`"
        elif home := next((name for name, info in fields.items() if key in _fields(_section(info.type))), None):
            hint = f"; it goes under `{home}:`"
        hint = hint or self._report.suggestion(key, fields) or f"; the keys here are {', '.join(fields)}"
        self._report.add(path, f"unknown key {short(key)}{hint}", at=at)

    def _value(self, node: Node, kind: Any, path: str) -> Any:
        if isinstance(node, Broken):
            return _BAD
        kind, optional = _optional(kind)
        empty = isinstance(node, Scalar) and node.value is None
        if empty and optional:
            return None
        if get_origin(kind) is dict:
            return self._dict(Mapping(node.at) if empty else node, get_args(kind)[1], path)
        if get_origin(kind) is list and get_args(kind)[0] == Plain:
            return self._plains(Listing(node.at) if empty else node, path)
        if get_origin(kind) is list:
            return self._texts(Listing(node.at) if empty else node, path)
        if section := _section(kind):
            return self._section(Mapping(node.at) if empty else node, section, path)
        if empty:
            return self._refuse(path, "no value; give one, or leave the key out", node)
        if get_origin(kind) is Union or isinstance(kind, types.UnionType):  # a command
            return self._texts(node, path) if isinstance(node, Listing) else self._leaf(node, str, path, " or a list")
        return self._leaf(node, kind, path)

    def _section(self, node: Node, kind: type, path: str) -> Any:
        short = getattr(kind, "short", None)
        if short and isinstance(node, Scalar):
            text = self._leaf(node, str, path, " or keys and values")
            return _BAD if text is _BAD else kind(**{short: text})
        if not isinstance(node, Mapping):
            return self._refuse(path, f"expected keys and values, got {describe(node)}", node)
        return self.struct(node, kind, path)

    # --- maps and lists

    def _dict(self, node: Node, kind: Any, path: str) -> Any:
        if not isinstance(node, Mapping):
            return self._refuse(path, f"expected keys and values, got {describe(node)}", node)
        read: Callable[[Node, str], Any] = self._text
        if kind is Any:
            read = self._option
        elif kind == Plain:
            read = self._plain
        elif section := _section(kind):
            read = lambda child, here: self._value(child, section, here)  # noqa: E731
        values = {}
        for key, child in node.entries.items():
            here = _join(path, key)
            self._report.place(here, child.at if isinstance(child, Scalar) else node.keys[key])
            values[key] = read(child, here)
        return {key: value for key, value in values.items() if value is not _BAD}

    def _texts(self, node: Node, path: str) -> Any:
        if not isinstance(node, Listing):
            return self._refuse(path, f"expected a list, got {describe(node)}", node)
        texts = []
        for number, item in enumerate(node.items):
            self._report.place(f"{path}[{number}]", item.at)
            texts.append(self._text(item, f"{path}[{number}]"))
        return _BAD if _BAD in texts else texts

    def _plains(self, node: Node, path: str) -> Any:
        if not isinstance(node, Listing):
            return self._refuse(path, f"expected a list, got {describe(node)}", node)
        return self._plain(node, path)

    def _plain(self, node: Node, path: str) -> Any:
        """Whatever stands there, lists and maps included; of numbers only those that JSON has."""
        if isinstance(node, Broken):
            return _BAD
        if isinstance(node, Listing):
            items = [self._plain(item, f"{path}[{number}]") for number, item in enumerate(node.items)]
            return _BAD if _BAD in items else items
        if isinstance(node, Mapping):
            return self._dict(node, Plain, path)
        if isinstance(node.value, float) and not math.isfinite(node.value):
            return self._refuse(path, "not a finite number", node)
        return node.value

    def _text(self, node: Node, path: str) -> Any:
        """The text of any scalar as it is written in the file: numbers and true are text here."""
        if isinstance(node, Broken):
            return _BAD
        if not isinstance(node, Scalar):
            return self._refuse(path, f"expected text, got {describe(node)}{_braces(node)}", node)
        if node.value is None:
            return self._refuse(path, 'no value; write "" for an empty text', node)
        return node.text

    def _option(self, node: Node, path: str) -> Any:
        """An option of sbatch: text, or true; lists are joined by commas, and false is as if left out."""
        if isinstance(node, Listing):
            texts = self._texts(node, path)
            if not texts:
                return self._refuse(path, "an empty list; leave the key out", node)
            return _BAD if texts is _BAD else ",".join(texts)
        if isinstance(node, Scalar) and node.value is None:
            return self._refuse(path, "no value; give one, or true for an option that takes none", node)
        if isinstance(node, Scalar) and isinstance(node.value, bool):
            return node.value or _BAD
        return self._text(node, path)

    # --- single values

    def _leaf(self, node: Node, kind: Any, path: str, alternative: str = "") -> Any:
        if get_origin(kind) is Literal:
            return self._choice(node, cast("tuple[str, ...]", get_args(kind)), path)
        base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        value = node.value if isinstance(node, Scalar) else _BAD
        try:
            if isinstance(value, float) and not math.isfinite(value):
                raise msgspec.ValidationError("not finite")
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            limit = "" if value is _BAD else _beyond(value, kind)
        if limit:
            return self._refuse(path, f"{limit}, got {describe(node).removeprefix('the number ')}", node)
        wanted = f"expected {_EXPECTED[base]}{alternative}, got {describe(node)}"
        return self._refuse(path, wanted + _advice(node, base) + _braces(node), node)

    def _choice(self, node: Node, choices: Sequence[str], path: str) -> Any:
        if isinstance(node, Scalar) and isinstance(node.value, str) and node.value in choices:
            return node.value
        hint = self._report.suggestion(node.text, choices) if isinstance(node, Scalar) else ""
        return self._refuse(path, f"expected one of {', '.join(choices)}, got {describe(node)}{hint}", node)

    def _refuse(self, path: str, message: str, node: Node) -> Any:
        self._report.add(path, message, at=node.at)
        return _BAD


def _advice(node: Node, base: type) -> str:
    if not isinstance(node, Scalar):
        return ""
    if base is str:
        return "; put it in quotes"
    if base is not bool and not node.plain and isinstance(resolve(node.text), (int, float)):
        return "; leave the quotes off"
    return ""


def _braces(node: Node) -> str:
    """YAML reads {port} without quotes as a mapping; nobody means that in a command."""
    if isinstance(node, Mapping) and len(node.entries) == 1:
        key, value = next(iter(node.entries.items()))
        if isinstance(value, Scalar) and not value.text:
            return f'; for the text write "{{{key}}}", in quotes'
    return ""


def _beyond(value: Any, kind: Any) -> str:
    """In words, the limit of ``kind`` that a number of the right type breaks; empty if the type is wrong."""
    base, *limits = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if isinstance(value, bool) or not isinstance(value, (int, base) if base is float else base):
        return ""
    for limit in limits:
        if limit.ge is not None and value < limit.ge:
            return f"must be {limit.ge:,} or more"
        if limit.gt is not None and value <= limit.gt:
            return f"must be more than {limit.gt:,}"
        if limit.le is not None and value > limit.le:
            return f"must be {limit.le:,} or less"
    return ""


# --- types -------------------------------------------------------------------------------------------------


@cache
def _fields(kind: type | None) -> dict[str, msgspec.structs.FieldInfo]:
    """The fields of a struct by their names in the file."""
    return {info.encode_name: info for info in msgspec.structs.fields(kind)} if kind else {}


def _optional(kind: Any) -> tuple[Any, bool]:
    """Take ``| None`` off a type, and say whether it was there."""
    if get_origin(kind) is not Union and not isinstance(kind, types.UnionType):
        return kind, False
    rest = tuple(part for part in get_args(kind) if part is not type(None))
    return (rest[0] if len(rest) == 1 else Union[rest]), len(rest) < len(get_args(kind))  # noqa: UP007


def _section(kind: Any) -> type[msgspec.Struct] | None:
    kind = _optional(kind)[0]
    return kind if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
