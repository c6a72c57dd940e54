"""Text for a terminal or a pipe that cannot write every character.

Knows characters and streams. Our own signs have a spelling in ASCII; whatever else a stream cannot
write is escaped, as in \\u4e2d. So nothing that is printed can fail because of how it is encoded.
"""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata
from typing import IO, Any

SPELL = "loadmaster.spell"       # an error handler, for `str.encode` and for streams

_OURS = {
    "\N{PLUS-MINUS SIGN}": "+-", "\N{MULTIPLICATION SIGN}": "x", "\N{MIDDLE DOT}": "*",
    "\N{MICRO SIGN}": "u", "\N{GREEK SMALL LETTER MU}": "u", "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-", "\N{EM DASH}": "-", "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{LESS-THAN OR EQUAL TO}": "<=", "\N{GREATER-THAN OR EQUAL TO}": ">=",
    "\N{NOT EQUAL TO}": "!=", "\N{ALMOST EQUAL TO}": "~", "\N{INFINITY}": "inf",
    "\N{RIGHTWARDS ARROW}": "->", "\N{LEFTWARDS ARROW}": "<-",
    "\N{LEFT SINGLE QUOTATION MARK}": "'", "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"', "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
}


def spell_streams() -> None:
    """From here on, printing to stdout and stderr spells what they cannot write."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SPELL)


def writable(text: str, stream: IO[str]) -> str:
    """The text as the stream will show it: its length is what a table must leave room for."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, SPELL).decode(encoding)


def one_line(text: str) -> str:
    """The text with line ends, escapes and other signs that no eye sees written out."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spelling, error.object[error.start : error.end])), error.end


def _spelling(character: str) -> str:
    if character in _OURS:
        return _OURS[character]
    bare: Any = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return bare or _escaped(character)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


codecs.register_error(SPELL, _spelled)
