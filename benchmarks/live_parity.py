"""Live ranks against transformers, against themselves under other plans, and with recording on.

Functions that return plain dictionaries; `loop.py` prints them. `hf_parity` runs ranks as threads
of this process, the others start a group on a local Ray cluster.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import ARCHITECTURES, save_random_checkpoint

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.workers.coordinator.coordinator import Coordinator
from loadmaster.workers.fleet.thread_fleet import ThreadFleet
from loadmaster.workers.group.group import Group, contiguous
from loadmaster.workers.protocol.phase_plans import PhasePlans
from loadmaster.workers.protocol.settings import GroupSettings, RankSettings, served_spec
from loadmaster.workers.protocol.step_messages import ReplayedRouting
from loadmaster.workers.rank.model import MoeCheckpoint

FP32_BAR = 1e-5
BF16_BAR = 2e-2
OVERHEAD_BAR = 0.02


# ---- parity with transformers --------------------------------------------------------------


def hf_parity(
    architectures: Sequence[str] = ARCHITECTURES, ranks: int = 4, seed: int = 0
) -> dict[str, Any]:
    """Logits of tiny random models on `ranks` ranks with replicas against one process.

    Per architecture: fp32 with the ranks' own routing; bf16 with the reference's routing replayed,
    and how many tokens the ranks' own routers would have sent elsewhere in some layer.
    """
    rows = {}
    for architecture in architectures:
        with tempfile.TemporaryDirectory() as directory:
            model = save_random_checkpoint(architecture, directory, seed=seed)
            prompts = _random_prompts(seed)
            fp32, _ = _parity(model, prompts, "float32", ranks, replayed=False)
            bf16, flips = _parity(model, prompts, "bfloat16", ranks, replayed=True)
        rows[architecture] = {
            "fp32_max_rel": fp32,
            "bf16_max_rel": bf16,
            "bf16_routing_flips": flips,
            "holds": fp32 <= FP32_BAR and bf16 <= BF16_BAR,
        }
    return {**rows, "holds": all(r["holds"] for r in rows.values())}


def _random_prompts(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in (48, 5, 33, 1, 70, 120)]


def _parity(
    directory: Path, prompts: list[list[int]], dtype: str, ranks: int, *, replayed: bool
) -> tuple[float, float]:
    """(largest difference over largest reference, share of tokens whose own routing differs)."""
    reference = [_reference(directory, prompt, dtype) for prompt in prompts]
    coordinator = thread_group(directory, ranks, dtype, replicated(directory, ranks))
    try:
        coordinator.configure(all_logits=True)
        replays = [routing for _, routing in reference] if replayed else None
        numbers = coordinator.submit(prompts, 1, replays=replays)
        states = coordinator.wait_all(numbers, 120.0)
        failed = [s.error for s in states if s.error]
        if failed:
            raise RuntimeError(failed[0])
        ours = [coordinator.logits(n) for n in numbers]
    finally:
        coordinator.stop()
    difference = max(
        float(np.abs(mine - logits).max())
        for (mine, _), (logits, _) in zip(ours, reference, strict=True)
    )
    scale = max(float(np.abs(logits).max()) for logits, _ in reference)
    flips = _flips([own for _, own in ours], [r for _, r in reference]) if replayed else 0.0
    return difference / scale, flips


def _flips(own: list[Any], routing: list[ReplayedRouting]) -> float:
    changed = total = 0
    for mine_LTK, reference in zip(own, routing, strict=True):
        other = np.sort(mine_LTK, axis=2) != np.sort(reference.ids_LTK, axis=2)
        changed += int(other.any(axis=(0, 2)).sum())
        total += other.shape[1]
    return changed / total


def _reference(
    directory: Path, prompt: list[int], dtype: str
) -> tuple[Any, ReplayedRouting]:
    """transformers' own logits [T, V] and routing of one prompt, in one process."""
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), experts_implementation="eager"
    ).eval()
    chosen: list[tuple[Any, Any]] = []

    def keep(module: Any, arguments: tuple[Any, ...]) -> None:
        chosen.append((arguments[1].numpy().copy(), arguments[2].float().numpy().copy()))

    for name in MoeCheckpoint(directory).expert_modules:
        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt]), use_cache=False).logits[0].float().numpy()
    return logits, ReplayedRouting(
        np.stack([ids for ids, _ in chosen]), np.stack([gates for _, gates in chosen])
    )


