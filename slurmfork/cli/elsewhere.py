"""Elsewhere: a verb with --cluster is checked here, run on that cluster's login node, and prints here.

What the user typed is understood here, so a mistake costs no connection; a spec is read here, and goes along.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from slurmfork import clusters
from slurmfork.cli import output, sending
from slurmfork.errors import SlurmforkError, SpecError, UsageError
from slurmfork.remote.frames import Hello, Request, Terminal
from slurmfork.remote.visit import Ear, NotThere, OtherVersion, Show, Visit
from slurmfork.version import __version__

if TYPE_CHECKING:
    from slurmfork.clusters import Cluster
    from slurmfork.remote.upload import Upload
    from slurmfork.spec import Code, Spec

# Done once, whatever becomes of the connection; the other verbs only look, and are simply asked again.
CHANGING = frozenset({"submit", "run", "fork", "stop", "cancel", "clean", "prune"})
STAYING = frozenset({"validate", "plan"})  # need the profile, and nobody over there
MARKED = frozenset({"logs"})
ATTENDED = frozenset({"run"})  # ends when nobody reads it any more
PATIENT = 3  # signals after which we leave, even if the far side does not answer
_LAST_WORDS = 2000
_LONGEST_NAME = 100


class LeftAlone(SlurmforkError):
    """We were told to leave before the far side has answered."""

    exit_code = 130
    kind = "interrupted"


def run(ctx: click.Context, cluster: str) -> int:
    """Run the verb of ``ctx`` on a cluster; returns its exit status."""
    profile = clusters.find(cluster)
    request, spec = _request(ctx, cluster, profile)
    verb = request.args[0]
    bar = sending.Bar(cluster)
    upload = (
        _upload(spec.code, ctx.params.get("root") or profile.root, bar) if spec and spec.code and request.once else None
    )
    screen = _Screen(as_json=bool(ctx.params.get("as_json")))
    visit = Visit(
        lambda: clusters.transport_of(cluster, profile),
        clusters.python_there(profile),
        request,
        Ear(screen.out, screen.err, output.complain),
        show=_show(request),
        check=lambda hello: _check(hello, cluster, changing=verb in CHANGING),
        upload=upload,
    )
    if verb in ATTENDED:
        screen.attend(lambda: visit.interrupt(signal.SIGHUP))
    try:
        with _signals(visit), bar:
            status = visit.run()
    except NotThere as error:
        raise NotThere(f"{error}; `slurmfork cluster bootstrap {cluster}` puts it there") from None
    except KeyboardInterrupt:
        if not visit.under_way:
            raise
        raise LeftAlone(f"not waiting for {cluster}; what was asked goes on over there") from None
    screen.conclude(verb, status)
    return status


class _Screen:
    """What comes from over there goes to stdout and stderr as it is."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._lost: Callable[[], object] | None = None
        self._written = False
        self._words = b""

    def attend(self, lost: Callable[[], object]) -> None:
        """Have it told at once when nobody reads any more; what comes then goes nowhere."""
        self._lost = lost

        def watch() -> None:
            readers = select.poll()
            for descriptor in (1, 2):
                readers.register(descriptor, 0)
            readers.poll()
            if output.give_up_lost():
                lost()

        threading.Thread(target=watch, daemon=True).start()

    def out(self, data: bytes) -> None:
        self._written = True
        if self._as_json:
            output.claim()
        self._write(sys.stdout, data)

    def err(self, data: bytes) -> None:
        self._words = (self._words + data)[-_LAST_WORDS:]
        self._write(sys.stderr, data)

    def _write(self, stream: Any, data: bytes) -> None:
        try:
            stream.buffer.write(data)
            stream.buffer.flush()
        except OSError:
            if self._lost is None:
                raise
            output.give_up_lost()
            self._lost()

    def conclude(self, verb: str, status: int) -> None:
        """With --json, a verb that could not even say that it failed has a document, too."""
        if self._as_json and status and not self._written:
            said = self._words.decode(errors="replace").strip().splitlines()
            words = said[-1].removeprefix("slurmfork: ") if said else f"`{verb}` ended with status {status}"
            output.error_document(SlurmforkError(words), words, "failed")


def lay_defaults(ctx: click.Context, cluster: str) -> None:
    """Have a verb that stays here see a spec as it would be on the cluster."""
    from slurmfork.spec import reader

    profile = clusters.find(cluster)
    overrides = tuple(ctx.params["overrides"])
    with suppress(SpecError):  # the verb itself says what is wrong
        spec = reader.load(ctx.params["spec"], overrides=overrides, backend=ctx.params["backend"])
        ctx.params["overrides"] = (*overrides, *_defaults(spec, profile))


def _show(request: Request) -> Show:
    """A person on a terminal sees what comes; a program gets all of it, or, should the connection fail, nothing."""
    if request.once:
        return Show.AT_ONCE
    if request.args[0] in MARKED:
        return Show.AT_MARKS
    return Show.AT_ONCE if request.terminal and request.terminal.out else Show.AT_END


def _check(hello: Hello, cluster: str, *, changing: bool) -> None:
    if hello.version == __version__:
        return
    words = f"{cluster} has slurmfork {hello.version}, here it is {__version__}"
    mend = f"`slurmfork cluster bootstrap {cluster}` makes them the same"
    if changing:
        raise OtherVersion(f"{words}; {mend}")
    output.complain(f"{words}; {mend}")


