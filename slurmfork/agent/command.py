"""From a command as the spec has it to an argument list: placeholders filled, a shell only where one is needed.

What `ps` shows and signals reach should be the worker itself: a string that needs no shell gets none. Runs nothing.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping

NAMES = ("port", "ports", "index", "rank", "role", "worker", "node", "run_id", "run_dir")

_NAME = "|".join(NAMES)
_PLACEHOLDER = re.compile(rf"\$\{{(?:{_NAME})\}}|\{{\{{(?P<literal>{_NAME})\}}\}}|\{{(?P<name>{_NAME})\}}")
_SHELL_TOKEN = re.compile(rf"\\.|['\"]|{_PLACEHOLDER.pattern}", re.DOTALL)

# What bash itself understands as a first word, where a program of that name is not meant or may not exist.
_BUILTINS = frozenset(
    [
        ".",
        ":",
        "[[",
        "alias",
        "bg",
        "break",
        "builtin",
        "caller",
        "case",
        "cd",
        "command",
        "compgen",
        "complete",
        "continue",
        "coproc",
        "declare",
        "dirs",
        "disown",
        "do",
        "enable",
        "eval",
        "exec",
        "exit",
        "export",
        "fc",
        "fg",
        "for",
        "function",
        "getopts",
        "hash",
        "help",
        "history",
        "if",
        "jobs",
        "let",
        "local",
        "logout",
        "mapfile",
        "popd",
        "pushd",
        "read",
        "readarray",
        "readonly",
        "return",
        "select",
        "set",
        "shift",
        "shopt",
        "source",
        "suspend",
        "time",
        "times",
        "trap",
        "type",
        "typeset",
        "ulimit",
        "umask",
        "unalias",
        "unset",
        "until",
        "wait",
        "while",
    ]
)


class BadCommand(ValueError):
    """The command cannot be made into arguments; the message says why."""


def arguments(command: str | list[str], values: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """What to execute. ``environment`` is the worker's; raises BadCommand."""
    if isinstance(command, str):
        return _of_text(fill_shell(command, values), environment)
    if not command or not command[0]:
        raise BadCommand("the command is empty")
    return [fill(word, values) for word in command]


# --- placeholders ------------------------------------------------------------------------------------------


def fill(text: str, values: Mapping[str, str]) -> str:
    """Replace placeholders by their values; everything else in braces stays as it is."""
    return _PLACEHOLDER.sub(lambda match: _value(match, values, ""), text)


def fill_shell(text: str, values: Mapping[str, str]) -> str:
    """As ``fill``, with the values quoted for the place in the shell's text where they stand."""
    quote = ""

    def one(match: re.Match[str]) -> str:
        nonlocal quote
        found = match[0]
        if found in ("'", '"'):
            quote = "" if quote == found else quote or found
            return found
        if found.startswith("\\") and quote == "'":
            quote = "" if found == "\\'" else quote  # within single quotes a backslash is a backslash
            return found
        return found if found.startswith("\\") else _value(match, values, quote, quoting=True)

    return _SHELL_TOKEN.sub(one, text)


def _value(match: re.Match[str], values: Mapping[str, str], quote: str, *, quoting: bool = False) -> str:
    if literal := match["literal"]:
        return "{" + literal + "}"
    name = match["name"]
    if not name:
        return match[0]
    if name not in values:
        raise BadCommand(f"the command has {{{name}}}, but the role reserves no ports: give it `ports: 1`")
    return _quoted(values[name], quote) if quoting else values[name]


def _quoted(value: str, quote: str) -> str:
    if quote == "'":
        return value.replace("'", "'\\''")
    if quote == '"':
        return re.sub(r'([\\"$`])', r"\\\1", value)
    return shlex.quote(value)


# --- shell or no shell -------------------------------------------------------------------------------------


def _of_text(text: str, environment: Mapping[str, str]) -> list[str]:
    if not text.strip():
        raise BadCommand("the command is empty")
    kind = _kind(text)
    words = shlex.split(text) if kind != "compound" else []
    if not words:
        return ["bash", "-c", text]
    first = words[0]
    is_word = "=" not in first and not re.match(r"[\"']?[$~*?\[{]", text.strip())
    if not is_word or first in _BUILTINS or _is_function(first, environment):
        return ["bash", "-c", text]
    if kind == "plain":
        return words
    return ["bash", "-c", f"exec {text.strip()}" if find(first, environment.get("PATH")) else text]


def _kind(text: str) -> str:
    """``plain`` (words and quotes), ``expanding`` (one command, for the shell to expand), or ``compound``."""
    quote, kind, position = "", "plain", 0
    while position < len(text):
        char = text[position]
        if char == "\\" and quote != "'":
            position += 1
            if position == len(text):
                return "compound"
            if text[position] == "\n" or (quote and text[position] not in '"\\'):
                kind = "expanding"  # shlex and the shell differ here
        elif quote:
            quote = "" if char == quote else quote
            if quote == '"' and char in "$`":
                kind = "expanding"
        elif char in "'\"":
            quote = char
        elif char in "|&;<>()`#!\n\r":
            return "compound"
        elif char in "$~*?[]{}":
            kind = "expanding"
        position += 1
    return "compound" if quote else kind


def _is_function(word: str, environment: Mapping[str, str]) -> bool:
    return f"BASH_FUNC_{word}%%" in environment  # `module`, mostly


def find(program: str, path: str | None) -> str | None:
    """Where a program is; None if nowhere. A name with a slash is not searched for."""
    if "/" in program:
        return program if os.access(program, os.X_OK) else None
    for directory in (path if path is not None else os.defpath).split(":"):
        candidate = f"{directory or '.'}/{program}"
        if os.access(candidate, os.X_OK) and not os.path.isdir(candidate):  # noqa: PTH112 (light)
            return candidate
    return None
