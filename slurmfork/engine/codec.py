"""Values in messages: Python's own types and a few others to bytes and back, types kept, no code run by data.

msgpack, with what that does not know as extensions. Large runs of bytes travel beside it. Dataclasses, msgspec
Structs, named tuples and Enums come by name, see ``engine.classes``; a dataclass is filled in without its __init__.
``pickle`` is for those who ask for it by name, on both sides.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import pathlib
import threading
import uuid
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from typing import Any, NamedTuple

import msgspec
from msgspec.msgpack import Ext

from slurmfork.engine import arrays, classes
from slurmfork.errors import CodecError

INLINE = 4096  # bytes; up to here a copy costs less than a place beside the message

(
    TUPLE, SET, FROZENSET, DICT, BYTES, BYTEARRAY, MEMORYVIEW, BIG, COMPLEX, PATH, DATETIME, DATE, TIME, TIMEDELTA,
    UUID, DECIMAL, ENUM, DATACLASS, STRUCT, NAMED, ARRAY, SCALAR, TENSOR,
) = range(1, 24)  # fmt: skip

_LEAVES = frozenset({type(None), bool, int, float, str})
_KEYS = frozenset({bool, int, float, str})
_encode = msgspec.msgpack.Encoder().encode


class Packed(NamedTuple):
    """A value as it is sent: a message, and what travels beside it."""

    body: bytes
    buffers: Sequence[memoryview]


def pack(value: object) -> Packed:
    """Raises CodecError for what cannot be sent."""
    packer = _Packer()
    try:
        try:
            return Packed(_encode(packer.value(value)), packer.buffers)
        except OverflowError:  # a whole number beyond 64 bits, which is seldom: numbers are looked at one by one
            packer = _Packer(_LEAVES - {int})
            return Packed(_encode(packer.value(value)), packer.buffers)
    except RecursionError:
        raise CodecError("the value is nested too deeply, or holds itself") from None
    except UnicodeEncodeError as error:
        raise CodecError(f"text that UTF-8 cannot hold: {error}") from None


def unpack(body: bytes | memoryview, buffers: Sequence[Any], packages: Collection[str] = ()) -> Any:
    """The value again. ``packages``: where classes may be imported from. Raises CodecError."""
    kept = _unpacker.buffers, _unpacker.packages
    _unpacker.buffers, _unpacker.packages = buffers, packages
    try:
        return _unpacker.decode(body)
    except CodecError:
        raise
    except Exception as error:  # whatever a message may hold that no packer writes
        raise CodecError(f"the message makes no sense: {type(error).__name__}: {error}") from None
    finally:
        _unpacker.buffers, _unpacker.packages = kept


def pack_pickle(value: object) -> Packed:
    """The same by pickle; raises CodecError."""
    import pickle

    buffers: list[memoryview] = []
    try:
        body = pickle.dumps(value, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
    except Exception as error:
        raise CodecError(f"cannot be pickled: {error}") from None
    return Packed(body, buffers)


def unpack_pickle(body: bytes | memoryview, buffers: Sequence[Any]) -> Any:
    """Runs what the sender wants: only for who asked for that."""
    import pickle

    try:
        return pickle.loads(body, buffers=buffers)  # noqa: S301 (asked for by name, on both sides)
    except Exception as error:
        raise CodecError(f"cannot be unpickled here: {type(error).__name__}: {error}") from None


# --- to bytes ----------------------------------------------------------------------------------------------


class _Packer:
    """One message. ``value`` makes of any value one that msgpack has; ``leaves`` are types that it has anyway."""

    def __init__(self, leaves: frozenset[type] = _LEAVES) -> None:
        self.buffers: list[memoryview] = []
        self._leaves = leaves

    def value(self, value: Any) -> Any:
        kind = type(value)
        if kind in self._leaves:
            return value
        if kind is list:
            return value if self._leaves.issuperset(map(type, value)) else [self.value(item) for item in value]
        if kind is dict:
            return self._dict(value)
        if (how := _HOW.get(kind)) is not None:
            return how(self, value)
        return self._other(value, kind)

    def ext(self, code: int, value: Any) -> Ext:
        return Ext(code, _encode(self.value(value)))

    def put(self, data: memoryview) -> int | bytes:
        if data.nbytes <= INLINE:
            return data.tobytes()
        self.buffers.append(data)
        return len(self.buffers) - 1

    def _dict(self, value: dict[Any, Any]) -> Any:
        if not _KEYS.issuperset(map(type, value)) or int not in self._leaves:
            return self.ext(DICT, [[key, item] for key, item in value.items()])
        if self._leaves.issuperset(map(type, value.values())):
            return value
        return {key: self.value(item) for key, item in value.items()}

    def _other(self, value: Any, kind: type) -> Any:
        if isinstance(value, Enum):
            return self.ext(ENUM, [*classes.name_of(kind), value.value])
        if sort := arrays.kind_of(value):
            return self._array(sort, value)
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return self.ext(NAMED, [*classes.name_of(kind), list(value)])
        if isinstance(value, pathlib.PurePath):
            return self.ext(PATH, str(value))
        if dataclasses.is_dataclass(value):
            return self.ext(DATACLASS, [*classes.name_of(kind), _fields_of(value)])
        if isinstance(value, msgspec.Struct):
            fields = {name: getattr(value, name) for name in value.__struct_fields__}
            return self.ext(STRUCT, [*classes.name_of(kind), fields])
        shown = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        raise CodecError(f'an instance of {shown} cannot be sent; make a dataclass of it, or ask for codec="pickle"')

    def _array(self, sort: str, value: Any) -> Ext:
        if sort == arrays.ARRAY:
            return self.ext(ARRAY, arrays.pack_array(value, self.put))
        if sort == arrays.SCALAR:
            return self.ext(SCALAR, arrays.pack_scalar(value))
        return self.ext(TENSOR, arrays.pack_tensor(value, self.put))

    def whole(self, value: int) -> Any:
        if -(2**63) <= value < 2**64:
            return value
        return Ext(BIG, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))

    def bytes(self, value: bytes) -> Any:
        return value if len(value) <= INLINE else self.ext(BYTES, self.put(memoryview(value)))

    def view(self, value: memoryview) -> Any:
        plain = value if value.c_contiguous else memoryview(value.tobytes())
        return self.ext(MEMORYVIEW, self.put(plain.cast("B") if plain.nbytes else memoryview(b"")))


def _fields_of(value: Any) -> dict[str, Any]:
    """What the fields of a dataclass hold, those without a value left out."""
    names = (field.name for field in dataclasses.fields(value))
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _moment(packer: _Packer, value: datetime.datetime) -> Ext:
    zone = getattr(value.tzinfo, "key", None)  # of a ZoneInfo
    plain = value.replace(tzinfo=None) if zone else value
    return packer.ext(DATETIME, [plain.replace(fold=0).isoformat(), value.fold, zone])


_HOW: dict[type, Callable[[_Packer, Any], Any]] = {
    int: _Packer.whole,
    bytes: _Packer.bytes,
    memoryview: _Packer.view,
    tuple: lambda packer, value: packer.ext(TUPLE, list(value)),
    set: lambda packer, value: packer.ext(SET, list(value)),
    frozenset: lambda packer, value: packer.ext(FROZENSET, list(value)),
    bytearray: lambda packer, value: packer.ext(BYTEARRAY, packer.put(memoryview(value))),
    complex: lambda packer, value: packer.ext(COMPLEX, [value.real, value.imag]),
    datetime.datetime: _moment,
    datetime.date: lambda packer, value: packer.ext(DATE, value.isoformat()),
    datetime.time: lambda packer, value: packer.ext(TIME, [value.replace(fold=0).isoformat(), value.fold]),
    datetime.timedelta: lambda packer, value: packer.ext(TIMEDELTA, [value.days, value.seconds, value.microseconds]),
    uuid.UUID: lambda packer, value: packer.ext(UUID, value.bytes),
    decimal.Decimal: lambda packer, value: packer.ext(DECIMAL, str(value)),
}


# --- and back ----------------------------------------------------------------------------------------------


class _Unpacker(threading.local):
    """A thread's decoder, and what belongs to the message that it is at."""

    buffers: Sequence[Any] = ()
    packages: Collection[str] = ()

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(ext_hook=self._ext)

    def decode(self, data: bytes | memoryview) -> Any:
        return self._decoder.decode(data)

    def _ext(self, code: int, data: memoryview) -> Any:
        if code == BIG:
            return int.from_bytes(data, "little", signed=True)
        value = self._decoder.decode(data)
        back = _BACK.get(code)
        if back is None:
            raise CodecError(f"there is no kind {code} of values: is the other side of another version?")
        return back(self, value)

    def get(self, where: int | bytes) -> Any:
        return bytearray(where) if isinstance(where, bytes) else self.buffers[where]

    def named(self, words: list[Any], base: type = object) -> type:
        found = classes.find(words[0], words[1], self.packages)
        if not issubclass(found, base):
            raise CodecError(f"{words[0]}.{words[1]} is not what it is sent as")
        return found

    def dataclass(self, words: list[Any]) -> Any:
        kind = self.named(words)
        if not dataclasses.is_dataclass(kind):
            raise CodecError(f"{words[0]}.{words[1]} is no dataclass here")
        names = {field.name for field in dataclasses.fields(kind)}
        if unknown := words[2].keys() - names:
            raise CodecError(f"{words[0]}.{words[1]} has no field {min(unknown)!r} here")
        made = object.__new__(kind)
        for name, value in words[2].items():
            object.__setattr__(made, name, value)
        return made

    def named_tuple(self, words: list[Any]) -> Any:
        kind = self.named(words, tuple)
        if len(words[2]) != len(getattr(kind, "_fields", ())):
            raise CodecError(f"{words[0]}.{words[1]} has other fields here")
        return tuple.__new__(kind, words[2])


