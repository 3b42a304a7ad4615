"""Wheels for another machine: this slurmfork as a wheel, and what it depends on, fetched here for a Python there.

What was fetched is kept in the cache directory, so that the same is not asked for twice, nor needs a network then.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from slurmfork.errors import SlurmforkError, one_line
from slurmfork.rundir import replace_file

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PIP_S = 600.0
ROUNDS = 5
OLDEST_GLIBC = 5  # of 2.x, in tags of wheels
LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}


class NoWheels(SlurmforkError):
    """What is needed could not be fetched; the message says why, in one line."""


class Target(Struct, kw_only=True):
    """A Python over there, as the survey tells of it."""

    version: tuple[int, int, int]
    machine: str
    libc: tuple[str, str]
    abiflags: str
    base: str
    markers: dict[str, str]

    def __str__(self) -> str:
        libc = " ".join(self.libc).strip() or "an unknown C library"
        return f"Python {'.'.join(map(str, self.version))} on {self.machine} with {libc}"

    def platforms(self) -> list[str]:
        """Tags of platforms whose wheels run there, the best first."""
        name, version = self.libc
        if name == "musl":
            return [f"musllinux_1_{minor}_{self.machine}" for minor in (2, 1)]
        minor = int(version.split(".")[1]) if name == "glibc" and version.startswith("2.") else 17
        found = []
        for number in range(minor, OLDEST_GLIBC - 1, -1):
            found.append(f"manylinux_2_{number}_{self.machine}")
            if number in LEGACY:
                found.append(f"{LEGACY[number]}_{self.machine}")
        return [*found, f"linux_{self.machine}"]

    @property
    def abi(self) -> str:
        return f"cp{self.version[0]}{self.version[1]}{'t' if 't' in self.abiflags else ''}"


def dependencies(requires: Sequence[str], target: Target, *, fresh: bool = False) -> list[Path]:
    """The wheels that ``requires`` and pip itself need there. ``fresh``: ask anew. Raises NoWheels."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in (*requires, "pip")]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({**target.markers, "extra": ""})]
    key = json.dumps([sorted(map(str, wanted)), target.abi, target.platforms(), target.markers["python_version"]])
    place = cache() / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not fresh and (kept := _kept(place)):
        return kept
    with tempfile.TemporaryDirectory(dir=cache(), prefix=".fetch-") as fetching:
        found = _fetched(wanted, target, Path(fetching))
        place.mkdir(exist_ok=True)
        for wheel in found:
            os.replace(wheel, place / wheel.name)  # noqa: PTH105
    sums = {wheel.name: digest_of(place / wheel.name) for wheel in found}
    replace_file(place / "wheels.json", json.dumps(sums).encode())
    return [place / name for name in sorted(sums)]


def _kept(place: Path) -> list[Path]:
    """What was fetched before; empty unless all of it is there, as it was."""
    try:
        sums = json.loads((place / "wheels.json").read_text())
        whole = all(digest_of(place / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return []
    return [place / name for name in sorted(sums)] if whole else []


def _fetched(wanted: list[Requirement], target: Target, into: Path) -> list[Path]:
    """pip reads markers as if for this Python; what they ask for over there beyond that is asked for by name."""
    more: list[str] = []
    for _ in range(ROUNDS):
        _download([*(f"{one.name}{_extras(one)}{one.specifier}" for one in wanted), *more], target, into)
        needed, missing = _closure(wanted, into, target.markers)
        if not missing:
            return needed
        more += missing
        for wheel in into.iterdir():
            wheel.unlink()
    raise NoWheels(f"what {', '.join(more)} need for {target} does not come to an end")


def _extras(one: Requirement) -> str:
    return f"[{','.join(sorted(one.extras))}]" if one.extras else ""


def _closure(wanted: list[Requirement], directory: Path, markers: dict[str, str]) -> tuple[list[Path], list[str]]:
    """The wheels that are needed, directly or not, and the requirements for which there is none."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename

    there = {parse_wheel_filename(wheel.name)[0]: wheel for wheel in directory.glob("*.whl")}
    needed, missing, seen = set(), [], set()
    todo = list(wanted)
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        if name not in there:
            missing.append(f"{one.name}{_extras(one)}{one.specifier}")
            continue
        if (name, frozenset(one.extras)) in seen:
            continue
        seen.add((name, frozenset(one.extras)))
        needed.add(there[name])
        for text in metadata_of(there[name]).get_all("Requires-Dist") or []:
            inner = Requirement(text)
            contexts = [{**markers, "extra": extra} for extra in (one.extras or {""})]
            if inner.marker is None or any(inner.marker.evaluate(context) for context in contexts):
                todo.append(inner)
    return sorted(needed), missing


def _download(requirements: list[str], target: Target, into: Path) -> None:
    version = ".".join(map(str, target.version))
    options = ["--only-binary", ":all:", "--python-version", version, "--implementation", "cp", "--abi", target.abi]
    for platform in target.platforms():
        options += ["--platform", platform]
    quiet = ["--disable-pip-version-check", "--no-input", "-q", "--retries", "2"]
    command = [*_pip(), "download", *quiet, *options, "--dest", str(into), *requirements]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PIP_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoWheels(f"cannot fetch the wheels for {target}: {one_line(str(error))[:300]}") from None
    if done.returncode:
        raise NoWheels(_why(done.stderr, target))


def _why(said: str, target: Target) -> str:
    low = said.lower()
    if "connection" in low or "name resolution" in low or "timed out" in low or "proxy" in low:
        return (
            f"cannot fetch the wheels for {target}: pip reaches no package index from here; "
            "bootstrap once where there is a network, or give pip an index that it can reach"
        )
    errors = [line.removeprefix("ERROR:").strip() for line in said.splitlines() if line.startswith("ERROR:")]
    return f"cannot fetch the wheels for {target}: {one_line((errors or [said])[-1])[:300]}"


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found]
    raise NoWheels(f"there is no pip here to fetch wheels with; `{sys.executable} -m ensurepip` puts it there")


def metadata_of(wheel: Path) -> Message:
    """A wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cache() -> Path:
    """Where wheels are kept: below the platform's directory for caches."""
    if sys.platform == "darwin":
        base = Path("~/Library/Caches").expanduser()
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    place = base / "slurmfork" / "wheels"
    place.mkdir(parents=True, exist_ok=True)
    return place
