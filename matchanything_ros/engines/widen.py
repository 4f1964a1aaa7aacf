"""An ONNX model in fp16 as the same model in fp32, without the onnx package: what a CPU without fp16 arithmetic wants.

There ONNX Runtime puts a Cast before and after every fp16 node, after its fusions and layouts have been chosen, and
casts the weights in every run. The same numbers as fp32 from the start take a fifth of the time less.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

FLOAT, FLOAT16 = 1, 10  # TensorProto.DataType

# Of each message of onnx.proto3 that can hold a type: its fields that are messages of this kind, by number.
_CHILDREN = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value"},
    "function": {7: "node", 12: "value"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "value": {2: "type"},
    "type": {1: "tensor_type"},
}
_ELEMENT_TYPE = {"tensor": 2, "tensor_type": 1}  # the field that says fp16
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf


def widen(model: bytes) -> bytes | None:
    """Every fp16 tensor, type and Cast of a serialised ModelProto made fp32; None if a weight is not inside `model`."""
    try:
        return bytes(_rewrite(memoryview(model), "model"))
    except _Elsewhere:
        return None


class _Elsewhere(Exception):
    """An fp16 tensor without raw data: in a file of its own, or in a form that exporters do not use."""


def _rewrite(message: memoryview, kind: str) -> bytearray:
    children, type_field = _CHILDREN.get(kind, {}), _ELEMENT_TYPE.get(kind)
    fields = list(_fields(message))
    half = any(number == type_field and value == FLOAT16 for number, _, value in fields)
    if half and kind == "tensor" and not any(number == 9 for number, _, _ in fields):
        raise _Elsewhere
    name = next((value for number, _, value in fields if kind == "attribute" and number == 1), None)
    names_a_type = name in (b"to", b"dtype")  # of a Cast, for one
    result = bytearray()
    for number, wire, value in fields:
        if isinstance(value, int):
            changed = value == FLOAT16 and (number == type_field or (names_a_type and number == 3))
            _put(result, number, wire, FLOAT if changed else value)
        elif number in children:
            _put(result, number, wire, _rewrite(value, children[number]))
        elif half and kind == "tensor" and number == 9:
            _put(result, number, wire, np.frombuffer(value, "<f2").astype("<f4").tobytes())
        else:
            _put(result, number, wire, value)
    return result


def _fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """(number, wire type, value) of each field; values of fixed width come as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, wire, value
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if length is None:
            length, at = _varint(message, at)
        yield key >> 3, wire, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _put(result: bytearray, number: int, wire: int, value: int | bytes | bytearray | memoryview) -> None:
    _put_varint(result, number << 3 | wire)
    if isinstance(value, int):
        _put_varint(result, value)
        return
    if wire == _BYTES:
        _put_varint(result, len(value))
    result += value


def _put_varint(result: bytearray, value: int) -> None:
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
