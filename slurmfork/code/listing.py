"""The listing: which files of a directory are a run's code, by git or by .gitignore files, and what may be sent.

Looks at names and sizes alone; nothing is read. What is too much, or cannot be sent, is refused here.
"""

from __future__ import annotations

import os
import posixpath
import socket
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from slurmfork.code import git, walk
from slurmfork.code.manifest import Entry, link_stays_inside
from slurmfork.code.weight import refuse_too_much
from slurmfork.errors import UsageError
from slurmfork.rundir import CodeRecord, GitRecord
from slurmfork.spec import Code

SHOWN = 3


class Listing(NamedTuple):
    """What would be sent: entries without their digests, and what is to be said of what would not."""

    directory: Path
    entries: list[Entry]
    record: CodeRecord
    notes: list[str]


def listing(code: Code, avoid: Sequence[Path] = ()) -> Listing:
    """List a directory. ``avoid``: directories that are never part of it, where runs live.

    Raises UsageError, in one line, for what cannot be read, is too much, or leads out.
    """
    directory = _directory(code.path)
    notes: list[str] = []
    facts = _facts(directory, notes)
    names = _chosen(directory, code, notes)
    for place in avoid:
        if (inside := _inside(directory, place)) is not None:
            names = [name for name in names if name != inside and not name.startswith(f"{inside}/")]
    entries = _entries(directory, names, notes)
    refuse_too_much(directory, entries, code.limit)
    size = sum(entry.size for entry in entries)
    record = CodeRecord(source=str(directory), host=socket.gethostname(), files=len(entries), size=size, git=facts)
    return Listing(directory, entries, record, notes)


def _directory(path: str) -> Path:
    given = Path(path).absolute()
    try:
        directory = given.resolve(strict=True)
        with os.scandir(directory):
            return directory
    except OSError as error:
        raise UsageError(f"code: cannot read the directory {given}: {error.strerror}") from None


def _facts(directory: Path, notes: list[str]) -> GitRecord | None:
    if git.repository(directory) is None:
        return None
    try:
        return git.facts(directory)
    except git.GitFailed as error:
        notes.append(f"the code's commit is not recorded, and .gitignore files are read without git: {error}")
        return None


# --- names


def _chosen(directory: Path, code: Code, notes: list[str]) -> list[str]:
    """The names of what belongs to it, in order."""
    names = _names(directory)
    if code.include:
        wanted = walk.patterns(code.include, "code.include")
        names |= {name for name in walk.walk(directory, ignoring=False) if wanted.match_file(name)}
    if code.exclude:
        unwanted = walk.patterns(code.exclude, "code.exclude")
        names = {name for name in names if not unwanted.match_file(name)}
    return sorted(name for name in names if walk.GIT not in name.split("/"))


def _names(directory: Path) -> set[str]:
    top = git.repository(directory)
    if top is not None:
        try:
            return _git_names(directory)
        except git.GitFailed as error:
            if not str(error):  # ignored by the repository around it
                top = None
    return set(walk.walk(directory, top=top))


def _git_names(directory: Path) -> set[str]:
    names = set()
    for name in git.files(directory):
        place = directory / name
        if place.is_dir() and not place.is_symlink():  # a submodule, or a repository within
            if (place / walk.GIT).exists():
                names |= {f"{name}/{inner}" for inner in _git_names(place)}
        else:
            names.add(name)
    return names


def _inside(directory: Path, place: Path) -> str | None:
    """Where ``place`` is within ``directory``, if it is."""
    try:
        return place.resolve().relative_to(directory).as_posix()
    except ValueError:
        return None


# --- what they name


def _entries(directory: Path, names: Iterable[str], notes: list[str]) -> list[Entry]:
    found, leading_out, special = [], [], []
    for name in names:
        _check_name(name)
        try:
            facts = os.lstat(directory / name)
        except (FileNotFoundError, NotADirectoryError):
            continue  # git knows it still
        except OSError as error:
            raise UsageError(f"code: cannot read {name}: {error.strerror}; `exclude` leaves it out") from None
        if stat.S_ISREG(facts.st_mode):
            found.append(Entry(name, facts.st_size, bool(facts.st_mode & stat.S_IXUSR)))
        elif stat.S_ISLNK(facts.st_mode):
            target = _target(directory, name)
            if target is None:
                leading_out.append(name)
            else:
                found.append(Entry(name, target=target))
        else:
            special.append(name)
    if special:
        notes.append(f"left out of the code, neither file nor link: {_some(special)}")
    if leading_out:
        shown = ", ".join(f"{name} -> {Path(directory, name).readlink()}" for name in leading_out[:SHOWN])
        more = f" and {len(leading_out) - SHOWN} more" if len(leading_out) > SHOWN else ""
        raise UsageError(
            f"code: links that lead out of {directory} would lead elsewhere over there: {shown}{more}; "
            "leave them out with `exclude`, or put there what they lead to"
        )
    return found


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        raise UsageError(f"code: the name {shown!r} is no UTF-8; rename it, or leave it out with `exclude`") from None


def _target(directory: Path, name: str) -> str | None:
    """A link's target, relative; None if it leads out, by its own words or through other links."""
    place = directory / name
    target = str(place.readlink())
    try:
        real = place.parent.joinpath(target).resolve()
    except (OSError, RuntimeError):  # links in a circle
        return target if link_stays_inside(name, target) else None
    if real != directory and directory not in real.parents:
        return None
    if posixpath.isabs(target):
        target = os.path.relpath(real, place.parent.resolve())
    return target if link_stays_inside(name, target) else None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
