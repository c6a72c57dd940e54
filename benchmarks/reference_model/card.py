"""The card beside the reference model's checkpoint: how it was trained, what was measured.

Knows one JSON file, `card.json`, with the parts "training" (written by `train`),
"held_out_bits_per_byte" and "routing" (written by `measure`). Knows nothing of what they mean.
"""

import json
from pathlib import Path
from typing import Any

from loadmaster.errors import InputError
from loadmaster.foundation.atomic_file import replacing

CARD_NAME = "card.json"


def read_card(directory: Path) -> dict[str, Any]:
    """The card in `directory`. Raises InputError where there is none."""
    path = directory / CARD_NAME
    if not path.is_file():
        raise InputError(f"{path}: no such file; a directory that train.py wrote has one")
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card


def write_card(directory: Path, card: dict[str, Any]) -> None:
    """Writes or replaces the card in one step."""
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    with replacing(directory / CARD_NAME) as file:
        file.write(text.encode())
