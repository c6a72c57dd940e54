"""Draft layers (MTP): how many follow the hidden layers, and what their experts are like.

They run only under speculative decoding and are numbered after the hidden layers, so they are
counted apart. A configuration says how many there are; most are like the other MoE layers, some
have experts of their own, some none. Knows fields. Knows nothing of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from .families import Family
from .fields import FIELDS, Config

_COUNTS = (
    "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers",
    "n_mtp_layers", "num_mtp_modules", "num_mtp_predict_layers", "mtp_depth", "n_predict_layers",
)
_KINDS = ("mtp_layers_block_type", "mtp_hybrid_override_pattern", "mtp_mlp_layer_types")
_PREFIXES = ("mtp_", "nextn_", "draft_")
_OWN_PARTS = ("mtp_config", "mtp", "nextn_config", "draft_config", "mtp_args")
_MOST = 100                      # more of them than any model has is a wrong number


@dataclass(frozen=True)
class Draft:
    """The draft layers that hold experts, and what they have of their own (None: as the others)."""

    layer_indices: tuple[int, ...]
    num_experts: int | None
    top_k: int | None
    intermediate: int | None


def find_draft(
    config: Config, layers: int, family: Family, listed: tuple[int, ...]
) -> Draft | None:
    """The draft layers with experts; None where there are none.

    listed: the MoE layers that a list in the file names, which may go beyond the last hidden one.
    Raises ValueError where a number is impossible.
    """
    own = _own_part(config)
    beyond = tuple(i for i in listed if i >= layers)
    count = _count(own) or (beyond[-1] - layers + 1 if beyond else 0)
    if config.get("use_mtp") is False or count == 0:
        return None
    if not 0 < count <= _MOST:
        raise ValueError(f"{count} draft layers")
    indices = beyond or tuple(range(layers, layers + count))
    if not beyond and (family.dense_draft or _dense_by_kind(own)):
        return None
    numbers = {
        quantity: _own_number(own, quantity) for quantity in ("experts", "top_k", "intermediate")
    }
    if numbers["experts"] is not None and numbers["experts"] < 2:
        return None
    return Draft(indices, numbers["experts"], numbers["top_k"], numbers["intermediate"])


def _own_part(config: Config) -> Config:
    for name in _OWN_PARTS:
        part = config.get(name)
        if isinstance(part, dict):
            prefixed = {f"mtp_{field}": value for field, value in part.items()}
            return Config((prefixed, part, *config.parts), (False, False, *config.moe_parts))
    return config


def _count(config: Config) -> int:
    for field in _COUNTS:
        value = config.get(field)
        if isinstance(value, int) and not isinstance(value, bool) and value:
            return value
    return 0


def _dense_by_kind(config: Config) -> bool:
    """Whether the file says what its draft layers are made of, and no experts are among it."""
    for field in _KINDS:
        kinds = config.get(field)
        if kinds:
            return not {"E", "moe", "sparse"} & set(kinds)
    return False


def _own_number(config: Config, quantity: str) -> int | None:
    for prefix in _PREFIXES:
        for field in FIELDS[quantity]:
            value = config.get(prefix + field)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
