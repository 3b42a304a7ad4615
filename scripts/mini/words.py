"""The nouns: what a cluster is asked to be, where it is, and what is written down of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

FIRST_PORT, PORTS_PER_BLOCK, BLOCKS = 17000, 270, 56  # all below the kernel's range for outgoing connections
KILL_WAIT_S = 5
ROLES = ("login", "jump", "node")  # what an sshd can be for


class Failed(Exception):
    """Something went wrong; the text is for the user. `code` is the exit status."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Shape:
    """What was asked for; two clusters of equal shape are as good as each other."""

    nodes: int
    gpus: int
    cpus: int
    proctrack: str
    accounting: bool
    min_job_age: int
    settings: tuple[str, ...] = ()
    ssh: bool = False
    sshd_options: tuple[str, ...] = ()
    login_shell: str = "bash"
    slurm: str = ""  # a release that is not this machine's own, 24.11
    kernels: bool = False
    site: str = ""

    @property
    def rooted(self) -> bool:
        """It lives in a root of its own, and Slurm's commands with it."""
        return bool(self.slurm)


@dataclass(frozen=True)
class Cluster:
    """Where a cluster of this name keeps everything."""

    name: str
    home: Path

    @property
    def conf(self) -> Path:
        return self.home / "slurm.conf"

    @property
    def root(self) -> Path:
        """The root of another release, as the cluster's own processes see it."""
        return self.home / "root"

    @property
    def shared(self) -> Path:
        """What kernels of their own have in common, /shared there."""
        return self.home / "shared"

    @property
    def prefix(self) -> str:
        """Node names differ between clusters: Slurm names its control groups by node and job only."""
        return "n" if self.name == "default" else f"{self.name}-n"

    def nodes(self, shape: Shape) -> list[str]:
        prefix = "n" if shape.kernels else self.prefix
        return [f"{prefix}{i}" for i in range(1, shape.nodes + 1)]


@dataclass(frozen=True)
class Place:
    """The block of loopback addresses and ports that a cluster has for itself."""

    block: int

    @property
    def slurmctld(self) -> int:
        return FIRST_PORT + PORTS_PER_BLOCK * self.block

    @property
    def slurmdbd(self) -> int:
        return self.slurmctld + 1

    def slurmd(self, index: int) -> int:
        return self.slurmctld + 9 + index

    def address(self, index: int) -> str:
        return f"127.0.{self.block}.{index}"

    def sshd(self, role: str) -> int:
        """All compute nodes use one port, each on its own address, as real ones do."""
        return self.slurmctld + 2 + ROLES.index(role)

    def ports(self, shape: Shape) -> list[int]:
        slurm = [self.slurmctld, self.slurmdbd, *(self.slurmd(i) for i in range(1, shape.nodes + 1))]
        return slurm + [self.sshd(role) for role in ROLES if shape.ssh]


@dataclass(frozen=True)
class Process:
    """One process, told from a later one of the same pid by its start time."""

    pid: int
    start_time: int


@dataclass
class Record:
    """cluster.json: what `up` did, read by the other verbs."""

    shape: Shape
    block: int
    version: str = ""
    ready: bool = False
    keeper: Process | None = None
    daemons: dict[str, Process] = field(default_factory=dict)
