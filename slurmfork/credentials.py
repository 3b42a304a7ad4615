"""Credentials of a run: a certificate authority of its own, and one certificate each for head, agents, clients
and hosts of engines.

Made by the head when it starts, in the run's 0700 ``credentials`` directory; the authority's key is never
written. Whoever has no certificate of this run's authority does not get past the TLS handshake, and a
certificate says which door it opens: agents join, clients ask.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from slurmfork.errors import RunDirError
from slurmfork.rundir import replace_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate

AUTHORITY = "ca.pem"
HEAD = "head"
AGENT = "agent"
CLIENT = "client"
ENGINE = "engine"
_VALID_DAYS = 400
_holders: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def server_name(run_id: str) -> str:
    """The name in the head's certificate: of the run, not of a host, so that any address or tunnel will do."""
    return f"{run_id.lower().replace('_', '-')}.head.slurmfork"


def engine_name(run_id: str) -> str:
    """The name in the certificate of the run's engines, wherever they are."""
    return f"{run_id.lower().replace('_', '-')}.engine.slurmfork"


def make(directory: Path, run_id: str) -> None:
    """Write ca.pem, and head, agent, client and engine.pem (certificate and key), all 0600; replaces old ones."""
    from cryptography.hazmat.primitives import serialization

    authority_key, authority = _issue(f"slurmfork run {run_id}", None, None)
    written = {AUTHORITY: authority.public_bytes(serialization.Encoding.PEM)}
    names = {HEAD: server_name(run_id), ENGINE: engine_name(run_id)}
    for holder in (HEAD, AGENT, CLIENT, ENGINE):
        name = names.get(holder)
        key, certificate = _issue(holder, (authority_key, authority), name)
        written[f"{holder}.pem"] = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    directory.mkdir(mode=0o700, exist_ok=True)
    directory.chmod(0o700)
    for file, data in written.items():
        replace_file(directory / file, data)


def _issue(
    holder: str, issuer: tuple[EllipticCurvePrivateKey, Certificate] | None, dns_name: str | None
) -> tuple[EllipticCurvePrivateKey, Certificate]:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, holder)])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[1].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2000, 1, 1))  # clocks of nodes differ, and are set back in mid-run
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    public = issuer[0].public_key() if issuer else key.public_key()
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
    builder = builder.add_extension(_usage(signs=issuer is None), critical=True)
    if dns_name:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(dns_name)]), critical=False)
    return key, builder.sign(issuer[0] if issuer else key, hashes.SHA256())


def _usage(*, signs: bool) -> Any:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def server_context(directory: Path) -> ssl.SSLContext:
    """TLS context of the head: asks every peer for a certificate of this run."""
    context = _context(directory, HEAD, server=True)
    context.num_tickets = 0  # nobody resumes a session; and what can be read from a connection is an answer
    return context


def engine_context(directory: Path) -> ssl.SSLContext:
    """TLS context of an engine's host, as a server."""
    context = _context(directory, ENGINE, server=True)
    context.num_tickets = 0
    return context


def agent_context(directory: Path) -> ssl.SSLContext:
    """TLS context of an agent."""
    return _context(directory, AGENT, server=False)


def client_context(directory: Path) -> ssl.SSLContext:
    """TLS context of a client."""
    return _context(directory, CLIENT, server=False)


def holder(tls: Any) -> str | None:
    """Who the peer of an SSL object is by its certificate: ``agent``, ``client``, ``head``; None without one."""
    if tls is None:
        return None
    if tls not in _holders:  # a certificate takes a while to read, and a connection keeps the one that it has
        subject = (tls.getpeercert() or {}).get("subject", ())
        found = [value for part in subject for key, value in part if key == "commonName"]
        _holders[tls] = str(found[0]) if found else None
    return _holders[tls]


def _context(directory: Path, who: str, *, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(directory / AUTHORITY)
        context.load_cert_chain(directory / f"{who}.pem")
    except (OSError, ssl.SSLError) as error:
        raise RunDirError(f"cannot use the run's credentials in {directory}: {error}") from None
    return context
