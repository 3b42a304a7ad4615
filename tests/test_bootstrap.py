"""Bootstrap: a home with nothing in it gets a slurmfork that works, once, and never half of one.

The other machine is this one, with a home of its own and the system's Python; the wheels come from the package index.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from processes import PATIENCE
from running import Shell
from test_door import Visitor

from slurmfork.errors import SlurmforkError
from slurmfork.remote import bootstrap as doing
from slurmfork.remote import ownwheel, wheels
from slurmfork.remote.bootstrap import BootstrapFailed, Bootstrapped, bootstrap
from slurmfork.remote.local import LocalTransport, ProcessChannel
from slurmfork.version import __version__

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600
pytestmark = pytest.mark.timeout(LIMIT)


class There(LocalTransport):
    """Another machine: a home, a PATH, and a shell that talks before anything else."""

    def __init__(self, home: Path, env: Mapping[str, str] | None = None, path: str = "/usr/bin:/bin") -> None:
        super().__init__("there")
        self.home, self.env, self.path = home, dict(env or {}), path
        home.mkdir(exist_ok=True)

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> ProcessChannel:
        talk = 'echo "Welcome, $1"; cd "$1" && shift && PATH=$1 && shift && exec "$@"'
        around = ["/bin/sh", "-c", talk, "sh", str(self.home), self.path]
        return super().start([*around, *argv], env={**self.env, **(env or {}), "HOME": str(self.home)})


def link_of(there: There) -> str:
    return os.readlink(there.home / ".slurmfork" / "venv")


def installed(there: There) -> list[str]:
    return sorted(path.name for path in (there.home / ".slurmfork" / "venvs").iterdir() if path.name[0] != ".")


def from_a_copy(copy: Path, there: There, *, prune: bool = False) -> Bootstrapped | str:
    """Bootstrap by another copy of the package; what came of it, or the error's line."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[3]); from test_bootstrap import There\n"
        "from pathlib import Path; from slurmfork.errors import SlurmforkError\n"
        "from slurmfork.remote.bootstrap import bootstrap\n"
        "try: print(json.dumps(bootstrap(There(Path(sys.argv[1])), prune=sys.argv[2] == 'True')))\n"
        "except SlurmforkError as error: print(json.dumps(str(error)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(there.home), str(prune), str(ROOT / "tests")],
        env={**os.environ, "PYTHONPATH": str(copy)},
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    answer = json.loads(done.stdout)
    return answer if isinstance(answer, str) else Bootstrapped(*answer)


def copy_of_the_package(directory: Path) -> Path:
    shutil.copytree(ROOT / "slurmfork", directory / "slurmfork", ignore=shutil.ignore_patterns("__pycache__"))
    return directory


@pytest.fixture(scope="module")
def done_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[There, Bootstrapped]:
    """A machine that was bootstrapped; for tests that leave it as it is."""
    there = There(tmp_path_factory.mktemp("there") / "a home")
    return there, bootstrap(there)


def test_the_verbs_work_where_nothing_was(done_once: tuple[There, Bootstrapped], local: Shell, tmp_path: Path) -> None:
    there, done = done_once
    assert (done.version, done.switched, done.removed) == (__version__, True, [])
    assert done.sent > 1_000_000
    assert done.python == f"{there.home}/.slurmfork/venvs/{done.name}/bin/python"
    visitor = Visitor(There(there.home, {"SLURMFORK_ROOT": str(local.root)}), python=doing.PYTHON)  # type: ignore[arg-type]
    spec = local.spec("name: boot\nbackend: local\nroles: {a: {command: [sleep, '1000']}}\n")
    run_id = visitor.submit(local, spec)
    assert visitor("wait", run_id, "--for", "ready") == 0, visitor.err
    script = (local.root / run_id / "batch.sh").read_text()
    assert f"slurmfork_python='{done.python}'" in script
    assert ".slurmfork/venv/" not in script
    assert visitor("cancel", run_id, once=True) == 0


def test_the_second_time_nothing_is_sent(done_once: tuple[There, Bootstrapped]) -> None:
    there, first = done_once
    assert bootstrap(there) == first._replace(sent=0, switched=False)
    assert installed(there) == [first.name]


