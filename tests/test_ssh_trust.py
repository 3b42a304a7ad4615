"""Whom SSH trusts, and who is let in: host keys, keys, passphrases, agents, certificates, passwords; real servers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sshd import Agent, Servers, Sshd, keygen, on_terminal, public
from test_ssh import to

from slurmfork.errors import TransportError
from slurmfork.remote.knownhosts import add, fingerprint, lines_about
from slurmfork.remote.ssh import SshTransport
from slurmfork.remote.transport import run
from slurmfork.remote.trust import ShownKey, UnknownHost

PAM = ("UsePAM yes", "KbdInteractiveAuthentication yes")


def says(transport: SshTransport) -> str:
    """What a command says over a transport that is closed then."""
    try:
        return run(transport, ["echo", "in"]).output.decode().strip()
    finally:
        transport.close()


def refused(transport: SshTransport) -> str:
    """The one line by which it is refused."""
    with pytest.raises(TransportError) as caught:
        says(transport)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fingerprint_of(key: Path) -> str:
    done = subprocess.run(["ssh-keygen", "-lf", f"{key}.pub"], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.split()[1]


def nobody_tried(server: Sshd) -> bool:
    """Whether a server saw no attempt to log in."""
    log = server.log.read_text()
    return "Accepted" not in log and "Failed" not in log and "userauth" not in log


# --- host keys


def test_an_unknown_host_is_refused_with_its_fingerprint(sshd: Servers) -> None:
    server = sshd(known=False)
    said = refused(to(server, profile="it"))
    expected = fingerprint_of(server.host_keys[0])
    assert f"ed25519 {expected}" in said
    assert f"`slurmfork cluster trust it --fingerprint {expected}`" in said
    assert nobody_tried(server)


def test_a_changed_key_is_refused_with_file_and_line(sshd: Servers, client: Path) -> None:
    server = sshd(known=False)
    other = keygen(client / "other")
    sshd.know("# a comment", server.known_line(other))
    said = refused(to(server, accept=lambda settings, key: True))
    assert f"another host key (ed25519 {fingerprint_of(server.host_keys[0])}) than is known by {client}" in said
    assert "known_hosts:2" in said
    assert f"ssh-keygen -f {client}/known_hosts -R '[127.0.0.1]:{server.port}'" in said
    assert nobody_tried(server)


def test_a_key_of_another_kind_is_a_changed_key(sshd: Servers, client: Path) -> None:
    server = sshd(known=False)
    sshd.know(server.known_line(keygen(client / "other", "rsa")))
    assert "another host key" in refused(to(server, accept=lambda settings, key: True))


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_the_known_key_is_asked_for(kind: str, sshd: Servers) -> None:
    server = sshd(host_keys=("ed25519", "ecdsa", "rsa"), known=False)
    sshd.know(server.known_line(server.host_keys[["ed25519", "ecdsa", "rsa"].index(kind)]))
    assert says(to(server)) == "in"


def test_hashed_names_patterns_and_plain_ones(sshd: Servers, client: Path) -> None:
    server = sshd()
    known = client / "known_hosts"
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True, timeout=30)
    assert known.read_text().startswith("|1|")
    assert says(to(server)) == "in"
    key = public(server.host_keys[0])
    known.write_text(f"[127.0.*]:{server.port} {key}\n")
    assert says(to(server)) == "in"
    known.write_text(f"127.0.0.1 {key}\n")  # without its port, as OpenSSH takes it too
    assert says(to(server)) == "in"
    known.write_text(f"[127.0.*]:*,![127.0.0.1]:{server.port} {key}\n")
    assert "is not known" in refused(to(server))
    known.write_text(f"[127.0.0.1]:{server.port + 1} {key}\n")
    assert "is not known" in refused(to(server))


def test_a_revoked_key_is_refused(sshd: Servers) -> None:
    server = sshd()
    sshd.know(f"@revoked * {public(server.host_keys[0])}")
    assert "known_hosts:2 calls revoked" in refused(to(server))


def test_a_host_certificate(sshd: Servers, client: Path) -> None:
    authority, stranger = keygen(client / "ca"), keygen(client / "other-ca")
    server = sshd(known=False)
    host_key = server.host_keys[0]

    def certify(by: Path, principal: str, *options: str) -> None:
        command = ["ssh-keygen", "-q", "-s", str(by), "-I", "host", "-h", "-n", principal, *options, f"{host_key}.pub"]
        subprocess.run(command, check=True, timeout=30)
        server.down_and_up(f"HostCertificate {host_key}-cert.pub")

    sshd.know(f"@cert-authority [127.0.0.1]:* {public(authority)}")
    certify(authority, "127.0.0.1")
    assert says(to(server)) == "in"
    certify(authority, "elsewhere.example")
    assert "it is for elsewhere.example, not for 127.0.0.1" in refused(to(server))
    certify(authority, "127.0.0.1", "-V", "20200101:20210101")
    assert "expired" in refused(to(server))
    certify(stranger, "127.0.0.1")
    assert "authority that is not known" in refused(to(server))
    sshd.know(f"@revoked * {public(authority)}")
    certify(authority, "127.0.0.1")
    assert "revoked" in refused(to(server))


def test_an_accepted_key_is_written_for_openssh_too(sshd: Servers, client: Path) -> None:
    server = sshd(known=False)
    asked: list[ShownKey] = []

    def accept(settings: object, key: ShownKey) -> bool:
        asked.append(key)
        return True

    transport = to(server, accept=accept)
    transport.look_at_key()
    assert [key.fingerprint for key in asked] == [fingerprint_of(server.host_keys[0])]
    assert nobody_tried(server)
    (client / "known_hosts").write_text("# no line break at its end")
    lookup = transport.settings().lookup
    for hashed in (False, True):
        add(client / "known_hosts", lookup, asked[0].kind, asked[0].blob, hashed=hashed)
    assert [line.line for line in lines_about(lookup, [client / "known_hosts"])] == [2, 3]
    assert says(to(server)) == "in"
    found = subprocess.run(
        ["ssh-keygen", "-F", lookup, "-f", str(client / "known_hosts")], capture_output=True, text=True, timeout=30
    )
    assert found.stdout.count(public(server.host_keys[0]).split()[1]) == 2
    assert fingerprint(asked[0].blob) == asked[0].fingerprint


def test_an_unknown_jump_host_is_refused_too(sshd: Servers) -> None:
    jump, target = sshd(known=False), sshd()
    with pytest.raises(UnknownHost) as caught:
        to(target, proxy_jump=f"127.0.0.1:{jump.port}").open()
    assert caught.value.settings.port == jump.port


# --- keys


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
@pytest.mark.parametrize("form", ["RFC4716", "PEM", "PKCS8"])
def test_kinds_and_forms_of_keys(kind: str, form: str, sshd: Servers, client: Path) -> None:
    if kind == "ed25519" and form != "RFC4716":
        pytest.skip("ssh-keygen writes Ed25519 in its own form only")
    key = keygen(client / "key", kind, "", "-m", form)
    server = sshd()
    server.authorize(key)
    assert says(to(server, identity_file=str(key))) == "in"


def test_a_wrong_key_is_refused_in_a_line(sshd: Servers, client: Path) -> None:
    server = sshd()
    wrong = keygen(client / "wrong")
    said = refused(to(server, identity_file=str(wrong)))
    assert f"does not let {server.login} in: it refused {wrong}" in said
    assert "the account may be locked" in said
    assert "id_ed25519" not in said  # the profile's key is the only one


def test_no_key_at_all(sshd: Servers, client: Path) -> None:
    server = sshd()
    assert "is not there" in refused(to(server, identity_file=str(client / "none")))
    (client / "id_ed25519").unlink()
    assert "it wants publickey, and there is no such key" in refused(to(server))


def test_a_key_that_others_can_read(sshd: Servers, client: Path) -> None:
    (client / "id_ed25519").chmod(0o644)
    assert f"can be read by others (chmod 600 {client / 'id_ed25519'})" in refused(to(sshd()))


def test_a_passphrase_without_a_terminal(sshd: Servers, client: Path) -> None:
    server = sshd()
    key = keygen(client / "locked", "ed25519", "open sesame")
    server.authorize(key)
    said = refused(to(server, identity_file=str(key)))
    assert f"{key} needs a passphrase, and there is no terminal (`ssh-add {key}`)" in said


TALK = """
import sys
from slurmfork.errors import SlurmforkError
from slurmfork.remote.ssh import SshTransport
from slurmfork.remote.transport import run
host, port, user, key = sys.argv[1:]
transport = SshTransport(host, port=int(port), user=user, identity_file=key or None)
try:
    print("GOT", run(transport, ["echo", "in"]).output.decode())
    print("AGAIN", transport.open().is_active())
