"""Futures of several calls as one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any


def gathered(futures: Sequence[Future[Any]]) -> Future[list[Any]]:
    """One future for several, in their order; the first failure is its own at once, and the rest is cancelled."""
    whole: Future[list[Any]] = Future()
    left = len(futures)
    lock = threading.Lock()

    def done(one: Future[Any]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if one.cancelled() or whole.done():
            return
        with contextlib.suppress(InvalidStateError):
            if (error := one.exception()) is not None:
                whole.set_exception(error)
            elif last:
                whole.set_result([future.result() for future in futures])

    def over(one: Future[list[Any]]) -> None:
        if one.cancelled() or one.exception() is not None:
            for future in futures:
                future.cancel()

    if not futures:
        whole.set_result([])
    for future in futures:
        future.add_done_callback(done)
    whole.add_done_callback(over)
    return whole
