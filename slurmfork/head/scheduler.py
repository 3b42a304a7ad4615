"""The scheduler, as the head asks it from inside of its job: Slurm's commands, in time and without an exception."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from slurmfork.backends.slurm_environment import environment

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
LAST_PATIENCE_S = 2.0


async def ask(*argv: str, patience: float = PATIENCE_S) -> str | None:
    """What a command prints; None where it fails, is not there, or does not answer in time."""
    process = None
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=environment(),  # what the job, or its setup lines, have set must not change the answer
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, words = await asyncio.wait_for(process.communicate(), patience)
    except (OSError, asyncio.TimeoutError) as error:
        log.warning("%s: %s", argv[0], error or f"no answer within {patience:g} s")
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # where the controller limits how often it is asked, it would try for ever
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), LAST_PATIENCE_S)
        return None
    if process.returncode:
        log.warning("%s: %s", " ".join(argv[:2]), words.decode(errors="replace").strip()[-300:])
        return None
    return output.decode(errors="replace")
