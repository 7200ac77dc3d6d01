"""PDF and HTML to text.

Runs in a process of its own, which `sandbox` starts and limits: what it reads may be hostile.

Messages: a line of JSON, then as many bytes as it says; the answer is a line of JSON. See
`Sandbox.extract`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

MOST_BLANKS = 128  # of a run; longer ones carry nothing and could fill chunks
MAX_LEVEL = 6
_LONG_BLANKS = re.compile(rf"(\s{{{MOST_BLANKS}}})\s+")
_BLANKS = re.compile(r"[ \t\n\r\f]+")
_SURROGATES_AND_NUL = re.compile(r"[\0\ud800-\udfff]")

# Their content is not text of the page, or is shown only where something else is not.
_LEFT_OUT = frozenset(
    (
        "script",
        "style",
        "template",
        "noscript",
        "svg",
        "math",
        "iframe",
        "object",
        "canvas",
        "audio",
        "video",
        "head",
        "select",
        "datalist",
    )
)
_PARAGRAPHS = frozenset(
    (
        "p",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "pre",
        "blockquote",
        "table",
        "ul",
        "ol",
        "dl",
        "section",
        "article",
        "aside",
        "header",
        "footer",
        "main",
        "nav",
        "figure",
        "form",
        "hr",
        "fieldset",
        "address",
        "details",
    )
)
_LINES = frozenset(
    (
        "div",
        "li",
        "tr",
        "dt",
        "dd",
        "br",
        "caption",
        "figcaption",
        "legend",
        "summary",
        "center",
        "thead",
        "tbody",
        "tfoot",
    )
)
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_HIDING = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)\b", re.IGNORECASE)


class ExtractError(Exception):
    """What the parent tells as an UnreadableFileError: (reason, detail)."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def squeeze_blanks(text: str) -> str:
    """Runs of more than MOST_BLANKS blanks become their first MOST_BLANKS."""
    return _LONG_BLANKS.sub(r"\1", text)


def extract_pdf(data: bytes, *, pages: int, characters: int, stream_bytes: int) -> dict[str, Any]:
    """The text layer of a PDF, its title, and its outline as headings.

    Raises:
        ExtractError: encrypted, without text, above a limit.
        Exception: whatever the parser raises on a damaged file.
    """
    import io
    import logging

    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings about repaired files
    pypdf.overwrite_configuration(
        pypdf.Configuration().with_overwrites(
            zlib_maximum_output_length=stream_bytes,
            lzw_maximum_output_length=stream_bytes,
            run_length_maximum_output_length=stream_bytes,
            array_based_stream_maximum_output_length=stream_bytes,
            maximum_declared_stream_length=stream_bytes,
        )
    )
    reader = pypdf.PdfReader(io.BytesIO(data), strict=False)
    if reader.is_encrypted:
        _unlock(reader)
    found = len(reader.pages)
    if found > pages:
        raise ExtractError(
            "too large",
            f"{found} pages, the limit is {pages}. Split it, or raise ParseLimits.pdf_pages",
        )
    parts: list[str] = []
    starts: list[int] = []
    length = empty = replaced = 0
    for page in reader.pages:
        text, count = _SURROGATES_AND_NUL.subn("\ufffd", page.extract_text())
        text = squeeze_blanks(text).strip()
        replaced += count
        starts.append(length)
        empty += not text
        if text:
            parts.append(text + "\n\n")
            length += len(text) + 2
        _check_length(length, characters)
    if not parts:
        raise ExtractError(
            "no text",
            f"its {found} pages hold no text, only images. Recognise the text first, for example "
            "with OCRmyPDF",
        )
    whole = "".join(parts).rstrip()
    notes = [f"{empty} of {found} pages hold no text"] if empty else []
    if replaced:
        notes.append(f"{replaced} characters that are not Unicode were replaced")
    headings, problem = _outline(reader, whole, starts)
    if problem:
        notes.append(problem)
    title = reader.metadata.title if reader.metadata else None
    return {"text": whole, "title": _clean_title(title), "headings": headings, "notes": notes}


