"""From YAML text to a tree of nodes that know their lines, and the list of all that a spec may not use.

Strict on purpose: YAML 1.2 core scalars (so that 02:00:00, on and no are text), one document, no anchors, no
tags, no merge keys, no key twice. It knows nothing of what the keys of a spec mean. Never recursive, so that
no input can exhaust the stack.
"""

from __future__ import annotations

import re
from typing import Any, TypeAlias

import yaml
from msgspec import Struct, field

from slurmfork.errors import Problem
from slurmfork.spec.yamlsyntax import syntax_problem

Value: TypeAlias = "str | int | float | bool | None"

MAX_DEPTH = 50
_TAGS = "tag:yaml.org,2002:"
_KINDS: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_LONGEST_NUMBER = 40
_LONGEST_KEY = 256
_MOST_PROBLEMS = 1000
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Where(Struct, frozen=True):
    """A place in a file, or in what stands for one (``--set``)."""

    file: str | None = None
    line: int | None = None


class Scalar(Struct, frozen=True):
    """One value: its text as written, and whether it is plain (unquoted), so that it may be a number."""

    text: str
    plain: bool
    at: Where

    @property
    def value(self) -> Value:
        return resolve(self.text) if self.plain else self.text


class Listing(Struct, frozen=True):
    """A sequence."""

    at: Where
    items: list[Node] = field(default_factory=list)


class Mapping(Struct, frozen=True):
    """Keys and values; ``keys`` tells where each key stands."""

    at: Where
    entries: dict[str, Node] = field(default_factory=dict)
    keys: dict[str, Where] = field(default_factory=dict)


class Broken(Struct, frozen=True):
    """In place of a value for which a problem was reported already."""

    at: Where


Node: TypeAlias = "Scalar | Listing | Mapping | Broken"


