"""Collects what is wrong in a spec, each thing with the line of the key that it is about; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from slurmfork.errors import Problem
from slurmfork.spec.yamlnodes import Where

_SUGGESTIONS = 50  # after so many problems nobody reads guesses, and they are slow to make


class Report:
    """All problems of one spec, and where each path of it stands."""

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._places: dict[str, Where] = {}
        self._reported: set[str] = set()
        self._bad: set[str] = set()  # what was reported, and all sections around it

    def place(self, path: str, at: Where) -> None:
        """Remember where ``path`` stands."""
        self._places[path] = at

    def where(self, path: str) -> Where:
        """Where ``path`` stands; for one that is not there, the nearest section around it."""
        while path not in self._places and path:
            path = _parent(path)
        return self._places.get(path, Where(self.file))

    def add(self, path: str, message: str, *, at: Where | None = None) -> None:
        """Note a problem; unless something is wrong with the very same path already."""
        if path not in self._reported:
            at = at or self.where(path)
            self._mark(path)
            self.problems.append(Problem(message, path=path, line=at.line, file=at.file))

    def extend(self, problems: Iterable[Problem]) -> None:
        """Take over problems that were found elsewhere."""
        for problem in problems:
            self._mark(problem.path)
            self.problems.append(problem)

    def sound(self, *paths: str) -> bool:
        """Whether nothing was found wrong with any of ``paths``, or with what is in them."""
        return self._bad.isdisjoint(paths)

    def suggestion(self, word: str, known: Iterable[str]) -> str:
        """``; did you mean 'x'?``, or nothing where no name is near."""
        if len(self.problems) >= _SUGGESTIONS or len(word) > 64:
            return ""
        import difflib  # only where something is wrong

        names = {_folded(name): name for name in known}
        near = difflib.get_close_matches(_folded(word), names, 1, 0.6)
        return f"; did you mean {names[near[0]]!r}?" if near else ""

    def in_order(self) -> list[Problem]:
        """The problems in the order of the file, those of the command line last."""
        problems = [replace(problem, path=_shown(problem.path)) for problem in self.problems]
        return sorted(problems, key=lambda problem: (problem.file != self.file, problem.line or 0))

    def _mark(self, path: str) -> None:
        self._reported.add(path)
        while path:
            self._bad.add(path)
            path = _parent(path)


def _shown(path: str) -> str:
    """A path fit for one line of a terminal, whatever the keys in it are."""
    return path if path.isprintable() else path.encode("unicode_escape").decode()


def _folded(word: str) -> str:
    return word.lower().replace("_", "-")


def _parent(path: str) -> str:
    return path[: max(path.rfind("."), path.rfind("["), 0)]
