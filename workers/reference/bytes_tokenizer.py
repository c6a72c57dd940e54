"""Text to token ids and back, where a token is a byte of UTF-8.

Knows nothing of models. Any Python installation can do it: there is no vocabulary file.
"""

from collections.abc import Iterable


def encode(text: str) -> list[int]:
    """The bytes of `text` in UTF-8 as ids 0 to 255; no start or end token is added."""
    return list(text.encode("utf-8"))


def decode(ids: Iterable[int]) -> str:
    """The text of byte ids. Half a character, as at a cut, becomes the replacement mark U+FFFD.

    Raises ValueError for an id outside 0 to 255.
    """
    return bytes(ids).decode("utf-8", errors="replace")
