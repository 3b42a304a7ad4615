"""Walking a directory without git: every file in it, but for what the .gitignore files on the way leave out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slurmfork.errors import UsageError

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

GIT = ".git"
_Rules = list[tuple[str, "GitIgnoreSpec"]]  # of a directory (as the beginning of paths), and its patterns


def walk(directory: Path, *, top: Path | None = None, ignoring: bool = True) -> Iterator[str]:
    """Relative paths of all that is no directory. ``top``: .gitignore files from there on hold, not only inside.

    ``ignoring=False``: .gitignore files hold nothing back. What .git names is never told.
    """
    rules: _Rules = []
    inside = ""
    if ignoring:
        places = [directory] if top is None else [top, *_between(top, directory)]
        inside = "" if top is None else _prefix(directory.relative_to(top).as_posix())
        if top is not None:
            _add_rules(rules, top / GIT / "info" / "exclude", "")
        for place in places[:-1]:  # that of the last is read below
            _add_rules(rules, place / ".gitignore", _prefix(place.relative_to(places[0]).as_posix()))
    for path in _walk(str(directory), inside, rules, ignoring):
        yield path[len(inside) :]


def _between(top: Path, directory: Path) -> list[Path]:
    parts = directory.relative_to(top).parts
    return [top.joinpath(*parts[: number + 1]) for number in range(len(parts))]


def _prefix(path: str) -> str:
    return "" if path in ("", ".") else f"{path}/"


def _walk(directory: str, prefix: str, rules: _Rules, ignoring: bool) -> Iterator[str]:
    held = len(rules)
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"cannot read {directory}: {error.strerror}; leave it out of `code:`") from None
    if ignoring and any(entry.name == ".gitignore" for entry in entries):
        _add_rules(rules, Path(directory) / ".gitignore", prefix)
    for entry in entries:
        if entry.name == GIT:
            continue
        path, is_directory = prefix + entry.name, entry.is_dir(follow_symlinks=False)
        if _ignored(path + "/" if is_directory else path, rules):
            continue
        if is_directory:
            yield from _walk(entry.path, path + "/", rules, ignoring)
        else:
            yield path
    del rules[held:]


def _ignored(path: str, rules: _Rules) -> bool:
    """The nearest .gitignore that says anything of a path decides."""
    for prefix, spec in reversed(rules):
        said = spec.check_file(path[len(prefix) :]).include
        if said is not None:
            return said
    return False


def _add_rules(rules: _Rules, file: Path, prefix: str) -> None:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return
    rules.append((prefix, patterns([line for line in lines if _is_pattern(line)], str(file))))


def _is_pattern(line: str) -> bool:
    """git takes no offence at what is none, either."""
    try:
        patterns([line], "")
    except UsageError:
        return False
    return True


def patterns(lines: Sequence[str], source: str) -> GitIgnoreSpec:
    """Patterns as in a .gitignore file; raises UsageError for one that is none."""
    from pathspec import GitIgnoreSpec

    try:
        return GitIgnoreSpec.from_lines(lines)
    except (ValueError, re.error) as error:
        raise UsageError(f"{source}: {error}") from None
