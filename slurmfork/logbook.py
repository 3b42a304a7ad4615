"""The logbook of head and agent: what they log, written by a thread of its own, so that a slow disk holds up nobody."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from logging.handlers import QueueHandler, QueueListener

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def begin() -> QueueListener:
    """Log to standard error from now on; ``end`` takes what is returned."""
    entries: queue.SimpleQueue[object] = queue.SimpleQueue()
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(QueueHandler(entries))
    listener = QueueListener(entries, writer)
    listener.start()
    return listener


def end(listener: QueueListener, timeout: float = 2.0) -> None:
    """Have what was logged written, for ``timeout`` seconds at most: a disk that hangs is not waited for."""
    stopping = threading.Thread(target=listener.stop, daemon=True)
    stopping.start()
    stopping.join(timeout)
