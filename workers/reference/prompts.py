"""Prompts for demonstrations, from text that every Python installation has.

Knows where text is found: the standard library's sources ("code"), the interactive help's topics
("english"), and `sentences.json`, written for this package: everyday work with computers and a
town, told by each language in its own words ("italian", "german", ...). Knows nothing of models.
Nothing is downloaded. Code and help come from the running Python, so prompts repeat exactly for the
same Python version; those of the other domains repeat on every machine.
"""

import json
import random
import sysconfig
from functools import cache
from importlib import resources
from pathlib import Path

from ...errors import InputError, UsageError

SENTENCES: dict[str, list[str]] = json.loads(
    resources.files(__package__).joinpath("sentences.json").read_text("utf-8")
)
WRITTEN_WITHOUT_SPACES = frozenset({"japanese", "chinese"})
DOMAINS: tuple[str, ...] = ("code", "english", *SENTENCES)


def demo_prompts(domain: str, count: int, tokens: int, seed: int) -> list[bytes]:
    """`count` prompts of exactly `tokens` bytes; a byte is a token, so `list(prompt)` gives ids.

    "code" and "english" are pieces that begin at a line's start; the other languages are sentences
    in shuffled order, repeated until long enough. A prompt may end inside a character. Equal
    arguments give equal prompts. Raises UsageError for an unknown domain or a size below 1, and
    InputError where this Python has no sources or too few of them.
    """
    if domain not in DOMAINS:
        raise UsageError(f"no prompts of domain {domain!r}; known: {', '.join(DOMAINS)}")
    if count < 1 or tokens < 1:
        raise UsageError(f"count {count} and tokens {tokens} must both be at least 1")
    rng = random.Random(f"{domain} {seed}")
    if domain in SENTENCES:
        return [_shuffled_sentences(domain, tokens, rng) for _ in range(count)]
    text = _code_text() if domain == "code" else _help_text()
    if len(text) <= tokens:
        raise InputError(f"{domain}: only {len(text)} bytes on this machine; ask for fewer tokens")
    return [_piece(text, tokens, rng) for _ in range(count)]


def _shuffled_sentences(domain: str, tokens: int, rng: random.Random) -> bytes:
    """Round after round of all sentences, each round in a new order, cut at `tokens` bytes."""
    gap = b"" if domain in WRITTEN_WITHOUT_SPACES else b" "
    sentences = [sentence.encode() for sentence in SENTENCES[domain]]
    text = bytearray()
    while len(text) < tokens:
        rng.shuffle(sentences)
        text += gap.join(sentences) + gap
    return bytes(text[:tokens])


def _piece(text: bytes, tokens: int, rng: random.Random) -> bytes:
    """`tokens` bytes from the start of a random line, earlier where the text would run out."""
    last = len(text) - tokens
    line = text.find(b"\n", rng.randrange(last)) + 1
    start = line if 0 < line <= last else text.rfind(b"\n", 0, last) + 1
    return text[start : start + tokens]


@cache
def _code_text() -> bytes:
    """The top-level modules of the standard library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    if not text:
        raise InputError(f"{folder}: no Python sources; install the standard library's .py files")
    return text


@cache
def _help_text() -> bytes:
    """What `help()` knows on the topics of the language, in the order of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        message = "this Python lacks pydoc_data; install all of its standard library"
        raise InputError(message) from None
    return "\n".join(topics[name] for name in sorted(topics)).encode()
