"""Arrays and tensors in messages: their bytes travel beside the message, what they are in it.

NumPy and torch are never imported to send, and to receive only when an array has come.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from typing import Any

from slurmfork.errors import CodecError

Put = Callable[[memoryview], "int | bytes"]  # keeps a buffer beside the message: its number; a small one: its bytes
Get = Callable[["int | bytes"], Any]  # the buffer again, writable

ARRAY, SCALAR, TENSOR = "array", "scalar", "tensor"


def kind_of(value: object) -> str:
    """``array``, ``scalar``, ``tensor``, or nothing."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return ARRAY
    if numpy is not None and isinstance(value, numpy.generic):
        return SCALAR
    return TENSOR if torch is not None and isinstance(value, torch.Tensor) else ""


# --- NumPy -------------------------------------------------------------------------------------------------


def pack_array(array: Any, put: Put) -> list[Any]:
    """[dtype, shape, whether in Fortran's order, bytes]."""
    numpy = sys.modules["numpy"]
    if type(array) not in (numpy.ndarray, numpy.memmap):
        raise CodecError(f"a {type(array).__name__} cannot be sent; numpy.asarray() makes a plain array of it")
    dtype = _dtype_words(array.dtype)
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    flat = (array.T if fortran else numpy.ascontiguousarray(array)).reshape(-1)
    data = memoryview(flat.view(numpy.uint8)) if flat.nbytes else memoryview(b"")
    return [dtype, list(array.shape), fortran, put(data)]


def unpack_array(words: list[Any], get: Get) -> Any:
    """The array, without a copy of its bytes."""
    numpy = _needed("numpy", "an array")
    dtype, shape, fortran, where = words
    kind = _dtype(numpy, dtype)
    if kind.itemsize * math.prod(shape) == 0:
        return numpy.empty(shape, kind, "F" if fortran else "C")
    flat = numpy.frombuffer(get(where), numpy.uint8).view(kind)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def pack_scalar(value: Any) -> list[Any]:
    """[dtype, bytes]."""
    return [_dtype_words(value.dtype), value.tobytes()]


def unpack_scalar(words: list[Any]) -> Any:
    """The scalar."""
    numpy = _needed("numpy", "a NumPy scalar")
    kind = _dtype(numpy, words[0])
    return numpy.frombuffer(words[1], kind)[0] if kind.itemsize else numpy.zeros((), kind)[()]


def _dtype_words(dtype: Any) -> Any:
    if dtype.hasobject:
        raise CodecError('an array of Python objects cannot be sent, except with codec="pickle"')
    words = sys.modules["numpy"].lib.format.dtype_to_descr(dtype) if dtype.names else dtype.str
    if not dtype.names and sys.modules["numpy"].dtype(words) != dtype:
        raise CodecError(f"an array of {dtype} cannot be sent: NumPy's own kinds can")
    return _listed(words)


def _listed(words: Any) -> Any:
    return [_listed(word) for word in words] if isinstance(words, (list, tuple)) else words


def _dtype(numpy: Any, words: Any) -> Any:
    kind = numpy.lib.format.descr_to_dtype(_fields(words) if isinstance(words, list) else words)
    if kind.hasobject:
        raise CodecError("an array of Python objects is refused")
    return kind


def _fields(words: Any) -> Any:
    """A structured type as NumPy wants it: tuples in a list."""
    fields = []
    for name, kind, *shape in words:
        inner = _fields(kind) if isinstance(kind, list) else kind
        fields.append((tuple(name) if isinstance(name, list) else name, inner, *(tuple(part) for part in shape)))
    return fields


# --- torch -------------------------------------------------------------------------------------------------


def pack_tensor(tensor: Any, put: Put) -> list[Any]:
    """[dtype, shape, bytes]; what it was computed from stays behind, as with ``detach``."""
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized:
        raise CodecError(f"a tensor on {tensor.device}, {tensor.layout} cannot be sent: .cpu() and .to_dense() help")
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    size = plain.numel() * plain.element_size()
    # By its address: torch's own ways to its bytes need NumPy, which need not be there, and know no bfloat16.
    area: Any = (ctypes.c_ubyte * size).from_address(plain.data_ptr()) if size else b""
    if size:
        area.owner = plain  # the bytes stay as long as who looks at them
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), put(memoryview(area).cast("B"))]


def unpack_tensor(words: list[Any], get: Get) -> Any:
    """The tensor, without a copy of its bytes."""
    torch = _needed("torch", "a tensor")
    name, shape, where = words
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise CodecError(f"torch here has no {name!r}")
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(get(where), dtype=torch.uint8).view(kind).reshape(shape)


def _needed(library: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError:
        raise CodecError(f"{what} has come, and {library} is not installed here") from None
