"""Bootstrap: puts this slurmfork, with all that it needs, into a virtual environment on another machine.

Nothing has to be there but a Python, and no network: the wheels are chosen and fetched here, and go through the
transport's own stream. The same content is sent once.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from slurmfork.errors import TransportError, one_line
from slurmfork.remote import ownwheel, wheels
from slurmfork.remote.transport import Done, Transport, run
from slurmfork.remote.wheels import Target
from slurmfork.spec.sizes import in_words
from slurmfork.version import __version__

PYTHON = ".slurmfork/venv/bin/python"  # what it puts there, relative to the home directory
OLDEST = (3, 10)
CANDIDATES = ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python3.10")
MODULES = ("slurmfork", "slurmfork.remote.door", "slurmfork.cli.submit", "slurmfork.head.main", "slurmfork.agent.main")
SURVEY_S = 60.0
INSTALL_S = 900.0
_MARK = b"\0slurmfork\0"


class BootstrapFailed(TransportError):
    """It could not be put there; what was there before is as it was. The message says why, in one line."""


class Bootstrapped(NamedTuple):
    """``sent`` counts bytes: 0 where all of it was there. ``removed`` names what was not needed any more."""

    version: str
    name: str
    python: str
    sent: int
    switched: bool
    removed: list[str]


class Survey(Target, kw_only=True):
    """A Python over there, and what was put there before."""

    executable: str
    home: str
    complete: list[str]
    current: str


def bootstrap(
    transport: Transport,
    python: str | None = None,
    *,
    fresh: bool = False,
    prune: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Bootstrapped:
    """Put this version there, and switch to it. ``python`` (default: the first that is new enough) will run it.

    ``fresh``: look for newer releases of what it depends on, in place of what was fetched before. ``prune``: remove
    what no run needs, and nobody has used for a day. Raises BootstrapFailed, NoWheels, TransportError.
    """
    there = survey(transport, python)
    say(f"{transport.name}: {there}, {there.executable}")
    with tempfile.TemporaryDirectory(prefix="slurmfork-") as directory:
        own = ownwheel.build(Path(directory))
        content = [own, *wheels.dependencies(ownwheel.requires(), there, fresh=fresh)]
        name = _name(content, there)
        answer, sent = {}, 0
        if name in there.complete:
            answer = _install(transport, there, name, b"", prune)
        if not answer or "broken" in answer:
            data = _tar(content)
            say(f"sending {len(content)} wheels, {in_words(len(data))}")
            answer, sent = _install(transport, there, name, data, prune), len(data)
    python_there = f"{there.home}/.slurmfork/venvs/{name}/bin/python"
    return Bootstrapped(__version__, name, python_there, sent, there.current != name, answer["removed"])


def _install(transport: Transport, there: Survey, name: str, data: bytes, prune: bool) -> dict[str, Any]:
    """Have it installed from ``data``, or, where that is empty, tried and switched to."""
    header = {"name": name, "version": __version__, "modules": MODULES, "prune": prune, "wheels": bool(data)}
    done = _script(transport, there.executable, "installer.py", json.dumps(header).encode() + b"\n" + data, INSTALL_S)
    answer = _answer(done)
    if answer is None:
        raise BootstrapFailed(f"{transport.name}: the installation ended with {done.status}: {_said(done)}")
    if "error" in answer:
        raise BootstrapFailed(f"{transport.name}: {one_line(answer['error'])}; what was there before is as it was")
    return answer


def survey(transport: Transport, python: str | None = None) -> Survey:
    """The Python to use over there; raises BootstrapFailed if there is none."""
    tried: list[str] = []
    for candidate in [python] if python else CANDIDATES:
        done = _try(transport, candidate)
        answer = _answer(done) if done else None
        if answer is None:
            if python:
                why = _said(done) if done else "it is not there"
                raise BootstrapFailed(f"{transport.name}: {candidate} is no Python: {why}")
            continue
        found = msgspec.convert(answer, Survey)
        if found.version >= OLDEST and found.markers["implementation_name"] == "cpython":
            return found
        tried.append(
            f"{candidate} is {found.markers['platform_python_implementation']} {found.markers['python_full_version']}"
        )
    words = f": {', '.join(tried)}" if tried else ""
    raise BootstrapFailed(
        f"{transport.name} has no CPython {OLDEST[0]}.{OLDEST[1]} or later on its PATH{words}; --python names one"
    )


def _try(transport: Transport, candidate: str) -> Done | None:
    try:
        return _script(transport, candidate, "survey.py", b"", SURVEY_S)
    except TransportError as error:
        if isinstance(error, BootstrapFailed) or "cannot run" not in str(error):
            raise
        return None


def _script(transport: Transport, python: str, name: str, data: bytes, timeout: float) -> Done:
    """Run a script of ours over there, from its standard input; ``data`` follows it."""
    script = Path(__file__).with_name(name).read_bytes()
    loader = f"import sys;exec(sys.stdin.buffer.read({len(script)}))"  # nothing that any shell would stumble over
    try:
        return run(transport, [python, "-I", "-c", loader], input=script + data, timeout=timeout)
    except TimeoutError:
        raise BootstrapFailed(f"{transport.name}: {python} did not answer within {timeout:.0f} s") from None


def _answer(done: Done) -> dict[str, Any] | None:
    """What the script said, behind what a shell may have said before."""
    _, mark, rest = done.output.partition(_MARK)
    if not mark or b"\0" not in rest:
        return None
    answer: dict[str, Any] = json.loads(rest[: rest.index(b"\0")])
    return answer


def _said(done: Done) -> str:
    return one_line(done.words)[-300:] or "it said nothing"


def _name(content: Sequence[Path], there: Survey) -> str:
    """By what is in it, and for which Python: the same name is the same installation."""
    sums = sorted(wheels.digest_of(wheel) for wheel in content)
    told = json.dumps([sums, there.base, there.version[:2], there.abiflags])
    return f"{__version__}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def _tar(content: Sequence[Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for wheel in content:
            tar.add(wheel, arcname=wheel.name)
    return buffer.getvalue()