@contextmanager
def _signals(visit: Visit) -> Iterator[None]:
    """Ctrl-C and the like are for the verb over there, which knows what they mean."""
    count = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if not visit.under_way or count >= PATIENT:
            raise KeyboardInterrupt
        if not visit.interrupt(number):
            output.complain("that is passed on when the connection is back; once more does not wait for it")
            count = PATIENT - 1

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup: stays ignored
            before[number] = signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- what was typed, as a request


def _request(ctx: click.Context, cluster: str, profile: Cluster) -> tuple[Request, Spec | None]:
    verb = ctx.command.name or ""
    made = Request(
        request_id=uuid.uuid4().hex, args=[verb], once=verb in CHANGING, terminal=_terminal(), cluster=cluster
    )
    spec, text = _read_spec(ctx, made) if isinstance(ctx.params.get("spec"), Path) else (None, b"")
    options, arguments = [], []
    for param in ctx.command.params:
        if isinstance(param, click.Argument):
            arguments.append((param, ctx.params.get(param.name or "")))
        elif ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE:
            options.append((param, ctx.params.get(param.name or "")))
    for param, value in options:
        if param.name not in ("cluster", "template", "overrides"):
            made.args += _option(param, value)
    if profile.root and "root" in ctx.params and ctx.params["root"] is None:
        made.args += ["--root", profile.root]
    for override in (*(ctx.params.get("overrides") or ()), *(_defaults(spec, profile) if spec else ())):
        made.args += ["--set", override]
    if template := ctx.params.get("template"):
        made.args.append("--template")
        _send_file(made, template, _read(template))
    if spec and (own := spec.slurm.get("template")):  # it will lie beside the spec
        path = Path(str(own))
        made.args += ["--set", f"slurm.template={_add_file(made, path, _read(path))}"]
    if spec and spec.code:  # it is sent, and not looked for beside the spec over there
        made.args += ["--set", "code.path=."]
    made.args.append("--")
    for param, value in arguments:
        if param.name == "spec" and value is not None:
            _send_file(made, value, text)
        elif value is not None:
            made.args += map(str, value) if param.nargs == -1 else [str(value)]
    return made, spec


def _upload(code: Code, root: str | None, bar: sending.Bar) -> Upload:
    """What goes first; what may not go is refused before anything is sent."""
    from slurmfork import rundir
    from slurmfork.code.listing import listing
    from slurmfork.remote.upload import Upload

    found = listing(code, avoid=[rundir.default_root()])
    for note in found.notes:
        output.complain(note)
    return Upload(found, root, bar, output.complain)


def _read_spec(ctx: click.Context, made: Request) -> tuple[Spec, bytes]:
    """The spec, checked here, and its text; what is secret in it comes from this environment."""
    from slurmfork import submission
    from slurmfork.spec import reader

    path, overrides = ctx.params["spec"], list(ctx.params.get("overrides") or ())
    text = reader.text_of(path)
    spec = reader.loads(text, file=str(path), overrides=overrides, backend=ctx.params.get("backend"))
    if made.once:
        made.secrets = submission.secrets(spec, os.environ)
    return spec, text.encode()


def _defaults(spec: Spec, profile: Cluster) -> list[str]:
    """What the profile says of Slurm's options, and the spec does not."""
    return [f"slurm.{name}={_yaml(value)}" for name, value in profile.slurm.items() if name not in spec.slurm]


def _yaml(value: object) -> str:
    """A value as --set takes it; text that it would read as something else in quotes."""
    text = str(value)
    return json.dumps(text) if isinstance(value, str) and (text != text.strip() or text[:1] in "\"'[{") else text


def _send_file(made: Request, path: Path, data: bytes) -> None:
    """Send a file along, and name it on the command line, where it will be a path over there."""
    made.paths.append(len(made.args))
    made.args.append(_add_file(made, path, data))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _add_file(made: Request, path: Path, data: bytes) -> str:
    plain = "".join(char if char.isascii() and (char.isalnum() or char in "_.+-") else "_" for char in path.name)
    name = plain.lstrip(".+-")[-_LONGEST_NAME:].lstrip(".+-") or "file"
    if made.files:
        name = f"{len(made.files)}-{name}"
    made.files[name] = data
    return name


def _option(param: click.Parameter, value: Any) -> list[str]:
    """An option as words of a command line."""
    name = max(param.opts, key=len)
    if getattr(param, "is_flag", False):
        return [name] if value or value is None else []
    if not param.expose_value:  # it means nothing to this verb
        return []
    if getattr(param, "multiple", False):
        return [word for one in value for word in (name, _word(one))]
    return [name, _word(value)]


def _word(value: Any) -> str:
    if isinstance(value, tuple):  # NAME=VALUE
        return "=".join(value)
    return f"{value:.9f}s" if isinstance(value, float) else str(value)


def _terminal() -> Terminal | None:
    out, err = sys.stdout.isatty(), sys.stderr.isatty()
    if not (out or err):
        return None
    size = shutil.get_terminal_size()
    return Terminal(
        columns=size.columns,
        lines=size.lines,
        out=out,
        err=err,
        name=os.environ.get("TERM", ""),
        plain=bool(os.environ.get("NO_COLOR")),
    )
