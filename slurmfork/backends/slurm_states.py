"""What Slurm's words for the state of a job mean for a run: one table, and the forms that they come in.

Slurm shows one word: a flag where one is set, else the base state. A word that is not in the table is no
error: the state is then not known, and the word is shown as it is.
"""

from __future__ import annotations

from slurmfork.names import RunState

_STATES: dict[str, RunState | None] = {
    # Base states.
    "PENDING": RunState.PENDING,
    "RUNNING": RunState.STARTING,  # whether it is ready is the head's to say
    "SUSPENDED": RunState.STARTING,
    "COMPLETED": RunState.COMPLETED,
    "CANCELLED": RunState.CANCELLED,
    "FAILED": RunState.FAILED,
    "TIMEOUT": RunState.TIMEOUT,
    "NODE_FAIL": RunState.NODE_FAIL,
    "PREEMPTED": RunState.PREEMPTED,
    "BOOT_FAIL": RunState.NODE_FAIL,
    "DEADLINE": RunState.TIMEOUT,
    "OUT_OF_MEMORY": RunState.FAILED,
    # Flags. They hide the base state, and none of them is the end of the job.
    "COMPLETING": RunState.STOPPING,
    "STAGE_OUT": RunState.STOPPING,
    "CONFIGURING": RunState.STARTING,  # its nodes boot
    "POWER_UP_NODE": RunState.STARTING,
    "EXPEDITING": RunState.PENDING,
    "RESIZING": RunState.STARTING,
    "REQUEUED": RunState.PENDING,
    "REQUEUED_CRON": RunState.PENDING,
    "REQUEUE_FED": RunState.PENDING,
    "REQUEUE_HOLD": RunState.PENDING,
    "SPECIAL_EXIT": RunState.PENDING,  # requeued, and held
    "RESV_DEL_HOLD": RunState.PENDING,
    "STOPPED": RunState.STARTING,
    "SIGNALING": RunState.STARTING,
    "REVOKED": None,  # another cluster of the federation has it
}

# Pending for one of these reasons, a job does not start by itself, or perhaps never.
_HINTS = {
    "JobHeldUser": "it starts after `scontrol release`",
    "JobHeldAdmin": "an administrator holds it",
    "launch failed requeued held": "it could not be launched, and starts after `scontrol release`",
    "DependencyNeverSatisfied": "it can never start",
    "BadConstraints": "no node can ever satisfy it",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows or has",
    "PartitionTimeLimit": "it asks for more time than the partition allows",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "AccountNotAllowed": "the partition does not admit the account",
    "QOSNotAllowed": "the partition does not admit the QOS",
}


def run_state(word: str) -> RunState | None:
    """The run state of a word of squeue, scontrol or sacct; None where it tells nothing that we know of.

    Takes ``CANCELLED by 1000``, and words cut short by a column, ``OUT_OF_ME+``.
    """
    first = word.split(maxsplit=1)[0].upper() if word.strip() else ""
    if not first.endswith("+"):
        return _STATES.get(first)
    meant = {state for name, state in _STATES.items() if name.startswith(first[:-1])}
    return meant.pop() if len(meant) == 1 else None


def pending_reason(reason: str) -> str:
    """Slurm's reason for a pending job, with what it means where waiting alone does not help."""
    hint = _HINTS.get(reason)
    return f"{reason}: {hint}" if hint else reason


def exit_status(word: str, code: str) -> int | None:
    """The status of a shell for Slurm's ``exit:signal``; None where that tells nothing, as if cancelled."""
    if run_state(word) in (None, RunState.PENDING, RunState.STARTING, RunState.STOPPING):
        return None
    status, _, signum = code.partition(":")
    if not status.isdigit() or (signum and not signum.isdigit()):
        return None
    if word.startswith("OUT_OF_ME"):  # Slurm says 0:125: the kernel's killer sends SIGKILL
        return 137
    if int(signum or 0):
        return 128 + int(signum) if int(signum) < 65 and int(signum) != _LAUNCH_FAILED else None
    if int(status) == 0 and run_state(word) is not RunState.COMPLETED:
        return None
    return int(status)


_LAUNCH_FAILED = 53  # not a signal, though Slurm shows it as one: the batch script was not started
