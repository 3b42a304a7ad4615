"""Installs what a bootstrap has sent: run over there, by a Python of there, on standard input. Standard library alone.

The header is a line of JSON, the wheels follow as a tar. A virtual environment is made in a place of its own and
tried; only then the link is switched to it. What fails before leaves the one that was in use as it was.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEPT_S = 86_400.0  # a process that began before a switch, and still looks, may need the one before
PIP_S = 540.0


class Failed(Exception):
    """In one line."""


def main() -> None:
    """Do what the header says, and say what came of it."""
    try:
        answer = _serve(json.loads(sys.stdin.buffer.readline()))
    except Failed as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"error": f"{error.strerror}: {error.filename}" if error.filename else str(error)}
    sys.stdout.write("\0slurmfork\0" + json.dumps(answer) + "\0")


def _serve(header: dict[str, Any]) -> dict[str, Any]:
    top = Path("~/.slurmfork").expanduser()
    top.mkdir(mode=0o700, exist_ok=True)
    facts = top.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise Failed(f"{top} is not a directory that only you can write to; `chmod go-w` makes it so")
    venvs = top / "venvs"
    venvs.mkdir(mode=0o700, exist_ok=True)
    with _alone(venvs):
        place = venvs / header["name"]
        if header["wheels"]:
            _install(place, header)
        else:
            try:
                _try(place, header)
            except Failed as error:
                return {"broken": str(error)}
        _switch(top, place)
        return {"removed": _prune(venvs, place) if header["prune"] else []}


@contextlib.contextmanager
def _alone(venvs: Path) -> Iterator[None]:
    """No two at once, as far as the file system can do that."""
    with (venvs / ".lock").open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _install(place: Path, header: dict[str, Any]) -> None:
    shutil.rmtree(place, ignore_errors=True)  # of an attempt that was cut off, or what has been damaged since
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=place.parent) as incoming:
        try:
            with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
                for member in tar:
                    source = tar.extractfile(member)
                    if source is not None:
                        with Path(incoming, os.path.basename(member.name)).open("xb") as file:  # noqa: PTH119
                            shutil.copyfileobj(source, file)
        except (tarfile.TarError, EOFError) as error:
            raise Failed(f"the wheels did not come whole: {error}") from None
        try:
            _make(place, Path(incoming), header)
            _try(place, header)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    (place / ".complete").write_text(json.dumps(header))


def _make(place: Path, incoming: Path, header: dict[str, Any]) -> None:
    try:
        import venv
    except ImportError:
        raise Failed(f"{sys.executable} has no module venv; have it installed, or name another with --python") from None
    venv.EnvBuilder(with_pip=False, symlinks=True).create(place)
    place.chmod(0o700)
    pip = next(incoming.glob("pip-*.whl"), None)
    if pip is None:
        raise Failed("pip is not among what was sent")
    options = ["--no-index", "--find-links", str(incoming), "--only-binary", ":all:", "--no-cache-dir"]
    quiet = ["--isolated", "--disable-pip-version-check", "--no-warn-script-location", "-q"]
    wanted = f"slurmfork=={header['version']}"
    _run([_python(place), "-I", str(pip / "pip"), "install", *quiet, *options, wanted], "pip")


def _try(place: Path, header: dict[str, Any]) -> None:
    names = ", ".join(header["modules"])
    said = _run([_python(place), "-I", "-c", f"import {names}; print(slurmfork.__version__)"], "the new installation")
    if said.split() != [header["version"]]:
        raise Failed(f"the new installation says that it is {said.strip()[:100]!r}, not {header['version']}")


def _python(place: Path) -> str:
    return str(place / "bin" / "python")


def _run(command: list[str], what: str) -> str:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    try:
        done = subprocess.run(
            command,
            env={**outside, "PIP_CONFIG_FILE": os.devnull},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PIP_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{what} did not end within {PIP_S:.0f} s") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise Failed(f"{what} failed: {(lines or ['it said nothing'])[-1][:300]}")
    return done.stdout


def _switch(top: Path, place: Path) -> None:
    link, target = top / "venv", f"venvs/{place.name}"
    if link.is_symlink():
        before = os.readlink(link)  # noqa: PTH115
        if before == target:
            return
        with contextlib.suppress(OSError):
            os.utime(top / before / ".complete")  # it was in use until now
    elif link.exists():
        raise Failed(f"{link} is there and no link of ours; move it away")
    temporary = top / f".venv-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.rename(link)


# --- what is not needed any more


def _prune(venvs: Path, current: Path) -> list[str]:
    removed = []
    for place in sorted(venvs.iterdir()):
        if place == current or place.name.startswith(".") or not place.is_dir() or place.is_symlink():
            continue
        stamp = place / ".complete"
        used = (stamp if stamp.exists() else place).stat().st_mtime
        if time.time() - used > KEPT_S and not any(_lives(run) for run in place.glob("runs/*")):
            shutil.rmtree(place)
            removed.append(place.name)
    return removed


def _lives(link: Path) -> bool:
    """Whether a run that was submitted from there may still need it: all but those that are surely over."""
    if not (link / "run.json").exists():
        return False
    over = (link / "end.json").exists() or (link / "batch.status").exists()
    return not over or (link / "requeued").exists()


if __name__ == "__main__":
    main()
