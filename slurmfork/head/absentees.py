"""Absentees: nodes whose agent will not come, known by what the launcher and the nodes themselves write.

A node that does not see the run directory can say so only on its standard error, which ends up in the batch log.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable

from slurmfork.rundir import RunDir

LOOK_S = 0.5
_PIECE = 256 * 1024
_SAID = re.compile(r"slurmfork: node (\S+) cannot take part: (.+)")
_ENDED = re.compile(
    r"srun: error: (\S+): tasks? \S+: (Exited with exit code \d+|Terminated|Killed|Aborted|.*core dump.*)"
    r"|slurmfork: the agent of (\S+) (ended with \d+)"
)


class BatchLog:
    """What is appended to the batch log from now on."""

    def __init__(self, rundir: RunDir) -> None:
        self._rundir = rundir
        self._offset = 0
        with contextlib.suppress(OSError):
            self._offset = rundir.batch_log.stat().st_size

    async def absentee(self, joined: Callable[[str], bool]) -> str:
        """Wait for word of a node that will not come, ``joined`` excepted; returns it, in one line."""
        while True:
            for line in self._new():
                if told := self._told(line, joined):
                    return told
            await asyncio.sleep(LOOK_S)  # a file of a network file system announces nothing

    def _new(self) -> list[str]:
        with contextlib.suppress(OSError), self._rundir.batch_log.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read(_PIECE).rpartition(b"\n")
            self._offset += len(whole + newline)
            return whole.decode(errors="replace").splitlines()
        return []

    def _told(self, line: str, joined: Callable[[str], bool]) -> str:
        if said := _SAID.fullmatch(line):
            return f"node {said[1]} cannot take part: {said[2]}"
        if said := _ENDED.fullmatch(line):
            node, how = said[1] or said[3], said[2] or said[4]
            if not joined(node):
                log = self._last_words(node)
                return f"the agent of {node} {how.lower()} before it joined" + (f": {log}" if log else "")
        return ""

    def _last_words(self, node: str) -> str:
        with contextlib.suppress(OSError):
            lines = self._rundir.agent_log(node).read_text(errors="replace").strip().splitlines()
            return lines[-1][:300] if lines else ""
        return ""
