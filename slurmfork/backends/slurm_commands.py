"""How Slurm's commands are asked: in time, and in an environment that does not change what they answer.

Nothing here knows what the answers mean.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from slurmfork.backends.base import PATIENCE_S
from slurmfork.backends.slurm_environment import environment


class Answer(NamedTuple):
    """What a command printed. ``words`` is its standard error, or why there is no answer, in one line."""

    ok: bool
    output: str
    words: str
    missing: bool = False


def ask(argv: Sequence[str], *, timeout: float = PATIENCE_S, env: Mapping[str, str] | None = None) -> Answer:
    """Run a command of Slurm to its end; an answer that is not ``ok`` says why in ``words``."""
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment() if env is None else env,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        return Answer(False, "", f"{argv[0]} was not found on PATH", missing=True)
    except OSError as error:
        return Answer(False, "", f"{argv[0]} cannot be run: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Answer(False, "", f"{argv[0]} did not answer within {timeout:.0f} s")
    words = one_line(done.stderr.decode(errors="replace"))
    if done.returncode and not words:
        words = f"{argv[0]} failed with status {done.returncode}"
    return Answer(done.returncode == 0, done.stdout.decode(errors="replace"), words)


def one_line(text: str) -> str:
    """Several lines of a message as one."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def of_cluster(command: str, cluster: str | None) -> list[str]:
    """The beginning of a command line: the command, and the cluster that it is about."""
    return [command, "-M", cluster] if cluster else [command]
