"""Sizes as people write them: 500M, 1G, 1.5 GB. Units are powers of 1024, as Slurm's are."""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([KMGT])(?:i?B)?")
_UNITS = {unit: 1024**power for power, unit in enumerate("KMGT", start=1)}


def size_of(text: str) -> int:
    """Bytes; raises ValueError, in words, for what is no size."""
    if match := _SIZE.fullmatch(text.strip()):
        return int(float(match[1]) * _UNITS[match[2]])
    raise ValueError(f"{text[:40]!r} is no size; write 500M, 1G or 1.5G")


def in_words(size: int) -> str:
    """A size in few letters: 12 KB, 1.5 GB."""
    if size < 1024:
        return f"{size} bytes"
    power = min((size.bit_length() - 1) // 10, 4)
    number, unit = size / 1024**power, ("KB", "MB", "GB", "TB")[power - 1]
    return f"{number:.1f} {unit}" if number < 10 else f"{number:,.0f} {unit}"
