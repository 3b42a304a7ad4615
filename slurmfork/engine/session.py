"""A session: the calls of one caller, over as many connections as it takes. Each call is done once.

Sync methods run and answer in their engine's thread, async ones in the loop; what ends first is answered first.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from slurmfork.engine import wire
from slurmfork.engine.answers import Answers, packed
from slurmfork.engine.channel import Channel
from slurmfork.engine.codec import pack, unpack, unpack_pickle
from slurmfork.engine.hosted import Engines, Hosted, Running, current
from slurmfork.engine.inbox import Arrived
from slurmfork.engine.yields import check_returns, check_streams, more, produce, stream
from slurmfork.errors import CodecError, EngineError

LARGE = 8 * 1024 * 1024  # bytes of a result beyond which the loop does not make the frame itself


class Session:
    """Serves the calls of one caller. ``join`` and ``leave`` tell of its connections, ``take`` of what comes."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._answers = Answers()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._does: dict[type, Callable[[Any, Arrived], None]] = {
            wire.Call: self._call,
            wire.Create: self._create,
            wire.Remove: self._remove,
            wire.Ask: self._ask,
            wire.Cancel: lambda message, _: self._answers.give_up(message.id),
            wire.More: lambda message, _: more(self._answers, message),
            wire.Received: lambda message, _: self._answers.received(message.ids),
        }

    def join(self, channel: Channel) -> None:
        """The caller is there, by this connection."""
        self._answers.channel = channel

    def leave(self, channel: Channel) -> bool:
        """This connection is gone; whether the session has no other."""
        if self._answers.channel is channel:
            self._answers.channel = None
        return self.deserted

    @property
    def deserted(self) -> bool:
        """Whether the caller has no connection now."""
        return self._answers.channel is None

    def close(self) -> None:
        """The caller does not come back: nobody waits for its calls."""
        self._answers.give_up_all()

    def take(self, arrived: Arrived) -> None:
        """What came from the caller; raises CodecError for what is not a caller's to say."""
        does = self._does.get(type(arrived.message))
        if does is None:
            raise CodecError("a caller does not say that")
        does(arrived.message, arrived)

    # --- calls

    def _call(self, message: wire.Call, arrived: Arrived) -> None:
        self._answers.received(message.received)
        running = self._answers.begin(message.id, message.window)
        if running is None:
            return
        try:
            if self._engines.closing:
                raise EngineError(f"{self._engines.home} is ending: nothing is called any more")
            if message.pickled and not self._engines.may_pickle(message.worker):
                raise CodecError(f"{message.worker} takes no pickled calls: `pickle: true` in its role allows them")
            engine = self._engines.get(message.worker, message.engine)
            method, for_loop = engine.method(message.method)
        except Exception as error:  # EngineError, or what looking the method up has raised
            self._answers.fail(running, error)
            return
        if for_loop:
            self._start(running, self._in_loop(running, message, arrived, method))
        else:
            engine.do(partial(self._in_thread, engine, running, message, arrived, method))

    def _in_thread(
        self, engine: Hosted, running: Running, message: wire.Call, arrived: Arrived, method: Callable[..., Any]
    ) -> None:
        """Call a sync method; in its engine's thread."""
        if running.cancelled:
            return
        current.set(running)
        engine.begin(message.method)
        try:
            if self._engines.closing:
                raise EngineError(f"{self._engines.home} is ending: this call was not begun")
            arguments, keywords = self._read(message, arrived)
            result = method(*arguments, **keywords)
            if inspect.isawaitable(result):
                self._loop.call_soon_threadsafe(self._finish_later, running, message, result)
            elif inspect.isasyncgen(result):
                self._loop.call_soon_threadsafe(self._stream_later, running, message, result)
            elif inspect.isgenerator(result):
                check_streams(message)
                produce(self._answers, engine, running, message, result)
            else:
                check_returns(message)
                self._answers.result(running, message, result, later=not engine.idle)
        except BaseException as error:
            self._answers.fail(running, error, later=not engine.idle)
        finally:
            engine.end()
            current.set(None)

    async def _in_loop(
        self, running: Running, message: wire.Call, arrived: Arrived, method: Callable[..., Any]
    ) -> None:
        arguments, keywords = self._read(message, arrived)
        result = method(*arguments, **keywords)
        del arrived
        if inspect.isasyncgen(result):
            await stream(self._answers, running, message, result)
        else:
            await self._finish(running, message, result)

    def _read(self, message: wire.Call, arrived: Arrived) -> tuple[list[Any], dict[str, Any]]:
        if message.pickled:
            arguments, keywords = unpack_pickle(arrived.body, arrived.buffers)
        else:
            arguments, keywords = unpack(arrived.body, arrived.buffers, self._engines.packages)
        return arguments, keywords

    def _start(self, running: Running, work: Coroutine[Any, Any, None]) -> None:
        """Do the loop's part of a call in a task of its own."""

        async def guarded() -> None:
            current.set(running)
            try:
                await work
            except asyncio.CancelledError as error:
                if not running.cancelled:  # the method's own doing, or the end of the process
                    self._answers.fail(running, EngineError(f"cancelled in its engine {error}".rstrip()))
            except BaseException as error:
                self._answers.fail(running, error, later=True)

        running.task = self._loop.create_task(guarded())
        self._tasks.add(running.task)
        running.task.add_done_callback(self._tasks.discard)

    def _finish_later(self, running: Running, message: wire.Call, result: Awaitable[Any]) -> None:
        self._start(running, self._finish(running, message, result))

    def _stream_later(self, running: Running, message: wire.Call, items: Any) -> None:
        self._start(running, stream(self._answers, running, message, items))

    async def _finish(self, running: Running, message: wire.Call, result: Awaitable[Any]) -> None:
        value = await result
        check_returns(message)
        made = packed(message, value)
        make = partial(self._answers.frame, wire.Result(message.id, message.pickled), made)
        large = sum(data.nbytes for data in made.buffers) > LARGE
        frame = await self._loop.run_in_executor(None, make) if large else make()
        self._answers.answer(running, frame, later=True)

    # --- engines

    def _create(self, message: wire.Create, arrived: Arrived) -> None:
        def read() -> tuple[list[Any], dict[str, Any]]:
            arguments, keywords = unpack(arrived.body, arrived.buffers, self._engines.packages)
            return arguments, keywords

        if running := self._answers.begin(message.id):
            making = self._engines.create(
                message.worker, message.engine, message.path, read, pickle=message.pickle and not message.engine
            )
            self._start(running, self._then_answer(running, making))

    def _remove(self, message: wire.Remove, _: Arrived) -> None:
        if running := self._answers.begin(message.id):
            self._start(running, self._then_answer(running, self._engines.remove(message.worker, message.engine)))

    async def _then_answer(self, running: Running, work: Awaitable[None]) -> None:
        await work
        self._answers.answer(running, wire.frame(wire.Result(running.id, False), pack(None)))

    def _ask(self, message: wire.Ask, _: Arrived) -> None:
        if running := self._answers.begin(message.id):
            health = {"worker": self._engines.home, "pid": os.getpid(), "engines": self._engines.health()}
            self._answers.answer(running, wire.frame(wire.Result(message.id, False), pack(health)))