def _unlock(reader: Any) -> None:
    """Many encrypted files only forbid printing: they open with the empty password."""
    from pypdf.errors import DependencyError

    try:
        unlocked = reader.decrypt("")
    except DependencyError as error:
        raise ExtractError(
            "encrypted", "it is encrypted with AES, which needs `pip install 'pypdf[crypto]'`"
        ) from error
    if not unlocked:
        raise ExtractError("encrypted", "it is encrypted. Save it without its password")


def _outline(
    reader: Any, text: str, starts: Sequence[int]
) -> tuple[list[tuple[int, int, str]], str | None]:
    """Bookmarks as headings: where their words stand on their page, or at its top.

    A damaged outline costs the headings only.
    """
    headings: list[tuple[int, int, str]] = []
    last = -1
    try:
        for level, entry in _bookmarks(reader.outline):
            page = reader.get_destination_page_number(entry)
            title = _clean_title(entry.title)
            if title is None or not isinstance(page, int) or not 0 <= page < len(starts):
                continue
            stop = starts[page + 1] if page + 1 < len(starts) else len(text)
            at = text.find(title, max(last + 1, starts[page]), stop)
            offset = starts[page] if at < 0 else at
            if last < offset < len(text):
                headings.append((offset, min(level, MAX_LEVEL), title))
                last = offset
    except MemoryError:
        raise
    except Exception as error:  # the text is there; any damage here is the outline's
        return headings, f"its bookmarks are damaged ({type(error).__name__})"
    return headings, None