def replicated(directory: str | Path, ranks: int, seed: int = 0, spare: int = 2) -> Plan:
    """Experts shuffled over the ranks, and `spare` replicas more on each."""
    spec = served_spec(directory, "bfloat16")
    rng = np.random.default_rng(seed)
    base = -(-spec.num_experts // ranks)
    slots = np.full((spec.num_layers, ranks, base + spare), -1, np.int16)
    for layer in range(spec.num_layers):
        parts = np.array_split(rng.permutation(spec.num_experts), ranks)
        for rank, part in enumerate(parts):
            others = np.setdiff1d(np.arange(spec.num_experts), part)
            row = np.concatenate((part, rng.choice(others, spare, replace=False)))
            slots[layer, rank, : len(row)] = row
    return Plan(
        slots=slots,
        num_experts=spec.num_experts,
        layer_indices=spec.layer_indices or (),
        dispatch=DispatchSpec(policy="balanced"),
    )


def thread_group(
    directory: str | Path, ranks: int, dtype: str, plan: Plan | None = None
) -> Coordinator:
    """A group whose ranks are threads of this process; started."""
    spec = served_spec(directory, dtype)
    plan = plan or contiguous(spec, ranks)
    cluster = Cluster.preset(
        "cpu", devices_per_node=ranks, slots_per_device=plan.slots_per_device
    )
    settings = GroupSettings(
        name="threads",
        journal=tempfile.mkdtemp(prefix="loadmaster-"),
        ranks=tuple(
            RankSettings(g, ranks, str(directory), cluster, dtype) for g in range(ranks)
        ),
        plans=PhasePlans.both(plan),
        model_spec=spec,
    )
    coordinator = Coordinator(settings, ThreadFleet())
    coordinator.start()
    return coordinator


# ---- the same bits under other plans -------------------------------------------------------


def outputs_identical(
    group: Group, prompts: Sequence[Sequence[int]], *, new_tokens: int = 24, seed: int = 1
) -> dict[str, Any]:
    """Greedy decoding before and after two different plans with replicas, bit for bit.

    Leaves the group under the second plan.
    """
    spec, ranks = group.model_spec, group.plan.num_devices
    before = group.generate(prompts, new_tokens)
    digest = group.prefill(prompts).digest
    same, switches = [], []
    for number in range(2):
        plan = _replicas_of(spec.num_experts, spec.num_layers, ranks, seed + number, group.plan)
        report = group.apply(plan)
        switches.append({"moved": len(report.moved), "moved_bytes": report.moved_bytes})
        same.append(
            group.generate(prompts, new_tokens) == before
            and group.prefill(prompts).digest == digest
        )
    return {"prompts": len(prompts), "switches": switches, "identical": all(same),
            "holds": all(same)}


def _replicas_of(experts: int, layers: int, ranks: int, seed: int, current: Plan) -> Plan:
    rng = np.random.default_rng(seed)
    base = -(-experts // ranks)
    slots = np.full((layers, ranks, base + 2), -1, np.int16)
    for layer in range(layers):
        for rank, part in enumerate(np.array_split(rng.permutation(experts), ranks)):
            others = np.setdiff1d(np.arange(experts), part)
            row = np.concatenate((part, rng.choice(others, 2, replace=False)))
            slots[layer, rank, : len(row)] = row
    return Plan(slots=slots, num_experts=experts, layer_indices=current.layer_indices)


# ---- what recording costs ------------------------------------------------------------------


def recording_overhead(
    group: Group, prompts: Sequence[Sequence[int]], *, pairs: int = 240
) -> dict[str, Any]:
    """Share of CPU time that recording adds, with the upper end of its 95 % band.

    prompts: enough for one step. That step runs again and again with recording on and off in turn
    (which of a pair goes first alternates). CPU time is that of the rank processes, all threads;
    start the group with `record_to` to have the writer in it. The share is the ratio of the
    totals; the band is a paired bootstrap.
    """
    group.prefill(prompts)
    pids = group.status()["pids"]
    cpu = np.empty((pairs, 2))
    for pair in range(pairs):
        for on in (1, 0) if pair % 2 else (0, 1):
            group.record(bool(on))
            before = _cpu_s(pids)
            group.prefill(prompts)
            cpu[pair, on] = _cpu_s(pids) - before
    group.record(False)
    rng = np.random.default_rng(0)
    off, on = cpu[rng.integers(0, pairs, (4000, pairs))].sum(axis=1).T
    upper = float(np.quantile(on / off, 0.975)) - 1.0
    return {
        "share": float(cpu[:, 1].sum() / cpu[:, 0].sum()) - 1.0,
        "upper_95": upper,
        "pairs": pairs,
        "cpu_ms_per_step": float(cpu[:, 0].mean() * 1e3),
        "holds": upper <= OVERHEAD_BAR,
    }


def _cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds of these processes so far, all threads, to the nanosecond (Linux)."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)
