"""Valid inputs made wrong: bytes, JSON values and .zip files, each change drawn from a given random generator.

What a fuzz run of any part uses: the same generator state gives the same mutant.
"""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from random import Random
from typing import Any

# Where sizes, counts and offsets break: ends of the signed and unsigned types of 8, 16 and 32 bits.
BOUNDARIES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
# Values that a JSON reader may take for what it wanted.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 0.0, -0.0, 1e-320, 1e308, -1e308, "", " ", "a", "\0",
    "\ud800", "../../etc/passwd", "/etc/passwd", "C:\\a", "a/b", "x" * 300, "0" * 64, "ü" * 64, [], {}, [[]],
    [None], {"": None}, {"file": "../a"}, [0] * 300,
)  # fmt: skip
ODD_NAMES = (
    "../a",
    "/a",
    "a/../../b",
    "..",
    ".",
    "",
    "a\\..\\b",
    "C:a",
    "a" * 300,
    "manifest.json",
    "\0",
    "ü/",
    "a/b/c",
)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def mutated_bytes(data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """Bytes with one to four changes: bits, boundary values, pieces removed, repeated, moved, or taken from others.

    Args:
        data: a valid input.
        random: draws the changes.
        others: inputs to take pieces from.
    """
    result = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if not result:
            return random.randbytes(random.randrange(20))
        random.choice(_CHANGES)(result, random, others)
    return bytes(result)


def mutated_json(value: Any, random: Random) -> Any:
    """A JSON value with one to three changes: another value, key or length somewhere in it.

    Args:
        value: what `json.loads` gave; it is not changed.
        random: draws the changes.
    """
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _changed(value, random)
    return value


def mutated_zip(data: bytes, random: Random) -> bytes:
    """A .zip written again with changed entries: names, links, contents, order, compression, and one entry twice.

    Args:
        data: a sound .zip file.
        random: draws the changes.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        chosen = random.randrange(len(entries))
        for place, (name, content) in enumerate(entries):
            info = zipfile.ZipInfo(name)
            if place == chosen:
                info, content = _changed_entry(info, content, entries, random)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a name that is there twice, which is meant
                archive.writestr(info, content)
    return stream.getvalue()


def with_png_checksums(data: bytes) -> bytes:
    """A PNG whose checksums are right for what its chunks hold, as far as it has whole chunks; other bytes as they are.

    A decoder stops at the first wrong checksum, and a mutant would never come further.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return data
    result, place = bytearray(data), len(_PNG_SIGNATURE)
    while place + 12 <= len(result):
        end = place + 8 + struct.unpack_from(">I", result, place)[0]
        if end + 4 > len(result):
            break
        struct.pack_into(">I", result, end, zlib.crc32(result[place + 4 : end]))
        place = end + 4
    return bytes(result)


def _flip_bit(data: bytearray, random: Random, _: Sequence[bytes]) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set_byte(data: bytearray, random: Random, _: Sequence[bytes]) -> None:
    data[random.randrange(len(data))] = random.randrange(256)


def _set_boundary(data: bytearray, random: Random, _: Sequence[bytes]) -> None:
    width = random.choice((1, 2, 4))
    place = random.randrange(len(data))
    value = random.choice(BOUNDARIES) & ((1 << (8 * width)) - 1)
    data[place : place + width] = value.to_bytes(width, random.choice(("little", "big")))


def _truncate(data: bytearray, random: Random, _: Sequence[bytes]) -> None:
    del data[random.randrange(len(data)) :]


def _remove(data: bytearray, random: Random, _: Sequence[bytes]) -> None:
    start, end = _piece(data, random)
    del data[start:end]


def _repeat(data: bytearray, random: Random, _: Sequence[bytes]) -> None:
    start, end = _piece(data, random)
    data[start:start] = data[start:end] * random.choice((1, 1, 2, 50))


def _insert(data: bytearray, random: Random, _: Sequence[bytes]) -> None:
    place = random.randrange(len(data) + 1)
    data[place:place] = random.randbytes(random.choice((1, 4, 32)))


def _overwrite(data: bytearray, random: Random, others: Sequence[bytes]) -> None:
    other = random.choice(others) if others else bytes(data)
    start, end = _piece(other, random)
    place = random.randrange(len(data))
    data[place : place + end - start] = other[start:end]


_CHANGES = (
    _flip_bit,
    _flip_bit,
    _set_byte,
    _set_boundary,
    _set_boundary,
    _truncate,
    _remove,
    _repeat,
    _insert,
    _overwrite,
)


def _piece(data: bytes | bytearray, random: Random) -> tuple[int, int]:
    start = random.randrange(max(1, len(data)))
    return start, min(len(data), start + random.choice((1, 2, 4, 16, 64, 512)))


def _changed(value: Any, random: Random) -> Any:
    """The value with one change, at a place that is reached by going down at random."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        kind = random.random()
        if kind < 0.07:
            return {other: item for other, item in value.items() if other != key}
        if kind < 0.14:
            return value | {random.choice(["", "extra", f"{key} ", "\ud800"]): random.choice(ODD_VALUES)}
        return value | {key: _changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.8:
        place = random.randrange(len(value))
        kind = random.random()
        if kind < 0.2:
            return value[:place] + value[place + 1 :]
        if kind < 0.4:
            return value[:place] + [value[place]] * random.choice((2, 3)) + value[place + 1 :]
        return [*value[:place], _changed(value[place], random), *value[place + 1 :]]
    if isinstance(value, str) and value and random.random() < 0.4:
        return mutated_bytes(value.encode("utf-8", "surrogatepass"), random).decode("utf-8", "replace")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and random.random() < 0.4:
        return random.choice((-value, value + 1, value * 2, value // 3, 0.5, str(value)))
    return random.choice(ODD_VALUES)


def _changed_entry(
    info: zipfile.ZipInfo, content: bytes, entries: list[tuple[str, bytes]], random: Random
) -> tuple[zipfile.ZipInfo, bytes]:
    kind = random.randrange(6)
    if kind == 0:
        info = zipfile.ZipInfo("x")
        info.filename = random.choice(ODD_NAMES)
    elif kind == 1:
        info.filename = random.choice(entries)[0]
    elif kind == 2:
        info.external_attr = random.choice((0o120777, 0o040755, 0o010644, 0o020644, 0o177777)) << 16
    elif kind == 3:
        info.compress_type = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif kind == 4:
        info.compress_type, content = zipfile.ZIP_DEFLATED, bytes(random.choice((0, 1, 1 << 20, 1 << 24)))
    else:
        content = mutated_bytes(content, random)
    return info, content
