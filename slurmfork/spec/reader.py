"""Reads a spec file: from bytes to a checked Spec, or to the list of everything that is wrong with it.

The one door to specs for the CLI and Python users. Nothing is submitted, and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from slurmfork.errors import Problem, SpecError
from slurmfork.spec import checks
from slurmfork.spec import overrides as laid
from slurmfork.spec.convert import convert, describe
from slurmfork.spec.model import Spec
from slurmfork.spec.report import Report
from slurmfork.spec.yamlnodes import Mapping, Node, Scalar, Where, parse

LARGEST = 1_000_000  # bytes; a spec is written by hand


def load(path: str | os.PathLike[str], *, overrides: Sequence[str] = (), backend: str | None = None) -> Spec:
    """Read a spec file. ``overrides`` are ``key=value`` as with --set; ``backend`` goes over the file's.

    Raises SpecError with every problem found: in the file, in the overrides, or in reading the file at all.
    """
    return loads(text_of(path), file=os.fspath(path), overrides=overrides, backend=backend)


def text_of(path: str | os.PathLike[str]) -> str:
    """What is in a spec file, which is read once: it may be a pipe. Raises SpecError."""
    file = os.fspath(path)
    return _text(_bytes(file), file)


def loads(text: str, *, file: str | None = None, overrides: Sequence[str] = (), backend: str | None = None) -> Spec:
    """Read a spec from text, as ``load`` does; ``file`` names it in messages and locates its template."""
    if len(text.encode(errors="surrogatepass")) > LARGEST:
        raise _too_large(file)
    root, problems = parse(text, file)
    report = Report(file)
    report.extend(problems)
    top = _top(root, text, report)
    for override in overrides:
        laid.apply(top, override, report)
    if backend is not None:
        laid.lay(top, ["backend"], Scalar(backend, True, laid.BACKEND))
    base = os.path.dirname(file or "")  # noqa: PTH120
    spec = None
    if isinstance(root, Mapping):
        spec = convert(top, report)
        checks.check(spec, report, base)
    if spec is None or report.problems:
        raise SpecError(report.in_order())
    return checks.settle(spec, base)


def _top(root: Node | None, text: str, report: Report) -> Mapping:
    """The mapping at the top; an empty one, and a problem, where there is none."""
    if isinstance(root, Mapping):
        return root
    empty = root is None or (isinstance(root, Scalar) and root.value is None)
    if not report.problems:
        got = "the file is empty" if empty else f"expected keys and values at the top, got {describe(root)}"  # type: ignore[arg-type]
        report.add("", f"{got}; `slurmfork init` writes a spec to begin with", at=Where(report.file, 1))
    return Mapping(Where(report.file, 1))


def _bytes(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            data = opened.read(LARGEST + 1)
    except IsADirectoryError:
        raise SpecError([Problem("is a directory; give the spec file in it", file=file)]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError([Problem(f"cannot be read: {reason}", file=file)]) from None
    if len(data) > LARGEST:
        raise _too_large(file)
    return data


def _text(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError([Problem("is not UTF-8; save it in that encoding", line=line, file=file)]) from None


def _too_large(file: str | None) -> SpecError:
    return SpecError([Problem(f"is larger than {LARGEST:,} bytes; a spec is a short text", file=file)])
