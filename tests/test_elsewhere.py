"""Verbs with --cluster, as they are typed: of a profile that is this machine itself, so that no SSH is between."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from processes import PATIENCE, wait_until
from running import Shell

from slurmfork.backends.slurm_environment import environment_of_job
from slurmfork.cli import elsewhere
from slurmfork.cli.group import cli
from slurmfork.clusters import Cluster
from slurmfork.remote.frames import Request

SPEC = """
name: there
backend: local
roles:
  a: {command: [sh, -c, "echo one; sleep 1000"]}
"""


class Here(Shell):
    """A shell with the cluster `here`."""

    def __init__(self, local: Shell) -> None:
        super().__init__(local.directory, local.env)
        self.home = local.directory / "home"
        self.home.mkdir()
        config = self.directory / "config.toml"
        config.write_text(f'[clusters.here]\nhost = "localhost"\npython = {json.dumps(sys.executable)}\n')
        self.env |= {"SLURMFORK_CONFIG": str(config), "HOME": str(self.home)}

    def doors(self) -> list[int]:
        """PIDs of the doors, and of their errands."""
        found = []
        for place in Path("/proc").iterdir():
            try:
                ours = place.name.isdigit() and f"HOME={self.home}\0".encode() in (place / "environ").read_bytes()
                if ours and b"slurmfork.remote.door" in (place / "cmdline").read_bytes():
                    found.append(int(place.name))
            except OSError:
                continue
        return sorted(found)


@pytest.fixture
def here(local: Shell) -> Iterator[Here]:
    made = Here(local)
    yield made
    made.runs = [run["run_id"] for run in made.json("status")["runs"]]
    made.end()


def request(*words: str, profile: Cluster | None = None) -> Request:
    """What is asked of the far side."""
    with cli.make_context("slurmfork", list(words)) as outer:
        command = cli.get_command(outer, words[0])
        assert command is not None
        with command.make_context(words[0], list(words[1:]), parent=outer) as context:
            return elsewhere._request(context, "big", profile or Cluster(host="x"))[0]


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ("fork r x -T a -c 3 -e A=-b=c -e B= -- cmd --flag -- '", "--target a --count 3 --env A=-b=c --env B= -- r x"),
        ("wait r -t 1.5h", "--timeout 5400.000000000s -- r"),
        ("wait r -t 0.00001", "--timeout 0.000010000s -- r"),
        ("prune --older-than 999999999w", "--older-than 604799999395200.000000000s --"),
        ("epilog --root /x --debug", "--debug --"),
        ("logs r a/0 -f", "--follow -- r a/0"),
    ],
)
def test_what_was_typed_is_what_is_asked(typed: str, asked: str) -> None:
    words = typed.split()
    args = request(*words).args
    tail = words[words.index("--") + 1 :] if "--" in words else []
    assert args == [words[0], *asked.split(), *tail]
    assert request(*args).args == args, "what is asked means over there what it means here"


@pytest.mark.parametrize("name", ["+a.yaml", "-b.yaml", "--", "sp ace'\n.yaml", "ä" * 100, "a" * 240 + ".yaml"])
def test_a_spec_may_be_called_anything(here: Here, name: str) -> None:
    here.spec(SPEC, name)
    done = here.call("render", "--cluster", "here", "--", name)
    assert done.returncode == 0, done.stderr


def test_a_spec_may_be_a_pipe(here: Here) -> None:
    pipe = here.directory / "pipe"
    os.mkfifo(pipe)
    writing = threading.Thread(target=pipe.write_text, args=(SPEC,))
    writing.start()
    done = here.call("submit", str(pipe), "--cluster", "here", "--json")
    writing.join(PATIENCE)
    assert json.loads(done.stdout)["name"] == "there", done.stderr


def test_values_of_a_profile_are_what_they_are(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: a\nroles:\n  a: {command: [x]}\n")
    slurm: dict[str, str | int | float | bool] = {"comment": '"a', "mail-user": " [b", "exclusive": True, "nice": 3}
    args = request("render", str(spec), profile=Cluster(host="x", slurm=slurm)).args
    given = [args[place + 1] for place, word in enumerate(args) if word == "--set"]
    assert given == ['slurm.comment="\\"a"', 'slurm.mail-user=" [b"', "slurm.exclusive=True", "slurm.nice=3"]


def test_a_cluster_without_a_name_is_not_here(here: Here) -> None:
    done = here.call("status", "--cluster", "")
    assert done.returncode == 2
    assert "the name of the cluster is empty" in done.stderr


def test_a_root_of_nobody_is_told(here: Here) -> None:
    done = here.call("status", "--root", "~nobody-of-this-name/runs", "--cluster", "here")
    assert (done.returncode, done.stderr) == (1, "slurmfork: ~nobody-of-this-name/runs: there is no such user\n")


@pytest.mark.parametrize("verb", [["submit", "spec.yaml"], ["status"], ["wait", "nobody"]])
def test_what_failed_before_it_was_a_verb_is_a_document(here: Here, verb: Sequence[str]) -> None:
    here.spec(SPEC)
    (here.home / ".slurmfork").write_text("")
    done = here.call(*verb, "--cluster", "here", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0 or document["error"] in done.stderr
    (here.home / ".slurmfork").unlink()


def test_a_verb_that_is_killed_over_there_is_a_document(here: Here) -> None:
    here.submit(here.spec(SPEC))
    waiting = here.start("wait", "last", "--cluster", "here", "--json")
    wait_until(lambda: len(here.doors()) == 2, "the errand")
    os.kill(here.doors()[-1], signal.SIGKILL)
    out, err = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == 137
    assert json.loads(out) == {"error": "`wait` was ended over there by signal 9", "kind": "failed"}
    assert "by signal 9" in err


def test_a_run_that_nobody_reads_any_more_is_cancelled(here: Here) -> None:
    running = here.start("run", str(here.spec(SPEC)), "--cluster", "here")
    assert running.stdout is not None
    assert running.stdout.readline() == "a/0 | one\n"
    running.stdout.close()  # and nothing more is written
    assert running.wait(PATIENCE) == 129
    assert [run["state"] for run in here.json("status")["runs"]] == ["cancelled"]


def test_the_size_of_a_terminal_is_no_variable_of_the_job() -> None:
    given = {"COLUMNS": "60", "LINES": "24", "SLURMFORK_DRESSED": "COLUMNS LINES", "A": "b"}
    assert environment_of_job([], given) == {"A": "b"}
    assert environment_of_job([], {"COLUMNS": "60"}) == {"COLUMNS": "60"}
