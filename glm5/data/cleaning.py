"""Cleaning: the same text in one form, and nothing that is not text.

Line ends become LF, Unicode is composed (NFC), control and invisible characters go, white space at the ends of lines
goes, more than two empty lines become two. On request, lines that web pages repeat ("Accept all cookies") go too. A
document that is no text at all (NUL bytes, mostly undecodable) is dropped with its reason. Left out on purpose: fixing
wrong encodings, HTML, changes of punctuation or case.
"""

from __future__ import annotations

import re
import unicodedata

UNDECODABLE = 0.01
"""Share of replacement characters from which a text is not UTF-8."""

# Control characters but tab and newline; soft hyphen, zero-width space, byte order mark, marks of direction.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028]")
_BOILERPLATE = re.compile(
    r"^\W*(accept( all)? cookies?|we use cookies.*|skip to (main )?content|share (this|on) \w+|click here.*|read more"
    r"|sign (in|up)( now)?|log in|subscribe( to our newsletter)?|back to top|page \d+ of \d+|loading"
    r"|(please )?enable javascript.*|javascript (is|must be) .*|advertisement|all rights reserved)\W*$",
    re.IGNORECASE,
)
LONGEST_BOILERPLATE = 100


def unreadable(text: str) -> str | None:
    """Why a text is no text: `empty`, `binary`, `not_utf8`; None when it is."""
    if not text.strip():
        return "empty"
    if "\x00" in text:
        return "binary"
    return "not_utf8" if text.count("\ufffd") > UNDECODABLE * len(text) else None


def clean(text: str, *, boilerplate: bool = False) -> str:
    """The cleaned text; cleaning it again changes nothing. boilerplate: take out lines of web pages."""
    text = _LINE_ENDS.sub("\n", text).replace("\u2029", "\n\n")
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    lines = [line.rstrip() for line in text.split("\n")]
    if boilerplate:
        lines = [line for line in lines if len(line) > LONGEST_BOILERPLATE or not _BOILERPLATE.match(line)]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")
