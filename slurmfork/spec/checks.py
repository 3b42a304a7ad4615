"""The rules that types cannot say: names, what excludes what, what needs what. All breaches are reported.

Works on a spec whose types are right; where a key's own value was refused already, rules about it keep quiet.
Touches no file but to see whether a template of the user's own, and the code, are there.
"""

from __future__ import annotations

import os
import re
import signal

import msgspec
from msgspec.structs import replace

from slurmfork import names
from slurmfork.spec import sbatch, shape, sizes
from slurmfork.spec.model import Ready, Role, Spec
from slurmfork.spec.report import Report
from slurmfork.spec.yamlnodes import short

RESERVED = "SLURMFORK_"
LONGEST_TEXT = 100_000  # bytes; Linux takes no argument or variable over 128 KiB

_NAME_RULE = "letters, digits, - and _ (not first or last), 40 at most"
_PORT = re.compile(r"(?<![${])\{(ports?)\}(?!\})")
_SIGNALS = {name.removeprefix("SIG"): number for name, number in signal.Signals.__members__.items()}
_UNSTOPPABLE = ("KILL", "STOP")
_CLASS = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_PROCESS = ("env", "cwd", "ports", "gpus", "restart", "checkpoint")  # what a process has, and an engine has not
_BARE = Role()
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check(spec: Spec, report: Report, base: str) -> None:
    """Report every breach. ``base``: the directory that a relative template is in."""
    if not names.NAME_PATTERN.fullmatch(spec.name):
        report.add("name", f"{short(spec.name)} is not a name: {_NAME_RULE}")
    _environment(spec.env, "env", report)
    _secrets(spec, report)
    _slurm(spec, report, base)
    _code(spec, report, base)
    if not spec.roles and report.sound("roles"):
        report.add("roles", "no roles; a spec needs at least one")
    for name, role in spec.roles.items():
        _role(name, role, spec, report)
    _mains(spec, report)
    _cycles(spec, report)


def settle(spec: Spec, base: str) -> Spec:
    """The resolved form of a spec that has no problems: defaults that depend on others, absolute paths."""
    roles = {name: _settle_role(role) for name, role in spec.roles.items()}
    slurm = dict(spec.slurm)
    if sbatch.TEMPLATE in slurm:
        slurm[sbatch.TEMPLATE] = _absolute(slurm[sbatch.TEMPLATE], base)
    code = spec.code and replace(spec.code, path=_absolute(spec.code.path, base))
    return replace(spec, roles=roles, slurm=slurm, code=code)


def _settle_role(role: Role) -> Role:
    if not role.colocated and role.replicas is None and role.per_node is None:
        role = replace(role, replicas=1)
    if role.checkpoint is not None:
        checkpoint = replace(role.checkpoint, signal=role.checkpoint.signal.removeprefix("SIG"))
        role = replace(role, checkpoint=checkpoint)
    if role.engine is not None:
        role = replace(role, ready=replace(role.ready or Ready(), notify=True))
    return replace(role, stop=replace(role.stop, signal=role.stop.signal.removeprefix("SIG")))


# --- environment -------------------------------------------------------------------------------------------


def _environment(env: dict[str, str], path: str, report: Report) -> None:
    for name, value in env.items():
        here = f"{path}.{name}"
        _variable(name, here, report)
        if len(value.encode()) > LONGEST_TEXT:
            report.add(here, f"over {LONGEST_TEXT:,} bytes, which Linux passes to no process; put it in a file")


def _variable(name: str, path: str, report: Report) -> None:
    if not names.ENV_PATTERN.fullmatch(name):
        report.add(path, f"{short(name)} is not a variable's name: letters, digits and _, no digit first")
    elif name.startswith(RESERVED):
        report.add(path, f"names that begin with {RESERVED} are set by slurmfork itself; choose another")


def _secrets(spec: Spec, report: Report) -> None:
    for number, name in enumerate(spec.secrets):
        path = f"secrets[{number}]"
        if "=" in name:
            report.add(path, "only the name goes here; the value comes from the environment of who submits")
            continue
        _variable(name, path, report)
        if name in spec.env:
            report.add(path, f"{name} is in `env` too; leave it out there, or it is no secret")


