"""Messages as bytes for HTTP: one safetensors file per message, no pickle.

A message is a frozen dataclass. Its arrays are the tensors of the file, each under its dotted path in the message;
everything else is JSON by field name in `__metadata__["message"]`, beside `__metadata__["flowbp_ray"]`, the version of
this format. safetensors (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length of the
header, the header in JSON (name -> dtype, shape, data_offsets), the bytes of the tensors without holes.

What is read is checked against the annotations of the dataclass, so that a body decides neither what is built nor of
which type. Floats that are not finite are written as JavaScript does (NaN, Infinity): a score may be NaN.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, deserialize

from flowbp_ray.messages import Packed

VERSION = 1
HEADER_LIMIT = 1 << 20  # bytes of the header: prompts and scores of some hundred rows need a tenth of it
LARGEST = 2**63 - 1

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Torch's name of a dtype -> safetensors' name. Others cannot be sent."""
NAMES = {code: name for name, code in CODES.items()}
Message = TypeVar("Message")


class WireError(ValueError):
    """Bytes that are not a message of the expected kind; the text says why in one line."""


def dump(message: Any) -> bytes:
    """The bytes of a message (a dataclass instance)."""
    tensors: dict[str, Packed] = {}
    text = json.dumps(_plain(message, "", tensors), ensure_ascii=False, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {"flowbp_ray": str(VERSION), "message": text}}
    end = 0
    for name, packed in tensors.items():
        shape, start, end = list(packed.array.shape), end, end + packed.nbytes
        header[name] = {"dtype": CODES[packed.dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # so that the data is aligned
    if len(head) > HEADER_LIMIT:
        raise WireError(f"the header has {len(head)} bytes, more than {HEADER_LIMIT}: send fewer rows or shorter texts")
    return b"".join([len(head).to_bytes(8, "little"), head, *(p.array.tobytes() for p in tensors.values())])


def parse(kind: type[Message], body: bytes) -> Message:
    """The message of class `kind` in `body`. Raises WireError for anything else, whatever the bytes are."""
    text = _metadata(body)
    try:
        found = {name: _packed(name, tensor) for name, tensor in deserialize(body)}
    except (SafetensorError, ValueError) as error:
        raise WireError(f"the body is no safetensors file: {_line(error)}") from error
    plain = _json(text, "the message")
    message = _typed(kind, plain, "", found)
    if found:
        raise WireError(f"{kind.__name__} has no tensor {_short(next(iter(found)))}")
    return typing.cast(Message, message)


def _metadata(body: bytes) -> str:
    """The JSON text of the message in the header, once its version is ours."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or not 2 <= length <= min(HEADER_LIMIT, len(body) - 8):
        raise WireError(f"the body is no safetensors file with a header of 2 to {HEADER_LIMIT} bytes")
    header = _json(body[8 : 8 + length], "the header")
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("message"), str):
        raise WireError("the header has no __metadata__ with flowbp_ray and message")
    if metadata.get("flowbp_ray") != str(VERSION):
        theirs = _short(metadata.get("flowbp_ray"))
        raise WireError(f"the body has version {theirs} of the format, this side {VERSION}: run the same flowbp_ray")
    return str(metadata["message"])


def _json(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise WireError(f"{what} is nested too deeply") from error
    except ValueError as error:  # also of bytes that are not UTF-8, and of integers with thousands of digits
        raise WireError(f"{what} is not JSON: {_line(error)}") from error


def _packed(name: str, tensor: Mapping[str, Any]) -> Packed:
    dtype = NAMES.get(tensor["dtype"])
    if dtype is None:
        raise WireError(f"tensor {_short(name)} is {tensor['dtype']}; only {', '.join(NAMES)} travel")
    array = np.frombuffer(tensor["data"], np.uint16 if dtype == "bfloat16" else dtype)
    return Packed(array.reshape(tensor["shape"]), dtype)


def _plain(value: Any, path: str, tensors: dict[str, Packed]) -> Any:
    """A value as JSON holds it; arrays are put into `tensors` under their path, and null stands for them."""
    if isinstance(value, np.ndarray):
        value = Packed(value, str(value.dtype))
    if isinstance(value, Packed):
        if value.dtype not in CODES:
            raise TypeError(f"{path} is {value.dtype}; only {', '.join(CODES)} travel")
        tensors[path] = value
        return None
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), _below(path, name), tensors) for name in names}
    if isinstance(value, Mapping):
        return {name: _plain(inner, _below(path, name), tensors) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner, _below(path, str(i)), tensors) for i, inner in enumerate(value)]
    if value is None or isinstance(value, str | int | float):  # bool is an int
        return value
    raise TypeError(f"{path} is a {type(value).__name__}, which does not travel")


def _typed(kind: Any, plain: Any, path: str, tensors: dict[str, Packed]) -> Any:
    """The value of type `kind` that `_plain` made `plain` of; takes its arrays out of `tensors`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _optional(arguments, plain, path, tensors)
    if kind is Packed or kind is np.ndarray:
        if path not in tensors:
            raise WireError(f"tensor {path} is missing")
        _expect(plain is None, path, "null, for its tensor", plain)
        packed = tensors.pop(path)
        return packed if kind is Packed else packed.array
    if dataclasses.is_dataclass(kind):
        return _fields(kind, plain, path, tensors)
    if origin in (tuple, list):
        return _sequence(origin, arguments, plain, path, tensors)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _expect(isinstance(plain, dict), path, "an object", plain)
        return {name: _typed(arguments[1], inner, _below(path, name), tensors) for name, inner in plain.items()}
    if kind is float:
        _expect(isinstance(plain, int | float) and not isinstance(plain, bool), path, "a number", plain)
        _expect(isinstance(plain, float) or abs(plain) <= LARGEST, path, "a number", plain)
        return float(plain)
    if kind is int:
        _expect(type(plain) is int and abs(plain) <= LARGEST, path, "an integer of 64 bits", plain)
        return plain
    assert kind in (str, bool), f"{path}: no rule for {kind}"
    _expect(type(plain) is kind, path, "a string" if kind is str else "true or false", plain)
    if kind is str:
        _expect(not any("\ud800" <= c <= "\udfff" for c in plain), path, "Unicode text", plain)
    return plain


def _optional(arguments: tuple[Any, ...], plain: Any, path: str, tensors: dict[str, Packed]) -> Any:
    """T | None: an array is there if its tensor is."""
    inner = [argument for argument in arguments if argument is not type(None)]
    assert len(inner) == 1, f"{path}: only T | None travels"
    if plain is None and path not in tensors:
        return None
    return _typed(inner[0], plain, path, tensors)


def _fields(kind: Any, plain: Any, path: str, tensors: dict[str, Packed]) -> Any:
    """A dataclass by the names of its fields."""
    _expect(isinstance(plain, dict), path, "an object", plain)
    hints, fields = typing.get_type_hints(kind), {field.name for field in dataclasses.fields(kind)}
    for name in plain.keys() - fields:
        raise WireError(f"{kind.__name__} has no field {_short(name)}")
    for name in fields - plain.keys():
        raise WireError(f"{kind.__name__} needs a field {name}")
    return kind(**{name: _typed(hints[name], plain[name], _below(path, name), tensors) for name in plain})


def _sequence(
    origin: type, arguments: tuple[Any, ...], plain: Any, path: str, tensors: dict[str, Packed]
) -> tuple[Any, ...] | list[Any]:
    """list[T], tuple[T, ...] or tuple[A, B]."""
    _expect(isinstance(plain, list), path, "an array", plain)
    if origin is list or arguments[-1] is Ellipsis:
        kinds = (arguments[0],) * len(plain)
    else:
        kinds = arguments
        _expect(len(plain) == len(kinds), path, f"an array of {len(kinds)}", plain)
    values = [_typed(k, v, _below(path, str(i)), tensors) for i, (k, v) in enumerate(zip(kinds, plain, strict=True))]
    return origin(values)  # type: ignore[no-any-return]


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _expect(good: bool, path: str, wanted: str, given: Any) -> None:
    if not good:
        raise WireError(f"{_short(path or 'the message')[1:-1]} must be {wanted}, got {_short(given)}")


def _short(value: Any) -> str:
    """A value in at most 60 printable characters."""
    text = ascii(value) if not isinstance(value, dict | list) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(error: Exception) -> str:
    return " ".join(ascii(str(error))[1:-1].split())[:200]
