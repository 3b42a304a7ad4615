"""Yields: what generator methods yield, sent item by item as long as the caller has room for more."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from functools import partial
from typing import Any

from slurmfork.engine import wire
from slurmfork.engine.answers import Answers
from slurmfork.engine.hosted import Hosted, Running, current
from slurmfork.errors import EngineError


def check_streams(message: wire.Call) -> None:
    """Raise EngineError where a generator was called as if it were none."""
    if not message.window:
        raise EngineError(f"{message.method} is a generator: .stream() iterates over what it yields")


def check_returns(message: wire.Call) -> None:
    """Raise EngineError where a stream was asked of what is no generator."""
    if message.window:
        raise EngineError(f"{message.method} is no generator: .call() has its result")


def produce(
    answers: Answers, engine: Hosted, running: Running, message: wire.Call, items: Generator[Any, Any, Any]
) -> None:
    """Send items of a sync generator; in its engine's thread, between other calls."""
    current.set(running)
    again = partial(produce, answers, engine, running, message, items)
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
            answers.item(message, next(items))
            if not engine.idle:
                engine.do(again)  # others have their turn
                return
    except StopIteration:
        answers.result(running, message, None)
    except BaseException as error:
        answers.fail(running, error)
    finally:
        engine.end()
        current.set(None)


async def stream(answers: Answers, running: Running, message: wire.Call, items: Any) -> None:
    """Send items of an async generator; in the loop."""
    ready = asyncio.Event()
    try:
        check_streams(message)
        async for value in items:
            answers.item(message, value)
            running.credit -= 1
            while running.credit <= 0:
                ready.clear()
                running.more = ready.set
                await ready.wait()
        answers.result(running, message, None)
    finally:
        await items.aclose()


def more(answers: Answers, message: wire.More) -> None:
    """The caller has room for so many more; in the loop."""
    running = answers.running(message.id)
    if running is not None:
        with running.lock:
            running.credit += message.items
            go_on, running.more = running.more, None
        if go_on is not None:
            go_on()