def _code(spec: Spec, report: Report, base: str) -> None:
    if spec.code is None:
        return
    if report.sound("code.path", "code") and not os.path.isdir(path := _absolute(spec.code.path, base)):  # noqa: PTH112
        report.add("code.path", f"there is no directory {path}")
    try:
        sizes.size_of(spec.code.limit)
    except ValueError as error:
        report.add("code.limit", str(error))


# --- slurm -------------------------------------------------------------------------------------------------


def _slurm(spec: Spec, report: Report, base: str) -> None:
    for key, value in spec.slurm.items():
        path = f"slurm.{key}"
        if reason := sbatch.REFUSED.get(key):
            report.add(path, f"{key} cannot be set: {reason}")
        elif key not in sbatch.ALLOWED:
            _unknown_option(key, path, report)
        elif value is True and key in sbatch.VALUES | {sbatch.TEMPLATE}:
            report.add(path, f"{key} needs a value, not true")
        elif value is not True and key in sbatch.FLAGS:
            report.add(path, f"{key} takes no value; write {key}: true")
        elif isinstance(value, str) and _CONTROL.search(value):
            report.add(path, "an option of sbatch is one line of plain text")
    if report.sound("slurm"):
        _template_exists(spec, report, base)
        _shape(spec, report)


def _unknown_option(key: str, path: str, report: Report) -> None:
    if len(key) == 1:
        hint = "; options have their long names here, such as partition for -p"
    else:
        hint = report.suggestion(key.lstrip("-"), sbatch.ALLOWED | sbatch.REFUSED.keys() - sbatch.NO_OPTIONS)
        hint = hint or "; `sbatch --help` lists them"
    report.add(path, f"sbatch has no option {short(key)}{hint}", at=report.where(path))


def _template_exists(spec: Spec, report: Report, base: str) -> None:
    if sbatch.TEMPLATE in spec.slurm:
        path = _absolute(spec.slurm[sbatch.TEMPLATE], base)
        if not os.path.isfile(path):  # noqa: PTH113 (pathlib is slow to import)
            report.add("slurm.template", f"there is no file {path}")


def _absolute(value: str, base: str) -> str:
    return os.path.abspath(os.path.join(base, os.path.expanduser(value)))  # noqa: PTH100, PTH111, PTH118


def _shape(spec: Spec, report: Report) -> None:
    for key, count in (
        ("gpus-per-node", shape.gpus_of),
        ("gres", shape.gpus_of),
        ("cpus-per-task", shape.cpus_of),
    ):
        try:
            if key in spec.slurm:
                count({key: spec.slurm[key]})
        except ValueError as error:
            report.add(f"slurm.{key}", str(error))
    if not report.sound("slurm"):
        return
    if "gpus-per-node" in spec.slurm and shape.gpus_of({"gres": spec.slurm.get("gres", "")}) is not None:
        report.add("slurm.gres", "GPUs are asked for twice, here and by gpus-per-node; leave one out")
    needy = next((name for name, role in spec.roles.items() if role.gpus and not role.colocated), None)
    if spec.backend == "slurm" and needy and shape.gpus_of(spec.slurm) is None:
        for kind in shape.shares_of(spec.slurm):
            why = f"is a part of a GPU that others are on too, and the role {needy} needs whole GPUs; ask for"
            report.add("slurm.gres", f"{kind} {why} gpus-per-node, or leave `gpus` out: all workers see what is given")
    if "cpus-per-task" in spec.slurm and "cpus-per-gpu" in spec.slurm:
        report.add("slurm.cpus-per-gpu", "CPUs are asked for twice, here and by cpus-per-task; leave one out")
    try:
        if shape.cpus_of(spec.slurm) == 0:
            report.add("slurm.cpus-per-task", "must be 1 or more")
    except ValueError as error:
        report.add("slurm.cpus-per-gpu", str(error))


# --- roles -------------------------------------------------------------------------------------------------


