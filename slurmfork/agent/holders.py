"""Holders: processes that are not this run's and hold devices that its node was granted.

Known by the device files that they have open, and by nvidia-smi where there is one, which sees other users' too.
Which file is whose device is told by SLURMFORK_DEVICE_FILES, else it is /dev/nvidiaN by the number that Slurm gave.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from slurmfork import killing, names, process
from slurmfork.agent.command import find
from slurmfork.agent.grant import SHARDS
from slurmfork.agent.node import Node
from slurmfork.agent.spawn import StartFailed
from slurmfork.agent.starter import Starter
from slurmfork.messages import Device
from slurmfork.orders import Finding

SMI_TIMEOUT_S = 8.0
SMI = ("--query-compute-apps=gpu_bus_id,pid,used_memory", "--format=csv,noheader,nounits")
GPUS = Path("/proc/driver/nvidia/gpus")

_SHARED = (SHARDS, names.SHARES, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")  # others are on these GPUs by design
# What watches devices or hands them out, and computes nothing there; as the kernel cuts their names.
_WATCHERS = frozenset({"nvidia-persiste", "nv-hostengine", "dcgm-exporter", "nvidia-smi", "slurmd", "slurmstepd"})
_APP = re.compile(r"([0-9A-Fa-f]+:[0-9A-Fa-f]+:[0-9A-Fa-f]+\.[0-9]), *(\d+), *(\d+|\[.*\]|N/A)")
_SHOWN = 3
_NOWHERE = "/dev/null"  # where a cluster for tests has devices that are none


class App(NamedTuple):
    """One process on one GPU, as nvidia-smi has it; ``memory`` in MiB, 0: it does not say."""

    bus: str
    pid: int
    memory: int


@dataclass
class Holder:
    """One process, the devices that it holds, and how much of their memory, in MiB; 0: not known."""

    pid: int
    devices: set[Device] = field(default_factory=set)
    memory: int = 0


def device_files(node: Node) -> dict[str, Device]:
    """The files of the granted devices, as far as they can be known: not of those that have no number."""
    if any(name in node.environment for name in _SHARED):
        return {}
    numbers = _slurms_numbers(node)
    listed = [path.strip() for path in node.environment.get(names.DEVICE_FILES, "").split(",")]
    found: dict[str, Device] = {}
    for device in node.devices:
        if isinstance(device, int):
            number = numbers.get(device, device)
            path = f"/dev/nvidia{number}" if listed == [""] else "".join(listed[number : number + 1])
            resolved = os.path.realpath(path or _NOWHERE)
            if resolved != _NOWHERE and os.path.exists(resolved):  # noqa: PTH110 (compared as text)
                found[resolved] = device
    return found


def _slurms_numbers(node: Node) -> dict[Device, int]:
    """Slurm's own numbers of the devices: where it constrains them, what a worker sees is counted from 0."""
    words = node.environment.get("SLURM_STEP_GPUS", "").split(",")
    if len(words) != len(node.devices) or not all(word.isascii() and word.isdigit() for word in words):
        return {}
    return dict(zip(node.devices, map(int, words), strict=True))


async def look(node: Node, starter: Starter) -> list[Finding]:
    """Who holds this node's devices; a line for each user, or run of a user."""
    files = device_files(node)
    if not files:
        return []
    loop = asyncio.get_running_loop()
    smi = find("nvidia-smi", node.environment.get("PATH"))
    text, findings = await _ask(smi, node, starter) if smi else ("", [])
    return findings + await loop.run_in_executor(None, _held, files, node.run_id, text)


async def _ask(smi: str, node: Node, starter: Starter) -> tuple[str, list[Finding]]:
    """What nvidia-smi says, and what is to be said of its saying nothing."""
    try:
        one, output = await starter.helper([smi, *SMI], node.environment)
    except StartFailed as failure:
        return "", [Finding(kind="devices", text=str(failure))]
    try:
        loop = asyncio.get_running_loop()
        if await loop.run_in_executor(None, killing.wait_gone, [one], SMI_TIMEOUT_S):
            process.send(one, signal.SIGKILL)
            return "", [Finding(kind="devices", text=f"nvidia-smi gave no answer within {SMI_TIMEOUT_S:g} s")]
        text = os.pread(output, 1 << 20, 0).decode(errors="replace").strip()
        fault = text.partition("\n")[0][:200] if text and not apps(text) else ""
        return text, [Finding(kind="devices", text=f"nvidia-smi says: {fault}")] if fault else []
    finally:
        os.close(output)


