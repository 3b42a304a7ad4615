"""The look at a node: a script for any POSIX shell that tells what /proc says there, and the reading of its answer.

Nothing of ours, and no Python, is needed on the node: sh, cat, grep, id, tr, uname and xargs do, as coreutils or
busybox have them. The script is read from standard input, so that no shell on the way has anything to quote; what a
login prints around it is told apart by a mark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from slurmfork import names, process
from slurmfork.process import Stat

# First the processes asked for, by files that never make the reader wait; then, which may hang with a process that
# hangs in the kernel, the environments. What came until then counts.
_SCRIPT = r"""
look() {
  [ -r "/proc/$1/stat" ] || return 1
  stat=
  while IFS= read -r line || [ -n "$line" ]; do stat="$stat$line "; done <"/proc/$1/stat"
  [ -n "$stat" ]
}
above() {
  child=$1 chain=
  while look "$child"; do
    child=${stat##*) } child=${child#* } child=${child%% *}
    case $child in '' | 0 | *[!0-9]*) break ;; esac
    chain="$chain $child"
  done
}
having() {
  if printf x | grep -qz x; then
    printf '%s\n' /proc/[0-9]*/environ | xargs grep -lszxF "$tag"
  else
    for file in /proc/[0-9]*/environ; do tr '\000' '\n' <"$file" | grep -qxF "$tag" && printf '%s\n' "$file"; done
  fi
}
tagged() {
  for file in $(having); do
    pid=${file#/proc/} pid=${pid%/environ}
    case " $pids " in *" $pid "*) continue ;; esac
    tr '\000\n' '\n ' <"$file" | grep -E '^(SLURMFORK_(RUN_ID|NODE|WORKER)|SLURMD_NODENAME|SLURM_JOB_ID)=' |
      while IFS= read -r line; do printf 'env %s %s\n' "$pid" "$line"; done
    printf 'command %s %s\n' "$pid" "$(tr '\000\n' '  ' <"/proc/$pid/cmdline")"
    printf 'owner %s %s\n' "$pid" "$(grep '^Uid:' "/proc/$pid/status" | tr '\t' ' ')"
    above "$pid"
    printf 'above %s %s\n' "$pid" "$chain"
    look "$pid" && printf 'stat %s\n' "$stat"
  done
}
probe() {
  LC_ALL=C
  export LC_ALL
  printf '\n%s begin\n' "$mark"
  printf 'boot %s\n' "$(cat /proc/sys/kernel/random/boot_id)"
  printf 'booted %s\n' "$(grep '^btime ' /proc/stat)"
  printf 'uid %s\n' "$(id -u)"
  printf 'host %s\n' "$(uname -n)"
  for pid in $pids; do look "$pid" && printf 'stat %s\n' "$stat"; done
  printf '%s looked\n' "$mark"
  tagged
  printf '%s end\n' "$mark"
}
probe </dev/null 2>/dev/null
exit 0
"""
_SHOWN = 120  # characters of a command line


class Tagged(NamedTuple):
    """A process that carries the run's tag and was not asked for. ``above``: the PIDs of its ancestors."""

    pid: int
    stat: Stat
    environment: Mapping[str, str]
    owner: int | None
    above: frozenset[int]
    command: str

    @property
    def node(self) -> str:
        """Whose it is: the name of a node of the run, as its environment has it."""
        return self.environment.get(names.NODE) or self.environment.get("SLURMD_NODENAME", "")


class Look(NamedTuple):
    """What a node said. ``booted`` is by the node's own clock; ``complete``: it was searched for tags to the end.

    ``stats`` has whatever of the PIDs asked for is there, and PID 1 wherever the processes of others can be seen.
    """

    boot_id: str
    booted: float
    uid: int
    host: str
    stats: Mapping[int, Stat]
    tagged: tuple[Tagged, ...] = ()
    complete: bool = True


def script(pids: Iterable[int], run_id: str, mark: str) -> bytes:
    """What a shell on the node is to read; ``mark`` is a word that nobody else would print."""
    listed = " ".join(str(pid) for pid in sorted({1, *pids}))
    return f"mark='{mark}' tag='{names.RUN_ID}={run_id}' pids='{listed}'{_SCRIPT}".encode()


def read(output: bytes, run_id: str, mark: str) -> Look | None:
    """What the script printed; None where it did not come to the end of the processes that were asked for."""
    marked = mark.encode()
    _, begun, rest = output.partition(b"\n" + marked + b" begin\n")
    asked, looked, more = rest.partition(b"\n" + marked + b" looked\n")
    found, ended, _ = (b"\n" + more).partition(b"\n" + marked + b" end\n")
    facts = _facts(asked)
    boot_id = _first(facts, "boot")
    if not begun or not looked or not boot_id:
        return None
    return Look(
        boot_id=boot_id,
        booted=float(_number(_first(facts, "booted").partition(" ")[2]) or 0),
        uid=_number(_first(facts, "uid")) or 0,
        host=_first(facts, "host"),
        stats=_stats(asked),
        tagged=tuple(_tagged(found, run_id)),
        complete=bool(ended),
    )


def _facts(data: bytes) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in data.decode(errors="replace").split("\n"):
        word, _, text = line.partition(" ")
        found.setdefault(word, []).append(text.strip())
    return found


def _first(facts: Mapping[str, list[str]], word: str) -> str:
    return next(iter(facts.get(word, ())), "")


def _stats(data: bytes) -> dict[int, Stat]:
    found = {}
    for line in data.split(b"\n"):
        word, _, text = line.partition(b" ")
        pid = _number(text.partition(b" ")[0].decode(errors="replace"))
        if word == b"stat" and pid is not None and (stat := process.parse_stat(text)):
            found[pid] = stat
    return found


def _tagged(data: bytes, run_id: str) -> Iterable[Tagged]:
    facts, stats = _facts(data), _stats(data)
    by_pid = {word: _by_pid(facts.get(word, ())) for word in ("env", "command", "owner", "above")}
    for pid, stat in stats.items():
        pairs = (entry.partition("=") for entry in by_pid["env"].get(pid, ()))
        environment = {name: value for name, _, value in pairs}
        if environment.get(names.RUN_ID) != run_id:  # another's, whose id begins as this one's
            continue
        owner = next(iter(by_pid["owner"].get(pid, ())), "").split()
        above = next(iter(by_pid["above"].get(pid, ())), "").split()
        command = next(iter(by_pid["command"].get(pid, ())), "") or stat.comm
        yield Tagged(
            pid=pid,
            stat=stat,
            environment=environment,
            owner=_number(owner[1]) if len(owner) > 1 else None,
            above=frozenset(int(one) for one in above if one.isdigit()),
            command=_shown(command),
        )


def _by_pid(entries: Iterable[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for entry in entries:
        pid, _, text = entry.partition(" ")
        if pid.isdigit():
            found.setdefault(int(pid), []).append(text)
    return found


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _shown(command: str) -> str:
    words = "".join(char if char.isprintable() else "?" for char in command)
    return words if len(words) <= _SHOWN else words[: _SHOWN - 3] + "..."
