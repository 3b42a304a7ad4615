"""Logging in: which keys are offered in which order, when a person is asked, and what a refusal says.

The order is OpenSSH's: certificates, keys of the agent, key files; then what the server asks; then a password. Nothing
is asked without a terminal. Keys that were read with a passphrase are kept, for a second connection.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import paramiko

from slurmfork.errors import NotOpened, TransportError, one_line
from slurmfork.remote import keys
from slurmfork.remote.sshconfig import Settings
from slurmfork.remote.terminal import Terminal
from slurmfork.remote.wire import AUTH_S, Wire

TRIES = 3
DIALOG_S = 300.0
_FACTORS = 4  # of a login; more would be a server that plays with us
_BY_PERSON = ("keyboard-interactive", "password")


class Offer(NamedTuple):
    """A key to offer, by a name for messages."""

    name: str
    key: paramiko.PKey


class KeyRing:
    """The keys that were read so far, and why others could not be."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._loaded: dict[Path, keys.PrivateKey] = {}
        self.unusable: dict[Path, str] = {}

    def load(self, file: Path, *, ask: bool) -> keys.PrivateKey | None:
        """A key file, asking for its passphrase if need be; None where that came to nothing."""
        if file in self._loaded or file in self.unusable:
            return self._loaded.get(file)
        try:
            self._loaded[file] = self._read(file, ask=ask)
        except keys.Unusable as error:
            self.unusable[file] = str(error)
        return self._loaded.get(file)

    def _read(self, file: Path, *, ask: bool) -> keys.PrivateKey:
        try:
            return keys.load(file)
        except keys.PassphraseNeeded:
            if not ask or not self._terminal.there:
                raise keys.Unusable(f"needs a passphrase, and there is no terminal (`ssh-add {file}`)") from None
        for _ in range(TRIES):
            passphrase = self._terminal.ask(f"Passphrase of {file}:")
            if not passphrase:
                break
            try:
                return keys.load(file, passphrase)
            except keys.Unusable as error:
                self._terminal.say(f"{file} {error}")
        raise keys.Unusable("was not opened: wrong passphrase")


