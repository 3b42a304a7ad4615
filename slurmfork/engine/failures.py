"""Failures: exceptions as they travel from an engine to its caller, and become exceptions again.

By type name and arguments, with the traceback as text. A class that is found here is filled in without its __init__,
so that no code of anybody's runs; one that is not found makes an EngineCallError.
"""

from __future__ import annotations

import builtins
import os
import traceback
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from slurmfork.engine import classes
from slurmfork.engine.codec import Packed, pack, unpack
from slurmfork.errors import CodecError, EngineCallError, SlurmforkError, WorkerFailed

if TYPE_CHECKING:
    from slurmfork.messages import WorkerView

_OURS = os.path.dirname(__file__)  # noqa: PTH120 (light)
_ENDS = {"exited": "has ended", "failed": "has failed", "stopped": "was stopped"}
_UNRAISABLE = (StopIteration, StopAsyncIteration)  # a future may not have them


class RemoteTraceback(Exception):
    """The cause of an exception that an engine has raised: where it did, in words; ``worker`` is whose engine."""

    def __init__(self, text: str, worker: str = "") -> None:
        super().__init__(text, worker)
        self.text = text
        self.worker = worker

    def __str__(self) -> str:
        return f'\n"""\n{f"In {self.worker}. " if self.worker else ""}{self.text}"""'


def pack_failure(error: BaseException) -> Packed:
    """What is sent, of whatever a method raises. Arguments and attributes that cannot travel stay behind."""
    try:
        return _packed(error)
    except Exception as fault:  # of its own making: an exception may be of any class
        told = EngineCallError(f"{type(error).__qualname__}, of which no more can be told ({type(fault).__name__})")
        return _packed(told)


def _packed(error: BaseException) -> Packed:
    kind = type(error)
    name = [kind.__module__, kind.__qualname__]
    text = _words(error)
    arguments, whole = _sendable(error.args), True
    if arguments is None:
        arguments, whole = [text], False
    attributes = {key: value for key, value in vars(error).items() if _sendable(value) is not None}
    notes = [str(note) for note in attributes.pop("__notes__", ())]
    return pack([name, whole, arguments, attributes, notes, text, _traceback(error)])


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as fault:
        return f"(its __str__ raises {type(fault).__name__})"


def _traceback(error: BaseException) -> str:
    """In words; empty for what is slurmfork's own to say, which has no line of the user's behind it."""
    trace = _beyond_us(error.__traceback__)
    if trace is None and isinstance(error, SlurmforkError) and error.__cause__ is None:
        return ""
    return "".join(traceback.format_exception(type(error), error, trace or _innermost(error.__traceback__)))


def unpack_failure(body: bytes, buffers: Sequence[Any], packages: Collection[str], worker: str = "") -> Exception:
    """The exception that a worker's engine has raised; its cause is the remote traceback, where there is one."""
    (module, name), whole, arguments, attributes, notes, text, trace = unpack(body, buffers, packages)
    error = _again(module, name, arguments, attributes, packages) if whole else None
    if error is None:
        shown = name if module == "builtins" else f"{module}.{name}"
        error = EngineCallError(f"{shown}: {text}" if text else shown, f"{module}:{name}")
    if notes:
        error.__notes__ = notes  # type: ignore[attr-defined]
    if trace:
        error.__cause__ = RemoteTraceback(trace, worker)
    return error


def _again(
    module: str, name: str, arguments: Sequence[Any], attributes: dict[str, Any], packages: Collection[str]
) -> Exception | None:
    try:
        kind = classes.find(module, name, packages)
        if not issubclass(kind, Exception) or issubclass(kind, _UNRAISABLE):
            return None
        if kind.__module__ == builtins.__name__:
            made: Exception = kind(*arguments)
        elif kind.__new__ in (Exception.__new__, OSError.__new__) or issubclass(kind, OSError):
            made = kind.__new__(kind, *arguments)
        else:
            return None
    except Exception:  # whatever a class makes of arguments that are not what it expects
        return None
    made.args = tuple(arguments)
    for key, value in attributes.items():
        made.__dict__[key] = value
    return made


def _sendable(value: Any) -> Any:
    try:
        pack(value)
    except CodecError:
        return None
    return value


def _beyond_us(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the host's own frames, which tell a user nothing; None if there are no others."""
    rest = trace
    while rest is not None and rest.tb_frame.f_code.co_filename.startswith(_OURS):
        rest = rest.tb_next
    return rest


def _innermost(trace: TracebackType | None) -> TracebackType | None:
    """Its last frame alone."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


# --- workers that are gone -----------------------------------------------------------------------------------


def verdict(worker: str, now: WorkerView | None, before: WorkerView) -> WorkerFailed | None:
    """What calls to a worker fail with; None while it may still live."""
    if now is None:
        return WorkerFailed(f"{worker} is gone", worker)
    from slurmfork.names import UP_STATES

    if now.state in UP_STATES and now.pid == before.pid:
        return None
    return worker_failed(now)


def worker_failed(view: WorkerView) -> WorkerFailed:
    """A worker's end as an error."""
    status = f", exit status {view.exit_status}" if view.exit_status is not None else ""
    reason = f": {view.reason}" if view.reason else ""
    tail = f"\n{view.log_tail}" if view.log_tail else ""
    how = _ENDS.get(view.state, f"is {view.state}")
    return WorkerFailed(f"{view.worker} {how}{status}{reason}{tail}", view.worker, view.exit_status, view.log_tail)
