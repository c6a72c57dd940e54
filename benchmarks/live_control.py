"""The control loop over a scripted day, and what a plan is worth in wall time on two cores."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from live_load import STEP_TOKENS

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.planner import plan
from loadmaster.placement.rebalancing.policy import Policy
from loadmaster.traces.steps import RECORDED
from loadmaster.traces.trace import RoutingTrace
from loadmaster.workers.calibrate.expert_fit import (
    ExpertFit,
    fit_kernel,
    machine,
    scale_to_live,
)
from loadmaster.workers.control.controller import Controller
from loadmaster.workers.control.decisions import Control
from loadmaster.workers.demo.measure import predicted
from loadmaster.workers.demo.pinning import pin_in_turn
from loadmaster.workers.group.group import Group, contiguous
from loadmaster.workers.protocol.settings import served_spec
from loadmaster.workers.reference import reference_model_dir
from loadmaster.workers.reference.prompts import DOMAINS, demo_prompts

RANKS = 4
SLOTS = 8                # none spare: with some, one plan does for every mix it was made for
PROMPT_TOKENS = 512
WINDOW_STEPS = 16
# Some windows each of: what was served so far, mixed; its code alone; another language, which no
# plan has seen; the mix again. (A day of which the mix holds every part has nothing to gain: plans
# for the parts are within 1 to 4 % of the plan for the mix.)
MIXED = tuple(d for d in DOMAINS if d not in ("japanese", "chinese"))
DAY = (MIXED, ("code",), ("chinese",), MIXED)
MOVES_BAR = 0.15


def window_prompts(domains: Sequence[str], seed: int) -> tuple[list[list[int]], list[str]]:
    """Prompts that fill one window of prefill steps."""
    count = WINDOW_STEPS * STEP_TOKENS // PROMPT_TOKENS
    each = -(-count // len(domains))
    lists = [demo_prompts(d, each, PROMPT_TOKENS, seed) for d in domains]
    prompts = [list(ps[i]) for i in range(each) for ps in lists][:count]
    return prompts, [d for _ in range(each) for d in domains][:count]


def cluster_of(ranks: int) -> Cluster:
    return Cluster.preset("cpu", devices_per_node=ranks, slots_per_device=SLOTS)


def widened(current_plan: Plan, slots_each: int = SLOTS) -> Plan:
    """The plan with empty slots, so many on each rank in all."""
    layers, ranks, width = current_plan.slots.shape
    slots = np.full((layers, ranks, slots_each), -1, np.int16)
    slots[:, :, :width] = current_plan.slots
    return Plan(slots=slots, num_experts=current_plan.num_experts, dispatch=current_plan.dispatch)


def recorded(
    group: Group, domains: Sequence[str], kernel: ExpertFit, cluster: Cluster, seed: int = 3
) -> tuple[RoutingTrace, Cluster]:
    """A recorded window of prefill, and the cluster with this machine's times fitted to it."""
    prompts, labels = window_prompts(domains, seed)
    group.prefill(prompts, labels, step_tokens=STEP_TOKENS)
    group.record(True)
    first = group.step
    group.prefill(prompts, labels, step_tokens=STEP_TOKENS)
    steps = group.measurements(first)
    group.record(False)
    trace = group.trace(take=True)
    fit = scale_to_live(kernel, steps, trace, group.plan, cluster, group.model_spec)
    hardware = machine(fit, cluster.hardware)
    return trace, cluster.model_copy(update={"hardware": hardware})


# ---- the day ---------------------------------------------------------------------------------


