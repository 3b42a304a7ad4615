"""This slurmfork as a wheel, made of its own files: the same bytes for the same files, from a checkout or installed."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import zipfile
from importlib import metadata
from pathlib import Path

from slurmfork.errors import SlurmforkError
from slurmfork.version import __version__

EPOCH = (1980, 1, 1, 0, 0, 0)
WHEEL = "Wheel-Version: 1.0\nGenerator: slurmfork\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
LEFT_OUT = ("__pycache__", ".pyc", ".pyo")


def build(into: Path) -> Path:
    """Write the wheel into a directory; its path. Raises SlurmforkError where there is no metadata."""
    package = Path(__file__).resolve().parent.parent
    found = _distribution()
    info = f"slurmfork-{__version__}.dist-info"
    files = {f"slurmfork/{name}": data for name, data in _files(package).items()}
    files[f"{info}/METADATA"] = (found.read_text("METADATA") or found.read_text("PKG-INFO") or "").encode()
    files[f"{info}/WHEEL"] = WHEEL.encode()
    files[f"{info}/entry_points.txt"] = (found.read_text("entry_points.txt") or "").encode()
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    wheel = into / f"slurmfork-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return wheel


def requires() -> list[str]:
    """What it depends on, extras apart."""
    return [text for text in _distribution().requires or [] if not re.search(r"""\bextra\s*==""", text)]


def _distribution() -> metadata.Distribution:
    """The metadata of this very version: beside a checkout there may be an older one's."""
    ours = [one for one in metadata.distributions(name="slurmfork") if one.version == __version__]
    if not ours:
        raise SlurmforkError(f"slurmfork {__version__} is not installed as such here; `pip install` it, then try again")
    return next((one for one in ours if one.read_text("METADATA")), ours[0])


def _files(package: Path) -> dict[str, bytes]:
    """The package's files by their names in it; in a checkout the templates are behind a link."""
    found = {}
    for directory, inner, names in os.walk(package, followlinks=True):
        inner[:] = sorted(name for name in inner if name not in LEFT_OUT)
        for name in sorted(names):
            if not name.endswith(LEFT_OUT):
                path = Path(directory, name)
                found[path.relative_to(package).as_posix()] = path.read_bytes()
    return found


def _record(files: dict[str, bytes], own: str) -> bytes:
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    return "".join([*lines, f"{own},,\n"]).encode()
