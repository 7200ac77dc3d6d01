"""The checksum of every row of an index file, and the exception for a row that fails its own."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping


class Damage(Exception):  # noqa: N818 - users see an IndexFileError
    """Something in the file is not what was stored.

    `file.typed_errors` turns it into an IndexFileError with the path and the next step.
    """


def fields_crc32(*fields: str | int | None) -> int:
    """Return the checksum of a row of texts and numbers.

    Numbers count in decimal and NULL as empty, with NUL between each two fields, as UTF-8.
    """
    # A text stays as it is: str() of an enumeration's member, which is stored as its text, would be
    # its name.
    return zlib.crc32(
        "\0".join(
            "" if field is None else field if isinstance(field, str) else str(field)
            for field in fields
        ).encode()
    )


def facts_crc32(facts: Mapping[str, str | None]) -> str:
    """Return the checksum of all facts that are there, by name; in decimal, as facts are texts."""
    there = [(name, value) for name, value in sorted(facts.items()) if value is not None]
    return str(fields_crc32(*(part for pair in there for part in pair)))


def document_crc32(id_: str, title: str | None, metadata: str | None, source: str | None) -> int:
    """Return the checksum of a row of `documents`."""
    return fields_crc32(id_, title, metadata, source)


def chunk_crc32(
    number: int,
    document: int,
    position: int,
    start: int,
    stop: int,
    num_tokens: int,
    truncated: int,
    title: str | None,
    text: str,
) -> int:
    """Return the checksum of a row of `chunks`."""
    return fields_crc32(number, document, position, start, stop, num_tokens, truncated, title, text)


def vector_crc32(number: int, head: bytes, scales: bytes, rest: bytes, floats: bytes | None) -> int:
    """Return the checksum of all that is stored of a chunk's vector, with the chunk's number.

    The head counts too, so that no vector can stand at another's number.
    """
    crc = zlib.crc32(
        rest,
        zlib.crc32(scales, zlib.crc32(head, zlib.crc32(number.to_bytes(8, "little", signed=True)))),
    )
    return crc if floats is None else zlib.crc32(floats, crc)


def block_crc32(block: int, live: bytes) -> int:
    """Return the checksum of a row of `blocks`."""
    return zlib.crc32(live, zlib.crc32(block.to_bytes(8, "little", signed=True)))


def head_crc32(block: int, squares: bytes, codes: bytes) -> int:
    """Return the checksum of a row of `heads`."""
    return zlib.crc32(
        codes, zlib.crc32(squares, zlib.crc32(block.to_bytes(8, "little", signed=True)))
    )


def chunk_hash(title: str | None, text: str) -> bytes:
    """Return 16 bytes that stand for what is embedded.

    Chunks of one document that have the same share a vector.
    """
    return hashlib.sha256("\0".join((title or "", text)).encode()).digest()[:16]
