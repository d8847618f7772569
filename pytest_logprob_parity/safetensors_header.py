"""The head of a safetensors file: 8 bytes with the length of the header, the header as JSON, and then the tensors."""

from __future__ import annotations

from typing import IO, Final

#: Bytes that hold the length of the header, as a little-endian whole number.
_LENGTH: Final = 8


def tensors_begin(data: bytes | bytearray | memoryview) -> int:
    """Where the tensors begin in a file that begins with `data`, in bytes: behind the header, if it is as long as it says."""
    return _LENGTH + int.from_bytes(data[:_LENGTH], "little")


def header_json(data: bytes | bytearray | memoryview) -> bytes:
    """The JSON text of the header of a file that begins with `data`; it is cut where `data` is."""
    return bytes(data[_LENGTH : tensors_begin(data)])


def read_head(file: IO[bytes], most: int) -> bytes:
    """The length of the header and the header, from the beginning of an open file; at most `most` bytes of the header."""
    length = file.read(_LENGTH)
    return length + file.read(min(tensors_begin(length) - _LENGTH, most))
