"""The launcher: starts the command that starts the agents (srun), detached, and tells when and how it ended.

Detached because Slurm's linuxproc tracker, on scancel, signals every process below the batch shell, and srun
answers SIGTERM by killing its step at once: no worker would get its grace. So srun becomes a child of init, in a
session of its own, with a bash that passes its exit status through a pipe. It ends with its step, whoever dies.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Mapping, Sequence

# `setsid -f` forks and leaves: what it runs is then nobody's child. $1 is the descriptor of the pipe.
_WRAPPER = 'fd=$1; shift; "$@" {fd_close}; echo $? >&"$fd"'


class Launcher:
    """A started launcher. ``status`` is its exit status once ``ended`` is done; None if it was lost."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = list(argv)
        self.status: int | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def orderly(self) -> bool:
        """Whether it ended as it should, and so its agents before it: not of a signal, and not out of sight."""
        return self.status is not None and self.status < 128

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it; raises OSError if it cannot be."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            script = _WRAPPER.format(fd_close=f"{writer}>&-")
            subprocess.run(
                ["setsid", "-f", "bash", "-c", script, "launcher", str(writer), *self.argv],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                pass_fds=(writer,),
                check=True,
                timeout=60,
            )
        except subprocess.SubprocessError as error:
            os.close(reader)
            raise OSError(f"the launcher could not be started: {error}") from None
        finally:
            os.close(writer)
        os.set_blocking(reader, False)
        asyncio.get_running_loop().add_reader(reader, self._read, reader)

    def _read(self, reader: int) -> None:
        text = os.read(reader, 64)
        if text.strip().isdigit():
            self.status = int(text)
        if not text or self.status is not None:
            asyncio.get_running_loop().remove_reader(reader)
            os.close(reader)
            if not self.ended.done():
                self.ended.set_result(None)
