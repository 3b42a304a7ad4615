"""The sbatch options of a run: what slurmfork needs, and the user's own, in the form of `#SBATCH` lines.

Pure. Which options a user may give is said in ``slurmfork.spec.sbatch``; a spec that was not read from a
file, and so was not checked, is held to it here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurmfork.errors import Problem, SpecError
from slurmfork.spec.sbatch import ALLOWED, REFUSED, TEMPLATE
from slurmfork.spec.shape import gpus_of

if TYPE_CHECKING:
    from slurmfork.plan import Request
    from slurmfork.spec import Spec

WARNING_S = 60  # how long before the time limit Slurm is to warn the batch script
LONGEST = 8000  # bytes of a line that sbatch of every release reads whole

_CPU_OPTIONS = {"cpus-per-task", "cpus-per-gpu"}
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_UNLIMITED = {"unlimited", "infinite", "0"}
_VARIABLES = {  # of sbatch that are not called like their option
    "array-inx": "array",
    "cpu-freq-req": "cpu-freq",
    "mem-per-node": "mem",
    "req-switch": "switches",
    "timelimit": "time",
}
_PLAIN = re.compile(r"[A-Za-z0-9_./:,@%+=^*-]+")
_UNSPEAKABLE = re.compile(r"[\0\n]")

Option = tuple[str, "str | None"]


def options(spec: Spec, request: Request, run_dir: Path) -> list[Option]:
    """Names and values (None: a flag) in the order of the script; raises SpecError for what cannot be."""
    own = _users(spec.slurm)
    given = {name for name, _ in own}
    found: list[Option] = [("nodes", str(request.nodes)), ("ntasks-per-node", "1")]
    if request.cpus_per_node and not given & _CPU_OPTIONS:
        found.append(("cpus-per-task", str(request.cpus_per_node)))
    if request.gpus_per_node and gpus_of(dict(own)) is None:
        found.append(("gpus-per-node", str(request.gpus_per_node)))
    requeue = "requeue" if spec.requeue else "no-requeue"
    found += [("output", _output(run_dir)), ("open-mode", "append"), ("export", "ALL"), (requeue, None)]
    if spec.on_node_fail == "continue":
        found.append(("no-kill", None))
    limit = next((seconds(value) for name, value in own if name == "time" and value), None)
    lead = max((math.ceil(role.checkpoint.before) for role in spec.roles.values() if role.checkpoint), default=0)
    if limit and lead >= limit:
        message = f"a checkpoint is to be {lead} s before the end of a job whose time limit is {limit} s"
        raise SpecError([Problem(message, "slurm.time")])
    if limit or lead:
        found.append(("signal", f"B:USR1@{lead or max(1, min(WARNING_S, (limit or 0) // 10))}"))
    if "job-name" not in given:
        found.insert(0, ("job-name", spec.name))
    return found + own


def ignored(spec: Spec, environment: Mapping[str, str]) -> list[str]:
    """What to say of variables that give options to sbatch: it does not see them, the spec is all that counts."""
    notes = []
    for name in sorted(name for name in environment if name.startswith("SBATCH_")):
        word = name.removeprefix("SBATCH_").lower().replace("_", "-")
        option = _VARIABLES.get(word, word)
        if option in REFUSED:
            notes.append(f"{name} is set and ignored: {REFUSED[option]}")
        elif option in ALLOWED and option not in spec.slurm:
            notes.append(f"{name} is set and ignored: put {option} into slurm:")
    return notes


def _users(section: dict[str, Any]) -> list[Option]:
    own: list[Option] = []
    problems = []
    for name, value in section.items():
        if name == TEMPLATE or value is None or value is False:
            continue
        try:
            own.append((_name(name), _value(name, value)))
        except ValueError as error:
            problems.append(Problem(str(error), f"slurm.{name}"))
    if problems:
        raise SpecError(problems)
    return own


def _name(name: str) -> str:
    if name in REFUSED:
        raise ValueError(REFUSED[name])
    if not _NAME.fullmatch(name):
        raise ValueError("is no long option of sbatch (as partition, or gpus-per-node)")
    return name


def _value(name: str, value: Any) -> str | None:
    if value is True:
        return None
    if isinstance(value, list) and all(isinstance(one, (str, int)) for one in value):
        value = ",".join(map(str, value))
    if not isinstance(value, (str, int, float)):
        raise ValueError("is neither text nor a number, nor a list of them, nor true or false")
    quoted(str(value))
    return str(value)


def quoted(value: str) -> str:
    """A value as sbatch reads it back from an `#SBATCH` line; raises ValueError for what no line can hold.

    sbatch knows double quotes with a backslash before a quote or a backslash; it expands nothing.
    """
    if _UNSPEAKABLE.search(value):
        raise ValueError("holds a line break or a NUL, which an #SBATCH line cannot hold")
    if len(value.encode(errors="replace")) > LONGEST:
        raise ValueError(f"is longer than the {LONGEST} bytes that sbatch reads from an #SBATCH line")
    if _PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _output(run_dir: Path) -> str:
    """batch.log, with what Slurm would take for a pattern of its own escaped."""
    if "\\" in str(run_dir) or _UNSPEAKABLE.search(str(run_dir)):
        message = f"the run directory {str(run_dir)!r} has a backslash or a line break in its name, which Slurm"
        raise SpecError([Problem(f"{message} cannot write to; choose another with --root")])
    return str(run_dir / "batch.log").replace("%", "%%")


def seconds(text: str) -> int | None:
    """A time limit in Slurm's forms (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S); None if there is none."""
    if text.strip().lower() in _UNLIMITED or not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text.strip()):
        return None
    days, _, rest = text.strip().rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, secs = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, (minutes, secs) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs or None