def _role(name: str, role: Role, spec: Spec, report: Report) -> None:
    path = f"roles.{name}"
    if not names.NAME_PATTERN.fullmatch(name):
        report.add(path, f"{short(name)} is not a role's name: {_NAME_RULE}", at=report.where(path))
    if role.engine is not None:
        _engine(role, path, report)
    elif role.command is not None:
        _command(role.command, role, path, report)
    else:
        _neither(role, path, report)
    _environment(role.env, f"{path}.env", report)
    if role.cwd is not None and not role.cwd.startswith("/") and spec.code is None:
        report.add(f"{path}.cwd", f"{short(role.cwd)} is not absolute; begin it with /, or send `code` along")
    _ready(role, path, report)
    _signal(role.stop.signal, f"{path}.stop.signal", report)
    if role.checkpoint is not None:
        _signal(role.checkpoint.signal, f"{path}.checkpoint.signal", report)
    _strategy(name, role, spec, report)
    if role.replicas is not None and role.per_node is not None:
        report.add(f"{path}.per_node", "replicas and per_node exclude each other; leave one out")


def _neither(role: Role, path: str, report: Report) -> None:
    if report.sound(f"{path}.command", f"{path}.engine"):
        report.add(f"{path}.command", "missing; a role has a command, or an engine")


def _engine(role: Role, path: str, report: Report) -> None:
    here = f"{path}.engine"
    if role.command is not None:
        report.add(here, "command and engine exclude each other; leave one out")
    if not _CLASS.fullmatch(role.engine or "") and report.sound(here):
        report.add(here, f"{short(role.engine or '')} names no class; write package.module:Class")
    sizes = {key: len(msgspec.json.encode(getattr(role, key))) for key in ("args", "kwargs")}
    if sum(sizes.values()) > LONGEST_TEXT:
        key = max(sizes, key=lambda key: sizes[key])
        report.add(f"{path}.{key}", f"over {LONGEST_TEXT:,} bytes; put it in a file, and give its name")
    if any(not name.isidentifier() for name in role.kwargs):
        wrong = next(name for name in role.kwargs if not name.isidentifier())
        report.add(f"{path}.kwargs.{wrong}", f"{short(wrong)} is no name of an argument in Python")


def _command(command: str | list[str], role: Role, path: str, report: Report) -> None:
    here = f"{path}.command"
    words = [command] if isinstance(command, str) else command
    for key in ("args", "kwargs", "pickle"):
        if getattr(role, key):
            report.add(f"{path}.{key}", f"{key} is for roles with an engine; this one has a command")
    if not report.sound(here):
        return
    if not words or not words[0].strip():
        report.add(here, "empty; give a program to run")
    if any(len(word.encode()) > LONGEST_TEXT for word in words):
        report.add(here, f"over {LONGEST_TEXT:,} bytes in one argument, which Linux passes to no process")
    found = next((match for word in words if (match := _PORT.search(word))), None)
    if found and not role.ports and report.sound(f"{path}.ports"):
        report.add(here, f"{{{found[1]}}} is used, but no ports are reserved; add `ports: 1` to the role")


def _ready(role: Role, path: str, report: Report) -> None:
    here, ready = f"{path}.ready", role.ready
    if ready is None:
        return
    if ready.http is not None and not re.fullmatch(r"/[!-~]*", ready.http):
        report.add(f"{here}.http", f"{short(ready.http)} is not a path; it begins with / and has no blanks")
    kinds = ("notify", "http", "tcp")
    if not report.sound(*(f"{here}.{kind}" for kind in kinds)):
        return
    given = [kind for kind in kinds if getattr(ready, kind)]
    if role.engine is not None:
        if given not in ([], ["notify"]):
            report.add(f"{here}.{given[-1]}", "an engine is ready when it is made; only the timeout can be given")
    elif len(given) != 1:
        many = f"it has {' and '.join(given)}" if given else "it has none of them"
        report.add(here, f"needs exactly one of notify, http and tcp; {many}")
    elif given != ["notify"] and not role.ports and report.sound(f"{path}.ports"):
        report.add(f"{here}.{given[0]}", "asks a port, but none is reserved; add `ports: 1` to the role")