class Day:
    """One group's day under one policy: serves a window's prompts again and again while it is on.

    Two batches are always on their way, so that there is work while the controller looks, stages
    and commits. `pause` lets what is under way end.
    """

    def __init__(self, group: Group, kernel: ExpertFit, control: Control) -> None:
        self.group = group
        self._loop = Controller(group, cluster_of(RANKS), control, kernel=kernel)
        self._parts: list[tuple[list[list[int]], list[str]]] = []
        self._on = threading.Event()
        self._threads: list[threading.Thread] = []
        self.critical_us: list[float] = []
        self.moves: list[int] = []
        self.errors: list[str] = []
        self.answered = 0
        group.record(True)

    def window(self, domains: Sequence[str], number: int) -> None:
        """Serve this window, measure it, let the controller decide under load."""
        prompts, labels = window_prompts(domains, number)
        half = len(prompts) // 2
        self._parts = [(prompts[:half], labels[:half]), (prompts[half:], labels[half:])]
        before, first = self.group.plan, self.group.step
        self._resume()
        try:
            _await_steps(self.group, WINDOW_STEPS)
            steps = self.group.measurements(first)
            full = steps.rows.sum(axis=1) >= 0.9 * STEP_TOKENS
            if not full.any():
                raise RuntimeError("no full step in a window: the load does not keep up")
            self.critical_us.append(WINDOW_STEPS * float(steps.critical_us[full].mean()))
            self._loop.tick()
        finally:
            self._pause()
        self.moves.append(len(before.moves_to(self.group.plan)))

    def _resume(self) -> None:
        self._on.set()
        self._threads = [threading.Thread(target=self._serve, args=(p,), daemon=True)
                         for p in range(2)]
        for thread in self._threads:
            thread.start()

    def _pause(self) -> None:
        self._on.clear()
        for thread in self._threads:
            thread.join()

    def _serve(self, part: int) -> None:
        prompts, labels = self._parts[part]
        while self._on.is_set():
            try:
                self.group.generate(prompts, 1, labels)
                self.answered += len(prompts)
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                time.sleep(0.5)

    def figures(self) -> dict[str, Any]:
        """Every window counts as WINDOW_STEPS full steps at the mean critical path measured in it;
        to that comes what switches cost the steps that carried them."""
        entries = self._loop.entries
        felt = [e.numbers for e in entries]
        stall_us = sum(n.get("stage_us", 0.0) + n.get("commit_us", 0.0) for n in felt)
        return {
            "total_ms": (sum(self.critical_us) + stall_us) / 1e3,
            "critical_ms": sum(self.critical_us) / 1e3,
            "stall_ms": stall_us / 1e3,
            "looking_ms": sum(n.get("looking_us", 0.0) for n in felt) / 1e3,
            "moves": sum(self.moves),
            "moves_by_window": self.moves,
            "critical_ms_by_window": [round(us / 1e3, 1) for us in self.critical_us],
            "answers": [e.answer for e in entries],
            "reasons": [e.reason for e in entries],
            "answered": self.answered,
            "errors": self.errors[:3],
        }


def controller(*, windows_each: int = 5) -> dict[str, Any]:
    """Net benefit against never and every-n with full re-planning, on the same traffic.

    Three groups take turns, window by window, the first one changing: what else this machine does
    biases none of them.
    """
    spec = served_spec(reference_model_dir(), "bfloat16")
    kernel = fit_kernel(spec)
    start = _plan_for_mixed(kernel)
    windows = [domains for domains in DAY for _ in range(windows_each)]
    with contextlib.ExitStack() as stack:
        days = {
            name: Day(stack.enter_context(_group(f"day-{name}", start)), kernel, control)
            for name, control in _controls(windows_each).items()
        }
        for number, domains in enumerate(windows):
            order = list(days.values())
            for day in order[number % 3 :] + order[: number % 3]:
                day.window(domains, number)
        found = {name: day.figures() for name, day in days.items()}
    decode = _decode_day(start, kernel)
    never, every, ours = found.values()
    flat = sum(ours["moves_by_window"][:windows_each])
    share = ours["moves"] / max(every["moves"], 1)
    whole = all(day["errors"] == [] for day in found.values())
    return {
        **found, "decode_moves": decode, "moves_share": share, "flat_moves": flat,
        "holds": bool(
            whole and ours["total_ms"] < never["total_ms"] and ours["total_ms"] < every["total_ms"]
            and share <= MOVES_BAR and flat == 0 and decode == 0
        ),
    }


def _controls(windows_each: int) -> dict[str, Control]:
    """A policy each; a switch must pay for itself while its domain lasts."""
    return {
        "never": Control(Policy("never"), window_steps=WINDOW_STEPS),
        "every_n": Control(
            Policy("every_n", every_steps=1, fewest_tokens=1), window_steps=WINDOW_STEPS,
            candidates="replan",
        ),
        "net_benefit": Control(
            Policy("net_benefit", every_steps=WINDOW_STEPS, fewest_tokens=4 * STEP_TOKENS,
                   horizon_steps=float(windows_each * WINDOW_STEPS)),
            window_steps=WINDOW_STEPS,
        ),
    }


def _plan_for_mixed(kernel: ExpertFit) -> Plan:
    """What an operator would start the day with: planned on a mixed window before it."""
    with _group("day-before", None) as group:
        trace, cluster = recorded(group, MIXED, kernel, cluster_of(RANKS), seed=999)
        return plan(
            trace, cluster, objective="time", model=group.model_spec, steps=RECORDED,
            dispatch="balanced", effort="fast",
        ).plan


