"""One trial: a random run, a fault at a random moment, the run's end, and what was left of it."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos import checks, sight, specs, stage
from chaos.faults import Fault
from chaos.sight import Sight, Watch, Who
from chaos.stage import Broken, Stage, until
from slurmfork.errors import SlurmforkError
from slurmfork.run import Run

END_PATIENCE = 60.0
SETTLE = 20.0
COMMS = {"guardian": b"slurmfork-guard\n", "agent": b"slurmfork-agent\n"}
MARKS = {"head": b"head/__main__.py", "launcher": b"backends/local_nodes.py", "batch": b"/batch.sh\0"}


@dataclass
class Result:
    """How a trial went. ``survivors`` after all that was to end them; ``cleaned``: how many it took `clean` to end."""

    seed: int
    fault: str
    moment: str = ""
    what: str = ""
    seconds: float | None = None
    survivors: list[str] = field(default_factory=list)
    cleaned: list[str] = field(default_factory=list)
    innocents: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.survivors or self.innocents or self.failures)


class Trial:
    """One trial; faults use it to find whom they are for, and to bring runs up where they do so themselves."""

    def __init__(self, on: Stage, directory: Path, seed: int, faults: list[Fault]) -> None:
        self.stage, self.directory, self.faults = on, directory, faults
        self.dice = random.Random(seed)
        self.place = directory / "mark"
        self.place.mkdir(parents=True)
        (self.place / "mark").write_bytes(bytes(4096))
        self.sight = Sight(self.place)
        self.shell = on.shell(directory / "home")
        self.root = self.shell.root
        self.draft = specs.draw(self.dice, self.place)
        self.run_id, self.job_id = "", ""
        self.taken_down: list[str] = []
        self.mounted: list[Path] = []
        self.background: list[subprocess.Popen[str]] = []
        self.turns: list[float] = []
        self.result = Result(seed, " + ".join(one.name for one in faults))
        self.missed = False
        self._struck: float | None = None
        self._cancels: list[subprocess.Popen[str]] = []
        self._adopted: list[int] = []

    @property
    def excuses(self) -> frozenset[str]:
        return frozenset().union(*(one.excuses for one in self.faults))

    @property
    def rundir(self) -> Path:
        return self.root / self.run_id

    def note(self, text: str) -> None:
        self.result.notes.append(text)

    # --- the whole

    def run(self) -> Result:
        moment = self.result.moment = self.dice.choice(self.faults[0].moments)
        watch = Watch(self.sight)
        with watch:
            try:
                for one in self.faults:
                    one.prepare(self)
                if moment == "stopping":  # so that it takes a while
                    self.draft.roles[specs.FIRST]["command"] = specs.command("stubborn", self.place, "{worker}")
                self.result.what = f"{self.draft.nodes} nodes, {self.draft.kinds()}"
                if moment != "own":
                    self.submit()
                    self._await_moment(moment)
                for number, one in enumerate(self.faults):
                    if number:
                        self.wait_a_moment(1.0)
                    one.strike(self)
                self._to_the_end()
                for one in self.faults:
                    one.finish(self)
            except (Broken, SlurmforkError, subprocess.TimeoutExpired) as error:
                self.result.failures.append(f"{type(error).__name__}: {error}")
            self._count(watch)
        self._check()
        self.tidy()
        return self.result

    def _await_moment(self, moment: str) -> None:
        if moment == "starting":
            self.wait_a_moment(0.5)
            return
        self.await_ready()
        if moment == "forking":
            self.fork_in_background()
            self.wait_a_moment(0.7)
        elif moment == "stopping":
            self.cancel_in_background()
            self.wait_a_moment(1.0)
        else:
            self.wait_a_moment(0.5)

    def wait_a_moment(self, most: float) -> None:
        """Let a random time pass."""
        stage.pause(self.dice.uniform(0, most))

    def struck(self) -> None:
        """It happens now."""
        self._struck = time.monotonic()
        self.turns.append(time.time())

    def kill(self, *those: Who) -> None:
        """The fault: SIGKILL."""
        self.struck()
        sight.kill(those)

    # --- commands

    def submit(self) -> None:
        self.submit_in_background()
        self.await_submit()

    def submit_in_background(self) -> subprocess.Popen[str]:
        spec = self.shell.spec(self.draft.text())
        self.background.append(self.shell.start("submit", str(spec), "--backend", self.stage.backend, "--json"))
        return self.background[-1]

    def await_submit(self) -> None:
        output, errors = self.background[0].communicate(timeout=stage.PATIENCE)
        if self.background[0].returncode:
            raise Broken(f"submit: {errors.strip() or output.strip()}")
        self._is(json.loads(output)["run_id"])

    def look_for_run(self) -> bool:
        """Whether the run's directory is there; from then on it is known."""
        with contextlib.suppress(OSError, ValueError):
            for path in self.root.iterdir():
                if (path / "run.json").exists():
                    self._is(path.name)
        return bool(self.run_id)

    def _is(self, run_id: str) -> None:
        self.run_id = self.sight.run_id = run_id
        with contextlib.suppress(OSError, ValueError):
            self.job_id = json.loads((self.rundir / "run.json").read_text()).get("job_id") or ""
        if self.stage.backend == "slurm" and self.job_id:
            self.sight.job = (self.job_id, self.stage.conf)

    def await_ready(self) -> None:
        status = Run.load(self.run_id, self.root).wait("ready", timeout=stage.PATIENCE)
        if status.state != "ready":
            raise Broken(f"the run is {status.state} before anything was done to it: {status.reason}")
        self._add_decoys()

    def fork_in_background(self) -> None:
        self.background.append(self.shell.start("fork", self.run_id, specs.FORKED, "--json"))

    def cancel_in_background(self) -> None:
        self.turns.append(time.time())
        self._cancels.append(self.shell.start("cancel", self.run_id, "--json"))

    # --- the end

    def _to_the_end(self) -> None:
        """Wait for the end that the fault brings, or bring one."""
        if not self.run_id:
            return
        if any(one.outside for one in self.faults):
            self._end_outside()
        elif not self._cancels and not self.missed and any(one.ends for one in self.faults):
            patience = max(one.patience for one in self.faults)
            if not self._wait_over(patience):
                self.result.failures.append(f"not over by itself within {patience:g} s: {self._status_words()}")
        if not any(one.outside for one in self.faults):
            if not self._cancels and not self.over():
                self.struck()
                self.cancel_in_background()
            self._await_cancels()
            if not self._wait_over(END_PATIENCE):
                self.result.failures.append(f"never over: {self._status_words()}")
        self._told_too_early()
        for child in self.background:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=stage.PATIENCE)
            if child.poll() is None:
                self.result.failures.append(f"`slurmfork {child.args[3]}` hangs")  # type: ignore[index]
                stage.kill_group(child)

    def _end_outside(self) -> None:
        self.struck()
        if self.stage.backend == "slurm":
            self.stage.slurm("scancel", self.job_id, check=False)
        else:
            for one in self.find("batch"):
                sight.signal_one(one, signal.SIGTERM)

    def _await_cancels(self) -> None:
        for child in self._cancels:
            try:
                output, errors = child.communicate(timeout=150)
            except subprocess.TimeoutExpired:
                stage.kill_group(child)
                self.result.failures.append("`slurmfork cancel` hangs for more than 150 s")
                continue
            told = _document(output)
            if child.returncode and not told.get("unverified"):
                self.result.failures.append(f"cancel: exit status {child.returncode}: {errors.strip()[-300:]}")
            elif child.returncode and "unverified" not in self.excuses:
                self.result.failures.append(f"cancel could not ask {told['unverified']}")

    def over(self) -> bool:
        with contextlib.suppress(SlurmforkError):
            return Run.load(self.run_id, self.root).status().over
        return False

    def _wait_over(self, patience: float) -> bool:
        deadline = time.monotonic() + patience
        while not self.over():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _told_too_early(self) -> None:
        """Whether "0 survivors" was said, of every node, while something was there."""
        with contextlib.suppress(SlurmforkError):
            status = Run.load(self.run_id, self.root).status()
            told = status.over and status.survivors == 0 and not status.unverified
            if told and (left := self.sight.workers()):
                words = f"told {status.state} with 0 survivors while {len(left)} processes were there"
                self.result.failures.append(words)

    def _status_words(self) -> str:
        with contextlib.suppress(SlurmforkError):
            status = Run.load(self.run_id, self.root).status()
            return f"{status.state}, {status.reason}"
        return "no status"

    def _count(self, watch: Watch) -> None:
        """Survivors, before and after the clean that some faults need."""
        left = self.sight.none_left(SETTLE)
        if left:
            told = [sight.describe(one) for one in left]
            cleans = any(one.cleans for one in self.faults)
            said = self.shell.call("clean", self.run_id) if self.run_id else None
            remain = self.sight.none_left(SETTLE if cleans else 1.0)
            if cleans:
                self.result.cleaned = told
                self.result.survivors = [sight.describe(one) for one in remain]
            else:
                self.result.survivors = told
                after = f"{len(remain)} after clean" + (f": {said.stdout}{said.stderr}" if said else "")
                self.note(f"{len(told)} left, {after}")
        if self._struck is not None and watch.gone is not None and watch.gone > self._struck:
            self.result.seconds = watch.gone - self._struck

    def _check(self) -> None:
        self.result.failures += checks.all_of(self)
        self.result.innocents += self.stage.harmed()

    def tidy(self) -> None:
        """Leave nothing of the trial on the machine, whatever happened."""
        for _ in range(20):
            if not (left := self.sight.workers() | self.sight.own()):
                break
            sight.kill(left)
            time.sleep(0.05)
        if self.stage.backend == "slurm" and self.job_id:
            self.stage.slurm("scancel", self.job_id, check=False)
        self.stage.innocents.release(self._adopted)
        for path in checks.scratch(self):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.mounted:
            subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)

    # --- finding

    def find(self, part: str) -> list[Who]:
        """Processes that are this part of the run: agent, guardian, head, launcher, batch."""
        found = [one for pid in sight.pids() if self._is_part(pid, part) and (one := sight.who(pid))]
        return [one for one in found if not self._is_part(sight.parent(one.pid), part)]

    def _is_part(self, pid: int, part: str) -> bool:
        if part in COMMS:
            return sight.read(pid, "comm") == COMMS[part] and sight.carries(pid, self.run_id)
        words = sight.read(pid, "cmdline")
        if self.stage.backend == "slurm" and part == "launcher":
            return sight.read(pid, "comm") == b"srun\n" and sight.carries(pid, self.run_id)
        if self.stage.backend == "slurm" and part == "batch":
            job = f"SLURM_JOB_ID={self.job_id}\0".encode()
            return words.startswith(b"/bin/bash\0") and b"slurm_script" in words and job in sight.read(pid, "environ")
        if part == "launcher":
            return MARKS[part] in b"".join(words.split(b"\0")[2:3]) and sight.carries(pid, self.run_id)
        return MARKS[part] in words and f"/{self.run_id}".encode() in words

    def one(self, part: str) -> Who:
        """One of them, awaited; of several any."""

        def there() -> list[Who]:
            if self.over():
                raise Broken(f"the run is over before its {part} was hit: {self._status_words()}")
            return self.find(part)

        with contextlib.suppress(Broken):
            until(there, f"the run's {part}", 20)
            if self.result.moment == "starting":
                self.wait_a_moment(0.6)
            return self.dice.choice(sorted(until(there, f"the run's {part}", 1)))
        self.note(f"its {part} was gone before it was hit")
        self.missed = True
        return Who(-1, 0)

    def journal_lines(self) -> list[str]:
        lines = []
        for path in sorted((self.rundir / "journal").glob("*.jsonl")):
            with contextlib.suppress(OSError):
                lines += path.read_text().splitlines()
        return lines

    # --- innocents

    def _add_decoys(self) -> None:
        """Those who look like this very run, and are a user's own."""
        argv = [sys.executable, "-c", "import signal; signal.pause()"]
        log = next(iter(sorted((self.rundir / "logs").glob("*.log"))))
        add = self.stage.innocents.add
        self._adopt(add("a user's look at a log", [*argv, "tail", "-f", str(log)], cwd=self.rundir, reads=log))
        self._adopt(add("a user's shell with the run's id", argv, SLURMFORK_RUN_ID=self.run_id))

    def _adopt(self, one: Who) -> None:
        self.sight.spared.add(one)
        self._adopted.append(one.pid)

    def adopt(self, words: str, pid: int) -> None:
        """Look after a child of ours that a fault has put where a worker was."""
        self._adopt(self.stage.innocents.note(words, pid))


def _document(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(text)
        return found
    return {}
