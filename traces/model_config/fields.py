"""One quantity, many names: how configurations call a model's sizes, and where they keep them.

`Config` looks a field up in the language model's own part first, then in what encloses it. Knows
names of fields. Knows nothing of families, files or bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InputError

Part = dict[str, Any]

# The same quantity under the names that configurations give it; the first that is set counts.
FIELDS: dict[str, tuple[str, ...]] = {
    "experts": (
        "num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts",
        "num_routed_experts", "moe_num_primary_experts", "num_moe_experts", "n_experts",
    ),
    "top_k": (
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
        "top_k_experts", "experts_top_k", "num_selected_experts", "experts_per_token",
        "n_activated_experts", "num_active_experts", "num_activated_experts",
        "moe_num_active_primary_experts", "moe_router_topk", "router_top_k", "expert_top_k",
    ),
    "layers": ("num_hidden_layers", "n_layers", "num_layers", "n_layer", "num_decoder_layers"),
    # A latent width is what travels to the experts, so it comes before the model's own.
    "hidden": (
        "moe_latent_size", "routed_expert_hidden_size", "moe_hidden_size", "moe_latent_dim",
        "hidden_size", "d_model", "dim", "n_embd", "emb_dim",
    ),
    "intermediate": (
        "moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size",
        "expert_intermediate_size", "expert_hidden_dim", "moe_inter_dim", "moe_hidden_dim",
        "intermediate_size", "ffn_hidden_size", "d_ff", "hidden_dim", "inter_dim",
        "encoder_ffn_dim",
    ),
    "shared": (
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert",
    ),
    "shared width": (
        "shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim",
        "share_expert_dims",
        "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size",
    ),
    "groups": ("n_group", "num_expert_group", "num_expert_groups", "n_expert_groups"),
    "groups per token": (
        "topk_group", "num_expert_groups_per_tok", "n_limited_groups", "num_limited_groups",
    ),
}
# Names that mean this only inside a part about experts: elsewhere `top_k` samples text.
_INSIDE_MOE_PART = {"top_k": ("top_k", "topk", "k"), "experts": ("experts",)}
_MOE_PARTS = ("moe", "moe_config", "moe_args", "ffn_config")
# Where multimodal and nested configurations keep the language model's fields.
_TEXT_PARTS = (
    "thinker_config", "text_config", "llm_config", "language_config", "language_model_config",
    "lm_config", "decoder_config", "language_model", "model_config", "builder_config",
    "pretrained_config", *_MOE_PARTS,
)
_OTHER_PARTS = ("vision", "audio", "visual", "image", "talker", "draft", "mtp", "speech", "code")


@dataclass(frozen=True)
class Config:
    """A configuration as its parts, the innermost about the language model's experts first."""

    parts: tuple[Part, ...]
    moe_parts: tuple[bool, ...]

    @classmethod
    def of(cls, whole: Part) -> Config:
        """The parts on the way from the whole file to the part about the experts."""
        parts, about_moe = [whole], [False]
        while True:
            found = _inner(parts[0])
            if found is None:
                return cls(tuple(parts), tuple(about_moe))
            parts.insert(0, found[1])
            about_moe.insert(0, found[0] in _MOE_PARTS)

    def get(self, field: str, default: Any = None) -> Any:
        """The field's value in the innermost part that sets it."""
        for part in self.parts:
            if part.get(field) is not None:
                return part[field]
        return default

    def names(self) -> tuple[str, ...]:
        """The model_type, then the architectures; those of the innermost part first."""
        own = [part for part, moe in zip(self.parts, self.moe_parts, strict=True) if not moe]
        types = [part.get("model_type") for part in own]
        built = [name for part in own for name in _listed(
            part.get("architectures") or part.get("architecture")
        )]
        return tuple(str(name) for name in (*types, *built) if name)

    def set_field(self, quantity: str, prefix: str = "") -> tuple[str, Any] | None:
        """The first of the quantity's fields that is set, and its value.

        Raises ValueError where that is a number written as text.
        """
        for part, moe in zip(self.parts, self.moe_parts, strict=True):
            aliases = FIELDS[quantity] + (_INSIDE_MOE_PART.get(quantity, ()) if moe else ())
            for alias in aliases:
                value = part.get(prefix + alias)
                if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\s*", value):
                    raise ValueError(f"{prefix + alias} is the text {value!r}, not a number")
                if isinstance(value, (int, float, list)) and not isinstance(value, bool):
                    return prefix + alias, value
        return None

    def number(
        self, quantity: str, layers: Sequence[int], notes: list[str], prefix: str = ""
    ) -> int | None:
        """The quantity; of a list per layer, what most of `layers` have (a note says the rest).

        Raises ValueError where it is no whole number.
        """
        found = self.set_field(quantity, prefix)
        if found is None:
            return None
        field, value = found
        if not isinstance(value, list):
            return _whole(field, value)
        numbers = [_whole(field, item) for item in value]
        if not numbers:
            return None
        if layers and len(numbers) > max(layers):
            own = [numbers[i] for i in layers]
            most = max(sorted(set(own), reverse=True), key=own.count)
            if len(set(own)) > 1:
                notes.append(
                    f"{quantity}: {field} differs from layer to layer ({min(own)} to {max(own)}); "
                    f"{most}, that of {own.count(most)} of {len(own)} layers, is taken for all"
                )
            return most
        if len(set(numbers)) > 1:
            notes.append(
                f"{quantity}: {field} lists {numbers}; the first is taken, that of text tokens"
            )
        return numbers[0]

    def most(self, quantity: str) -> int | None:
        """The quantity, the largest where there are several. Raises ValueError on no number."""
        found = self.set_field(quantity)
        if found is None:
            return None
        field, value = found
        values = value if isinstance(value, list) else [value]
        return max((_whole(field, each) for each in values), default=None)

    def require_agreement(self, quantity: str, where: str) -> None:
        """Raise InputError where one part gives a quantity two values under two names."""
        for part in self.parts:
            said = {
                alias: part[alias] for alias in FIELDS[quantity]
                if isinstance(part.get(alias), int) and not isinstance(part.get(alias), bool)
            }
            if len(set(said.values())) > 1:
                pairs = " and ".join(f"{alias} {value}" for alias, value in said.items())
                raise InputError(
                    f"{where}: says {pairs}, which mean the same and cannot both be right; "
                    "remove the wrong one"
                )


def _inner(part: Part) -> tuple[str, Part] | None:
    """The part inside that says more of the experts: a known name, else one that counts experts."""
    for name in _TEXT_PARTS:
        inner = part.get(name)
        if isinstance(inner, dict) and inner:
            return name, inner
    for name, inner in part.items():
        if (
            isinstance(inner, dict)
            and not any(word in name for word in _OTHER_PARTS)
            and not any(part.get(alias) for alias in FIELDS["experts"])
            and any(inner.get(alias) for alias in FIELDS["experts"])
        ):
            return name, inner
    return None


def _listed(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, list) else [value]


def _whole(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise ValueError(f"{field} {value!r} is not a whole number")
    return int(value)
