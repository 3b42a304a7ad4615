"""The background: one event loop in a thread of its own, which carries all calls of this process.

So calls can be made from any thread, with or without an event loop of its own: from a notebook as from a script.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

from slurmfork.errors import UsageError

T = TypeVar("T")


class Background:
    """A loop that runs for as long as the process does."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="slurmfork-calls", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    @property
    def here(self) -> bool:
        """Whether this is its thread."""
        return threading.current_thread() is self._thread

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, done there."""
        self.refuse()
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def refuse(self) -> None:
        """Raise UsageError in its own thread, where waiting for a call would wait for ever."""
        if self.here:
            raise UsageError("a callback of a future cannot wait for a call: have another thread do that")


_the: Background | None = None
_lock = threading.Lock()


def background() -> Background:
    """The one of this process."""
    global _the
    with _lock:
        if _the is None:
            _the = Background()
        return _the


def _forget() -> None:
    """A process that was forked has not its parent's threads."""
    global _the, _lock
    _the, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
