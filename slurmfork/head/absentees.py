"""Absentees: nodes whose agent will not come, or not come back, known by what launcher and nodes write.

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
_NONE = re.compile(r"slurmfork: (no nodes: .+)")
_ENDED = re.compile(
    r"srun: error: (\S+): tasks? \S+: (Exited with exit code \d+|Terminated|Killed|Aborted|.*core dump.*)"
    r"|slurmfork: the agent of (\S+) (ended with \d+)"
)
_TROUBLE = re.compile(r"srun: error: (?!\S+: tasks? |Application launch failed)(.+)")  # which names no node


class BatchLog:
    """What is appended to the batch log from now on, read in a thread: the disk may hang."""

    def __init__(self, rundir: RunDir) -> None:
        self._rundir = rundir
        self._offset = 0
        self._looking = asyncio.Lock()
        self._refused: dict[str, str] = {}
        self._ended: dict[str, str] = {}
        self._none = self._trouble = ""
        with contextlib.suppress(OSError):
            self._offset = rundir.batch_log.stat().st_size

    async def absentee(self, joined: Callable[[str], bool]) -> str:
        """Wait for word of a node that will not come, ``joined`` excepted; returns it, in one line."""
        while True:
            await self._look()
            if self._none:
                return self._none
            for node, why in self._refused.items():
                return f"node {node} cannot take part: {why}"
            for node, how in self._ended.items():
                if not joined(node):
                    log = self._last_words(node)
                    return f"the agent of {node} {how.lower()} before it joined" + (f": {log}" if log else "")
            await asyncio.sleep(LOOK_S)  # a file of a network file system announces nothing

    async def refusal(self) -> str:
        """Why the launcher got no nodes, where it has said so."""
        await self._look()
        return self._none

    async def trouble(self) -> str:
        """The last that srun complained of, but for how tasks ended."""
        await self._look()
        return self._trouble

    async def end_of(self, node: str) -> None:
        """Wait for the launcher's word that a node's guardian has ended, and so its agent."""
        await self._look()
        while node not in self._ended:
            await asyncio.sleep(LOOK_S)
            await self._look()

    async def _look(self) -> None:
        """Note what is new."""
        loop = asyncio.get_running_loop()
        async with self._looking:
            while lines := await loop.run_in_executor(None, self._read, self._offset):
                self._offset += len(lines)
                for line in lines.decode(errors="replace").splitlines():
                    if said := _SAID.fullmatch(line):
                        self._refused[said[1]] = said[2]
                    elif said := _NONE.fullmatch(line):
                        self._none = said[1]
                    elif said := _ENDED.fullmatch(line):
                        self._ended[said[1] or said[3]] = said[2] or said[4]
                    elif said := _TROUBLE.fullmatch(line):
                        self._trouble = said[1][:300]

    def _read(self, offset: int) -> bytes:
        """Whole lines from there on."""
        with contextlib.suppress(OSError), self._rundir.batch_log.open("rb") as file:
            file.seek(offset)
            whole, newline, _ = file.read(_PIECE).rpartition(b"\n")
            return whole + newline
        return b""

    def _last_words(self, node: str) -> str:
        with contextlib.suppress(OSError):
            lines = self._rundir.agent_log(node).read_text(errors="replace").strip().splitlines()
            return lines[-1][:300] if lines else ""
        return ""