def test_an_installed_slurmfork_makes_the_wheel_that_it_came_from(
    done_once: tuple[There, Bootstrapped], tmp_path: Path
) -> None:
    _, done = done_once
    mine = ownwheel.build(tmp_path)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    code = (
        "import sys; from pathlib import Path; from slurmfork.remote import ownwheel; ownwheel.build(Path(sys.argv[1]))"
    )
    subprocess.run([done.python, "-I", "-c", code, str(theirs)], check=True, timeout=PATIENCE)
    assert (theirs / mine.name).read_bytes() == mine.read_bytes()


def test_what_was_damaged_is_sent_again(local: Shell, tmp_path: Path) -> None:
    there = There(tmp_path / "home")
    first = bootstrap(there)
    shutil.rmtree(next(Path(first.python).parent.parent.glob("lib/*/site-packages/msgspec")))
    again = bootstrap(there)
    assert (again.name, again.sent) == (first.name, first.sent)
    assert bootstrap(there).sent == 0


def test_another_version_is_switched_to_and_runs_keep_theirs(local: Shell, tmp_path: Path) -> None:
    there = There(tmp_path / "home", {"SLURMFORK_ROOT": str(local.root)})
    old = bootstrap(there)
    visitor = Visitor(there, python=doing.PYTHON)  # type: ignore[arg-type]
    spec = local.spec(
        """
        name: boot
        backend: local
        roles:
          a: {command: [sleep, "1000"]}
          b: {command: [sleep, "1000"], autostart: false, strategy: {type: colocation, target: a}}
        """
    )
    run_id = visitor.submit(local, spec)
    assert visitor("wait", run_id, "--for", "ready") == 0, visitor.err

    copy = copy_of_the_package(tmp_path / "copy")
    with (copy / "slurmfork" / "head" / "main.py").open("a") as file:
        file.write("this is no Python\n")
    said = from_a_copy(copy, there)
    assert isinstance(said, str)
    assert said.startswith("there: ")
    assert said.endswith("; what was there before is as it was")
    assert "SyntaxError" in said
    assert (link_of(there), installed(there)) == (f"venvs/{old.name}", [old.name])

    shutil.copy(ROOT / "slurmfork" / "head" / "main.py", copy / "slurmfork" / "head" / "main.py")
    (copy / "slurmfork" / "news.py").write_text('"""New."""\n')
    new = from_a_copy(copy, there)
    assert isinstance(new, Bootstrapped)
    assert (new.switched, link_of(there)) == (True, f"venvs/{new.name}")
    assert new.name != old.name
    assert visitor("fork", run_id, "b", "--json", once=True) == 0, visitor.err
    assert json.loads(visitor.out)["workers"][0]["state"] == "running"
    workers = [command(pid) for pid in local.pids(run_id)]
    assert any(old.python in words for words in workers)
    assert not any(".slurmfork/venv/" in word for words in workers for word in words)

    stamp = there.home / ".slurmfork" / "venvs" / old.name / ".complete"
    assert from_a_copy(copy, there, prune=True) == new._replace(sent=0, switched=False), "it was in use just now"
    os.utime(stamp, (time.time() - 2 * 86_400,) * 2)
    assert from_a_copy(copy, there, prune=True) == new._replace(sent=0, switched=False), "a run needs it"
    assert visitor("cancel", run_id, once=True) == 0
    removed = from_a_copy(copy, there, prune=True)
    assert isinstance(removed, Bootstrapped)
    assert removed.removed == [old.name]
    back = bootstrap(there)
    assert (back.name, back.switched) == (old.name, True)


