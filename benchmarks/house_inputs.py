"""Fixed inputs and what the package makes of them, by its public names alone.

Run as a program with PYTHONPATH naming the folder that holds a checkout called `loadmaster`:
`python house_inputs.py [NAME ...]` prints one JSON document a line, {name, seconds, result};
`--list` prints the names. Only `loadmaster.*` of the API and the verbs of the command line are
used, so that one text runs before and after every move. Traces are drawn here by numpy; nothing of
the package makes them.

A result is plain JSON: numbers as they are, arrays as a fingerprint of their values, objects as
their fields in order. Wall times and version strings are left out. `house_plans.py` compares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import loadmaster as lm

Array = npt.NDArray[Any]
Result = Any

LEFT_OUT = ("seconds", "version")     # wall time, and what a release changes
MOST_LISTED = 48                      # values of an array that are shown beside its fingerprint

INPUTS: dict[str, Callable[[], Result]] = {}


def fixed(function: Callable[[], Result]) -> Callable[[], Result]:
    """Put an input on the list under its function's name."""
    INPUTS[function.__name__] = function
    return function


# ---- plain values --------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """The value as JSON, the same for equal values whatever their types are called."""
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()[:16]}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, lm.RoutingTrace):
        return {"trace": value.digest()}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items() if k not in LEFT_OUT}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value)]
    elif hasattr(type(value), "model_fields"):
        names = list(type(value).model_fields)
    else:
        raise TypeError(f"no plain form of {type(value).__name__}")
    return {name: plain(getattr(value, name)) for name in names if name not in LEFT_OUT}


def _array(values: Array) -> dict[str, Any]:
    """Shape, fingerprint, and the values themselves where they are few; width does not count."""
    kind = values.dtype.kind
    wide = {"i": np.int64, "u": np.int64, "b": np.int64, "f": np.float64}[kind]
    same = np.ascontiguousarray(values, wide)
    found = {
        "shape": list(values.shape),
        "values": hashlib.sha256(same.tobytes()).hexdigest()[:16],
    }
    if values.size <= MOST_LISTED:
        found["listed"] = plain(same.reshape(-1).tolist())
    return found


# ---- traces, models, clusters --------------------------------------------------------------------


