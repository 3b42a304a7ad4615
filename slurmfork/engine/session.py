"""A session: the calls of one caller, over as many connections as it takes. Each call is done once.

An answer is kept until the caller says that it has it: a call that comes again after a lost connection gets the same.
Sync methods run and answer in their engine's thread, async ones in the loop; what ends first is answered first.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any

from slurmfork.engine import wire
from slurmfork.engine.channel import Channel
from slurmfork.engine.codec import Packed, pack, pack_pickle, unpack, unpack_pickle
from slurmfork.engine.failures import pack_failure
from slurmfork.engine.hosted import Engines, Hosted, Running, current
from slurmfork.engine.wire import Arrived
from slurmfork.errors import CodecError, EngineError

LARGE = 8 * 1024 * 1024  # bytes of a result beyond which the loop does not make the frame itself


class Session:
    """Serves the calls of one caller. ``join`` and ``leave`` tell of its connections, ``take`` of what comes."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._running: dict[int, Running] = {}
        self._kept: dict[int, wire.Frame] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._does: dict[type, Callable[[Any, Arrived], None]] = {
            wire.Call: self._call,
            wire.Create: self._create,
            wire.Remove: self._remove,
            wire.Ask: self._ask,
            wire.Cancel: self._cancel,
            wire.More: self._more,
            wire.Received: self._received,
        }

    def join(self, channel: Channel) -> None:
        """The caller is there, by this connection."""
        self._channel = channel

    def leave(self, channel: Channel) -> bool:
        """This connection is gone; whether the session has no other."""
        if self._channel is channel:
            self._channel = None
        return self._channel is None

    @property
    def deserted(self) -> bool:
        """Whether the caller has no connection now."""
        return self._channel is None

    def close(self) -> None:
        """The caller does not come back: nobody waits for its calls."""
        for number in list(self._running):
            self._give_up(number)
        self._kept.clear()

    def take(self, arrived: Arrived) -> None:
        """What came from the caller; raises CodecError for what is not a caller's to say."""
        does = self._does.get(type(arrived.message))
        if does is None:
            raise CodecError("a caller does not say that")
        does(arrived.message, arrived)

    # --- calls

    def _begin(self, number: int, credit: int = 0) -> Running | None:
        """A new call; None for one that came before, which then gets what it would have got."""
        if number in self._running:
            return None
        if (kept := self._kept.get(number)) is not None:
            if self._channel is not None and not kept.lent:
                self._channel.send(kept)
            return None
        running = self._running[number] = Running(number, credit)
        return running

    def _call(self, message: wire.Call, arrived: Arrived) -> None:
        for number in message.received:
            self._kept.pop(number, None)
        running = self._begin(message.id, message.window)
        if running is None:
            return
        try:
            if self._engines.closing:
                raise EngineError(f"{self._engines.home} is ending: nothing is called any more")
            if message.pickled and not self._engines.may_pickle(message.worker):
                raise CodecError(f"{message.worker} takes no pickled calls: `pickle: true` in its role allows them")
            engine = self._engines.get(message.worker, message.engine)
            method, for_loop = engine.method(message.method)
        except EngineError as error:
            self._fail(running, error)
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
            arguments, keywords = self._read(message, arrived)
            result = method(*arguments, **keywords)
            if inspect.isawaitable(result):
                self._loop.call_soon_threadsafe(self._finish_later, running, message, result)
            elif inspect.isasyncgen(result):
                self._loop.call_soon_threadsafe(self._stream_later, running, message, result)
            elif inspect.isgenerator(result):
                self._check_streams(message)
                self._produce(engine, running, message, result)
            else:
                self._check_result(message)
                self._answer(running, self._result(message, result), later=not engine.idle)
        except BaseException as error:
            self._fail(running, error, later=not engine.idle)
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
            await self._stream(running, message, result)
        else:
            await self._finish(running, message, result)

    def _start(self, running: Running, work: Any) -> None:
        """Do the loop's part of a call in a task of its own."""

        async def guarded() -> None:
            current.set(running)
            try:
                await work
            except asyncio.CancelledError as error:
                if not running.cancelled:  # the method's own doing, or the end of the process
                    self._fail(running, EngineError(f"the method was cancelled in its engine {error}".rstrip()))
            except BaseException as error:
                self._fail(running, error, later=True)

        running.task = self._loop.create_task(guarded())
        self._tasks.add(running.task)
        running.task.add_done_callback(self._tasks.discard)

    def _finish_later(self, running: Running, message: wire.Call, result: Awaitable[Any]) -> None:
        self._start(running, self._finish(running, message, result))

    def _stream_later(self, running: Running, message: wire.Call, items: Any) -> None:
        self._start(running, self._stream(running, message, items))

    async def _finish(self, running: Running, message: wire.Call, result: Awaitable[Any]) -> None:
        value = await result
        self._check_result(message)
        packed = _packed(message, value)
        make = partial(self._frame, wire.Result(message.id, message.pickled), packed)
        if sum(data.nbytes for data in packed.buffers) > LARGE:
            frame = await self._loop.run_in_executor(None, make)
        else:
            frame = make()
        self._answer(running, frame, later=True)

    # --- streams

    def _produce(self, engine: Hosted, running: Running, message: wire.Call, items: Generator[Any, Any, Any]) -> None:
        """Send items of a sync generator while there is credit; in its engine's thread, between other calls."""
        current.set(running)
        again = partial(self._produce, engine, running, message, items)
        engine.begin(message.method)
        try:
            while True:
                with running.lock:
                    if running.cancelled:
                        items.close()
                        return
                    if running.credit <= 0:
                        running.more = partial(engine.do, again)
                        return
                    running.credit -= 1
                value = next(items)
                self._send(self._frame(wire.Item(message.id, message.pickled), _packed(message, value)))
                if not engine.idle:
                    engine.do(again)  # others have their turn
                    return
        except StopIteration:
            self._answer(running, self._result(message, None))
        except BaseException as error:
            self._fail(running, error)
        finally:
            engine.end()
            current.set(None)

    async def _stream(self, running: Running, message: wire.Call, items: Any) -> None:
        """Send items of an async generator while there is credit."""
        self._check_streams(message)
        ready = asyncio.Event()
        try:
            async for value in items:
                self._send(self._frame(wire.Item(message.id, message.pickled), _packed(message, value)))
                running.credit -= 1
                while running.credit <= 0:
                    ready.clear()
                    running.more = ready.set
                    await ready.wait()
            self._answer(running, self._result(message, None))
        finally:
            await items.aclose()

    def _more(self, message: wire.More, _: Arrived) -> None:
        running = self._running.get(message.id)
        if running is not None:
            with running.lock:
                running.credit += message.items
                go_on, running.more = running.more, None
            if go_on is not None:
                go_on()

    # --- engines

    def _create(self, message: wire.Create, arrived: Arrived) -> None:
        def read() -> tuple[list[Any], dict[str, Any]]:
            arguments, keywords = unpack(arrived.body, arrived.buffers, self._engines.packages)
            return arguments, keywords

        if running := self._begin(message.id):
            making = self._engines.create(
                message.worker, message.engine, message.path, read, pickle=message.pickle and not message.engine
            )
            self._start(running, self._then_answer(running, making))

    def _remove(self, message: wire.Remove, _: Arrived) -> None:
        if running := self._begin(message.id):
            self._start(running, self._then_answer(running, self._engines.remove(message.worker, message.engine)))

    async def _then_answer(self, running: Running, work: Awaitable[None]) -> None:
        await work
        self._answer(running, self._frame(wire.Result(running.id, False), pack(None)))

    def _ask(self, message: wire.Ask, _: Arrived) -> None:
        if running := self._begin(message.id):
            health = {"worker": self._engines.home, "pid": os.getpid(), "engines": self._engines.health()}
            self._answer(running, self._frame(wire.Result(message.id, False), pack(health)))

    # --- giving up

    def _cancel(self, message: wire.Cancel, _: Arrived) -> None:
        self._give_up(message.id)

    def _give_up(self, number: int) -> None:
        running = self._running.pop(number, None)
        self._kept.pop(number, None)
        if running is None:
            return
        with running.lock:
            running.cancelled = True
            go_on, running.more = running.more, None
        if running.task is not None:
            running.task.cancel()
        elif go_on is not None:
            go_on()  # so that the generator is closed, in its own thread

    def _received(self, message: wire.Received, _: Arrived) -> None:
        for number in message.ids:
            self._kept.pop(number, None)

    # --- answers, from any thread

    def _read(self, message: wire.Call, arrived: Arrived) -> tuple[list[Any], dict[str, Any]]:
        if message.pickled:
            arguments, keywords = unpack_pickle(arrived.body, arrived.buffers)
        else:
            arguments, keywords = unpack(arrived.body, arrived.buffers, self._engines.packages)
        return arguments, keywords

    def _check_streams(self, message: wire.Call) -> None:
        if not message.window:
            raise EngineError(f"{message.method} is a generator: .stream() iterates over what it yields")

    def _check_result(self, message: wire.Call) -> None:
        if message.window:
            raise EngineError(f"{message.method} is no generator: .call() has its result")

    def _result(self, message: wire.Call, value: Any) -> wire.Frame:
        return self._frame(wire.Result(message.id, message.pickled), _packed(message, value))

    def _frame(self, message: wire.Message, packed: Packed) -> wire.Frame:
        channel = self._channel
        return wire.frame(message, packed, channel.lender if channel is not None else None)

    def _fail(self, running: Running, error: BaseException, *, later: bool = False) -> None:
        self._answer(running, self._frame(wire.Failure(running.id), pack_failure(error)), later=later)

    def _answer(self, running: Running, frame: wire.Frame, *, later: bool = False) -> None:
        """Send a call's last word, and keep it; ``later``: with others, in the loop's turn."""
        if running.cancelled:
            return
        self._kept[running.id] = frame
        self._running.pop(running.id, None)
        self._send(frame, later=later)

    def _send(self, frame: wire.Frame, *, later: bool = False) -> None:
        channel = self._channel
        if channel is not None:
            channel.post(frame) if later else channel.send(frame)


def _packed(message: wire.Call, value: Any) -> Packed:
    return pack_pickle(value) if message.pickled else pack(value)