def _bookmarks(outline: Any) -> Iterator[tuple[int, Any]]:
    """(level, entry), without recursion."""
    stack = [iter(outline)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif isinstance(entry, list):
            stack.append(iter(entry))
        else:
            yield len(stack), entry


def extract_html(source: str, *, characters: int) -> dict[str, Any]:
    """What a reader of the page sees, headings and title.

    Raises:
        ExtractError: nothing to see, or above the limit.
    """
    from selectolax.lexbor import LexborHTMLParser

    page = LexborHTMLParser(source)
    out = _Page(characters)
    if page.body is not None:
        _walk(page.body, out)
    text = "".join(out.parts).rstrip()
    if not text.strip():
        raise ExtractError(
            "no text",
            "it shows no text. Pages that scripts fill must be saved as the browser shows them",
        )
    title = page.css_first("head > title")
    return {
        "text": text,
        "title": _clean_title(None if title is None else title.text()),
        "headings": out.headings,
        "notes": [],
    }


def _walk(body: Any, out: _Page) -> None:
    """Depth first, without recursion: a page may nest a million tags."""
    node, depth = body, 0
    while True:
        child = None
        if node.is_text_node:
            out.write(node.text_content or "")
        elif node.is_element_node and not _is_hidden(node):
            out.enter(node.tag)
            child = node.child
            if child is None:
                out.leave(node.tag)
        if child is not None:
            node, depth = child, depth + 1
            continue
        while depth and node.next is None:
            node, depth = node.parent, depth - 1
            out.leave(node.tag)
        if not depth:
            return
        node = node.next


def _is_hidden(node: Any) -> bool:
    if node.tag in _LEFT_OUT:
        return True
    attributes = node.attributes
    return "hidden" in attributes or _HIDING.search(attributes.get("style") or "") is not None


class _Page:
    """Text as it grows, with the blanks that the next word will be put behind."""

    def __init__(self, characters: int) -> None:
        self.parts: list[str] = []
        self.headings: list[tuple[int, int, str]] = []
        self._length, self._most = 0, characters
        self._newlines, self._blank = 0, ""
        self._preformatted = 0
        self._heading: tuple[int, int, int] | None = None  # offset, level, number of its first part

    def enter(self, tag: str) -> None:
        self._break(tag)
        if tag == "pre":
            self._preformatted += 1
        if tag in _HEADINGS and self._heading is None:
            self._put_gap()
            self._heading = self._length, _HEADINGS[tag], len(self.parts)

    def leave(self, tag: str) -> None:
        if tag == "pre":
            self._preformatted -= 1
        if tag in _HEADINGS and self._heading is not None and self._heading[1] == _HEADINGS[tag]:
            offset, level, first = self._heading
            title = _clean_title("".join(self.parts[first:]))
            if title is not None:
                self.headings.append((offset, level, title))
            self._heading = None
        self._break(tag)

    def write(self, text: str) -> None:
        if self._preformatted:
            if text:
                self._put(squeeze_blanks(text.replace("\0", "\ufffd")))
            return
        words = _BLANKS.sub(" ", text)
        if words[:1] == " ":
            self._blank = self._blank or " "
        if words.strip(" "):
            self._put(words.strip(" "))
            self._blank = " " if words[-1] == " " else ""

    def _break(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._newlines = 2
        elif tag in _LINES:
            self._newlines = max(self._newlines, 1)
        elif tag in ("td", "th"):
            self._blank = "\t"

    def _put_gap(self) -> None:
        gap = "\n" * self._newlines or self._blank
        if self._length and gap:
            self.parts.append(gap)
            self._length += len(gap)
        self._newlines, self._blank = 0, ""

    def _put(self, text: str) -> None:
        self._put_gap()
        self.parts.append(text)
        self._length += len(text)
        _check_length(self._length, self._most)


def _check_length(length: int, characters: int) -> None:
    if length > characters:
        raise ExtractError(
            "too large",
            f"more than {characters} characters of text. Split it, or raise ParseLimits.characters",
        )


def _clean_title(title: object) -> str | None:
    if not isinstance(title, str):
        return None
    return " ".join(_SURROGATES_AND_NUL.sub("\ufffd", title[:2000]).split())[:500] or None


def main() -> None:
    """Answer requests until stdin ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a library that prints must not speak in between
    while line := requests.readline():
        request = json.loads(line)
        answer = _answer(request, _read_exactly(requests, request["bytes"]))
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        if answer.get("reason") in ("memory", "damaged"):  # whatever it has left in memory goes
            return


def _answer(request: dict[str, Any], data: bytes) -> dict[str, Any]:
    try:
        _limit(request["memory_bytes"], request["cpu_s"])
        if request["kind"] == "pdf":
            return extract_pdf(
                data,
                pages=request["pages"],
                characters=request["characters"],
                stream_bytes=request["stream_bytes"],
            )
        return extract_html(data.decode("utf-8"), characters=request["characters"])
    except ExtractError as error:
        return {"reason": error.reason, "detail": error.detail}
    except MemoryError:
        return {
            "reason": "memory",
            "detail": f"reading it takes more than {request['memory_bytes'] // 2**20} MB of memory",
        }
    except RecursionError:
        return {"reason": "damaged", "detail": "it is nested too deeply"}
    # a parser may raise anything on a damaged file; the parent tells it as a typed error
    except Exception as error:
        return {
            "reason": "damaged",
            "detail": f"it is damaged ({type(error).__name__}: {str(error)[:200]})",
        }


def _limit(memory_bytes: int, cpu_s: int) -> None:
    """Before each file.

    Windows has no such limits: there only the parent's clock and the parser's own bounds hold.
    """
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + cpu_s + 1,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
    }  # it writes no file
    # macOS accepts RLIMIT_AS only where it is far above what every process maps
    if sys.platform != "darwin":
        limits[resource.RLIMIT_AS] = memory_bytes
    for which, value in limits.items():
        _, hard = resource.getrlimit(which)
        resource.setrlimit(
            which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard)
        )


def _read_exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise SystemExit(f"{len(data)} of {count} bytes came")
    return data
