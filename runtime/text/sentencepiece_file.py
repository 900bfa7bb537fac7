"""sentencepiece's model files: Protocol Buffers, of which just what has to be changed is read here.

The message is `ModelProto` in sentencepiece_model.proto: field 1 holds the pieces (each a message with
`type` in field 3), field 3 the normalizer's settings (with `add_dummy_prefix` in field 3), and field 4
samples that the library checks itself with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

_PIECES, _NORMALIZER, _SELF_TEST = 1, 3, 4
_CONTROL = b"\x18\x03"  # the type CONTROL, which no text contains
_NO_DUMMY_PREFIX = b"\x18\x00"  # add_dummy_prefix is false
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def is_sentencepiece(beginning: bytes) -> bool:
    """Whether a file that begins so can be a sentencepiece model: its first field is the first piece."""
    return beginning[:1] == bytes([_PIECES << 3 | _LENGTH])


def edited(model: bytes, *, control: Collection[int] = (), dummy_prefix: bool = True) -> bytes:
    """The model with the pieces of these ids as control symbols, which no text is ever taken for.

    Without `dummy_prefix` no space is put in front of a text either. Raises ValueError for what is no
    well-formed message.
    """
    parts: list[bytes] = []
    index = 0
    for field, record, content in _fields(model):
        if field == _SELF_TEST:
            continue  # the samples tell of the model as it was
        if field == _PIECES:
            # Of a field that occurs twice, the last counts.
            parts.append(_message(_PIECES, content + _CONTROL) if index in control else record)
            index += 1
        else:
            parts.append(record)
    if not dummy_prefix:
        # Messages that occur twice are merged.
        parts.append(_message(_NORMALIZER, _NO_DUMMY_PREFIX))
    return b"".join(parts)


def _message(field: int, content: bytes) -> bytes:
    head = bytearray([field << 3 | _LENGTH])
    length = len(content)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*head, length]) + content


def _fields(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each field at the top of a message: its number, its whole record, and the content of a nested one."""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        kind, content = key & 7, at
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _LENGTH:
            length, content = _varint(data, at)
            at = content + length
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"no field can be of kind {kind}, at byte {start}")
        if at > len(data):
            raise ValueError(f"the field at byte {start} is longer than the rest of the file")
        yield key >> 3, data[start:at], data[content:at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("the file ends within a number")
