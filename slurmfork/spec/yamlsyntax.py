"""What the YAML parser complains about, in plain words, and with the line where the mistake is."""

from __future__ import annotations

import yaml

from slurmfork.errors import Problem

_PLAIN_WORDS = (
    (
        "mapping values are not allowed",
        "a ':' where no key can stand; put the text in quotes, or check indentation",
    ),
    ("found unexpected end of stream", "the quote that opens here is never closed"),
    (
        "did not find expected ',' or",
        "a list or mapping that opens here is not closed, or a ',' is missing in it",
    ),
    ("expected ',' or", "a list or mapping that opens here is not closed, or a ',' is missing in it"),
    ("could not find expected ':'", "a key without a ':' after it"),
    (
        "found unknown escape",
        "an unknown escape in double quotes; write \\\\ for a backslash, or use single quotes",
    ),
    ("found invalid Unicode character", "an escape in double quotes that stands for no character"),
    ("found undefined tag handle", "tags (!name) are not used in specs"),
)
_FITS_NOT = (
    "this does not fit what is above it; check the indentation, and put text that has any of "
    ": # [ ] { } , & * ! | > % @ in it in quotes"
)
_OPENED_BEFORE = ("found unexpected end of stream", "did not find expected ',' or", "expected ',' or")


def syntax_problem(error: yaml.YAMLError, text: str, file: str | None) -> Problem:
    """The parser's complaint in plain words, with the line of the mistake rather than of where it showed."""
    problem = str(getattr(error, "problem", None) or "it is not valid YAML")
    mark = getattr(error, "problem_mark", None)
    if problem.startswith(_OPENED_BEFORE):
        mark = getattr(error, "context_mark", None) or mark
    lines = text.splitlines() or [""]
    number = min(mark.line, len(lines) - 1) if mark else 0
    here = lines[number]
    if "\t" in here[: len(here) - len(here.lstrip())]:
        message = "a tab in the indentation; YAML wants spaces"
    elif "cannot start any token" in problem and mark:
        message = f"a value cannot begin with {here[mark.column : mark.column + 1]!r}; put it in quotes"
    else:
        message = next((words for start, words in _PLAIN_WORDS if problem.startswith(start)), _FITS_NOT)
    return Problem(message, line=number + 1 if mark else None, file=file)