@functools.cache
def routed(
    tokens: int, layers: int, experts: int, top_k: int, *, seed: int, skew: float = 0.9,
    pull: float = 1.5, phases: bool = False, steps: bool = False, gates: bool = False,
    fewer: bool = False, requests: bool = True, homes: int = 0,
) -> lm.RoutingTrace:
    """Requests of three domains, each with popular experts of its own; layers follow each other.

    fewer: a router that sometimes picks fewer than K. homes: ranks recorded as `source`; 0 = none.
    """
    rng = np.random.default_rng([seed, tokens, layers, experts, top_k])
    lengths = rng.geometric(1 / 60, tokens) + 8
    request_T = np.repeat(np.arange(tokens), lengths)[:tokens]
    domain_T = rng.integers(0, 3, request_T[-1] + 1)[request_T]
    popularity = np.arange(1, experts + 1) ** -skew
    log_DLE = np.log([[rng.permutation(popularity) for _ in range(layers)] for _ in range(3)])
    next_LE = rng.integers(0, experts, (layers, experts))
    ids, gate = np.empty((tokens, layers, top_k), np.int64), np.empty((tokens, layers, top_k))
    for layer in range(layers):
        logit_TE = log_DLE[domain_T, layer] + rng.gumbel(size=(tokens, experts))
        if layer:
            logit_TE[np.arange(tokens), next_LE[layer, ids[:, layer - 1, 0]]] += pull
        ids[:, layer] = np.argsort(-logit_TE, axis=1, kind="stable")[:, :top_k]
        chosen = np.take_along_axis(logit_TE, ids[:, layer], axis=1)
        weight = np.exp(chosen - chosen.max(axis=1, keepdims=True))
        gate[:, layer] = weight / weight.sum(axis=1, keepdims=True)
    place_T = np.arange(tokens) - np.searchsorted(request_T, request_T)
    columns: dict[str, Any] = {
        "request": request_T if requests else None,
        "domain": domain_T, "domain_names": ("code", "prose", "tables"),
        "phase": (place_T >= 20).astype(np.uint8) if phases else None,
        "step": rng.integers(0, max(1, tokens // 300), tokens) if steps else None,
        "gates": gate if gates else None,
        "k_of_token": rng.integers(1, top_k + 1, (tokens, layers)) if fewer else None,
        "source": request_T % homes if homes else None,
    }
    return lm.RoutingTrace.from_arrays(ids, num_experts=experts, model_name="drawn", **columns)


@functools.cache
def halves(trace: lm.RoutingTrace) -> tuple[lm.RoutingTrace, lm.RoutingTrace]:
    """Half the requests to plan on, half to judge on."""
    known, unseen = trace.split(0.5, seed=3)
    return known, unseen


def small() -> lm.RoutingTrace:
    """Three layers of 24 experts, top-3."""
    return routed(9_000, 3, 24, 3, seed=1, skew=1.0)


def wide() -> lm.RoutingTrace:
    """Two layers of 64 experts, top-6."""
    return routed(8_000, 2, 64, 6, seed=2)


def model_of(trace: lm.RoutingTrace, **more: Any) -> lm.ModelSpec:
    """A model of the trace's shape with sizes, so that time is known."""
    sizes = {"hidden": 2048, "intermediate": 768, "other_time_us": 400.0} | more
    return lm.ModelSpec(
        name="drawn", num_layers=trace.num_layers, num_experts=trace.num_experts,
        top_k=trace.top_k, **sizes,
    )


def devices(
    traffic: str = "return_home/per_expert", *, nodes: int = 1, each: int = 4, slots: int = 5,
    preset: str = "h100", speeds: tuple[float, ...] | None = None,
) -> lm.Cluster:
    """A cluster of a preset's devices."""
    return lm.Cluster.preset(
        preset, nodes=nodes, devices_per_node=each, slots_per_device=slots, traffic=traffic,
        speeds=speeds,
    )


STEPS = lm.StepSampler(tokens=256, concurrency=32, seed=0)


def made(result: lm.PlanResult) -> Result:
    """A PlanResult and the bytes of its plan's file, as what they say."""
    return {"result": plain(result), "file": plain(json.loads(result.plan.to_json()))}


def planned_and_judged(
    trace: lm.RoutingTrace, cluster: lm.Cluster, *, steps: lm.StepSampler = STEPS,
    sized: bool = True, **options: Any,
) -> Result:
    """Planned on half the requests, judged on the others; with times where `sized`."""
    known, unseen = halves(trace)
    result = lm.plan(known, cluster, steps=steps, **options)
    model = options.get("model") or (model_of(trace) if sized else None)
    plan = result.plan
    judged = lm.evaluate(plan, unseen, cluster, steps=steps, model=model)
    return made(result) | {"evaluation": plain(judged)}


# ---- every method --------------------------------------------------------------------------------


def _method(name: str) -> Result:
    cluster = devices(nodes=2, each=2, slots=7)
    return planned_and_judged(small(), cluster, method=name)


for _name in ("contiguous", "round_robin", "eplb", "eplb_hierarchical", "greedy",
              "anticorrelation", "lpt_swap", "affinity", "moetuner", "auto"):
    INPUTS[f"method_{_name}"] = functools.partial(_method, _name)


# ---- objectives, efforts, devices ----------------------------------------------------------------


@fixed
def time_at_decode() -> Result:
    """Steps of 32 tokens: weights read are the price, and a replica may cost more than it gives."""
    trace = wide()
    return planned_and_judged(
        trace, devices(each=8, slots=10, preset="b200"), model=model_of(trace), seed=1,
        steps=lm.StepSampler(tokens=32, concurrency=32),
    )


@fixed
def time_at_prefill() -> Result:
    """Steps of 2,048 tokens on two nodes, spine narrowed to a half."""
    trace = wide()
    cluster = devices(nodes=2, each=4, slots=10).with_oversubscription(2.0)
    return planned_and_judged(
        trace, cluster, model=model_of(trace), objective="time", effort="fast",
        steps=lm.StepSampler(tokens=1024, concurrency=32),
    )


@fixed
def time_on_uneven_devices() -> Result:
    """Devices of four speeds."""
    trace = small()
    cluster = devices(slots=8, speeds=(1.0, 0.5, 2.0, 1.3))
    return planned_and_judged(trace, cluster, model=model_of(trace), seed=2)


@fixed
def balance_on_uneven_devices() -> Result:
    """The same devices, balance as the objective although the model is known."""
    trace = small()
    cluster = devices(slots=8, speeds=(1.0, 0.5, 2.0, 1.3))
    return planned_and_judged(trace, cluster, model=model_of(trace), objective="balance")


@fixed
def balance_on_many_devices() -> Result:
    """Sixteen devices: too many for exact subsets."""
    return planned_and_judged(wide(), devices(nodes=2, each=8, slots=5), seed=4)


@fixed
def thorough_on_a_tiny_layer() -> Result:
    """Effort thorough, where programs refine what the search found."""
    trace = routed(4_000, 2, 8, 2, seed=5)
    return planned_and_judged(trace, devices(slots=2), dispatch="even", effort="thorough")


@fixed
def experts_of_unequal_size() -> Result:
    """Experts of two sizes, and devices whose memory is shared by the layers."""
    trace = small()
    sizes = tuple(9_000_000 if e % 3 else 5_000_000 for e in range(trace.num_experts))
    model = model_of(trace, expert_bytes=sizes)
    text = devices(slots=8).to_yaml()
    bounded = text.replace("expert_memory_bytes: null", "expert_memory_bytes: 146000000")
    cluster = _from_yaml(bounded)
    return planned_and_judged(trace, cluster, model=model, objective="balance")


def _from_yaml(text: str) -> lm.Cluster:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cluster.yaml"
        path.write_text(text)
        return lm.Cluster.from_yaml(path)


# ---- what crosses the links ----------------------------------------------------------------------


@fixed
def traffic_per_rank() -> Result:
    """A token is sent once per rank, in one node."""
    return planned_and_judged(
        wide(), devices("return_home/per_rank", each=8, slots=10), effort="fast"
    )


@fixed
def traffic_per_node() -> Result:
    """A token is sent once per node."""
    cluster = devices("return_home/per_node", nodes=2, each=4, slots=10)
    return planned_and_judged(wide(), cluster, balance_slack=0.05)


@fixed
def traffic_allgather() -> Result:
    """Routing does not change bytes."""
    return planned_and_judged(wide(), devices("allgather", nodes=2, each=4, slots=9))


@fixed
def traffic_coherent() -> Result:
    """A token stays where its expert is until the next layer."""
    return planned_and_judged(
        small(), devices("coherent", nodes=2, each=2, slots=6), sized=False
    )


@fixed
def traffic_coherent_affinity() -> Result:
    """The same, by methods that follow the way of tokens through the layers."""
    cluster = devices("coherent", nodes=2, each=2, slots=6)
    return {
        name: planned_and_judged(small(), cluster, method=name, sized=False)
        for name in ("affinity", "moetuner")
    }


# ---- every dispatch policy -----------------------------------------------------------------------


def _dispatch(policy: str, **parameters: float) -> Result:
    """Plans for the policy on one node and on two under each payload that tells them apart."""
    spec = lm.DispatchSpec(policy=policy, parameters=parameters)
    return [
        planned_and_judged(small(), cluster, dispatch=spec, effort="fast", seed=7)
        for cluster in (devices(slots=7), devices("return_home/per_rank", nodes=2, each=2, slots=7))
    ]


for _spec in (
    {"policy": "even"}, {"policy": "nearest"}, {"policy": "balanced", "slack": 0.1},
    {"policy": "fewest_active"}, {"policy": "sglang_static", "seed": 9},
    {"policy": "sglang_dynamic", "seed": 9}, {"policy": "vllm_hash"},
    {"policy": "trtllm_round_robin", "offset_by_rank": 1},
    {"policy": "ascend_fixed", "tensor_parallel": 2},
):
    INPUTS[f"dispatch_{_spec['policy']}"] = functools.partial(_dispatch, **_spec)  # type: ignore[arg-type]


@fixed
def one_plan_under_every_dispatch_and_payload() -> Result:
    """One plan with replicas, judged under every policy, payload and order of steps."""
    trace = routed(5_000, 2, 16, 3, seed=11, steps=True, homes=8, fewer=True)
    known, unseen = halves(trace)
    cluster = devices(nodes=2, each=4, slots=4)
    plan = lm.plan(known, cluster, method="eplb", steps=STEPS).plan
    policies = ("even", "nearest", "balanced", "fewest_active", "sglang_static", "sglang_dynamic",
                "vllm_hash", "trtllm_round_robin", "ascend_fixed")
    found = {}
    for traffic in ("return_home/per_expert", "return_home/per_rank", "return_home/per_node",
                    "allgather"):
        for policy in policies:
            judged = lm.evaluate(plan, unseen, cluster.with_traffic(traffic), steps=STEPS,
                                 dispatch=policy, model=model_of(trace))
            found[f"{traffic} {policy}"] = plain(judged)
    for order in ("recorded", "shuffled", "stored"):
        steps = lm.StepSampler(tokens=256, concurrency=16, order=order, seed=1)
        found[order] = plain(lm.evaluate(plan, unseen, cluster, steps=steps))
    return found


# ---- what is planned from ------------------------------------------------------------------------


@fixed
def from_a_profile() -> Result:
    """A sample of a trace without requests stands in for it."""
    trace = routed(9_000, 2, 16, 2, seed=12, requests=False)
    profile = lm.Profile.from_trace(trace, windows=6, sample_tokens=4_000, seed=2)
    return [made(lm.plan(profile, devices(), method=m, steps=STEPS)) for m in ("auto", "eplb")]


@fixed
def from_loads_alone() -> Result:
    """Windows of loads, no tokens: average steps; and a rebalance on them."""
    load = np.random.default_rng(13).gamma(0.6, 900.0, (5, 3, 32)).round() + 1.0
    profile, cluster = lm.Profile.from_loads(load, top_k=4), devices(each=8, slots=5)
    plans = {m: lm.plan(profile, cluster, method=m) for m in ("auto", "eplb", "greedy")}
    moved = lm.rebalance(plans["eplb"].plan, profile, cluster, max_moves=9)
    return {m: made(r) for m, r in plans.items()} | {"moved": made(moved)}


@fixed
def beside_a_standing_plan() -> Result:
    """`current` is one more candidate; a trace with its own steps, ranks and uneven choices."""
    trace = routed(8_000, 2, 16, 3, seed=14, steps=True, homes=4, fewer=True, gates=True)
    current = lm.plan(trace, devices(), method="round_robin", steps=STEPS).plan
    steps = lm.StepSampler(order="recorded")
    return planned_and_judged(trace, devices(), current=current, steps=steps, effort="fast")


# ---- rebalance -----------------------------------------------------------------------------------


@functools.cache
def drifted() -> tuple[lm.Plan, lm.RoutingTrace, lm.Cluster]:
    """A plan that ignores load, and a trace it is not good for."""
    cluster, trace = devices(nodes=2, each=4, slots=5), routed(6_000, 2, 32, 4, seed=16)
    return lm.plan(trace, cluster, method="round_robin", steps=STEPS).plan, trace, cluster


@fixed
def rebalance_within_moves() -> Result:
    """The default budget, none, few moves, and more than could help."""
    plan, trace, cluster = drifted()
    return [
        made(lm.rebalance(plan, trace, cluster, max_moves=most, effort=effort, steps=STEPS, seed=3))
        for most, effort in ((None, "normal"), (0, "fast"), (4, "fast"), (40, "fast"))
    ]


@fixed
def rebalance_within_bytes() -> Result:
    """Moves counted in bytes: balance and time as objectives, and what moving pays back."""
    plan, trace, _ = drifted()
    model, slow = model_of(trace), devices(each=8, slots=5, preset="cpu")
    return [
        made(lm.rebalance(plan, trace, slow, max_bytes=most, max_moves=12, model=model,
                          objective=objective, effort="fast",
                          steps=lm.StepSampler(tokens=512, concurrency=32)))
        for most, objective in ((80_000_000, "time"), (20_000_000, "balance"))
    ]


# ---- comparison ----------------------------------------------------------------------------------


@fixed
def plans_side_by_side() -> Result:
    """Bands and verdicts: by balance and transfers, by time, and where nothing differs."""
    known, unseen = halves(small())
    cluster, model = devices(nodes=2, each=2, slots=7), model_of(small())
    plans = {m: lm.plan(known, cluster, method=m, steps=STEPS).plan
             for m in ("contiguous", "eplb", "affinity", "lpt_swap")}
    same = {"now": plans["eplb"], "new": dataclasses.replace(plans["eplb"])}
    per_node = cluster.with_traffic("return_home/per_node")
    return {
        "balance": plain(lm.compare(plans, unseen, cluster, steps=STEPS, current="eplb")),
        "transfers": plain(lm.compare(plans, unseen, per_node, steps=STEPS, balance_slack=0.05)),
        "time": plain(lm.compare(plans, unseen, cluster, steps=STEPS, model=model, seed=5)),
        "even": plain(lm.compare(plans, unseen, cluster, steps=STEPS, dispatch="even",
                                 resamples=200)),
        "same": plain(lm.compare(same, unseen, cluster, steps=STEPS)),
        "dict": plain(lm.compare(plans, unseen, cluster, steps=STEPS).to_dict()),
    }


# ---- simulation ----------------------------------------------------------------------------------


def arrivals(requests: int, rate: float, seed: int) -> lm.Workload:
    """Poisson arrivals with domains."""
    rng = np.random.default_rng(seed)
    return lm.Workload.from_arrays(
        np.cumsum(rng.exponential(1e6 / rate, requests)), rng.integers(8, 300, requests),
        rng.integers(1, 40, requests), domain=rng.integers(0, 3, requests),
        domain_names=("code", "prose", "tables"),
    )


@fixed
def served() -> Result:
    """A day of requests, its steps priced from routed samples, under two dispatches."""
    known, unseen = halves(small())
    cluster = devices(nodes=2, each=2, slots=7)
    plan = lm.plan(known, cluster, method="greedy", steps=STEPS).plan
    work, model = arrivals(150, 120.0, 1), model_of(small())
    return [
        plain(lm.simulate(plan, work, cluster, trace=unseen, model=model, dispatch=d, seed=2))
        for d in (None, "even")
    ]


@fixed
def served_step_by_step() -> Result:
    """The same with every step routed."""
    known, unseen = halves(small())
    cluster = devices("return_home/per_rank", slots=7)
    plan = lm.plan(known, cluster, method="eplb", steps=STEPS).plan
    return plain(lm.simulate(
        plan, arrivals(40, 200.0, 3), cluster, trace=unseen, model=model_of(small()),
        routing="every_step", seed=1,
    ))


# ---- the command line: what has no public name of its own ----------------------------------------


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder to be in, with a trace, a model and two plans in files."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            trace = routed(7_000, 2, 16, 2, seed=21, skew=1.2, phases=True, steps=True)
            lm.save_trace(trace, "trace")
            sizes = model_of(trace, layer_indices=(1, 2), total_layers=3)
            Path("model.json").write_text(sizes.model_dump_json())
            cluster = devices(slots=6)
            for name, method in (("now", "contiguous"), ("new", "lpt_swap")):
                lm.plan(trace, cluster, method=method, steps=STEPS).plan.save(f"{name}.json")
            yield Path(folder)
        finally:
            os.chdir(before)


def typed(*words: object, code: int = 0) -> Any:
    """Run a verb with --json in this process; what it printed. Raises where it ends otherwise."""
    out, err, argv, ended = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["loadmaster", *map(str, words), "--json"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("loadmaster", run_name="__main__")
    except SystemExit as exit:
        ended = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    finally:
        sys.argv = argv
    if ended != code:
        raise RuntimeError(f"{words[0]} ended with {ended}: {err.getvalue().strip()[-300:]}")
    return plain(json.loads(out.getvalue()))


LOAD = ("--requests", 60, "--rate", 300, "--prompt-tokens", 96, "--output-tokens", 24)
SIZES = ("--model", "model.json")
STEPPED = ("--step-tokens", 256, "--concurrency", 32)


@fixed
def advice_beside_the_plan_in_force() -> Result:
    """`plan` with --current: the verdict, by balance, by time, within moves, phases apart."""
    with workplace():
        size = ("--devices-per-node", 4, "--effort", "fast", *STEPPED)
        return {
            "first": typed("plan", "trace", *size, "--out", "first.json"),
            "current": typed("plan", "trace", "--current", "now.json", *size, *SIZES),
            "moves": typed("plan", "trace", "--current", "now.json", "--max-moves", 4, *size),
            "apart": typed("plan", "trace", "--phase", "apart", *size, "--step-tokens", 64,
                           "--method", "eplb", "--out", "plan.json"),
            "files": [plain(json.loads(Path(name).read_text())) for name in
                      ("first.json", "plan.prefill.json", "plan.decode.json")],
        }


@fixed
def plans_judged_and_shown() -> Result:
    """`evaluate`, `plan-show`, `plan-diff`; and 4 where the first plan is the worse."""
    with workplace():
        return {
            "evaluate": typed("evaluate", "trace", "new.json", "now.json", *STEPPED),
            "worse": typed("evaluate", "trace", "now.json", "--current", "new.json", *STEPPED,
                           code=4),
            "show": typed("plan-show", "new.json"),
            "diff": typed("plan-diff", "now.json", "new.json", *SIZES),
        }


FAULTS = """faults:
- {kind: slow_device, device: 1, factor: 3, at_us: 20000, until_us: 120000}
- {kind: jitter, sigma: 0.2}
- {kind: flapping_nic, device: 2, share: 0.2, period_us: 30000, down_us: 9000, at_us: 10000}
- {kind: lost_devices, devices: [3], at_us: 60000, detect_us: 5000, replan_us: 5000,
   back_after_us: 150000}
"""


@fixed
def served_with_faults() -> Result:
    """`simulate` with every kind of fault, little memory, two groups, and prompts first."""
    with workplace():
        Path("faults.yaml").write_text(FAULTS)
        return [
            typed("simulate", "trace", "now.json", "new.json", *SIZES, *LOAD, *more)
            for more in (
                ("--faults", "faults.yaml", "--slo-ttft-ms", 20, "--slo-tpot-ms", 2),
                ("--faults", "faults.yaml", "--groups", 2, "--prefill", "first"),
                ("--kv-bytes-per-token", 2e8, "--step-tokens", 64, "--other-us-per-token", 0.5),
                ("--overlap", "two_batch", "--traffic", "return_home/per_rank"),
                ("--overlap", "pipeline", "--dispatch", "nearest", "--nodes", 2,
                 "--devices-per-node", 2),
            )
        ]


@fixed
def served_under_control() -> Result:
    """`simulate --policy`: what each policy decides, window after window; devices that compute."""
    with workplace():
        slow = model_of(lm.load_trace("trace"), hidden=512, intermediate=1024)
        Path("slow.json").write_text(slow.model_dump_json())
        load = ("--requests", 600, "--rate", 60, "--prompt-tokens", 256, "--output-tokens", 16)
        return {
            policy: typed("simulate", "trace", "now.json", "--model", "slow.json", *load,
                          "--preset", "cpu", "--step-tokens", 512, "--policy", policy,
                          "--every-steps", every)
            for policy, every in (("never", 100), ("every-n", 120), ("drift", 100),
                                  ("net-benefit", 100))
        }


@fixed
def replayed_and_reported() -> Result:
    """`replay` of recorded steps; `simulate`'s report, as its text, and its timeline."""
    with workplace():
        typed("simulate", "trace", "now.json", "new.json", *SIZES, *LOAD, "--report", "page.html",
              "--trace-out", "steps.json")
        page = re.sub(r"(?s)<(style|script).*?</\1>", " ", Path("page.html").read_text())
        return {
            "recorded": typed("replay", "trace", "now.json", "new.json", *SIZES),
            "cut": typed("replay", "trace", "now.json", "new.json", *SIZES, "--order",
                         "interleaved", "--max-steps", 12, *STEPPED, "--overlap", "two_batch"),
            "page": " ".join(re.sub(r"<[^>]*>", " ", page).split()),
            "timeline": plain(json.loads(Path("steps.json").read_text())),
        }


GRID = """base: {preset: h100, devices_per_node: 4, slots_per_device: 5, step_tokens: 512}
axes: {method: [eplb, auto], traffic: [return_home/per_expert, allgather], failure: [none, slow]}
failures: {slow: [{kind: slow_device, device: 0, factor: 2.0}]}
slo: {ttft_us: 1000000, tpot_us: 50000}
"""


@fixed
def scenarios_swept() -> Result:
    """`whatif` over methods, traffic modes and a failure."""
    with workplace():
        Path("grid.yaml").write_text(GRID)
        found = typed("whatif", "trace", "grid.yaml", *SIZES, *LOAD, "--csv", "table.csv")
        return {"found": found, "csv": Path("table.csv").read_text()}


@fixed
def experts_cached() -> Result:
    """`cache`: every policy and predictor, slots by layer and shared."""
    with workplace():
        return [typed("cache", "trace", *SIZES, "--slots", n, "--max-steps", 80, *more)
                for n, more in ((6, ()), (12, ("--shared", "--tier", "disk")))]


@fixed
def engines_files() -> Result:
    """A plan to every engine's file and back; what each engine may not hold is said."""
    with workplace():
        found: dict[str, Any] = {}
        ends = {"sglang": "json", "trtllm": "yaml", "vllm_ascend": "json", "eplb": "npz",
                "omni": "npy"}
        for engine, end in ends.items():
            file, back = f"{engine}.{end}", f"{engine}-back.json"
            sizes = () if engine in ("omni", "vllm_ascend") else ("--devices", 4)
            found[engine] = [
                typed("plan-export", "new.json", "--format", engine, "--out", file, "--nearest",
                      *SIZES),
                typed("plan-import", file, "--format", engine, "--out", back, *sizes,
                      "--num-experts", 16),
                plain(json.loads(Path(back).read_text())),
                Path(file).read_text() if end in ("json", "yaml") else plain(np.load(file))
                if end == "npy" else plain(dict(np.load(file))),
            ]
        return found


@fixed
def traces_made_and_read() -> Result:
    """`trace synth`, `trace info` and `trace import`: what a trace holds, and for how long."""
    with workplace():
        arrays = routed(3_000, 2, 16, 2, seed=22)
        np.savez("arrays.npz", ids=arrays.ids, request=arrays.request)
        synth = ("--layers", 2, "--experts", 16, "--top-k", 2, "--tokens", 6_000, "--domains", 2,
                 "--switch-tokens", 1_000, "--seed", 4)
        return {
            "synth": typed("trace", "synth", *synth, "--out", "made"),
            "drawn": plain(lm.load_trace("made")),
            "info": typed("trace", "info", "trace"),
            "import": typed("trace", "import", "arrays.npz", "--num-experts", 16, "--out", "read"),
            "read": plain(lm.load_trace("read")),
        }


def main() -> None:
    """Run the inputs that are named, or all, one line of JSON each."""
    if sys.argv[1:] == ["--list"]:
        print(json.dumps(list(INPUTS)))
        return
    unknown = [name for name in sys.argv[1:] if name not in INPUTS]
    if unknown:
        sys.exit(f"no input {unknown[0]!r}; there are: {', '.join(INPUTS)}")
    print(json.dumps({"package": str(lm.__file__), "inputs": len(INPUTS)}), flush=True)
    for name in sys.argv[1:] or INPUTS:
        start = time.process_time()
        try:
            result = INPUTS[name]()
        except Exception as error:
            traceback.print_exc()
            result = {"raised": f"{type(error).__name__}: {error}"}
        seconds = round(time.process_time() - start, 2)
        print(json.dumps({"name": name, "seconds": seconds, "result": result}), flush=True)


if __name__ == "__main__":
    main()
