"""The routes of the API: each is told once, at its handler, and serves dispatch and the OpenAPI document alike.

The types of a request and of its reply are those that the handler takes and returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints
from urllib.parse import parse_qsl

import msgspec
from msgspec import Struct

from slurmfork.errors import Refused
from slurmfork.serving import JSON

H = TypeVar("H", bound=Callable[..., Any])

LINES = "application/x-ndjson"
TEXT = "text/plain; version=0.0.4; charset=utf-8"  # as Prometheus wants it


@dataclass(frozen=True)
class Route:
    """One thing that can be asked. ``refusals`` are the kinds of errors that it may meet beyond every route's."""

    method: str
    path: str
    handler: Callable[..., Any]
    asks: type[Struct]
    answers: Any
    refusals: tuple[str, ...]

    @property
    def media(self) -> str:
        """The content type of its reply."""
        return TEXT if self.answers is str else JSON

    def read(self, query: str, body: bytes) -> Struct:
        """What is asked: the body of a POST, the query of a GET; raises DecodeError or Refused for nonsense."""
        if self.method == "POST":
            return msgspec.json.decode(body, type=self.asks)
        pairs = parse_qsl(query, keep_blank_values=True)
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise Refused("malformed request: something in the query is said twice", "malformed")
        return msgspec.convert(fields, self.asks, strict=False)


class Routes:
    """All routes, in the order in which they are told. ``get`` and ``post`` are decorators of their handlers."""

    def __init__(self) -> None:
        self._routes: dict[str, dict[str, Route]] = {}

    def __iter__(self) -> Iterator[Route]:
        return (route for by_method in self._routes.values() for route in by_method.values())

    def get(self, path: str, *refusals: str) -> Callable[[H], H]:
        """A handler that takes the query."""
        return self._route("GET", path, refusals)

    def post(self, path: str, *refusals: str) -> Callable[[H], H]:
        """A handler that takes the body."""
        return self._route("POST", path, ("too_large", *refusals))

    def _route(self, method: str, path: str, refusals: tuple[str, ...]) -> Callable[[H], H]:
        def keep(handler: H) -> H:
            hints = get_type_hints(handler)
            answers = hints.pop("return")
            (asks,) = hints.values()
            route = Route(method, path, handler, asks, answers, refusals)
            self._routes.setdefault(path, {})[method] = route
            return handler

        return keep

    def methods(self, path: str) -> list[str]:
        """The methods that a path takes."""
        return list(self._routes.get(path, ()))

    def find(self, method: str, path: str) -> Route:
        """Who serves this; raises Refused where nobody does."""
        if path not in self._routes:
            raise Refused(f"there is no {path[:200]}", "unknown_path")
        if method not in self._routes[path]:
            raise Refused(f"{path} does not take {method[:20]}", "method")
        return self._routes[path][method]
