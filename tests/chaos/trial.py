"""One trial: a random run, a fault at a random moment, the run's end, and what was left of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from chaos import checks, end, sight, specs, stage
from chaos.faults import Fault
from chaos.parts import Parts
from chaos.result import Result
from chaos.sight import Sight, Watch, Who
from chaos.stage import Broken, Stage, until
from slurmfork.errors import SlurmforkError
from slurmfork.run import Run, RunStatus

ROOT = Path(__file__).resolve().parents[2]


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
        self.draft = specs.draw(self.dice, self.place, engines=on.engines, isolation=on.isolation)
        self.run_id, self.job_id = "", ""
        self.taken_down: list[str] = []
        self.mounted: list[Path] = []
        self.background: list[subprocess.Popen[str]] = []
        self.turns: list[float] = []
        self.result = Result(seed, " + ".join(one.name for one in faults), engines=self.draft.hosts)
        self.caller: subprocess.Popen[str] | None = None
        self.began: float | None = None
        self.cancels: list[subprocess.Popen[str]] = []
        self._adopted: list[int] = []

    @property
    def excuses(self) -> frozenset[str]:
        return frozenset().union(*(one.excuses for one in self.faults))

    @property
    def rundir(self) -> Path:
        return self.root / self.run_id

    def fail(self, words: str) -> None:
        self.result.failures.append(words)

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
                    self.draft.stubborn()
                self.result.what = f"{self.draft.nodes} nodes, {self.draft.kinds()}"
                if moment != "own":
                    self.submit()
                    self._await_moment(moment)
                for number, one in enumerate(self.faults):
                    if number:
                        self.wait_a_moment(1.0)
                    one.strike(self)
                end.bring(self)
                for one in self.faults:
                    one.finish(self)
            except (Broken, SlurmforkError, subprocess.TimeoutExpired) as error:
                self.result.failures.append(f"{type(error).__name__}: {error}")
            end.count(self, watch)
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
        self.began = time.monotonic()
        self.turns.append(time.time())

    def kill(self, *those: Who) -> None:
        """The fault: SIGKILL."""
        self.struck()
        sight.kill(those)

    def _check(self) -> None:
        self.result.failures += checks.all_of(self)
        self.result.innocents += self.stage.harmed()

    def tidy(self) -> None:
        """Leave nothing of the trial on the machine, whatever happened."""
        if self.caller is not None and self.caller.poll() is None:
            self.caller.kill()
            self.caller.communicate()
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
        self.sight.hold(self.find("holder"))
        if self.draft.hosts:
            self._call_engines()

    def _call_engines(self) -> None:
        """Have a controller that calls them until the run is over, and must hear of that."""
        self.caller = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("caller.py"))],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.caller.stdin is not None
        told = {"run_id": self.run_id, "root": str(self.root), "role": specs.FIRST}
        self.caller.stdin.write(json.dumps(told) + "\n")
        self.caller.stdin.flush()

    def fork_in_background(self) -> None:
        self.background.append(self.shell.start("fork", self.run_id, specs.FORKED, "--json"))

    def cancel_in_background(self) -> None:
        self.turns.append(time.time())
        self.cancels.append(self.shell.start("cancel", self.run_id, "--json"))

    # --- looking

    def find(self, part: str) -> list[Who]:
        """Processes that are this part of the run: agent, guardian, head, launcher, batch."""
        return Parts(self.run_id, self.stage.backend, self.job_id).find(part)

    def status(self) -> RunStatus:
        return Run.load(self.run_id, self.root).status()

    def over(self) -> bool:
        with contextlib.suppress(SlurmforkError):
            return self.status().over
        return False

    def status_words(self) -> str:
        with contextlib.suppress(SlurmforkError):
            status = self.status()
            return f"{status.state}, {status.reason}"
        return "no status"

    def one(self, part: str) -> Who:
        """One of them, awaited; of several any."""

        def there() -> list[Who]:
            if self.over():
                raise Broken(f"the run is over before its {part} was hit: {self.status_words()}")
            return self.find(part)

        with contextlib.suppress(Broken):
            until(there, f"the run's {part}", 20)
            if self.result.moment == "starting":
                self.wait_a_moment(0.6)
            return self.dice.choice(sorted(until(there, f"the run's {part}", 1)))
        self.note(f"its {part} was gone before it was hit")
        self.result.missed = True
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