def _moment_again(_: _Unpacker, words: list[Any]) -> datetime.datetime:
    value = datetime.datetime.fromisoformat(words[0]).replace(fold=words[1])
    if words[2] is None:
        return value
    import zoneinfo

    return value.replace(tzinfo=zoneinfo.ZoneInfo(words[2]))


def _buffer(unpacker: _Unpacker, where: int | bytes) -> Any:
    found = unpacker.get(where)
    return found if isinstance(found, bytearray) else bytearray(found)


_BACK: dict[int, Callable[[_Unpacker, Any], Any]] = {
    TUPLE: lambda unpacker, value: tuple(value),
    SET: lambda unpacker, value: set(value),
    FROZENSET: lambda unpacker, value: frozenset(value),
    DICT: lambda unpacker, value: {key: item for key, item in value},
    BYTES: lambda unpacker, where: bytes(unpacker.get(where)),
    BYTEARRAY: _buffer,
    MEMORYVIEW: lambda unpacker, where: memoryview(unpacker.get(where)),
    COMPLEX: lambda unpacker, value: complex(*value),
    PATH: lambda unpacker, value: pathlib.Path(value),
    DATETIME: _moment_again,
    DATE: lambda unpacker, value: datetime.date.fromisoformat(value),
    TIME: lambda unpacker, value: datetime.time.fromisoformat(value[0]).replace(fold=value[1]),
    TIMEDELTA: lambda unpacker, value: datetime.timedelta(*value),
    UUID: lambda unpacker, value: uuid.UUID(bytes=value),
    DECIMAL: lambda unpacker, value: decimal.Decimal(value),
    ENUM: lambda unpacker, words: unpacker.named(words, Enum)(words[2]),
    DATACLASS: _Unpacker.dataclass,
    STRUCT: lambda unpacker, words: unpacker.named(words, msgspec.Struct)(**words[2]),
    NAMED: _Unpacker.named_tuple,
    ARRAY: lambda unpacker, words: arrays.unpack_array(words, unpacker.get),
    SCALAR: lambda unpacker, words: arrays.unpack_scalar(words),
    TENSOR: lambda unpacker, words: arrays.unpack_tensor(words, unpacker.get),
}
_unpacker = _Unpacker()
