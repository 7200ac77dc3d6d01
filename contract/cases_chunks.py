"""chunks.json: where long texts are cut, counted with the built-in vocabulary."""

from __future__ import annotations

import json
from typing import Any

from contract import texts
from contract.library import EgemmaError, Heading, Prompts, Tokenizer, split_text
from contract.notation import BUILTIN


def chunks() -> dict[str, Any]:
    """Every text at several sizes, with and without title, overlap, headings and prompt."""
    cases: list[dict[str, Any]] = []
    for name, text in _plain_texts().items():
        for most, overlap, title, prompt in (
            (64, 0, None, True),
            (64, 12, "A short title", True),
            (40, 0, None, False),
            (128, 24, None, False),
        ):
            cases.append(_case(name, text, most, overlap, title, prompt, []))
    guide = texts.MARKDOWN
    heads = _headings(guide)
    for most, overlap, title, prompt in (
        (64, 0, None, True), (64, 12, "Guide", True), (200, 40, "The long handbook of everything", True), (40, 4, None, False),
        (48, 0, "x" * 300, True), (96, 10, "word " * 60, True),
    ):  # fmt: skip
        cases.append(_case("markdown with headings", guide, most, overlap, title, prompt, heads))
    deep = [Heading(offset=0, level=3, title="Deep"), Heading(offset=40, level=1, title=" Outer \n one "),
            Heading(offset=80, level=2, title="Inner " + "y" * 250)]  # fmt: skip
    cases.append(_case("headings out of level", texts.ENGLISH, 64, 8, "  ", True, deep))
    one = [Heading(offset=30, level=1, title="Late")]
    cases.append(_case("text before a heading", texts.ENGLISH, 64, 0, None, True, one))
    blank_before = "\n\n \n" + guide
    heads = [Heading(offset=h.offset + 4, level=h.level, title=h.title) for h in _headings(guide)]
    cases.append(_case("blank before a heading", blank_before, 64, 0, "Guide", True, heads))
    cases += _refused()
    return {
        "about": "A document's text as chunks: each [start, stop, title, text], positions in code points. `prompt`: "
        "each chunk is counted behind `title: none | text: ` (or its title in it), else bare. Tokens are "
        "counted by sdk/egemma/builtin/tokenizer.model, BOS and EOS included. `headings`: [offset, level, title]. The "
        "text of a case stands under its name in `texts`.",
        "made_by": "contract/make.py from egemma.chunks.split_text",
        "tolerance": "none: spans, titles and texts are equal",
        "texts": {case["name"]: case.pop("of") for case in cases},
        "cases": cases,
    }


def builtin_tokenizer() -> Tokenizer:
    settings = json.loads((BUILTIN / "manifest.json").read_text("utf-8"))["tokenizer"]
    return Tokenizer(BUILTIN / "tokenizer.model", **settings)


PROMPTS = Prompts(
    by_name={"query": "task: search result | query: ", "document": "title: none | text: "}
)
_TOKENIZER = builtin_tokenizer()


def count_tokens(text: str) -> int:
    """Of a text as it is, BOS and EOS included."""
    return _TOKENIZER.encode(text, overflow="truncate").num_tokens


def _plain_texts() -> dict[str, str]:
    english = texts.ENGLISH
    return {
        "empty": "",
        "one letter": "a",
        "blanks only": " \n\t " * 40,
        "english": english,
        "english, CRLF": english.replace("\n", "\r\n"),
        "english, CR": english.replace("\n", "\r"),
        "english, one line": " ".join(english.split()),
        "english, a word a line": "\n".join(english.split()[:90]),
        "english, no blanks": "".join(english.split()),
        "english, wide gaps": english.replace(". ", ".\n\n   \n"),
        "english, line separators": english.replace(". ", ".\u2028").replace("\n", "\x85"),
        "german": texts.GERMAN,
        "spanish": texts.SPANISH,
        "french": texts.FRENCH,
        "japanese": texts.JAPANESE,
        "chinese": texts.CHINESE,
        "korean": texts.KOREAN,
        "thai": texts.THAI,
        "arabic": texts.ARABIC,
        "hebrew": texts.HEBREW,
        "hindi": texts.HINDI,
        "russian": texts.RUSSIAN,
        "code": texts.CODE,
        "list": texts.LIST,
        "markdown": texts.MARKDOWN,
        "emoji": texts.EMOJI,
        "accents": "e\u0301\u0302\u0303a\u0308 " * 60,
        "long word": "Donaudampfschifffahrtsgesellschaft" * 12,
        "one letter often": "a" * 400,
        "quotes": '"Yes." He said: "No!" (Or not?) \'Why?\' «Oui.» „Nein.“ ' * 6,
        "ellipses": "Well... he said... no… And then? e.g. this, i.e. that. Dr. No. 3.5 kg. " * 5,
        "ideographic stops": "はい。。。」いいえ！？」たぶん｡」" * 8,
        "blank in front and behind": "\n\n   " + english[:300] + "   \n\n",
        "control characters": "".join(chr(code) for code in range(1, 32)) * 6,
        "scattered": texts.scattered("chunks", 240),
    }


def _case(
    name: str,
    text: str,
    most: int,
    overlap: int,
    title: str | None,
    prompt: bool,
    headings: list[Heading],
) -> dict[str, Any]:
    case = {
        "name": name,
        "of": text,
        "title": title,
        "max_tokens": most,
        "overlap_tokens": overlap,
        "prompt": prompt,
        "headings": [[heading.offset, heading.level, heading.title] for heading in headings],
    }
    try:
        found = split_text(
            text,
            title=title,
            count_tokens=count_tokens,
            max_tokens=most,
            overlap_tokens=overlap,
            headings=headings,
            prompt=PROMPTS.document if prompt else None,
        )
    except EgemmaError as error:
        return case | {"error": type(error).__name__}
    return case | {
        "chunks": [[chunk.start, chunk.stop, chunk.title, chunk.text] for chunk in found]
    }


def _headings(markdown: str) -> list[Heading]:
    """The lines that begin with #, outside of code; enough for our own page."""
    found, offset = [], 0
    for line in markdown.splitlines(keepends=True):
        if line.startswith("#"):
            marks = len(line) - len(line.lstrip("#"))
            found.append(Heading(offset=offset, level=marks, title=line.strip("# \n")))
        offset += len(line)
    return found


def _refused() -> list[dict[str, Any]]:
    def heading(offset: int) -> Heading:
        return Heading(offset=offset, level=1, title="A")

    text = "A text of some words."
    return [
        _case("no room", text, 10, 0, None, True, []),
        _case("no room beside the overlap", text, 40, 30, None, True, []),
        _case("just room", text, 26, 0, None, True, []),
        _case("no tokens", text, 0, 0, None, False, []),
        _case("less than no tokens", text, -5, 0, None, False, []),
        _case("negative overlap", text, 64, -1, None, False, []),
        _case("headings in the wrong order", text, 64, 0, None, True, [heading(5), heading(2)]),
        _case("headings at one place", text, 64, 0, None, True, [heading(5), heading(5)]),
        _case("a heading before the text", text, 64, 0, None, True, [heading(-1)]),
        _case("a heading behind the text", text, 64, 0, None, True, [heading(len(text) + 1)]),
        _case("a heading at the end", text, 64, 0, None, True, [heading(len(text))]),
    ]
