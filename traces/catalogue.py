"""Published MoE models by name, so that sizes are known without a checkpoint at hand.

`catalogue_model("gpt-oss-20b")` gives the ModelSpec; `models_of_shape` says which models route like
a trace does. The facts stand in `catalogue.yaml` beside this file. Knows names and shapes. Knows
nothing of files that people have: those say more, and `ModelSpec.from_pretrained` reads them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..foundation.documents import read_yaml
from .model_config.layer_ranges import parse_layers
from .model_config.quantisation.formats import FORMATS, ExpertBytes, WeightFormat, format_named
from .model_spec import DraftLayers, ModelSpec

CATALOGUE = Path(__file__).with_name("catalogue.yaml")
# Words of a release's name that change neither its shape nor its weights' format.
_RELEASE = re.compile(
    r"(instruct|thinking|chat|base|it|hf|pt|preview|mtp|dpo|sft|rl|\d{4}|\d{6}|v0\.\d)"
)
_FORMAT = re.compile(
    r"(bf16|fp16|fp8(dynamic|block)?|nvfp4|mxfp4|mxfp8|w8a8|w4a16|w4a8|awq|gptq|autoround|"
    r"int4|int8|4bit|8bit)"
)


def catalogue_model(name: str) -> ModelSpec:
    """The published model of that name; case, organisation and release words do not matter.

    "openai/gpt-oss-20b", "Qwen3-235B-A22B-Instruct-2507" and "DeepSeek-V3-0324" are found; a format
    at the end ("Qwen3-235B-A22B-FP8") replaces the one first published, which a note says. Raises
    InputError that names the closest there are.
    """
    wanted = _squashed(name)
    for known in sorted(_entries(), key=len, reverse=True):
        rest = wanted[len(known):]
        if wanted == known:
            return _model(_entries()[known], None)
        if wanted.startswith(f"{known}-") and (told := _release(rest)):
            return _model(_entries()[known], told)
    close = difflib.get_close_matches(wanted, _entries(), n=3, cutoff=0.5)
    known_as = ", ".join(close or ("gpt-oss-20b", "deepseek-v3", "qwen3-235b-a22b"))
    raise InputError(
        f"model {name!r} is neither a file, a folder nor in the catalogue; "
        f"{'close to it' if close else 'there are, among others'}: {known_as}; "
        "give one of those, a config.json, a params.json or a checkpoint's folder"
    )


def models_of_shape(n_layers: int, n_experts: int, top_k: int) -> tuple[str, ...]:
    """The models with so many MoE layers, experts in each, and choices of a token."""
    return tuple(
        name
        for name, facts in _facts().items()
        if (len(parse_layers(facts["layers"])), *facts["size"][:2]) == (n_layers, n_experts, top_k)
    )


def _squashed(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().rsplit("/", 1)[-1].lower())


def _release(rest: str) -> str | None:
    """The format that the words after a known name tell, "published" if none; None: another model.
    """
    told = "published"
    for word in rest.strip("-").split("-"):
        if _FORMAT.fullmatch(word):
            told = word
        elif not _RELEASE.fullmatch(word):
            return None
    return told


@cache
def _facts() -> Mapping[str, Mapping[str, Any]]:
    facts: dict[str, Mapping[str, Any]] = read_yaml(CATALOGUE)
    return facts


@cache
def _entries() -> Mapping[str, str]:
    """Every name a model goes by -> its first name in the catalogue."""
    return dict(_named())


def _named() -> Iterator[tuple[str, str]]:
    for name, facts in _facts().items():
        for known in (name, *facts.get("also", ())):
            yield known, name


def _model(name: str, told: str | None) -> ModelSpec:
    facts = _facts()[name]
    layers = parse_layers(facts["layers"])
    experts, top_k, hidden, intermediate = facts["size"]
    form = FORMATS[facts.get("format", "bf16")].grouped(facts.get("group"))
    notes: tuple[str, ...] = ()
    if told is not None and told != "published":
        form, notes = _other_format(told, form, name)
    matrices = 3 if facts.get("gated", True) else 2
    size = ExpertBytes.of([form] * matrices, hidden, intermediate, 2 * facts.get("biases", False))
    groups, groups_per_token = facts.get("groups", (1, None))
    draft = facts.get("draft")
    return ModelSpec(
        name=name, num_layers=len(layers), num_experts=experts, top_k=top_k, hidden=hidden,
        intermediate=intermediate, matrices_per_expert=matrices,
        bytes_per_parameter=size.bytes_per_parameter, scale_bytes_per_expert=size.scale_bytes,
        num_shared_experts=facts.get("shared", 0), num_expert_groups=groups,
        groups_per_token=groups_per_token, layer_indices=layers,
        total_layers=facts.get("of", layers[-1] + 1),
        draft_layers=None if draft is None else DraftLayers(
            layer_indices=parse_layers(draft), num_experts=experts, top_k=top_k
        ),
        notes=notes,
    )


def _other_format(
    told: str, published: WeightFormat, name: str
) -> tuple[WeightFormat, tuple[str, ...]]:
    word = {"fp8": "fp8_block", "awq": "int4_zero", "gptq": "int4_zero", "autoround": "int4_zero"}
    form = FORMATS.get(word.get(told, told)) or format_named(told) or published
    return form, (
        f"bytes per expert: {form.name} after the name; {name} was first published in "
        f"{published.name}: give the checkpoint's folder where its scales or exceptions differ",
    )