def _signal(given: str, here: str, report: Report) -> None:
    name = given.removeprefix("SIG")
    if name in _UNSTOPPABLE:
        report.add(here, f"{name} cannot be handled by a worker; a stop with TERM is followed by KILL after the grace")
    elif name not in _SIGNALS:
        by_number = {str(int(number)): known for known, number in _SIGNALS.items()}
        hint = f"; write {by_number[given]}" if given in by_number else report.suggestion(name, _SIGNALS)
        report.add(here, f"{short(given)} is not the name of a signal{hint or '; TERM, INT and USR1 are some'}")


def _strategy(name: str, role: Role, spec: Spec, report: Report) -> None:
    path = f"roles.{name}"
    if not report.sound(f"{path}.strategy"):
        return
    if not role.strategy.fork:
        _shared(name, role, spec, report)
    if role.colocated:
        _colocated(name, role, spec, report)
        return
    if role.strategy.target is not None:
        report.add(f"{path}.strategy.target", "only with `type: colocation`; add that, or leave the target out")


def _shared(name: str, role: Role, spec: Spec, report: Report) -> None:
    """The rules of a role without processes of its own."""
    path = f"roles.{name}"
    here = f"{path}.strategy.fork"
    target = spec.roles.get(role.strategy.target or "")
    if not role.colocated:
        report.add(here, "false is for `type: colocation`, to live in the target's processes")
    elif role.engine is None:
        report.add(here, "false needs an `engine`: a command is always a process of its own")
    elif target is not None and target.engine is None and report.sound(f"roles.{role.strategy.target}.engine"):
        report.add(here, f"false needs a target that hosts an engine, and {role.strategy.target} has a command")
    elif target is not None and target.shared and role.strategy.target != name:
        other = target.strategy.target
        report.add(here, f"{role.strategy.target} lives in the processes of {other} itself; make {other} the target")
    for key in _PROCESS:
        if getattr(role, key) != getattr(_BARE, key):
            report.add(f"{path}.{key}", "not with `fork: false`: it is the target's process, which has its own")


def _colocated(name: str, role: Role, spec: Spec, report: Report) -> None:
    path, target = f"roles.{name}", role.strategy.target
    here = f"{path}.strategy.target"
    if role.per_node is not None:
        report.add(f"{path}.per_node", "not with colocation, where the targets say which nodes; use replicas")
    if target is None:
        report.add(here, "missing; colocation needs the role to go beside", at=report.where(f"{path}.strategy"))
    elif target == name:
        report.add(here, "a role cannot go beside itself")
    elif target not in spec.roles and report.sound(f"roles.{target}"):
        others = [other for other in spec.roles if other != name]
        hint = report.suggestion(target, others) or f"; the others are {', '.join(others[:10]) or 'none'}"
        report.add(here, f"there is no role {short(target)}{hint}")
    elif target not in spec.roles:
        return  # it is there, but could not be read
    elif role.autostart and not spec.roles[target].autostart and report.sound(f"roles.{target}.autostart"):
        report.add(here, f"{target} is not started by itself (autostart: false); add `autostart: false` here too")


def _mains(spec: Spec, report: Report) -> None:
    mains = [name for name, role in spec.roles.items() if role.main]
    for name in mains[1:]:
        report.add(f"roles.{name}.main", f"there can be one main role, and {mains[0]} is one")
    for name in mains:
        if not spec.roles[name].autostart:
            report.add(f"roles.{name}.main", "a main role has to start by itself; leave `autostart: false` out")


def _cycles(spec: Spec, report: Report) -> None:
    """Report each ring of targets once, at its first role in the file."""
    seen: set[str] = set()
    for start in spec.roles:
        chain: list[str] = []
        name: str | None = start
        while name in spec.roles and name not in seen:
            seen.add(name)
            chain.append(name)
            role = spec.roles[name]
            name = role.strategy.target if role.colocated else None
        if name in chain and name != chain[-1]:
            ring = chain[chain.index(name) :]
            shown = " -> ".join([*ring, ring[0]])
            report.add(f"roles.{ring[0]}.strategy.target", f"the targets go round in a circle: {shown}")
