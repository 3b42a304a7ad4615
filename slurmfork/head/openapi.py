"""The OpenAPI document of the API, made from its routes and the types of its messages. Imported when asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import msgspec

from slurmfork.head.routes import LINES, Route, Routes
from slurmfork.messages import ErrorReply, Event, EventsQuery
from slurmfork.serving import JSON, STATUS_OF
from slurmfork.version import __version__

_ABOUT = """The API of a run's head, for clients; on a node the agent's Unix socket takes the same requests from \
processes of the same user, over plain HTTP. Address and port are in the run directory's `head.json`, the certificates \
in its `credentials`. Unknown fields and wrong types are refused, 1.0 for a whole number too; a body is 1 MiB at most. \
A request that carries a `request_id` is done once, however often it is sent."""
_CERTIFICATE = "The run's own: `client.pem`, which `ca.pem` vouches for. Without it the TLS handshake fails."
_EVERYWHERE = ("malformed", "refused", "internal")


def document(routes: Routes) -> dict[str, Any]:
    """The whole document, OpenAPI 3.1."""
    asked = [route.asks for route in routes]
    answered = [route.answers for route in routes]
    kinds = [*asked, *answered, ErrorReply, Event]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    by_type = dict(zip(map(str, kinds), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_type, components)
    queries = {route.asks.__name__ for route in routes if route.method == "GET"}
    found: dict[str, Any] = _portable(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "slurmfork",
                "version": __version__,
                "description": _ABOUT,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [
                {
                    "url": "https://{run}.head.slurmfork:{port}",
                    "description": "The name in the head's certificate; connect it to the address in `head.json`.",
                    "variables": {
                        "run": {"default": "run-id", "description": "The run's id in lower case, `_` as `-`."},
                        "port": {"default": "443", "description": "As `head.json` has it."},
                    },
                }
            ],
            "security": [{"certificate": []}],
            "paths": paths,
            "components": {
                "schemas": {name: schema for name, schema in components.items() if name not in queries},
                "securitySchemes": {"certificate": {"type": "mutualTLS", "description": _CERTIFICATE}},
            },
        }
    )
    return found


def _operation(route: Route, by_type: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": route.path.rpartition("/")[2].removesuffix(".json"),
        "summary": (inspect.getdoc(route.handler) or "").partition("\n")[0].removesuffix("."),
    }
    if route.method == "POST":
        made["requestBody"] = {"required": True, "content": {JSON: {"schema": by_type[str(route.asks)]}}}
    elif parameters := _parameters(components[route.asks.__name__]):
        made["parameters"] = parameters
    content = {route.media: {"schema": by_type[str(route.answers)]}}
    if route.asks is EventsQuery:
        content[LINES] = {"schema": by_type[str(Event)]}
    made["responses"] = {"200": {"description": "Done", "content": content}, **_errors(route.refusals, by_type)}
    return made


def _parameters(query: dict[str, Any]) -> list[dict[str, Any]]:
    made = []
    for name, schema in query["properties"].items():
        text = {"description": schema.pop("description")} if "description" in schema else {}
        made.append({"name": name, "in": "query", **text, "schema": schema})
    return made


def _errors(refusals: Iterable[str], by_type: dict[str, Any]) -> dict[str, Any]:
    """Responses by status; the description lists the kinds that have it."""
    kinds: dict[int, list[str]] = {}
    for kind in sorted({*_EVERYWHERE, *refusals}, key=lambda kind: (STATUS_OF[kind], kind)):
        kinds.setdefault(STATUS_OF[kind], []).append(kind)
    content = {JSON: {"schema": by_type[str(ErrorReply)]}}
    return {
        str(status): {"description": f"{HTTPStatus(status).phrase}: {', '.join(words)}", "content": content}
        for status, words in kinds.items()
    }


def _portable(part: Any) -> Any:
    """Without what only Python knows: the end of a text in patterns, and the markup of docstrings."""
    if isinstance(part, list):
        return [_portable(item) for item in part]
    if not isinstance(part, dict):
        return part
    found = {name: _portable(value) for name, value in part.items()}
    if isinstance(pattern := found.get("pattern"), str):
        found["pattern"] = pattern.removesuffix("\\Z") + ("$" if pattern.endswith("\\Z") else "")
    if isinstance(text := found.get("description"), str):
        found["description"] = inspect.cleandoc(text).replace("``", "`")
    return found
