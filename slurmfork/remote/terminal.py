"""Asking a person: passphrases, passwords and one-time codes, from the terminal and from nowhere else.

Never from standard input, which may be a pipe that somebody else writes, and never from the background, where a
process that reads from its terminal is stopped.
"""

from __future__ import annotations

import os
import termios

from slurmfork.errors import TransportError, one_line


class NoTerminal(TransportError):
    """There is nobody to ask."""


class Terminal:
    """The terminal of this process. ``allowed`` False: act as if there were none."""

    def __init__(self, *, allowed: bool = True) -> None:
        self._allowed = allowed

    @property
    def there(self) -> bool:
        """Whether a person can be asked."""
        if not self._allowed:
            return False
        try:
            descriptor = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return os.tcgetpgrp(descriptor) == os.getpgrp()
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def say(self, text: str) -> None:
        """Show a line; what a server wrote is shown as printable text only."""
        if self.there:
            with open("/dev/tty", "w") as terminal:
                terminal.write(one_line(text) + "\n")

    def ask(self, prompt: str, *, echo: bool = False) -> str:
        """One line from the person; raises NoTerminal, KeyboardInterrupt."""
        if not self.there:
            raise NoTerminal(f"{one_line(prompt)}: there is no terminal to ask on")
        descriptor = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, "rb+", buffering=0) as terminal:
            before = termios.tcgetattr(descriptor)
            quiet = termios.tcgetattr(descriptor)
            if not echo:
                quiet[3] &= ~termios.ECHO
            try:
                termios.tcsetattr(descriptor, termios.TCSAFLUSH, quiet)  # what was typed before was not for us
                terminal.write((one_line(prompt) + " ").encode())
                answer = terminal.readline()
            finally:
                termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
                if not echo:
                    terminal.write(b"\n")
        if not answer:
            raise KeyboardInterrupt  # ^D
        return answer.decode(errors="surrogateescape").rstrip("\r\n")
