"""Classes by name: which class a name in a message may stand for. Nothing is imported because data says so.

A class that comes by name is taken from a module that is imported already, or from the packages that the receiver
was given (those of its engines); and only if it is of the kind that is looked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection

from slurmfork.errors import CodecError


def name_of(kind: type) -> list[str]:
    """[module, qualified name] of a class that others can find; raises CodecError for one that they cannot."""
    module, name = kind.__module__, kind.__qualname__
    if module == "__main__" or "<" in name:
        raise CodecError(f"{module}.{name} cannot be found by its name elsewhere: define it in a module of its own")
    return [module, name]


def find(module: str, name: str, packages: Collection[str]) -> type:
    """The class of that name; raises CodecError where it is none, or in a module that is not to be imported."""
    home = sys.modules.get(module)
    if home is None:
        if module.partition(".")[0] not in packages:
            raise CodecError(f"{module}.{name} is refused: nothing here has imported {module}, and data may not")
        try:
            home = importlib.import_module(module)
        except ImportError as error:
            raise CodecError(f"{module}.{name} cannot be imported here: {error}") from None
    found: object = home
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or [found.__module__, found.__qualname__] != [module, name]:
        raise CodecError(f"{module}.{name} is no class here")
    return found


def load(path: str) -> type:
    """The class that ``package.module:Class`` names, imported; raises ImportError, or TypeError if it is none."""
    module, _, name = path.partition(":")
    found: object = importlib.import_module(module)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ImportError(f"module {module!r} has no {name!r}") from None
    if not callable(found):
        raise TypeError(f"{path} is {type(found).__name__}, not a class")
    return found  # type: ignore[return-value]
