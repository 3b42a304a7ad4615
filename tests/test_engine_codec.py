"""Values to bytes and back: what may be sent comes back equal and of its type; nothing runs because data says so."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import math
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
from engine_classes import Colour, Frozen, Pair, Plain, Record, Sample
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmfork.engine import codec
from slurmfork.engine.codec import pack, pack_pickle, unpack, unpack_pickle
from slurmfork.errors import CodecError


def again(value: Any) -> Any:
    """A value as the other side has it: what was beside the message in memory that is not the sender's."""
    packed = pack(value)
    return unpack(packed.body, [bytearray(buffer) for buffer in packed.buffers])


def same(left: Any, right: Any) -> bool:
    """Equal, of one type, and so in all that they hold; nan is nan."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Sample):
        return all(
            same(getattr(left, field), getattr(right, field)) for field in ("prompt", "rewards", "extra", "later")
        )
    if isinstance(left, dict):
        if len(left) != len(right):
            return False
        return all(same(a, b) and same(left[a], right[b]) for a, b in zip(left, right, strict=True))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.binary(), st.dates(), st.tuples(st.integers()))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**62, max_value=2**66),
    st.floats(),
    st.text(),
    st.binary(),
    st.binary(min_size=codec.INLINE, max_size=codec.INLINE + 2),
    st.binary().map(bytearray),
    st.complex_numbers(allow_nan=False),
    st.datetimes(timezones=st.none() | st.timezones()),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.uuids(),
    st.decimals(allow_nan=False),
    st.sampled_from(Colour),
    st.text(alphabet="abc/.", min_size=1).map(Path),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(KEYS, inner),
        st.sets(KEYS),
        st.frozensets(KEYS),
        st.builds(Pair, inner, inner),
        st.builds(Sample, st.text(), st.lists(st.floats(allow_nan=False)), inner),
        st.builds(Record, st.text(), st.integers()),
    ),
    max_leaves=20,
)


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_a_value_comes_back(value: Any) -> None:
    assert same(value, again(value))


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_nonsense_is_refused_in_one_way(body: bytes) -> None:
    with contextlib.suppress(CodecError):
        unpack(body, [bytearray(8)])


@given(VALUES, st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_message_does_no_harm(value: Any, data: st.DataObject) -> None:
    packed = pack(value)
    damaged = bytearray(packed.body)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CodecError):
        unpack(bytes(damaged), [bytearray(buffer) for buffer in packed.buffers])


DTYPES = ["?", "i1", "<u2", ">i4", "<i8", "<f2", "<f4", ">f8", "<c8", "<c16", "S5", "<U3", "<M8[ns]", "<m8[D]", "V7"]
FIELDS = numpy.dtype([("a", "<i4"), ("b", "<f8", (2, 3)), ("c", [("d", "S3")])])


@pytest.mark.parametrize("dtype", [*map(numpy.dtype, DTYPES), FIELDS], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (4, 3), (200, 7, 2)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_comes_back(dtype: Any, shape: tuple[int, ...], order: str) -> None:
    noise = numpy.random.default_rng(0).integers(0, 2, (math.prod(shape), dtype.itemsize), numpy.uint8)
    value = noise.reshape(-1).view(dtype).reshape(shape, order=order) if noise.size else numpy.zeros(shape, dtype)
    value = numpy.asarray(value, order=order)
    back = again(value)
    assert (back.dtype, back.shape, back.flags.c_contiguous) == (value.dtype, value.shape, value.flags.c_contiguous)
    assert back.tobytes() == value.tobytes()
    assert back.flags.writeable


def test_of_an_array_that_is_a_part_of_another_only_that_is_sent() -> None:
    value = numpy.arange(100_000).reshape(100, 1000)[::2, 3:700:7]
    packed = pack(value)
    assert sum(buffer.nbytes for buffer in packed.buffers) == value.nbytes
    assert numpy.array_equal(again(value), value)


def test_an_array_is_received_without_a_copy() -> None:
    packed = pack({"a": numpy.ones(10_000)})
    room = bytearray(packed.buffers[0])
    back = unpack(packed.body, [room])["a"]
    room[:8] = bytes(8)
    assert back[0] == 0.0


def test_an_array_is_sent_without_a_copy() -> None:
    value = numpy.ones(10_000)
    (buffer,) = pack(value).buffers
    value[0] = 5
    assert memoryview(buffer).cast("B").cast("d")[0] == 5


@pytest.mark.parametrize(
    "value", [numpy.float32(1.5), numpy.int8(-3), numpy.bool_(True), numpy.datetime64("2020-01-01")]
)
def test_a_numpy_scalar_stays_one(value: Any) -> None:
    assert type(again(value)) is type(value)
    assert again(value) == value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Plain(), "engine_classes.Plain cannot be sent; make a dataclass of it"),
        ([{"a": object()}], "an instance of object cannot be sent"),
        (print, "cannot be sent"),
        (numpy.array([None]), "array of Python objects"),
        (numpy.ma.array([1]), "MaskedArray cannot be sent"),
        ("\ud800", "UTF-8"),
        (type("Local", (), {"__module__": "__main__"}), "cannot be sent"),
    ],
    ids=["instance", "object", "function", "array of objects", "masked", "text", "class"],
)
def test_what_cannot_be_sent_is_named(value: Any, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        pack(value)


def test_a_value_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(CodecError, match="holds itself"):
        pack(value)


# --- what data may not do ----------------------------------------------------------------------------------


def sent(code: int, words: Any) -> bytes:
    """A message that no packer would write."""
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(code, msgspec.msgpack.encode(words)))


def test_a_class_comes_only_from_what_is_imported_or_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "unheard_of.py"
    module.write_text("import dataclasses\n@dataclasses.dataclass\nclass Thing:\n    x: int\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    body = sent(codec.DATACLASS, ["unheard_of", "Thing", {"x": 1}])
    with pytest.raises(CodecError, match="nothing here has imported unheard_of"):
        unpack(body, [])
    assert "unheard_of" not in sys.modules
    assert unpack(body, [], {"unheard_of"}).x == 1


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (codec.DATACLASS, ["os", "system", {"command": "true"}]),
        (codec.DATACLASS, ["subprocess", "Popen", {"args": "true"}]),
        (codec.DATACLASS, ["engine_classes", "Plain", {}]),
        (codec.DATACLASS, ["engine_classes", "Sample", {"__class__": 1}]),
        (codec.DATACLASS, ["engine_classes", "Sample.__init__", {}]),
        (codec.STRUCT, ["subprocess", "Popen", {"args": "true"}]),
        (codec.ENUM, ["builtins", "print", "x"]),
        (codec.ENUM, ["engine_classes", "Plain", "x"]),
        (codec.NAMED, ["builtins", "list", [1]]),
        (codec.NAMED, ["engine_classes", "Pair", [1]]),
        (codec.ARRAY, ["|O", [1], False, b"12345678"]),
        (codec.ARRAY, ["<f8", [3], False, b"12345678"]),
        (codec.ARRAY, ["<f8", [1], False, 7]),
        (99, [1]),
    ],
)
def test_data_names_nothing_but_plain_classes(code: int, words: list[Any]) -> None:
    with pytest.raises(CodecError):
        unpack(sent(code, words), [])


def test_no_code_of_a_dataclass_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    value = Frozen(3)
    monkeypatch.setenv("ENGINE_CLASSES_TRAP", "1")
    assert again(value) == value


def test_pickle_is_another_thing() -> None:
    packed = pack_pickle([Plain, numpy.ones(10_000)])
    back = unpack_pickle(packed.body, [bytearray(buffer) for buffer in packed.buffers])
    assert back[0] is Plain
    assert back[1].sum() == 10_000
    with pytest.raises(CodecError, match="cannot be pickled"):
        pack_pickle(lambda: 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_tensors_come_back(torch_python: str) -> None:
    code = """
