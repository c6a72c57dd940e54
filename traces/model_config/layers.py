"""Which of a model's layers hold experts, in the model's own numbers.

A list in the configuration says it best; else its numbers do (how many first layers are dense,
every how many-th is MoE); where it has neither, its family's code decides. Knows fields and
families. Knows nothing of weights.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import InputError
from .families import Family
from .fields import Config
from .layer_ranges import MOST_LAYERS

# Lists: one entry a layer, or the numbers of layers; the first that is set counts.
_KINDS = ("mlp_layer_types", "layers_block_type", "hybrid_override_pattern", "ffn_layer_types")
_MASKS = (
    "is_moe_layer", "moe_layer_freq", "moe_layer_layout", "moe_layer_pattern", "interleave",
    "moe_layer_mask",
)
_NUMBERS = (
    "moe_layers_enum", "moe_layers", "moe_layer_indices", "moe_layer_ids", "moe_layer_idx",
    "sparse_layers", "expert_layers",
)
_DENSE_NUMBERS = (
    "mlp_only_layers", "dense_layers", "dense_layer_indices", "dense_layer_ids", "dense_mlp_idx",
)
_MOE_KINDS = re.compile(r"E|sparse|experts?|(\w+_)?moe(_\w+)?")
# How many first layers are dense.
_DENSE_FIRST = (
    "first_k_dense_replace", "num_dense_layers", "n_dense_layers", "n_dense_first_layers",
    "num_dense_first_layers", "first_num_dense_layers", "num_first_dense_layers",
    "moe_layer_num_skipped", "moe_layer_start_index", "dense_prefix_layers",
    "first_k_dense_layers",
)
# Every how many-th layer is MoE: those whose number, counted from 0 or from 1, is a multiple.
_EVERY_FROM_0 = ("moe_layer_freq", "route_every_n", "moe_every_n_layer")
_EVERY_FROM_1 = (
    "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval",
    "moe_layer_frequency", "moe_every_n_layers",
)
_WORDS = re.compile(r"(moe|sparse|expert|mlp|ffn)")


def listed_layers(config: Config, layers: int, where: str) -> tuple[str, tuple[int, ...]] | None:
    """The field that lists the MoE layers, and them; draft layers beyond the last may be listed.

    Raises InputError where a list is shorter than the model.
    """
    for field in _KINDS:
        kinds = [str(kind) for kind in config.get(field) or ()]
        moe = [bool(_MOE_KINDS.fullmatch(kind)) for kind in kinds]
        if any(moe):        # the same names list blocks that have nothing to do with experts
            return field, _marked(field, moe, layers, where)
    for field in (*_MASKS, *_NUMBERS):
        listed = _as_list(config.get(field))
        if not listed:
            continue
        marks = set(listed) <= {0, 1}
        if marks and (field in _MASKS or len(listed) >= layers > 2):
            return field, _marked(field, [bool(mark) for mark in listed], layers, where)
        return field, tuple(sorted({int(number) for number in listed}))
    return _unnamed_list(config, layers)


def ruled_layers(
    config: Config, layers: int, family: Family | None
) -> tuple[str, tuple[int, ...]] | None:
    """The numbers that say which layers are MoE, and them; the family's where it is known.

    None where the file says nothing of it and the family is not known.
    """
    said: list[str] = []
    first = _number(config, _DENSE_FIRST, said)
    dense = [int(i) for field in _DENSE_NUMBERS for i in _noted(config, field, said)]
    last = config.get("moe_layer_end_index")
    last = last[0] if isinstance(last, list) else last
    rules: list[Callable[[int], bool]] = []
    for fields, counted_from in ((_EVERY_FROM_0, 0), (_EVERY_FROM_1, 1)):
        period = _number(config, fields, said)
        if period is not None:
            if period == 0 and counted_from == 0:
                raise ValueError(f"{said[-1]} 0 repeats no layer")
            rules.append(_every(period or 1, counted_from))
    offset = config.get("moe_layer_offset")
    if isinstance(offset, int) and len(rules) == 1:        # counted from that layer on
        said.append("moe_layer_offset")
        shifted = rules.pop()
        rules.append(lambda i: i >= offset and shifted(i - offset))
    if config.get("expert_layer_period") is not None:
        said.append("expert_layer_period")
        each, at = config.get("expert_layer_period"), config.get("expert_layer_offset", 0)
        rules.append(_every(each, -at))
    if family is None and not said:
        return None
    like = family or Family()
    if like.only_listed:
        return "no list", ()
    if not rules and like.every is not None:
        each, at = like.every
        rules.append(_every(each, -at))
    first = like.dense_first if first is None else first
    left_out = set(dense) if "mlp_only_layers" in said else {*dense, *like.dense}
    end = layers if last in (None, -1) else min(int(last) + 1, layers)
    chosen = tuple(
        i for i in range(first, end) if i not in left_out and all(rule(i) for rule in rules)
    )
    return ", ".join(said) or "its family", chosen


def encoder_then_decoder(config: Config, notes: list[str]) -> tuple[int, ...]:
    """The encoder's MoE layers, then the decoder's, numbered after the encoder's last."""
    encoder = config.get("encoder_layers") or config.get("num_layers") or 0
    decoder = config.get("decoder_layers") or config.get("num_decoder_layers")
    decoder = encoder if decoder is None else decoder
    if not 0 <= encoder + decoder <= MOST_LAYERS or min(encoder, decoder) < 0:
        raise ValueError(f"an encoder of {encoder} layers and a decoder of {decoder}")
    layers: list[int] = []
    for side, count, before in (("encoder", encoder, 0), ("decoder", decoder, encoder)):
        sparse = config.get(f"num_sparse_{side}_layers")
        if sparse is None:                                   # NLLB: every so many-th
            step = config.get(f"{side}_sparse_step") or 0
            layers += [before + i for i in range(count) if step and (i + 1) % step == 0]
        elif sparse:                                         # Switch: so many, from the second
            step = max(count // sparse, 1)
            layers += [before + i for i in range(count) if step == 1 or i % step == 1]
    notes.append(
        f"layers: an encoder of {encoder} layers and a decoder of {decoder}; the decoder's are "
        f"numbered from {encoder}"
    )
    return tuple(layers)


def _every(period: int, counted_from: int) -> Callable[[int], bool]:
    return lambda i: (i + counted_from) % period == 0


def _marked(field: str, mask: Sequence[bool], layers: int, where: str) -> tuple[int, ...]:
    if len(mask) < layers:
        raise InputError(
            f"{where}: {field} lists {len(mask)} layers, but the model has {layers}; correct the "
            "wrong one"
        )
    return tuple(i for i, moe in enumerate(mask) if moe)


def _as_list(value: Any) -> list[Any] | None:
    """A list, also as text: "3,4,5", "[0]*3+[1]*58"; None of a number or nothing."""
    if isinstance(value, list):
        return value
    if isinstance(value, str) and re.fullmatch(r"[\d,\s]+", value) and "," in value:
        return [int(part) for part in value.split(",") if part.strip()]
    if isinstance(value, str) and "[" in value:
        return _evaluated(value)
    return None


def _evaluated(text: str) -> list[Any]:
    """A list written as sums and multiples of lists, as Megatron takes it; nothing else is run."""
    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.List):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                return left + right
            both = (left, right) if isinstance(left, list) else (right, left)
            if not isinstance(both[1], int) or len(both[0]) * both[1] > MOST_LAYERS:
                raise ValueError(f"{text!r} repeats too often")
            return left * right
        raise ValueError(f"{text!r} is no list of layers")

    try:
        found = value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError):
        raise ValueError(f"{text!r} is no list of layers") from None
    if not isinstance(found, list):
        raise ValueError(f"{text!r} is no list of layers")
    return found


def _unnamed_list(config: Config, layers: int) -> tuple[str, tuple[int, ...]] | None:
    """A list under a name not known here that can only mean this: a 0 or 1 for each layer."""
    for part in config.parts:
        for field, value in part.items():
            if (
                isinstance(value, list) and len(value) == layers > 1
                and _WORDS.search(field) and "layer" in field
                and set(value) == {0, 1}
            ):
                return field, tuple(i for i, moe in enumerate(value) if moe)
    return None


def _number(config: Config, fields: Sequence[str], said: list[str]) -> int | None:
    for field in fields:
        value = config.get(field)
        if isinstance(value, list) and value:       # one entry for each kind of token (ERNIE VL)
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise ValueError(f"{field} {value} is negative")
            said.append(field)
            return value
        if value is not None:
            raise ValueError(f"{field} {value!r} is neither a number nor a list")
    return None


def _noted(config: Config, field: str, said: list[str]) -> list[Any]:
    value = config.get(field)
    if isinstance(value, list):
        said.append(field)
        return value
    return []
