"""A group without Ray: four ranks as threads, real models, real gloo."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from benchmarks.random_checkpoint import ARCHITECTURES
from loadmaster.errors import InputError, LoadmasterError
from loadmaster.placement.plan import Plan, PlanError
from loadmaster.traces.load import load_trace
from loadmaster.workers.coordinator.coordinator import Coordinator
from loadmaster.workers.fleet.thread_fleet import ThreadFleet
from loadmaster.workers.protocol.settings import Limits, served_spec
from loadmaster.workers.rank.staging import Staging

Start = Callable[..., Coordinator]
Get = Callable[[str], Path]
Make = Callable[..., Any]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers_in_one_process(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make, random_prompts: Make,
    architecture: str,
) -> None:
    """fp32, chunked prompts, experts at random on four ranks with replicas."""
    directory = checkpoint(architecture)
    plan = shuffled_plan(served_spec(directory, "float32"), 0)
    group = start_threads(directory, plan, dtype="float32")
    prompts = random_prompts(0, 6, longest=90)
    group.configure(all_logits=True)
    numbers = group.submit(prompts, 1)
    group.wait_all(numbers, 60.0)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        for number, prompt in zip(numbers, prompts, strict=True):
            logits, _ = group.logits(number)
            want = reference(torch.tensor([prompt])).logits[0].numpy()
            assert np.abs(logits - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_plan_payload_dispatch_and_company_change_no_bit(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make, random_prompts: Make, serve: Make,
    architecture: str,
) -> None:
    """bf16: tokens and every output row, under plans, payloads and step sizes of all kinds."""
    directory = checkpoint(architecture)
    spec = served_spec(directory, "bfloat16")
    prompts = random_prompts(3, 8, longest=80)
    group = start_threads(directory)
    group.configure(digests=True)
    first = serve(group, prompts, 6)
    for plan, options in (
        (shuffled_plan(spec, 1), {"payload": "per_rank"}),
        (shuffled_plan(spec, 2, dispatch="even"), {"limits": Limits(256, 32, 3)}),
        (shuffled_plan(spec, 3, spare=4, dispatch="fewest_active"), {}),
    ):
        other = start_threads(directory, plan, **options)
        other.configure(digests=True)
        assert serve(other, prompts, 6) == first
    alone = [serve(group, [p], 6)[0] for p in prompts]
    assert alone == first


def test_switches_under_load_change_no_bit_and_move_what_they_must(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make, random_prompts: Make, serve: Make
) -> None:
    directory = checkpoint("qwen3_moe")
    spec = served_spec(directory, "bfloat16")
    prompts = random_prompts(5, 12)
    quiet = start_threads(directory)
    quiet.configure(digests=True)
    want = serve(quiet, prompts, 40)
    group = start_threads(directory, stage_budget_bytes=8192)
    group.configure(digests=True)
    numbers = group.submit(prompts, 40)
    plan = group.status()["plan"]
    size = int(spec.bytes_per_expert_E()[0])
    for seed in range(3):
        target = shuffled_plan(spec, seed)
        report = group.apply(target)
        moved = [(a, b, c) for a, b, c in plan.moves_to(target)]
        assert list(report.moved) == moved
        assert report.moved_bytes == len(moved) * size
        assert report.retried_bytes == 0
        assert report.stage_steps > 3, "the budget must spread the bytes over steps"
        plan = target
    assert not all(s.done for s in group.wait_all(numbers, 0.0)), "the load ended too early"
    states = group.wait_all(numbers, 60.0)
    assert [(s.tokens, s.digest) for s in states] == want
    assert group.status()["epoch"] == 4


def test_a_rank_that_has_switched_can_read_more_experts_from_the_checkpoint(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make, random_prompts: Make, serve: Make
) -> None:
    """float64 lies in torch's own tensors: those made within a step must be writable outside it."""
    directory, fleet = checkpoint("qwen3_moe"), ThreadFleet()
    spec = served_spec(directory, "float64")
    group = start_threads(directory, dtype="float64", fleet=fleet)
    roomy = shuffled_plan(spec, 1)
    fewer = roomy.slots.copy()
    fewer[:, :, -1] = -1                              # the replicas
    for plan in (roomy, Plan(fewer, spec.num_experts, dispatch=roomy.dispatch)):
        group.apply(plan)
        serve(group, random_prompts(1, 2))            # retires and gathers what the switch left
    everything = [list(range(spec.num_experts))] * spec.num_layers
    first, second = (thread.rank for thread in fleet._threads[:2])
    for rank in (first, second):
        rank.hold(everything)
        assert rank.held() == everything
    assert first.fingerprints() == second.fingerprints()


