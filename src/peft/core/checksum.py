"""A checksum inside a safetensors file: written when an adapter is saved, checked when it is loaded.

It stands in the file's metadata, which other readers pass over: ``peft_checksum`` with the value ``peft-crc32:`` and eight
hexadecimal digits. They are the CRC-32 of the header without this entry, as JSON with sorted keys and no spaces in UTF-8,
followed by the data. A file that is read and written again without a change keeps its checksum, whatever the order of its metadata.
"""

from __future__ import annotations

import json
import mmap
import re
import zlib
from collections.abc import Mapping
from typing import Any

KEY = "peft_checksum"
PREFIX = "peft-crc32:"
_BLANK = f"{PREFIX}00000000"
_VALUE = re.compile(rf"{PREFIX}[0-9a-f]{{8}}")

METADATA = {"format": "pt", KEY: _BLANK}
"""Metadata for a file that :func:`seal` is going to complete."""


class ChecksumError(ValueError):
    """The content of a file is not what its checksum says."""


def seal(path: str, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Write the checksum into a file that was saved with :data:`METADATA`, after making sure that the file is complete.

    Args:
        path: The file.
        expected: Shape of each tensor that it has to hold.

    Raises:
        OSError: The file lacks a tensor, or holds one of another shape.
    """
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        end, header = _header(content)
        found = {k: tuple(v["shape"]) for k, v in header.items() if k != "__metadata__"}
        last = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        if found != dict(expected) or len(content) != end + last:
            raise OSError(
                f"What was written to {path!r} is not what had to be, so nothing was saved, and what was there is as it was. Is the disk "
                "in order?"
            )
        # Two entries come out in random order: one order makes equal adapters equal files.
        entries = (b'"format":"pt"', f'"{KEY}":"{_BLANK}"'.encode())
        raw = bytes(content[8:end]).replace(b",".join(reversed(entries)), b",".join(entries))
        value = f"{PREFIX}{_crc(content, end, header):08x}".encode()
        content[8:end] = raw.replace(_BLANK.encode(), value, 1)


def verify(path: str) -> None:
    """Check a file that has a checksum; one without, as other writers make them, passes.

    Raises:
        ChecksumError: The content has changed since the file was written.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        length = int.from_bytes(content[:8], "little")
        raw = content[8 : 8 + length]
        # Either mark is enough, so that a changed byte in one of them does not make the file one without a checksum.
        if KEY.encode() not in raw and PREFIX.encode() not in raw:
            return
        try:
            end, header = _header(content)
            value = header["__metadata__"][KEY]
        except (ValueError, KeyError, TypeError):
            raise ChecksumError("its checksum is unreadable") from None
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise ChecksumError("its checksum is unreadable")
        if f"{PREFIX}{_crc(content, end, header):08x}" != value:
            raise ChecksumError("its content does not match its checksum")


def _header(content: mmap.mmap) -> tuple[int, dict[str, Any]]:
    end = 8 + int.from_bytes(content[:8], "little")
    return end, json.loads(content[8:end].decode())


def _crc(content: mmap.mmap, end: int, header: dict[str, Any]) -> int:
    metadata = {k: v for k, v in header["__metadata__"].items() if k != KEY}
    canonical = json.dumps(
        {**header, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    crc = zlib.crc32(canonical.encode())
    with memoryview(content) as view, view[end:] as data:
        return zlib.crc32(data, crc)
