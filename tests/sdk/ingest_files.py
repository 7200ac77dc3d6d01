"""What the tests of single files share: files on disk, refusals, and a PDF by hand."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from egemma.ingest import ParseLimits, UnreadableFileError, read_file
from egemma.ingest.sandbox import Sandbox

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux limits the memory of the process"
)
with_pdf = pytest.mark.skipif(
    importlib.util.find_spec("pypdf") is None, reason="needs pypdf: pip install 'egemma[ingest]'"
)
with_html = pytest.mark.skipif(
    importlib.util.find_spec("selectolax") is None,
    reason="needs selectolax: pip install 'egemma[ingest]'",
)


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path, sandbox: Sandbox | None = None, **limits: Any) -> UnreadableFileError:
    with pytest.raises(UnreadableFileError) as caught:
        read_file(path, limits=ParseLimits(**limits), sandbox=sandbox)
    assert str(path) in str(caught.value)
    return caught.value


# A PDF by hand: what a library would repair on writing can be put in.


def pdf(
    *pages: bytes | None,
    extra: tuple[bytes, ...] = (),
    catalog: bytes = b"",
    filters: bytes = b"",
    trailer: bytes = b"",
) -> bytes:
    """Pages of content streams (None is a page without one), then `extra` objects, numbered from 4
    + 2 * len(pages) on.
    """
    kids = b" ".join(b"%d 0 R" % (4 + 2 * number) for number in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R %s >>" % catalog,
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(pages)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, content in enumerate(pages):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R /Resources << "
            b"/Font << /F 3 0 R >> >> >>" % (5 + 2 * number)
        )
        body = content or b""
        objects.append(b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(body), filters, body))
    objects += extra
    out, offsets = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + b"".join(
        b"%010d 00000 n \n" % offset for offset in offsets
    )
    return (
        out
        + table
        + b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n"
        % (len(objects) + 1, trailer, len(out))
    )


def lines(*texts: str) -> bytes:
    shown = b" ".join(b"(%s) Tj 0 -20 Td" % text.encode("latin-1") for text in texts)
    return b"BT /F 12 Tf 50 700 Td %s ET" % shown
