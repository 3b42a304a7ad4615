"""The parts of a run: which processes are its agents, guardians, head, launcher, batch script, Slurm's step daemons.

On Ray also its driver, which is a child of the launcher's, and the holders: the actors that guardians are children of.
"""

from __future__ import annotations

from dataclasses import dataclass

from chaos import sight
from chaos.sight import Who

COMMS = {"guardian": b"slurmfork-guard\n", "agent": b"slurmfork-agent\n"}
STEPD = b"slurmstepd\n"
MARKS = {"head": b"head/__main__.py", "batch": b"/batch.sh\0"}
LAUNCHERS = {"local": b"backends/local_nodes.py", "ray": b"backends/ray_driver.py"}


@dataclass(frozen=True)
class Parts:
    """Those of one run. ``job_id``: on Slurm."""

    run_id: str
    backend: str
    job_id: str

    def find(self, part: str) -> list[Who]:
        """All that are this part; of a shell that has forked for a moment, the first."""
        if part == "holder":
            above = {sight.parent(one.pid) for one in self.find("guardian")} if self.backend == "ray" else set()
            return [one for pid in above if (one := sight.who(pid))]
        if part == "driver":
            below = {one.pid for one in self.find("launcher")}
            return [one for pid in sight.pids() if sight.parent(pid) in below and (one := sight.who(pid))]
        if part == "stepd":
            above = {sight.parent(one.pid) for one in self.find("guardian")}
            return [one for pid in above if sight.read(pid, "comm") == STEPD and (one := sight.who(pid))]
        found = [one for pid in sight.pids() if self._is(pid, part) and (one := sight.who(pid))]
        firsts = [one for one in found if not self._is(sight.parent(one.pid), part)]
        return [one for one in firsts if sight.lives(one)]  # of who is gone the parent says nothing

    def _is(self, pid: int, part: str) -> bool:
        if part in COMMS:
            named = sight.read(pid, "comm") == COMMS[part] and sight.carries(pid, self.run_id)
            return named and not self._launches(pid)  # the driver on Ray has a guardian, too
        words = sight.read(pid, "cmdline")
        if self.backend == "slurm" and part == "launcher":
            return sight.read(pid, "comm") == b"srun\n" and sight.carries(pid, self.run_id)
        if self.backend == "slurm" and part == "batch":
            job = f"SLURM_JOB_ID={self.job_id}\0".encode()
            return words.startswith(b"/bin/bash\0") and b"slurm_script" in words and job in sight.read(pid, "environ")
        if part == "launcher":
            return self._launches(pid) and sight.carries(pid, self.run_id)
        return MARKS[part] in words and f"/{self.run_id}".encode() in words

    def _launches(self, pid: int) -> bool:
        program = b"".join(sight.read(pid, "cmdline").split(b"\0")[2:3])
        return self.backend in LAUNCHERS and program.endswith(LAUNCHERS[self.backend])
