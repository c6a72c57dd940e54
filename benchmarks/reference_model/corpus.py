"""The text the reference model learns from: one file per domain, its first 90% to train on.

Knows files, bytes and the split. Knows nothing of models. The text is not part of the package;
a directory of UTF-8 `*.txt` files is named by whoever trains or measures.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadmaster.errors import InputError

TRAIN_TENTHS = 9
NOT_TEXT = frozenset({"NOTICES.txt", "README.txt"})

ByteArray = NDArray[np.uint8]


@dataclass(frozen=True)
class Domain:
    """One text file: the bytes to train on, and the tail that is held out."""

    name: str
    train: ByteArray
    held_out: ByteArray

    @property
    def sha256(self) -> str:
        """Digest of the whole file."""
        return hashlib.sha256(self.train.tobytes() + self.held_out.tobytes()).hexdigest()


def read_domains(directory: Path, context_tokens: int) -> list[Domain]:
    """Reads every `*.txt` of `directory` in name order; a file's last tenth is held out.

    Notices are left out. Raises InputError where there is no text, or where a held-out part is
    shorter than one row of `context_tokens` + 1 bytes.
    """
    paths = sorted(p for p in directory.glob("*.txt") if p.name not in NOT_TEXT)
    if not paths:
        raise InputError(f"{directory}: no .txt files; give a directory with one file per domain")
    domains = []
    for path in paths:
        data = np.frombuffer(path.read_bytes(), np.uint8)
        cut = len(data) * TRAIN_TENTHS // 10
        if len(data) - cut <= context_tokens:
            raise InputError(
                f"{path}: {len(data)} bytes; its last tenth must exceed {context_tokens} bytes"
            )
        domains.append(Domain(path.stem, data[:cut], data[cut:]))
    return domains


def draw_rows(
    domains: list[Domain], rows_per_domain: int, context_tokens: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Rows of `context_tokens` + 1 train bytes, `rows_per_domain` from each domain in order.

    Every row lies within one domain, so that a router can tell domains apart.
    """
    rows: list[ByteArray] = []
    for domain in domains:
        starts = rng.integers(0, len(domain.train) - context_tokens, size=rows_per_domain)
        rows.extend(domain.train[s : s + context_tokens + 1] for s in starts)
    return np.stack(rows).astype(np.int64)


def held_out_rows(domain: Domain, context_tokens: int) -> NDArray[np.int64]:
    """The held-out bytes as rows of `context_tokens` + 1 that overlap by one byte.

    Each byte but the very first is thus predicted exactly once; an incomplete last row is dropped.
    """
    starts = range(0, len(domain.held_out) - context_tokens, context_tokens)
    return np.stack(
        [domain.held_out[s : s + context_tokens + 1] for s in starts]
    ).astype(np.int64)
