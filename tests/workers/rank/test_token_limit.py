"""Capacity rules on live ranks: the whole step is judged at once, and what was dropped is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from loadmaster.placement.dispatch.token_limit import CapacityRule, apply_capacity
from loadmaster.workers.coordinator.coordinator import Coordinator
from loadmaster.workers.protocol.settings import Limits
from loadmaster.workers.rank.model import MoeCheckpoint

Start = Callable[..., Coordinator]
Make = Callable[..., Any]
ONE_STEP = Limits(step_tokens=4096, chunk_tokens=512)


def choices_of_first_layer(directory: Path, prompt: list[int]) -> tuple[Any, Any]:
    """The router's ids and gates [T, K] in the first MoE layer, from transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    seen: list[Any] = []
    name = MoeCheckpoint(directory).expert_modules[0]
    model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[1:3]))
    with torch.inference_mode():
        model(torch.tensor([prompt]))
    return tuple(t.numpy() for t in seen[0])


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_what_is_dropped_is_what_the_rule_drops_from_the_whole_step(
    start_threads: Start, checkpoint: Callable[[str], Path], random_prompts: Make, serve: Make,
    architecture: str,
) -> None:
    """Four requests on four ranks meet in one step; the oracle sees them in home order."""
    directory = checkpoint(architecture)
    rule = CapacityRule("drop", 0.8)
    group = start_threads(directory, dtype="float32", capacity=rule, limits=ONE_STEP)
    prompts = random_prompts(2, 4, longest=50)
    serve(group, prompts)
    rows = [choices_of_first_layer(directory, p) for p in prompts]
    want = apply_capacity(
        np.concatenate([ids for ids, _ in rows]), np.concatenate([g for _, g in rows]), 8, rule
    )
    m = group.measurements()
    assert want.dropped > 0
    assert int(m.dropped[0, 0].sum()) == want.dropped
    assert int(m.peak[0, 0]) == want.peak_load
    assert int(m.tokens[0, 0].sum()) == sum(map(len, prompts)) * 2 - want.dropped


def test_a_wide_capacity_changes_no_bit(
    start_threads: Start, checkpoint: Callable[[str], Path], random_prompts: Make, serve: Make
) -> None:
    prompts = random_prompts(5, 6)
    directory = checkpoint("qwen3_moe")
    plain = start_threads(directory)
    roomy = start_threads(directory, capacity=CapacityRule("drop", 100.0))
    for group in (plain, roomy):
        group.configure(digests=True)
    assert serve(roomy, prompts, 4) == serve(plain, prompts, 4)
    assert roomy.measurements().dropped.sum() == 0


@pytest.mark.parametrize("architecture", ["qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_rerouting_drops_less_and_keeps_to_the_limit(
    start_threads: Start, checkpoint: Callable[[str], Path], random_prompts: Make, serve: Make,
    architecture: str,
) -> None:
    directory = checkpoint(architecture)
    prompts = random_prompts(2, 4, longest=50)
    dropped, peak = {}, {}
    for name in ("drop", "reroute"):
        rule = CapacityRule(name, 0.8)  # type: ignore[arg-type]
        group = start_threads(directory, capacity=rule, limits=ONE_STEP)
        serve(group, prompts)
        m = group.measurements()
        dropped[name], peak[name] = int(m.dropped[0, 0].sum()), int(m.peak[0, 0])
    assert 0 < dropped["reroute"] < dropped["drop"]
    assert peak["reroute"] <= -(-sum(map(len, prompts)) * 2 * 8 // 80)
