"""Limits of memory, of numbers and of time: what fits, loads of any size, and what is kept.

`fits`: slots and devices against figures reckoned by hand. `counts`: the same loads at any scale
get the same plan, in like time. `time`: how much work each verb, method and objective does after
its limit, everything compiled beforehand; in seconds of the process, for a machine may do other
things, and by the wall beside them. `job`: a copy of the package, as a job is sent, compiles
nothing anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import loadmaster as lm
from loadmaster.errors import InfeasibleError
from loadmaster.placement.memory import fitting_slots, require_slots_fit
from loadmaster.placement.planning.planner import METHODS
from loadmaster.placement.rebalancing.advise import advise
from loadmaster.traces.profile import Profile
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.workers.jobs.submit import _copy_package

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MOST_OVER_S = 1.5            # of work, on one core, beyond a limit
SCALES = (1e-6, 1e-3, 1.0, 1e6, 2.0**31, 1e12, 1e15)

# Name, preset, bytes of an expert, layers, experts, other weights; slots that fit, devices needed.
# A slot takes bytes · layers; an H100 or A100 has 85,899,345,920 bytes, an H200 141e9, a PCIe card
# 48e9, and a tenth is kept free.
FITS: tuple[tuple[str, str, int, int, int, int, int, int], ...] = (
    # 3·7168·2048 + 4·3·56·16 scales; (77.309 - 18.970) / 2.55495 = 22.83; 256 / 22 = 11.6
    ("DeepSeek-V3 fp8", "h100", 44_050_944, 58, 256, 18_969_985_024, 22, 12),
    # (126.9 - 18.970) / 2.55495 = 42.24; 256 / 42 = 6.1
    ("DeepSeek-V3 fp8", "h200", 44_050_944, 58, 256, 18_969_985_024, 42, 7),
    # 3·4096·14336·2; (77.309 - 3.211) / 11.27429 = 6.57; 8 / 6 = 1.3
    ("Mixtral-8x7B bf16", "a100", 352_321_536, 32, 8, 3_210_739_712, 6, 2),
    # 3·2880·2880·17/32 + 2·(2·2880 + 2880) biases; (43.2 - 3.595) / 0.31768 = 124.7; 32 / 124
    ("gpt-oss-20b mxfp4", "pcie", 13_236_480, 24, 32, 3_594_977_280, 124, 1),
    # 60 layers of the same experts; (77.309 - 12) / 2.64306 = 24.7; 384 / 24 = 16
    ("Kimi-K2 fp8", "h100", 44_050_944, 60, 384, 12_000_000_000, 24, 16),
)


def limits() -> dict[str, Any]:
    """All four."""
    found = {"fits": fits(), "counts": counts(), "time": kept_time(), "job": job()}
    return {"holds": all(part["holds"] for part in found.values())} | found


def fits() -> dict[str, Any]:
    """Slots and devices of known models on known devices; and what `plan` says to one too many."""
    rows = []
    for name, preset, size, layers, experts, dense, slots, devices in FITS:
        model = lm.ModelSpec(
            name=name, num_layers=layers, num_experts=experts, top_k=1,
            expert_bytes=(size,) * experts, dense_bytes=dense,
        )
        place = lm.Cluster.preset(preset, devices_per_node=1, slots_per_device=slots)
        more, enough = place.with_slots(slots + 1), place
        rows.append({
            "model": name, "preset": preset, "slots": fitting_slots(place, model),
            "slots_by_hand": slots, "one_more_is_refused": _refused(more, model),
            "as_many_are_refused": _refused(enough, model),
            "devices": -(-experts // fitting_slots(place, model)), "devices_by_hand": devices,
        })
    refused = _over_memory()
    holds = all(
        r["slots"] == r["slots_by_hand"] and r["devices"] == r["devices_by_hand"]
        and r["one_more_is_refused"] and not r["as_many_are_refused"] for r in rows
    )
    return {"holds": holds and refused["exit"] == 3, "models": rows, "over_memory": refused}


def _refused(place: lm.Cluster, model: lm.ModelSpec) -> bool:
    try:
        require_slots_fit(place, model)
    except InfeasibleError:
        return True
    return False


def _over_memory() -> dict[str, Any]:
    """DeepSeek-V3 in fp8 on eight H100 with an even share and a quarter more, as typed."""
    config = {
        "model_type": "deepseek_v3", "torch_dtype": "bfloat16", "hidden_size": 7168,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "v3").mkdir()
        (work / "v3" / "config.json").write_text(json.dumps(config))
        rng = np.random.default_rng(0)
        ids = np.argsort(rng.random((512, 58, 64)), axis=2)[:, :, :8] * 4
        np.savez(work / "trace.npz", ids=ids.astype(np.uint8), request=np.arange(512) // 16,
                 num_experts=256, layer_indices=np.arange(3, 61))
        done = _typed("plan", work / "trace.npz", "--preset", "h100", "--devices-per-node", "8",
                      "--method", "greedy", "--effort", "fast", "--model", work / "v3")
    return {"exit": done.returncode, "said": done.stderr.strip().splitlines()[-1:]}


def _typed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    root = Path(lm.__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-m", "loadmaster", *map(str, arguments)], capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": str(root)},
    )


def counts() -> dict[str, Any]:
    """The same shares at every scale: equal slots, and no scale slower than three others."""
    rng = np.random.default_rng(0)
    raw = rng.gamma(0.5, 1.0, (2, 4, 64)) + 1e-3
    place = lm.Cluster.preset("h100", nodes=2, devices_per_node=8, slots_per_device=5)
    rows = []
    for method in ("auto", "greedy", "eplb"):
        for dispatch in ("balanced", "even"):
            def planned(
                scale: float, method: str = method, dispatch: str = dispatch
            ) -> lm.PlanResult:
                return lm.plan(Profile.from_loads(raw * scale), place, method=method,
                               dispatch=dispatch)

            first = planned(1.0)
            made = [planned(scale) for scale in SCALES]
            rows.append({
                "method": method, "dispatch": dispatch,
                "equal_plans": sum(np.array_equal(m.plan.slots, first.plan.slots) for m in made),
                "of": len(made), "seconds": [round(m.seconds, 2) for m in made],
                "objective": first.evidence.objective, "bound": first.evidence.bound,
            })
    even = all(
        r["equal_plans"] == r["of"] and max(r["seconds"]) <= 3 * np.median(r["seconds"]) + 1
        for r in rows
    )
    dumps = _dumps()
    return {"holds": even and dumps["holds"], "scales": list(SCALES), "plans": rows,
            "dumps": dumps}


def _dumps() -> dict[str, Any]:
    """Sums of 1e9 and 1e12 assignments per layer, and a thousandth of them."""
    folder = DATA / "field" / "dumps"
    names = ("loads_1e9_assignments_per_layer", "loads_1e12_assignments_per_layer")
    if not all((folder / f"{name}.npz").is_file() for name in names):
        return {"holds": False, "why": f"not present: {folder}"}
    place = lm.Cluster.preset("h100", slots_per_device=3)
    made = []
    for name in names:
        load = np.load(folder / f"{name}.npz")["expert_load"]
        made += [lm.plan(Profile.from_loads(x), place) for x in (load, load * 1e-3)]
    equal = all(np.array_equal(m.plan.slots, made[0].plan.slots) for m in made)
    return {"holds": equal, "equal_plans": equal, "seconds": [round(m.seconds, 2) for m in made],
            "imbalance": made[0].evidence.objective, "bound": made[0].evidence.bound}


def kept_time() -> dict[str, Any]:
    """Seconds of work, and by the wall, beyond the limit; by what was asked."""
    trace = synth_trace(layers=58, experts=256, top_k=8, tokens=20_000, request_tokens=100)
    model = lm.ModelSpec(name="V3's shape", num_layers=58, num_experts=256, top_k=8, hidden=7168,
                         intermediate=2048, bytes_per_parameter=1.0)
    place = lm.Cluster.preset("h100", nodes=8, devices_per_node=8, slots_per_device=5)
    loads = Profile.from_loads(trace.load_LE(), top_k=8)
    current = lm.plan(loads, place, method="contiguous", dispatch="even").plan
    asked: dict[str, Callable[[float], Any]] = {}
    for objective in ("balance", "time"):
        sized = {"objective": objective, "model": model if objective == "time" else None}
        for method in METHODS:
            asked[f"plan {method} {objective}"] = lambda s, m=method, z=sized: lm.plan(
                trace, place, method=m, time_limit_s=s, **z)
        asked[f"rebalance {objective}"] = lambda s, z=sized: lm.rebalance(
            current, trace, place, time_limit_s=s, **z)
        asked[f"advise {objective}"] = lambda s, z=sized: advise(
            trace, place, time_limit_s=s, **z)
    for dispatch in ("balanced", "even"):
        asked[f"plan auto on loads {dispatch}"] = lambda s, d=dispatch: lm.plan(
            loads, place, dispatch=d, time_limit_s=s)
    rows = {}
    for name, run in asked.items():
        run(1e-3)                                # compiled, and read once
        rows[name] = {str(limit): _beyond(run, limit) for limit in (0.5, 4.0)}
    worst = max(over[0] for row in rows.values() for over in row.values())
    return {"holds": worst <= MOST_OVER_S, "worst_over_s": worst, "at_most": MOST_OVER_S,
            "over_s_work_and_wall": rows}


def _beyond(run: Callable[[float], Any], limit: float) -> tuple[float, float]:
    """(seconds of work after the limit, seconds by the wall)."""
    at_limit: list[float] = []
    watch = threading.Timer(limit, lambda: at_limit.append(time.process_time()))
    began = time.perf_counter()
    watch.start()
    run(limit)
    worked, wall = time.process_time(), time.perf_counter() - began
    watch.cancel()
    work = worked - at_limit[0] if at_limit else 0.0
    return round(work, 2), round(max(wall - limit, 0.0), 2)


def job() -> dict[str, Any]:
    """A first plan in a copy of the package with other times of change, as a job is sent."""
    code = (
        "import time; began = time.perf_counter()\n"
        "import gc, numba, loadmaster as lm\n"
        "from loadmaster.traces.synth.generate import synth_trace\n"
        "trace = synth_trace(layers=1, experts=8, top_k=2, tokens=4000, request_tokens=50)\n"
        "place = lm.Cluster.preset('cpu', devices_per_node=4, slots_per_device=3)\n"
        "for method in ('auto', 'greedy', 'affinity'):\n"
        "    lm.plan(trace, place, method=method, steps=lm.StepSampler(tokens=64, concurrency=8))\n"
        "seconds = time.perf_counter() - began\n"
        "from numba.core.dispatcher import Dispatcher\n"
        "stats = [x.stats for x in gc.get_objects() if isinstance(x, Dispatcher)]\n"
        "print(lm.__file__, seconds, sum(sum(s.cache_misses.values()) for s in stats))\n"
    )

    def run(where: Path) -> tuple[str, float, int]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              check=True, cwd=where, env=os.environ | {"PYTHONPATH": str(where)})
        file, seconds, misses = done.stdout.split()
        return file, float(seconds), int(misses)

    run(Path(lm.__file__).resolve().parents[1])          # compiled here
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "loadmaster"
        _copy_package(copy)
        for path in copy.rglob("*.py"):
            os.utime(path, (1e9, 1e9))
        _, seconds, misses = run(Path(folder))
    return {"holds": misses == 0, "seconds": round(seconds, 1), "compiled_anew": misses}
