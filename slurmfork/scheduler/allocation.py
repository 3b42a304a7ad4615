"""The allocation: the run of a scheduler, waited for and ended."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from slurmfork.errors import StillAlive, WorkerCreationError, WorkerTimeout
from slurmfork.messages import CancelReply, WorkerView
from slurmfork.names import RunState
from slurmfork.run import Run

if TYPE_CHECKING:
    from typing_extensions import Self


class Allocation:
    """A run, which ends when a ``with`` of it is left."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._spec = run.spec()
        self._allocated = False

    def __repr__(self) -> str:
        return f"<scheduler of run {self.run.run_id}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reply = self.close()
        if reply.survivors and error is None:
            raise StillAlive(f"{reply.survivors} processes of run {self.run.run_id} are left: {reply.details}")

    def close(self) -> CancelReply:
        """End the run, and verify: ``survivors`` counts what is left. A run that is over is left as it is."""
        return self.run.cancel("its controller is done")

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the nodes are there and all that starts by itself is up, however long the queue takes.

        Every other method does so by itself, without a limit. Raises WorkerTimeout, WorkerCreationError.
        """
        if self._allocated:
            return
        try:
            status = self.run.wait("ready", timeout)
        except TimeoutError as error:
            raise WorkerTimeout(self.run.run_id, timeout or 0.0, str(error)) from None
        if status.state is not RunState.READY:
            failed = [view for view in self._views() if view.exit_status]
            raise WorkerCreationError(f"run {self.run.run_id}", status.reason, kind=str(status.state), workers=failed)
        self._allocated = True

    @property
    def n_gpus_per_node(self) -> int:
        """GPUs of each node of the allocation; the fewest, where they differ."""
        self.wait()
        return min((len(node.devices) for node in self.run.status().nodes), default=0)

    def _views(self, role: str | None = None) -> list[WorkerView]:
        return self.run.workers(role)