class Login:
    """One login over a wire whose host is trusted. ``who`` names the host in messages."""

    def __init__(self, wire: Wire, settings: Settings, *, who: str, terminal: Terminal, ring: KeyRing) -> None:
        self._wire = wire
        self._settings = settings
        self._who = who
        self._terminal = terminal
        self._ring = ring
        self._asks = terminal.there and not settings.batch
        self._offered: list[str] = []
        self._answered = 0

    def run(self) -> str:
        """Says what opened the door; raises TransportError in one line."""
        agent = keys.Agent(self._settings.agent)
        try:
            return self._run(agent)
        except (EOFError, OSError, paramiko.SSHException) as error:
            raise self._hung_up(error) from error
        finally:
            agent.close()

    def _run(self, agent: keys.Agent) -> str:
        try:
            allowed = self._wire.auth_none(self._settings.user)
        except paramiko.BadAuthenticationType as error:
            allowed = error.allowed_types
        opened: list[str] = []
        while not self._wire.is_authenticated():
            if len(opened) >= _FACTORS:
                raise TransportError(f"{self._who} asks for more than {_FACTORS} things, one after another")
            name, allowed = self._step(allowed, agent)
            opened.append(name)
        return " and ".join(opened) or "no authentication at all"

    def _step(self, allowed: list[str], agent: keys.Agent) -> tuple[str, list[str]]:
        """One factor: its name, and by what the login may go on."""
        if "publickey" in allowed:
            for offer in self._offers(agent):
                self._offered.append(offer.name)
                user, key = self._settings.user, offer.key
                left = self._attempt(lambda user=user, key=key: self._wire.auth_publickey(user, key))  # type: ignore[misc]
                if left is not None:
                    return offer.name, left
        ways: dict[str, Callable[[], list[str]]] = {"keyboard-interactive": self._dialog, "password": self._password}
        for way in _BY_PERSON:
            for _ in range(TRIES if self._asks and way in allowed else 0):
                self._answered += 1
                left = self._attempt(ways[way])
                if left is not None:
                    return way, left
        raise TransportError(self._refusal(allowed))

    def _attempt(self, work: Callable[[], list[str]]) -> list[str] | None:
        """None: refused, and something else may be tried."""
        try:
            return work()
        except (paramiko.SSHException, TimeoutError) as error:  # of the agent, too
            if not self._wire.is_active() or str(error) == "Authentication timeout.":
                raise
        return None

    # --- keys

    def _offers(self, agent: keys.Agent) -> Iterator[Offer]:
        files = [file for file in self._settings.identity_files if file.exists() or keys.public_blob(file)]
        blobs = {blob: file for file in files if (blob := keys.public_blob(file))}
        held = [key for key in agent.keys if key.asbytes() in blobs]
        others = [] if self._settings.identities_only else [key for key in agent.keys if key not in held]
        for key in sorted([*held, *others], key=lambda key: (not keys.is_certificate(key), key not in held)):
            named = blobs.get(key.asbytes())
            yield Offer(f"{named} (agent)" if named else f"agent key {one_line(key.comment) or key.get_name()}", key)
        in_agent = {key.asbytes() for key in agent.keys}
        for file in files:
            certificates = list(keys.certificates(file, self._settings.certificate_files))
            if keys.public_blob(file) in in_agent and not certificates:
                continue
            if not file.exists():
                continue
            loaded = self._ring.load(file, ask=self._asks)
            if loaded is None:
                continue
            for path in certificates:
                twin = loaded.certified(path)
                if twin is not None:
                    yield Offer(str(path), twin)
            if loaded.plain.asbytes() not in in_agent:
                yield Offer(str(file), loaded.plain)

    # --- people

    def _password(self) -> list[str]:
        password = self._terminal.ask(f"({self._settings.user}@{self._who}) Password:")
        self._wire.auth_timeout = AUTH_S
        return self._wire.auth_password(self._settings.user, password, fallback=False)

    def _dialog(self) -> list[str]:
        """What the server asks, put to the person; paramiko asks in its own thread, we do in the caller's."""
        asked: queue.SimpleQueue[tuple[str, str, list[tuple[str, bool]]] | list[str] | BaseException] = (
            queue.SimpleQueue()
        )
        answers: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()

        def handler(title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
            asked.put((title, instructions, prompts))
            given = answers.get()
            if given is None:
                raise paramiko.SSHException("given up")
            return given

        def work() -> None:
            try:
                asked.put(self._wire.auth_interactive(self._settings.user, handler))
            except BaseException as error:  # for the thread that waits for us
                asked.put(error)

        self._wire.auth_timeout = DIALOG_S
        threading.Thread(target=work, name="slurmfork-login", daemon=True).start()
        while True:
            found = asked.get()
            if isinstance(found, BaseException):
                raise found
            if isinstance(found, list):
                return found
            try:
                answers.put(self._answer(*found))
            except BaseException:
                answers.put(None)
                raise

    def _answer(self, title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
        for text in (title, instructions):
            if text.strip():
                self._terminal.say(text)
        whom = f"({self._settings.user}@{self._who})"
        return [self._terminal.ask(f"{whom} {one_line(prompt)}", echo=echo) for prompt, echo in prompts]

    # --- refusals

    def _refusal(self, allowed: list[str]) -> str:
        user = self._settings.user
        found = [f"{self._who} does not let {user} in"]
        if self._offered:
            found.append(f"it refused {', '.join(dict.fromkeys(self._offered))}")
        missing = [file for file in self._settings.identity_files if self._settings.files_named and not file.exists()]
        found += [f"{file} is not there" for file in missing if f"{file} (agent)" not in self._offered]
        found += [f"{file} {reason}" for file, reason in self._ring.unusable.items()]
        wanted = [way for way in _BY_PERSON if way in allowed]
        if wanted and not self._asks:
            found.append(f"it asks for a password or code ({', '.join(wanted)}), and there is no terminal to ask on")
        elif self._answered:
            found.append("what was typed was wrong")
        elif len(found) == 1:
            found.append(f"it wants {', '.join(allowed) or 'nothing that is known here'}, and there is no such key")
        advice = "; if this should work, the account may be locked: ask the site" if self._offered else ""
        return f"{found[0]}: {'; '.join(found[1:])}{advice}"

    def _hung_up(self, error: BaseException) -> TransportError:
        user = self._settings.user
        if isinstance(error, TimeoutError) or "timeout" in str(error).lower():
            return NotOpened(f"{self._who} did not answer when {user} logged in")
        if len(self._offered) > 1:
            return TransportError(
                f"{self._who} hung up after it had refused {', '.join(self._offered)}: "
                "`identity_file` in the profile, or IdentitiesOnly in ~/.ssh/config, offers the right one alone"
            )
        told = one_line(str(error))
        reason = f" ({told})" if told and not isinstance(error, EOFError) else ""
        return NotOpened(
            f"{self._who} hung up when {user} logged in{reason}: if it happens again, the account may be locked"
        )
