"""Prompts as people have them: text, or bytes that must be UTF-8, to token ids.

Knows a checkpoint's tokenizer. Knows nothing of groups or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...traces.recording.record_model import tokenizer_of

Prompt = Sequence[int] | str | bytes


def as_tokens(prompt: Prompt, model_dir: str) -> Sequence[int]:
    """Token ids as they are; text through the checkpoint's tokenizer.

    Raises InputError for bytes that are not UTF-8, text with half a surrogate pair, what is no
    flat list of numbers, and for text when the checkpoint has no tokenizer and its vocabulary is
    not the 256 bytes.
    """
    if isinstance(prompt, bytes):
        try:
            prompt = prompt.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"the prompt is not UTF-8 (byte {error.start}): convert it, or give token ids"
            ) from error
    if isinstance(prompt, str):
        _require_encodable(prompt)
        return _tokenizer(model_dir)(prompt)
    try:
        np.asarray(prompt)
    except ValueError as error:
        raise InputError("a prompt is a list of token ids, and nothing inside it a list") from error
    return prompt


def _require_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt holds half a surrogate pair (character {error.start}), which is no text: "
            "remove it"
        ) from error


@lru_cache(maxsize=4)
def _tokenizer(model_dir: str) -> Callable[[str], list[int]]:
    return tokenizer_of(Path(model_dir))
