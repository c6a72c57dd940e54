"""Prompts given as text reach the model as its own tokens, or are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.random_checkpoint import save_random_checkpoint
from loadmaster.errors import InputError
from loadmaster.workers.group.prompt_tokens import as_tokens
from loadmaster.workers.reference import reference_model_dir


def test_token_ids_stay_as_they_are() -> None:
    assert as_tokens([3, 1, 4], "nowhere") == [3, 1, 4]


def test_a_byte_model_takes_bytes() -> None:
    directory = str(reference_model_dir())
    assert as_tokens("Grüße", directory) == list("Grüße".encode())
    assert as_tokens("Grüße".encode(), directory) == list("Grüße".encode())


@pytest.mark.parametrize("prompt", [b"\xff\xfe", "ü".encode("latin-1"), "語".encode()[:2]])
def test_bytes_that_are_not_utf8_are_refused(prompt: bytes) -> None:
    with pytest.raises(InputError, match=r"not UTF-8 \(byte 0\)"):
        as_tokens(prompt, str(reference_model_dir()))


def test_text_for_a_model_without_a_tokenizer_is_refused(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    import json
    import shutil

    directory = shutil.copytree(checkpoint("olmoe"), tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(InputError, match="has no tokenizer"):
        as_tokens("hello", str(directory))


def test_random_checkpoints_are_byte_models(tmp_path: Path) -> None:
    directory = save_random_checkpoint("olmoe", tmp_path, layers=1, experts=2, top_k=1)
    assert as_tokens("hi", str(directory)) == [104, 105]