def resolve(text: str) -> Value:
    """What a plain scalar means by YAML 1.2's core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _LONGEST_NUMBER:
        return text
    if _INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def parse(text: str, file: str | None = None, *, lines: bool = True) -> tuple[Node | None, list[Problem]]:
    """The root node (None where there is nothing, or nothing that can be read) and all problems found.

    ``lines`` false: the text is no file, so that lines would say nothing.
    """
    if found := _UNPRINTABLE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        what = "a NUL character" if found[0] == "\0" else f"the control character {found[0]!r}"
        return None, [Problem(f"{what}: a spec is plain text", line=line, file=file)]
    builder = _Builder(file, lines)
    try:
        for event in yaml.parse(text, Loader=_loader()):
            if not builder.take(event):
                break
    except yaml.YAMLError as error:
        builder.problems.append(syntax_problem(error, text, file))
        return None, builder.problems
    return builder.root, builder.problems


def _loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


# --- building the tree -------------------------------------------------------------------------------------


class _Open(Struct):
    """A list or mapping whose end has not come. ``key`` waits for its value; None: it is not usable."""

    node: Listing | Mapping
    path: str
    awaits_value: bool = False
    key: str | None = None
    key_at: Where = Where()


class _Builder:
    """Takes parser events one by one; ``take`` answers whether to go on."""

    def __init__(self, file: str | None, lines: bool) -> None:
        self.root: Node | None = None
        self.problems: list[Problem] = []
        self._file = file
        self._lines = lines
        self._open: list[_Open] = []
        self._documents = 0

    def take(self, event: Any) -> bool:
        at = Where(self._file, event.start_mark.line + 1 if self._lines else None)
        if len(self.problems) > _MOST_PROBLEMS:
            self._problem("too many mistakes to go on", at)
            return False
        if isinstance(event, yaml.DocumentStartEvent):
            return self._begin_document(at)
        if isinstance(event, yaml.CollectionStartEvent):
            return self._begin(event, at)
        if isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
        elif isinstance(event, yaml.ScalarEvent):
            self._refuse_anchor(event, at)
            self._attach(self._scalar(event, at))
        elif isinstance(event, yaml.AliasEvent):
            shown = f"*{event.anchor}"
            self._problem(f"aliases ({shown}) are not used in specs; if text is meant, write '{shown}' in quotes", at)
            self._attach(Broken(at))
        return True

    def _begin_document(self, at: Where) -> bool:
        self._documents += 1
        if self._documents > 1:
            self._problem("a second document begins here (---); a spec is one document", at)
        return self._documents == 1

    def _begin(self, event: Any, at: Where) -> bool:
        self._refuse_anchor(event, at)
        is_list = isinstance(event, yaml.SequenceStartEvent)
        if event.tag not in (None, "!", _TAGS + ("seq" if is_list else "map")):
            self._refuse_tag(event.tag, at)
        node = Listing(at) if is_list else Mapping(at)
        path = self._path()
        self._attach(node)
        self._open.append(_Open(node, path))
        if len(self._open) > MAX_DEPTH:
            self._problem(f"nested deeper than {MAX_DEPTH} levels", at)
            self.root = None
            return False
        return True

    def _scalar(self, event: Any, at: Where) -> Node:
        if "\0" in event.value or any("\ud800" <= char <= "\udfff" for char in event.value):
            self._problem("NUL and unpaired surrogate characters cannot be passed to a process", at)
            return Broken(at)
        if event.tag in (None, "!"):
            return Scalar(event.value, bool(event.implicit[0]) and event.tag is None, at)
        kind = event.tag.removeprefix(_TAGS)
        if event.tag == _TAGS + "str":
            return Scalar(event.value, False, at)
        if event.tag != _TAGS + kind or kind not in _KINDS:
            self._refuse_tag(event.tag, at)
        elif isinstance(resolve(event.value), _KINDS[kind]):
            return Scalar(event.value, True, at)
        else:
            self._problem(f"{event.value!r} is not of the type that its tag !!{kind} says", at)
        return Broken(at)

    def _attach(self, node: Node) -> None:
        if not self._open:
            self.root = node
            return
        parent = self._open[-1]
        if isinstance(parent.node, Listing):
            parent.node.items.append(node)
        elif not parent.awaits_value:
            parent.awaits_value, parent.key, parent.key_at = True, self._key(node), node.at
        else:
            parent.awaits_value = False
            self._add_entry(parent.node, parent, node)

    def _add_entry(self, mapping: Mapping, parent: _Open, node: Node) -> None:
        if parent.key is None:
            return
        if first := mapping.keys.get(parent.key):
            path = f"{parent.path}.{parent.key}" if parent.path else parent.key
            self._problem(
                f"key {short(parent.key)} is given twice (first on line {first.line})",
                parent.key_at,
                path=path,
            )
            return
        mapping.entries[parent.key] = node
        mapping.keys[parent.key] = parent.key_at

    def _key(self, node: Node) -> str | None:
        """The text of a key; None, and a problem, if it is none."""
        if isinstance(node, Broken):
            return None
        if not isinstance(node, Scalar):
            what = "a list" if isinstance(node, Listing) else "a mapping"
            self._problem(f"a key must be text, not {what}; if text in braces is meant, put it in quotes", node.at)
            return None
        if node.plain and node.text == "<<":
            self._problem("merge keys (<<) are not used in specs; write the keys out", node.at)
            return None
        if not isinstance(node.value, str):
            self._problem(f"a key must be text; put {node.text or 'it'} in quotes", node.at)
            return None
        if len(node.text) > _LONGEST_KEY:
            self._problem(f"a key of {len(node.text)} characters; no name is that long", node.at)
            return None
        return node.text

    def _refuse_anchor(self, event: Any, at: Where) -> None:
        if event.anchor is not None:
            shown = f"&{event.anchor}"
            self._problem(f"anchors ({shown}) are not used in specs; write the value out where it is needed", at)

    def _refuse_tag(self, tag: str, at: Where) -> None:
        shown = "!!" + tag.removeprefix(_TAGS) if tag.startswith(_TAGS) else tag
        self._problem(f"tags ({short(shown)}) are not used in specs; leave it out, or put the text in quotes", at)

    def _problem(self, message: str, at: Where, *, path: str | None = None) -> None:
        where = self._path() if path is None else path
        self.problems.append(Problem(message, path=where, line=at.line, file=at.file))

    def _path(self) -> str:
        """The dotted path of the node that comes next."""
        if not self._open:
            return ""
        parent = self._open[-1]
        if isinstance(parent.node, Listing):
            return f"{parent.path}[{len(parent.node.items)}]"
        if not parent.awaits_value or parent.key is None:
            return parent.path
        return f"{parent.path}.{parent.key}" if parent.path else parent.key


def short(text: str, longest: int = 60) -> str:
    """Text in quotes, cut if it is long, with nothing in it that a terminal would act on."""
    return repr(text if len(text) <= longest else text[: longest - 3] + "...")
