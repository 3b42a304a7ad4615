"""``--set key=value``: lays values over the tree of a spec before it is read, so that the same rules hold."""

from __future__ import annotations

from slurmfork.spec.report import Report
from slurmfork.spec.yamlnodes import Mapping, Node, Scalar, Where, parse, short

SET = Where("--set")
BACKEND = Where("--backend")
CODE = "code"
_YAML_STARTS = "\"'[{"


def apply(root: Mapping, override: str, report: Report) -> None:
    """Lay one ``key=value`` over the tree; what is wrong with it goes into the report."""
    path, equals, text = override.partition("=")
    path = path.strip()
    keys = path.split(".")
    if not equals or not all(keys):
        report.add(path, f"expected key=value, as in nodes=4, got {short(override)}", at=SET)
    elif keys[0] == "roles" and len(keys) > 2 and not _has_role(root, keys[1]):
        hint = report.suggestion(keys[1], _roles(root)) or f"; the roles are {', '.join(_roles(root)) or 'none'}"
        report.add(path, f"there is no role {short(keys[1])}{hint}", at=SET)
    elif (node := _value(text.strip(), path, report)) is not None:
        lay(root, keys, node)


def lay(root: Mapping, keys: list[str], node: Node) -> None:
    """Put ``node`` at a path; sections on the way are made where they are not there."""
    here = root
    for key in keys[:-1]:
        inner = here.entries.get(key)
        if key == CODE and here is root and isinstance(inner, Scalar) and inner.value is not None:  # its short form
            inner = here.entries[key] = Mapping(inner.at, {"path": inner}, {"path": inner.at})
        if not isinstance(inner, Mapping):
            inner = Mapping(node.at)
            here.entries[key] = inner
            here.keys[key] = node.at
        here = inner
    here.entries[keys[-1]] = node
    here.keys[keys[-1]] = node.at


def _value(text: str, path: str, report: Report) -> Node | None:
    """Quoted text, a [list] or a {mapping} is YAML; everything else is one plain value, # and : included."""
    if not text.startswith(tuple(_YAML_STARTS)):
        if "\0" in text:
            report.add(path, "a NUL character cannot be passed to a process", at=SET)
            return None
        return Scalar(text, True, SET)
    node, problems = parse(text, SET.file, lines=False)
    for problem in problems:
        report.add(path, problem.message, at=SET)
    return None if problems else node


def _roles(root: Mapping) -> list[str]:
    roles = root.entries.get("roles")
    return list(roles.entries) if isinstance(roles, Mapping) else []


def _has_role(root: Mapping, name: str) -> bool:
    return name in _roles(root)
