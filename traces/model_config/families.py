"""What the architectures' own code decides and their configurations leave unsaid.

A family is a `model_type`. Its row says what holds where the file is silent: how many first layers
are dense, which period MoE layers have, whether experts have a gate or biases, what stands before
`experts` in a module's name. Tests build every family that transformers knows, and compare.
An unknown model_type is looked for under its architectures and its siblings' names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "mixer", "moe", "moe_block")


@dataclass(frozen=True)
class Family:
    """What a model of this model_type is like where its configuration does not say."""

    dense_first: int = 0                 # layers before the first MoE layer
    dense: tuple[int, ...] = ()          # other dense layers
    every: tuple[int, int] | None = None     # period and offset: layer % period == offset
    only_listed: bool = False            # no rule: a list in the file says which layers
    gated: bool = True                   # three matrices an expert, or two
    biases: bool = False                 # of the experts, in 16 bits
    shared: int | None = None            # shared experts, where no field counts them
    top_k: int | None = None
    blocks: tuple[str, ...] = BLOCKS     # what may stand before "experts" in a module's name
    dense_draft: bool = False            # MTP layers have no experts
    layers: str = ""                     # the field that counts layers, where another misleads
    encoder_decoder: bool = False


_EVERY, _FIRST, _SECOND, _THIRD = Family(), Family(1), Family(2), Family(3)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("aria_text", "flex_olmo", "granitemoe", "granitemoe_swa", "granitemoehybrid",
         "granitemoeshared", "hunyuan_v1_moe", "hunyuan", "inkling2_text",
         "inkling2_loop_text", "jetmoe", "kolibri1", "lara_mini", "mellum", "minimax",
         "minimax_text_01", "minimax_m1", "minimax_m2", "minimax_m3_vl_text",
         "minimax_m3", "mixtral", "muse_spark_text", "olmoe", "phimoe", "qwen2_moe",
         "qwen3_moe", "qwen3_next", "qwen3_omni_moe_text", "qwen3_vl_moe_text",
         "qwen3_5_moe_text", "qwen4_exp_text", "smallthinker", "minicpm", "skywork",
         "yuan", "solar_open", "zaya", "deepseek_v4", "grok1", "grok_1", "xverse",
         "skywork_moe", "arctic"),
        _EVERY,
    ),
    "dbrx": Family(blocks=("ffn",)),
    **dict.fromkeys(("gemma4_text", "diffusion_gemma_text"), Family(blocks=("", "moe"))),
    **dict.fromkeys(("gpt_oss", "openai_privacy_filter"), Family(biases=True)),
    **dict.fromkeys(
        ("longcat_flash", "longcat_flash_ngram"), Family(dense_draft=True, layers="num_layers"),
    ),
    **dict.fromkeys(
        ("deepseek", "deepseek_v2", "dots1", "mistral4", "unlimited_ocr_text",
         "deepseek_ocr2_text", "cohere2_moe", "bailing_moe", "bailing_moe_v2", "llada2_moe",
         "pangu_ultra_moe"),
        Family(0),
    ),
    **dict.fromkeys(
        ("afmoe", "axk1", "axk2", "dots3_note_text", "ernie4_5_vl_moe_text", "exaone_moe",
         "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "hy_v3", "hy_v4", "hy_v4_vl_text",
         "kimi_linear", "laguna", "mistral_large4_text", "mistral_large4", "sarvam_mla",
         "sarvam_moe"),
        _FIRST,
    ),
    "mimo_v2_flash": Family(1, dense_draft=True),
    **dict.fromkeys(("lfm2_moe", "bailing_hybrid", "inkling_text", "motif"), _SECOND),
    **dict.fromkeys(
        ("beam", "deepseek_v3", "deepseek_v32", "glm5_next_text", "glm_moe_dsa", "kimi_k2",
         "kimi_k25"),
        _THIRD,
    ),
    **dict.fromkeys(("step3p5", "step3p7"), Family(3, dense_draft=True)),
    "flint": Family(dense=(0, 1)),
    "jamba": Family(every=(2, 1)),
    "ernie4_5_moe": Family(1, dense_draft=True),
    "llama4_text": Family(shared=1, blocks=("feed_forward",)),
    "nemotron_h": Family(only_listed=True, gated=False, blocks=("mixer",)),
    "switch_transformers": Family(gated=False, top_k=1, encoder_decoder=True),
    "nllb_moe": Family(gated=False, top_k=2, encoder_decoder=True),
}
# Architectures and model_types whose own name does not lead to their family.
_ALSO = {
    "hunyuanmoev1": "hunyuan_v1_moe", "grok1model": "grok1", "git": "", "nllbmoe": "nllb_moe",
    "minimaxm3vl": "minimax_m3_vl_text", "minimaxm3sparse": "minimax_m3_vl_text",
    "kimik25": "kimi_k25", "kimik3": "kimi_linear", "exaonemoe": "exaone_moe",
    "pangupromoe": "mixtral", "moonshotkimia": "kimi_k2",
}


@dataclass(frozen=True)
class Kin:
    """The family a model is read as, and the name that led to it."""

    family: Family
    name: str
    exact: bool                          # its own model_type, not an architecture or a sibling


def find_family(names: Iterable[str]) -> Kin | None:
    """The family of the first name that is known; else of an architecture; else of a sibling.

    names: model_types and architectures, the innermost part's first.
    """
    names = tuple(names)
    for name in names:
        if name in FAMILIES:
            return Kin(FAMILIES[name], name, exact=True)
    by_squashed = {_squashed(known): known for known in FAMILIES}
    for name in names:
        squashed = _squashed(name)
        known = _ALSO.get(squashed) or by_squashed.get(squashed) or by_squashed.get(
            squashed + "text"
        )
        if known:
            return Kin(FAMILIES[known], known, exact=True)
    for name in names:
        known = _sibling(_squashed(name), by_squashed)
        if known:
            return Kin(FAMILIES[known], known, exact=False)
    return None


def _squashed(name: str) -> str:
    """A model_type or a class's name without what is not the model's: "GptOssForCausalLM"."""
    bare = re.sub(r"(Model)?(LM|For[A-Z]\w*)$", "", name)
    return re.sub(r"[^a-z0-9]", "", bare.lower())


def _sibling(name: str, by_squashed: dict[str, str]) -> str | None:
    """A known family of which the name is another version, or with which it begins."""
    bare = re.sub(r"\d+", "#", name)
    versions = [
        known for known in by_squashed if "#" in bare and re.sub(r"\d+", "#", known) == bare
    ]
    if len({FAMILIES[by_squashed[known]] for known in versions}) == 1:
        return by_squashed[max(versions)]
    starts = {
        bare: row for known, row in by_squashed.items()
        if len(bare := known.removesuffix("text")) >= 6 and name.startswith(bare)
        and not re.match(r"v\d" if bare[-1].isdigit() else r"v?\d", name[len(bare):])
    }
    return starts[max(starts, key=len)] if starts else None