def test_the_trace_holds_what_the_router_chose(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make, random_prompts: Make,
    tmp_path: Path,
) -> None:
    """Logical ids of every token, whatever the plan; requests, phase, home rank and domain."""
    directory = checkpoint("olmoe")
    spec = served_spec(directory, "float32")
    group = start_threads(
        directory, shuffled_plan(spec, 4), dtype="float32", record_to=tmp_path / "trace"
    )
    prompts = random_prompts(8, 5)
    group.configure(recording=True)
    numbers = group.submit(prompts, 3, domains=["a", "b", "a", "b", "a"])
    states = group.wait_all(numbers, 60.0)
    trace = group.trace()
    assert trace is not None
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for number, prompt, state in zip(numbers, prompts, states, strict=True):
        mine = trace.slice_requests([number])
        fed = [*prompt, *state.tokens[:-1]]
        with torch.inference_mode():
            out = reference(torch.tensor([fed]), output_router_logits=True)
        for layer, logits in enumerate(out.router_logits):
            want = logits.topk(2).indices.sort(dim=1).values.numpy()
            assert np.array_equal(np.sort(mine.ids[:, layer], axis=1), want)
        assert mine.phase.tolist() == [0] * len(prompt) + [1] * 2
        assert len(set(mine.source.tolist())) == 1
        assert {trace.domain_names[d] for d in mine.domain} == {"ab"[number % 2]}
    group.stop()
    assert load_trace(tmp_path / "trace").num_tokens == trace.num_tokens


def test_nothing_is_recorded_when_recording_is_off(
    start_threads: Start, checkpoint: Get, random_prompts: Make, serve: Make
) -> None:
    group = start_threads(checkpoint("olmoe"))
    serve(group, random_prompts(0, 2))
    assert group.trace() is None


def test_measurements_count_every_assignment(
    start_threads: Start, checkpoint: Get, random_prompts: Make, serve: Make
) -> None:
    group = start_threads(checkpoint("qwen3_moe"))
    prompts = random_prompts(1, 6)
    serve(group, prompts)
    m = group.measurements()
    rows = sum(len(p) for p in prompts)
    assert m.rows.sum() == rows
    assert (m.tokens.sum(axis=(0, 2)) == rows * 2).all()
    assert (m.remote_transfers.sum(axis=(0, 2)) <= rows * 2).all()
    assert m.expert_cpu_us.shape == (len(m.step), 2, 4)
    assert (m.expert_cpu_us[m.tokens > 0] > 0).all()
    assert (m.step_wall_us > 0).all()


# ---- what goes wrong -----------------------------------------------------------------------