def _held(files: Mapping[str, Device], run_id: str, smi: str) -> list[Finding]:
    holders = by_files(files)
    by_memory(holders, files, apps(smi), minors(GPUS))
    groups: dict[tuple[int, str], list[Holder]] = {}
    for pid, holder in holders.items():
        uid, run = process.owner(pid), (process.environ(pid) or {}).get(names.RUN_ID, "")
        if uid is not None and run != run_id and process.name(pid) not in _WATCHERS:
            groups.setdefault((uid, run), []).append(holder)
    return [Finding(kind="devices", serious=True, text=_words(*whose, held)) for whose, held in groups.items()]


def by_files(files: Mapping[str, Device]) -> dict[int, Holder]:
    """Who has these files open, by PID; others' processes do not show it."""
    holders: dict[int, Holder] = {}
    for pid in process.pids():
        for file in process.open_files(pid):
            if file.path in files:
                holders.setdefault(pid, Holder(pid)).devices.add(files[file.path])
    return holders


def by_memory(
    holders: dict[int, Holder], files: Mapping[str, Device], found: Iterable[App], minors: Mapping[str, int]
) -> None:
    """Complete who was found by files with what nvidia-smi knows. ``minors``: the GPUs' numbers by bus."""
    elsewhere = set()
    for bus, pid, memory in found:
        device = files.get(f"/dev/nvidia{minors[bus]}") if bus in minors else None
        # Who shows his files and has none of ours open is another: nvidia-smi may count PIDs outside of a container.
        if device is not None and not os.access(f"/proc/{pid}/fd", os.R_OK):
            holders.setdefault(pid, Holder(pid)).devices.add(device)
        if bus in minors and device is None:
            elsewhere.add(pid)
        elif pid in holders:
            holders[pid].memory += memory
    for pid in elsewhere:  # CUDA opens the files of all GPUs, but who computes on others alone is not in our way
        if pid in holders and not holders[pid].memory:
            del holders[pid]


def apps(text: str) -> list[App]:
    """The processes in an answer of nvidia-smi; what is no such line is passed over."""
    found = [match for line in text.splitlines() if (match := _APP.fullmatch(line.strip()))]
    return [App(_bus(match[1]), int(match[2]), int(match[3]) if match[3].isdigit() else 0) for match in found]


def minors(directory: Path) -> dict[str, int]:
    """The numbers of the device files of NVIDIA's GPUs, by bus; empty where the driver does not tell."""
    found = {}
    for path in directory.glob("*/information"):
        if match := re.search(r"^Device Minor:\s*(\d+)", path.read_text(), re.MULTILINE):
            found[_bus(path.parent.name)] = int(match[1])
    return found


def _bus(text: str) -> str:
    """One spelling of a PCI address: the driver writes a domain of four digits, nvidia-smi one of eight."""
    domain, _, rest = text.lower().partition(":")
    return f"{int(domain, 16):x}:{rest}"


def _words(uid: int, run: str, held: list[Holder]) -> str:
    devices = sorted({str(device) for holder in held for device in holder.devices})
    largest = sorted(held, key=lambda holder: (-holder.memory, holder.pid))
    shown = "; ".join(_one(holder) for holder in largest[:_SHOWN])
    more = f"; and {len(held) - _SHOWN} more" if len(held) > _SHOWN else ""
    whose = f"{_user(uid)}'s run {run}" if run else _user(uid)
    many = f"{len(held)} processes of " if len(held) > 1 else ""
    return f"GPU {','.join(devices)} is held by {many}{whose}: {shown}{more}"


def _one(holder: Holder) -> str:
    memory = f", {holder.memory / 1024:.1f} GiB" if holder.memory else ""
    identity = process.identify(holder.pid)
    since = time.strftime(", since %Y-%m-%d %H:%M", time.localtime(process.begun(identity))) if identity else ""
    return f"pid {holder.pid} ({process.command(holder.pid)}){memory}{since}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
