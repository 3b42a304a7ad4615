"""What runs on Ray's nodes: the actor that holds a node's guardian, and a command that is run there.

Ray brings these there by value, where no package of ours need be: so all that they need is imported within.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any


class Keeper:
    """An actor that holds the guardian of a node, its child, which hears of its end."""

    def where(self) -> tuple[str, str, str]:
        """(Ray's id of the node, host name, what tells machines apart)."""
        import ray

        with open("/proc/sys/kernel/random/boot_id") as file:
            machine = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
        return ray.get_runtime_context().get_node_id(), os.uname().nodename, machine

    async def start(self, node: str, argv: list[str], environment: dict[str, str], options: dict[str, Any]) -> None:
        """Start the guardian with the devices that Ray granted here; raises OSError."""
        import asyncio

        import ray

        granted = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        own = {name: os.environ[name] for name in options["variables"] if name in os.environ}
        if not granted:
            own = {}
        environment = {**environment, **own, options["devices"]: ",".join(map(str, granted))}
        log = os.open(options["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.guardian = subprocess.Popen(  # noqa: ASYNC220 (by this thread, whose end is the actor's)
                argv,
                env=environment,
                cwd=options["cwd"],
                umask=options["umask"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)
        # Ray's own watch takes no raylet for dead whose children went to another than init: a systemd of the user's.
        self.raylet = os.pidfd_open(raylet := os.getppid())
        asyncio.get_running_loop().add_reader(self.raylet, self._orphan)
        if os.getppid() != raylet:  # it ended before we looked
            self._orphan()

    def _orphan(self) -> None:
        """The raylet is gone: so is this, at once, of which the kernel tells the guardian."""
        os._exit(1)

    async def ended(self) -> int:
        """Its exit status, once it has ended."""
        import asyncio

        code = await asyncio.get_running_loop().run_in_executor(None, self.guardian.wait)
        return code if code >= 0 else 128 - code

    async def signal(self, number: int) -> None:
        """Pass a signal on to it."""
        self.guardian.send_signal(number)


def errand(argv: list[str], limit: float) -> tuple[int, bytes, bytes]:
    """Run a command here; (exit status, output, errors)."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False)
    return done.returncode, done.stdout, done.stderr
