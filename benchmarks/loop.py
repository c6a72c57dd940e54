"""The loop's figures: demo time, identical outputs, parity, recording, storage, plan quality.

    python benchmarks/loop.py --json            all, one JSON object
    python benchmarks/loop.py --only hf_parity  one section

Sections run alone; ratios are within one run; seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
GPTOSS = DATA / "routing" / "gptoss20b_decode.npz"


def demo_seconds() -> dict[str, Any]:
    """`loadmaster demo` as a user runs it, start to end."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        started = time.perf_counter()
        done = subprocess.run(
            [_command(), "demo", "--json", "--out", str(folder)],
            capture_output=True, text=True, check=False,
        )
        seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"demo failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return {"demo_seconds": round(seconds, 1), "demo": json.loads(done.stdout)}


def outputs_identical() -> dict[str, Any]:
    """bf16, greedy decoding of 64 prompts before and after two plans with replicas."""
    from live_parity import outputs_identical as measure

    with _group() as group:
        found = measure(group, _prompts(64, 192))
    return {"outputs_identical": found.pop("identical"), "outputs_identical_details": found}


def hf_parity() -> dict[str, Any]:
    """Logits against the single-process transformers model, per architecture."""
    from live_parity import hf_parity as measure

    return {"hf_parity": measure()}


def recording_overhead() -> dict[str, Any]:
    """CPU time that recording adds to live prefill steps, writer included."""
    from live_parity import recording_overhead as measure

    with tempfile.TemporaryDirectory() as scratch, _group(record_to=Path(scratch)) as group:
        found = measure(group, _prompts(12, 384))
    return {"recording_overhead": found}


def trace_store() -> dict[str, Any]:
    """Raw ids written per CPU second, and id columns against their entropy."""
    from traces import write

    return write()


def gptoss_auto_vs_eplb() -> dict[str, Any]:
    """Held-out imbalance: 8 devices, 5 slots, default steps, random split by request."""
    import loadmaster as lm

    if not GPTOSS.exists():
        return {"gptoss_auto_vs_eplb": {"skipped": f"not present: {GPTOSS.name}"}}
    trace = lm.load_trace(GPTOSS)
    cluster = lm.Cluster.preset("h100", devices_per_node=8, slots_per_device=5)
    steps = lm.StepSampler()
    rows = []
    for seed in range(3):
        planning, unseen = trace.split(0.5, seed=seed)
        made = {
            method: lm.plan(planning, cluster, method=method, objective="balance",
                            dispatch="balanced", steps=steps, seed=seed)
            for method in ("auto", "eplb", "contiguous")
        }
        judged = {
            f"{method}+{dispatch}": lm.evaluate(
                made[method].plan, unseen, cluster, steps=steps, dispatch=dispatch
            ).imbalance_mean
            for method, dispatch in (("auto", "balanced"), ("eplb", "balanced"), ("eplb", "even"),
                                     ("contiguous", "even"))
        }
        rows.append(judged | {"bound": made["auto"].evidence.bound,
                              "gap": made["auto"].evidence.gap,
                              "auto_seconds": made["auto"].seconds})
    mean = {name: sum(r[name] for r in rows) / len(rows) for name in rows[0]}
    best = mean["auto+balanced"]
    holds = best < mean["eplb+even"] and best < mean["eplb+balanced"]
    return {"gptoss_auto_vs_eplb": {"holds": holds, "mean": mean, "by_seed": rows}}


def import_seconds() -> dict[str, Any]:
    """`loadmaster --help`, best of five (the first run of a machine reads the disk)."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([_command(), "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return {
        "import_seconds": round(min(seconds), 3),
        "import_seconds_worst": round(max(seconds), 3),
    }


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "demo_seconds": demo_seconds,
    "outputs_identical": outputs_identical,
    "hf_parity": hf_parity,
    "recording_overhead": recording_overhead,
    "trace_store": trace_store,
    "gptoss_auto_vs_eplb": gptoss_auto_vs_eplb,
    "import_seconds": import_seconds,
}


def _command() -> str:
    return str(Path(sys.executable).with_name("loadmaster"))


def _group(record_to: Path | None = None) -> Any:
    import loadmaster as lm
    from loadmaster.workers.reference import reference_model_dir

    return lm.Group.start(
        reference_model_dir(), ranks=4, name=f"loop-{os.getpid()}", record_to=record_to
    )


def _prompts(count: int, tokens: int) -> list[list[int]]:
    from loadmaster.workers.reference.prompts import DOMAINS, demo_prompts

    each = -(-count // len(DOMAINS))
    lists = [demo_prompts(domain, each, tokens, seed=7) for domain in DOMAINS]
    return [list(prompts[i]) for i in range(each) for prompts in lists][:count]


def main() -> None:
    """Run the sections asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.only:
        print(f"{name} ...", file=sys.stderr)
        part = SECTIONS[name]()
        found |= part
        if not options.json:
            for key, value in part.items():
                print(f"{key}: {json.dumps(value, indent=2)}")
    if options.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