import torch
from slurmfork.engine.codec import pack, unpack
for name in "bfloat16 float16 float32 float64 int8 int64 bool complex64".split():
    kind = getattr(torch, name)
    for shape in [(), (0,), (3,), (2, 0), (100, 70)]:
        value = torch.randint(0, 2, shape).to(kind)
        packed = pack(value)
        back = unpack(packed.body, [bytearray(buffer) for buffer in packed.buffers])
        assert back.dtype == kind and back.shape == value.shape and torch.equal(back, value), (kind, shape)
value = torch.arange(20_000.0).reshape(100, 200).t()[3:50]
packed = pack([value])
assert sum(b.nbytes for b in packed.buffers) == value.numel() * 4
assert torch.equal(unpack(packed.body, [bytearray(b) for b in packed.buffers])[0], value)
try:
    pack(torch.eye(3).to_sparse())
except Exception as error:
    print(error)
"""
    import slurmfork

    home = str(Path(slurmfork.__file__).parent.parent)
    paths = [home, str(Path(msgspec.__file__).parent.parent)]
    done = subprocess.run(
        [torch_python, "-c", f"import sys; sys.path += {paths!r}\n{code}"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert ".to_dense()" in done.stdout


def test_the_kinds_that_are_told() -> None:
    """One of each, so that a type that hypothesis seldom draws is there too."""
    zone = datetime.timezone(datetime.timedelta(hours=2))
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 6, zone)
    for value in [2**100, -(2**63) - 1, moment, decimal.Decimal("1.10"), uuid.uuid4(), memoryview(b"abc"), Colour.BLUE]:
        assert same(value, again(value)), value