def _group(name: str, start: Plan | None) -> Group:
    spec = served_spec(reference_model_dir(), "bfloat16")
    current_plan = widened(contiguous(spec, RANKS)) if start is None else start
    group = Group.start(
        reference_model_dir(), current_plan, ranks=RANKS, name=name.replace("_", "-"),
        cpus_per_rank=0.1,      # three groups share the cores
    )
    pin_in_turn(group.status()["pids"])     # or which ranks meet on a core would differ by group
    return group


def _await_steps(group: Group, steps: int) -> None:
    until, deadline = group.step + steps, time.monotonic() + 300.0
    while group.step < until:
        if time.monotonic() > deadline:
            raise RuntimeError("no steps for five minutes")
        time.sleep(0.02)


def _decode_day(start: Plan, kernel: ExpertFit) -> int:
    """Moves made while only new tokens are generated: small experts, small steps."""
    control = Control(
        Policy("net_benefit", every_steps=32, fewest_tokens=1000, horizon_steps=160.0),
        window_steps=32,
    )
    with _group("day-decode", start) as group:
        loop = Controller(group, cluster_of(RANKS), control, kernel=kernel)
        moves = 0
        for number, domains in enumerate((MIXED, MIXED, ("code",), ("chinese",))):
            prompts, labels = window_prompts(domains, number)
            short = [p[:32] for p in prompts[:48]]
            group.record(False)
            group.prefill(short, labels[:48])
            before = group.plan
            group.record(True)
            group.generate(short, 32, labels[:48])
            loop.tick()
            moves += len(before.moves_to(group.plan))
    return moves


# ---- two ranks on two cores --------------------------------------------------------------------


def two_ranks_wall(*, rounds: int = 16) -> dict[str, Any]:
    """Wall time per step under `contiguous` and `auto`, against what the plan promised.

    The two plans take turns on the same traffic, so that what else the machine does biases neither.
    """
    spec = served_spec(reference_model_dir(), "bfloat16")
    kernel = fit_kernel(spec)
    domains = ("code",)
    slots = spec.num_experts // 2 + 2
    current_plan = widened(contiguous(spec, 2), slots)
    with Group.start(reference_model_dir(), current_plan, ranks=2, name="two-ranks") as group:
        pin_in_turn(group.status()["pids"])
        cluster = Cluster.preset("cpu", devices_per_node=2, slots_per_device=slots)
        trace, fitted = recorded(group, domains, kernel, cluster)
        better = plan(
            trace, fitted, objective="time", model=spec, steps=RECORDED, dispatch="balanced",
            effort="normal",
        ).plan
        judged, _ = recorded(group, domains, kernel, cluster, seed=5)
        walls, paths = _in_turns(group, {"contiguous": current_plan, "auto": better}, rounds)
        gain_us = (
            predicted(current_plan, judged, fitted, spec, None).critical_path_us
            - predicted(better, judged, fitted, spec, None).critical_path_us
        )
    return _wall_verdict(walls, paths, gain_us)


def _in_turns(
    group: Group, plans: dict[str, Plan], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Mean wall time and critical path of full steps, us, by plan and round."""
    prompts, labels = window_prompts(("code",), 5)
    walls: dict[str, list[float]] = {name: [] for name in plans}
    paths: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(rounds):
        for name in list(plans) if turn % 2 else list(plans)[::-1]:
            group.apply(plans[name])
            first = group.step
            group.prefill(prompts, labels, step_tokens=STEP_TOKENS)
            steps = group.measurements(first)
            whole = steps.rows.sum(axis=1) >= 0.9 * STEP_TOKENS
            walls[name].append(float(steps.step_wall_us[whole].mean()))
            paths[name].append(float(steps.critical_us[whole].mean()))
    return walls, paths


def _wall_verdict(
    walls: dict[str, list[float]], paths: dict[str, list[float]], gain_us: float
) -> dict[str, Any]:
    now, new = np.array(walls["contiguous"]), np.array(walls["auto"])
    measured = float(1.0 - np.mean(new) / np.mean(now))
    promised = float(gain_us / np.mean(now))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(now), (4000, len(now)))
    gains = 1.0 - new[drawn].mean(axis=1) / now[drawn].mean(axis=1)
    low, high = (float(q) for q in np.quantile(gains, [0.025, 0.975]))
    near = abs(measured - promised) <= 0.03 or low <= promised <= high
    return {
        "measured_gain": measured, "measured_band": [low, high], "predicted_gain": promised,
        "step_wall_ms": {k: float(np.mean(v)) / 1e3 for k, v in walls.items()},
        "critical_ms": {k: float(np.mean(v)) / 1e3 for k, v in paths.items()},
        "holds": bool(near and np.sign(measured) == np.sign(promised)),
    }