def command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def test_what_is_cut_off_leaves_nothing(tmp_path: Path) -> None:
    there = There(tmp_path / "home")
    found = doing.survey(there)
    data = doing._tar([ownwheel.build(tmp_path)])
    with pytest.raises(BootstrapFailed, match="did not come whole"):
        doing._install(there, found, "0-cut", data[: len(data) // 2], False)
    with pytest.raises(BootstrapFailed, match="; what was there before is as it was"):
        doing._install(there, found, "0-whole", data, False)  # without pip and all the others
    assert installed(there) == []
    assert [path.name for path in (there.home / ".slurmfork" / "venvs").iterdir()] == [".lock"]


def test_a_place_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    there = There(tmp_path / "home")
    (there.home / ".slurmfork").mkdir()
    (there.home / ".slurmfork").chmod(0o777)
    with pytest.raises(BootstrapFailed, match="only you can write to"):
        doing._install(there, doing.survey(there), "0-x", b"x", False)


# --- which Python


def program(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


def test_the_first_that_is_new_enough_is_taken(tmp_path: Path) -> None:
    bin_ = tmp_path / "bin"
    facts = doing.survey(There(tmp_path / "home"))
    old = json.dumps({name: getattr(facts, name) for name in facts.__struct_fields__} | {"version": [3, 6, 8]})
    program(bin_, "python3", f"cat >/dev/null; printf '\\0slurmfork\\0'; printf '%s' '{old}'; printf '\\0'")
    program(bin_, "python3.13", "exit 3")
    program(bin_, "python3.11", f'exec {sys.executable} "$@"')
    there = There(tmp_path / "home", path=f"{bin_}:/nonexistent")
    assert doing.survey(there).version == sys.version_info[:3]
    (bin_ / "python3.11").unlink()
    there.path = f"{bin_}:/nonexistent"
    program(bin_, "cat", 'exec /bin/cat "$@"')
    with pytest.raises(BootstrapFailed, match=r"no CPython 3\.10 or later on its PATH: python3 is CPython .*--python"):
        doing.survey(there)


@pytest.mark.parametrize("name", ["/nonexistent/python3", "/bin/true", "/bin/sh"])
def test_what_is_no_python_is_said_in_a_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(BootstrapFailed, match=f"^there: {name} is no Python: ") as caught:
        bootstrap(There(tmp_path / "home"), name)
    assert "\n" not in str(caught.value)


# --- wheels


def test_without_a_network_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = There(tmp_path / "home")
    with pytest.raises(SlurmforkError, match="pip reaches no package index from here") as caught:
        bootstrap(there)
    assert "\n" not in str(caught.value)
    assert list(there.home.iterdir()) == []


def test_what_another_python_needs_beyond_this_one_is_fetched_too() -> None:
    """aiohttp needs async-timeout before 3.11, which pip here would not fetch for there."""
    here = doing.survey(There(Path.home()))
    markers = {**here.markers, "python_version": "3.10", "python_full_version": "3.10.4"}
    target = wheels.Target(
        version=(3, 10, 4), machine="x86_64", libc=("glibc", "2.28"), abiflags="", base="", markers=markers
    )
    found = [path.name for path in wheels.dependencies(["aiohttp>=3.9"], target)]
    assert [name for name in found if name.startswith("async_timeout-")]
    assert all("-cp310-" in name or "-abi3-" in name or name.endswith("-any.whl") for name in found)


def test_tags_of_platforms_are_those_that_run_there() -> None:
    def tags(libc: tuple[str, str]) -> list[str]:
        made = wheels.Target(version=(3, 12, 1), machine="aarch64", libc=libc, abiflags="", base="", markers={})
        return made.platforms()

    assert tags(("glibc", "2.17"))[:2] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    assert "manylinux_2_28_aarch64" not in tags(("glibc", "2.17"))
    assert "manylinux_2_28_aarch64" in tags(("glibc", "2.36"))
    assert tags(("musl", ""))[0] == "musllinux_1_2_aarch64"


def test_the_wheel_is_the_same_each_time_and_whole(tmp_path: Path) -> None:
    sums = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        wheel = ownwheel.build(tmp_path / name)
        sums.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert len(sums) == 1
    place = tmp_path / "place"
    install = ["-m", "pip", "-q", "install", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, timeout=PATIENCE)
    assert (place / "slurmfork" / "templates" / "sbatch.sh.j2").is_file()
    assert (place / "bin" / "slurmfork").is_file()
    assert wheels.metadata_of(wheel)["Version"] == __version__
    assert any(text.startswith("msgspec") for text in ownwheel.requires())
    assert not any("pytest" in text for text in ownwheel.requires())
