"""A progress bar for what is sent, on a terminal; without one, nothing."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """Shown from the first word on until all has arrived. ``where`` it goes is its title."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def show(self, done: int, total: int) -> None:
        """So many bytes of so many have arrived."""
        if not sys.stderr.isatty():
            return
        if self._progress is None:
            self._open()
        assert self._progress is not None
        assert self._task is not None
        self._progress.update(self._task, completed=done, total=total)
        if done >= total:
            self._close()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(f"to {self._where}", total=None)
        self._progress.start()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