except SlurmforkError as error:
    print("REFUSED", error)
finally:
    transport.close()
"""


def talk(
    server: Sshd, dialog: list[tuple[str, str]], *, user: str | None = None, key: Path | None = None
) -> tuple[int, str]:
    """Log in from a terminal."""
    where = ["127.0.0.1", str(server.port), user or server.login, str(key or "")]
    return on_terminal([sys.executable, "-c", TALK, *where], dialog)


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_a_passphrase_from_the_terminal(kind: str, sshd: Servers, client: Path) -> None:
    server = sshd()
    key = keygen(client / "locked", kind, "open sesame", *(["-m", "PEM"] if kind == "rsa" else []))
    server.authorize(key)
    ask = f"Passphrase of {key}:"
    status, seen = talk(server, [(ask, "wrong one"), (ask, "open sesame")], key=key)
    assert (status, "GOT in" in seen) == (0, True), seen
    assert "has another passphrase" in seen
    assert "sesame" not in seen
    assert "wrong one" not in seen


def test_a_wrong_passphrase_is_refused(sshd: Servers, client: Path) -> None:
    server = sshd()
    key = keygen(client / "locked", "ed25519", "open sesame")
    _, seen = talk(server, [(f"Passphrase of {key}:", "wrong")] * 3, key=key)
    assert (
        f"REFUSED 127.0.0.1:{server.port} does not let {server.login} in: {key} was not opened: wrong passphrase"
        in seen
    )


# --- agents and certificates


def test_keys_of_an_agent(sshd: Servers, client: Path, agent: Agent) -> None:
    server = sshd()
    for kind in ("ed25519", "ecdsa", "rsa"):
        key = keygen(client / f"in-agent-{kind}", kind)
        agent.add(key)
        os.unlink(key)
        server.authorize(key)
        assert says(to(server)) == "in"
        assert says(to(server, identity_file=str(key))) == "in"  # known by its public half


def test_a_passphrase_is_not_asked_for_what_the_agent_holds(sshd: Servers, client: Path, agent: Agent) -> None:
    server = sshd()
    key = keygen(client / "locked")
    agent.add(key)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "open sesame", "-f", str(key)], check=True, timeout=30)
    server.authorize(key)
    assert says(to(server, identity_file=str(key))) == "in"


def test_many_keys_in_the_agent(sshd: Servers, client: Path, agent: Agent) -> None:
    """A server hangs up after six refusals: a named key is the only one that is offered."""
    server = sshd()
    agent.add(*(keygen(client / f"k{number}") for number in range(7)))
    said = refused(to(server))
    assert "hung up after it had refused agent key k0" in said
    assert "IdentitiesOnly" in said
    assert says(to(server, identity_file=str(client / "id_ed25519"))) == "in"
    (client / "config").write_text("Host *\n  IdentitiesOnly yes\n  IdentityFile ~/.ssh/id_ed25519\n")
    assert says(to(server)) == "in"


def test_an_agent_that_is_gone(sshd: Servers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "nothing"))
    assert says(to(sshd())) == "in"


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_a_users_certificate(kind: str, sshd: Servers, client: Path, agent: Agent) -> None:
    authority = keygen(client / "ca")
    server = sshd(f"TrustedUserCAKeys {client}/ca.pub", authorized=False)
    shutil.copy(f"{authority}.pub", server.directory / "ca.pub")
    server.down_and_up(f"TrustedUserCAKeys {server.directory}/ca.pub")
    key = keygen(client / "key", kind)
    command = ["ssh-keygen", "-q", "-s", str(authority), "-I", "me", "-n", server.login, f"{key}.pub"]
    subprocess.run(command, check=True, timeout=30)
    assert says(to(server, identity_file=str(key))) == "in"  # from KEY-cert.pub
    agent.add(key)
    os.unlink(key)
    os.unlink(f"{key}-cert.pub")
    assert says(to(server)) == "in"  # from the agent
    assert "Accepted certificate" in server.log.read_text() or "CA ED25519" in server.log.read_text()


# --- passwords and codes


@pytest.mark.parametrize(
    ("options", "word"), [(("PasswordAuthentication yes",), "password"), (PAM, "keyboard-interactive")]
)
def test_a_password_without_a_terminal(options: tuple[str, ...], word: str, sshd: Servers, client: Path) -> None:
    (client / "id_ed25519").unlink()
    said = refused(to(sshd(*options), user=sshd.user().name))
    assert f"it asks for a password or code ({word}), and there is no terminal to ask on" in said


@pytest.mark.parametrize("options", [("PasswordAuthentication yes",), PAM])
def test_a_password_from_the_terminal(options: tuple[str, ...], sshd: Servers, client: Path) -> None:
    (client / "id_ed25519").unlink()
    server, user = sshd(*options), sshd.user()
    status, seen = talk(server, [("Password:", "wrong"), ("Password:", user.password)], user=user.name)
    assert (status, "GOT in" in seen) == (0, True), seen
    assert user.password not in seen


def test_wrong_passwords(sshd: Servers, client: Path) -> None:
    (client / "id_ed25519").unlink()
    server, user = sshd("PasswordAuthentication yes"), sshd.user()
    _, seen = talk(server, [("Password:", "wrong")] * 3, user=user.name)
    assert f"does not let {user.name} in: what was typed was wrong" in seen


def test_a_key_and_then_a_password(sshd: Servers) -> None:
    server, user = sshd(*PAM, "AuthenticationMethods publickey,keyboard-interactive"), sshd.user()
    status, seen = talk(server, [("Password:", user.password)], user=user.name)
    assert (status, "GOT in" in seen) == (0, True), seen
    said = refused(to(server, user=user.name))
    assert "it asks for a password or code (keyboard-interactive), and there is no terminal" in said


@pytest.mark.parametrize("options", [(), PAM])
def test_a_locked_user(options: tuple[str, ...], sshd: Servers) -> None:
    user = sshd.user()
    server = sshd(*options)
    assert says(to(server, user=user.name)) == "in"
    user.lock()
    assert "may be locked" in refused(to(server, user=user.name))


def test_batch_mode_asks_nothing(sshd: Servers, client: Path) -> None:
    (client / "id_ed25519").unlink()
    (client / "config").write_text("Host *\n  BatchMode yes\n")
    _, seen = talk(sshd("PasswordAuthentication yes"), [])
    assert "there is no terminal to ask on" in seen
