"""The agent's side of the journal: one thread writes it, in order, so that no slow disk holds up the node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from pathlib import Path

from slurmfork.journal import Journal, Record

log = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 30.0

_Entry = tuple[tuple[Record, ...], "asyncio.Future[None] | None", bool]


class Ledger:
    """Writes records to the node's journal. Raises OSError where that cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path)
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._finished = asyncio.Event()
        # A daemon: a disk that never answers must not keep the agent from ending.
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    async def write(self, *records: Record, sync: bool = True) -> None:
        """Have the records in the journal, with ``sync`` on the disk; raises OSError if not, or not in time."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((records, done, sync))
        try:
            await asyncio.wait_for(done, WRITE_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise OSError(f"the journal was not written within {WRITE_TIMEOUT_S:g} s") from None

    def later(self, *records: Record) -> None:
        """Write the records without waiting for the disk; a failure is logged."""
        self._queue.put((records, None, False))

    async def close(self, timeout: float) -> None:
        """Write what is still to be written, for ``timeout`` seconds at most."""
        self._queue.put(None)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._finished.wait(), timeout)

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            records, done, sync = entry
            try:
                self._journal.append(*records, sync=sync)
            except OSError as error:
                self._tell(done, error)
            else:
                self._tell(done, None)
        self._journal.close()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._finished.set)

    def _tell(self, done: asyncio.Future[None] | None, error: OSError | None) -> None:
        if done is None:
            if error is not None:
                log.error("the journal could not be written: %s", error)
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(_settle, done, error)


def _settle(done: asyncio.Future[None], error: OSError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