def test_a_corrupted_transfer_is_sent_again_and_counted_apart(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("qwen3_moe")
    spec = served_spec(directory, "bfloat16")
    group = start_threads(directory)
    accept, flipped = Staging._accept, []

    def flip_once(self: Staging, key: tuple[int, int], expected: str) -> bool:
        if not flipped:
            flipped.append(key)
            self._incoming[key][5] ^= 1
        return accept(self, key, expected)

    monkeypatch.setattr(Staging, "_accept", flip_once)
    plan = group.status()["plan"]
    target = shuffled_plan(spec, 1)
    report = group.apply(target)
    size = int(spec.bytes_per_expert_E()[0])
    assert report.moved_bytes == len(plan.moves_to(target)) * size
    assert report.retried_bytes >= size


@pytest.mark.parametrize("times", [1, 3])
def test_a_bit_that_flips_between_arrival_and_commit_does_not_serve(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make, random_prompts: Make, serve: Make,
    monkeypatch: pytest.MonkeyPatch, times: int,
) -> None:
    directory = checkpoint("qwen3_moe")
    spec = served_spec(directory, "bfloat16")
    group = start_threads(directory)
    group.configure(digests=True)
    prompts = random_prompts(8, 4)
    want = serve(group, prompts, 4)
    verify, flips = Staging.verify, []

    def flip_first(self: Staging, expected: dict[tuple[int, int], str]) -> list[tuple[int, int]]:
        if self.staged and len(flips) < times and len({f[0] for f in flips} | {id(self)}) == 1:
            layer, expert = self.staged[0]
            flips.append((id(self), layer, expert))
            held = self._stores[layer].get(expert)
            held["down"].view(torch.int16).flatten()[3] ^= 1
            self._stores[layer].put(expert, held)
        return verify(self, expected)

    monkeypatch.setattr(Staging, "verify", flip_first)
    target = shuffled_plan(spec, 1)
    if times < 3:
        report = group.apply(target)
        assert report.retried_bytes == int(spec.bytes_per_expert_E()[0])
        assert report.moved_bytes > report.retried_bytes
    else:
        with pytest.raises(LoadmasterError, match="the old plan stays active"):
            group.apply(target)
        assert group.status()["epoch"] == 1
    assert len(flips) == times
    assert serve(group, prompts, 4) == want


def test_a_transfer_that_stays_corrupted_aborts_and_the_old_plan_serves_on(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make, random_prompts: Make, serve: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = checkpoint("qwen3_moe")
    spec = served_spec(directory, "bfloat16")
    group = start_threads(directory)
    group.configure(digests=True)
    prompts = random_prompts(2, 4)
    before = serve(group, prompts, 3)
    accept = Staging._accept

    def flip(self: Staging, key: tuple[int, int], expected: str) -> bool:
        self._incoming[key][5] ^= 1
        return accept(self, key, expected)

    monkeypatch.setattr(Staging, "_accept", flip)
    with pytest.raises(LoadmasterError, match=r"arrived corrupted .* the old plan stays"):
        group.apply(shuffled_plan(spec, 1))
    assert group.status()["epoch"] == 1
    assert serve(group, prompts, 3) == before
    monkeypatch.setattr(Staging, "_accept", accept)
    group.apply(shuffled_plan(spec, 1))
    assert serve(group, prompts, 3) == before


@pytest.mark.parametrize(
    ("slots", "experts", "reason"),
    [
        (np.zeros((2, 4, 1), int), 1, "2 layers x 1 experts"),
        (np.arange(8).reshape(1, 4, 2), 8, "1 layers x 8 experts on 4 devices"),
        (np.tile(np.arange(8).reshape(1, 8, 1), (2, 1, 1)), 8, "8 experts on 8 devices"),
    ],
)
def test_a_plan_for_something_else_is_refused_and_nothing_moves(
    start_threads: Start, checkpoint: Get, slots: np.ndarray, experts: int, reason: str
) -> None:
    group = start_threads(checkpoint("qwen3_moe"))
    with pytest.raises(PlanError, match=reason):
        group.apply(Plan(slots=slots, num_experts=experts))
    assert group.status()["epoch"] == 1


def test_bad_prompts_are_refused_and_the_others_run(
    start_threads: Start, checkpoint: Get, serve: Make
) -> None:
    group = start_threads(checkpoint("qwen3_moe"))
    with pytest.raises(InputError, match="the prompt is empty"):
        group.submit([[1, 2], []], 4)
    with pytest.raises(InputError, match="exceed the model's 2048 positions"):
        group.submit([[1] * 2048], 1)
    assert group.status()["requests"] == 0
    assert len(serve(group, [[1, 2, 3]], 4)[0][0]) == 4


def test_a_stopped_group_says_so(start_threads: Start, checkpoint: Get) -> None:
    group = start_threads(checkpoint("qwen3_moe"))
    group.stop()
    with pytest.raises(LoadmasterError, match="not serving"):
        group.submit([[1]], 1)


def test_applies_that_wait_when_the_group_stops_are_told(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make
) -> None:
    directory = checkpoint("qwen3_moe")
    group = start_threads(directory, stage_budget_bytes=64)
    spec = served_spec(directory, "bfloat16")
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(group.apply, shuffled_plan(spec, seed)) for seed in (1, 2)]
        while not (group.status()["switching"] and group._boundary._changes):
            time.sleep(0.01)
        group.stop()
        for call in calls:
            with pytest.raises(LoadmasterError, match="was stopped"):
                call.result(10.0)
