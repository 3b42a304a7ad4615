"""Quoting a command for a login shell that nobody has told us of: sh, bash, dash, zsh, csh, tcsh or fish.

SSH carries one line of text, which the user's shell over there reads. All of these shells take single quotes
literally but for three characters, and all take a backslash before each of those three, outside of quotes, for the
character itself. A newline is another matter: no way of writing one is common to them, so it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from slurmfork.errors import UsageError

_BY_BACKSLASH = frozenset("'\\!")  # ' ends quotes; fish reads \ inside them; csh reads ! inside them
_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:,")


def quote(word: str) -> str:
    """One word, as text that any of the shells takes for that word; raises UsageError for what none can carry."""
    if "\n" in word or "\r" in word or "\0" in word:
        raise UsageError(f"{word!r} cannot be given to a command over SSH: it holds a line break or NUL")
    if word and _BARE.issuperset(word):
        return word
    parts: list[str] = []
    plain = ""
    for char in word:
        if char not in _BY_BACKSLASH:
            plain += char
            continue
        if plain:
            parts.append(f"'{plain}'")
            plain = ""
        parts.append("\\" + char)
    if plain or not parts:
        parts.append(f"'{plain}'")
    return "".join(parts)


def command_line(argv: Sequence[str], env: Mapping[str, str] | None = None) -> bytes:
    """A command, and what its environment has besides, as the line that SSH sends."""
    if not argv:
        raise UsageError("there is no command to run")
    words = [*(["env", *(f"{name}={value}" for name, value in env.items())] if env else []), *argv]
    return os.fsencode(" ".join(map(quote, words)))
