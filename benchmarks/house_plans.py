"""Whether plans, evaluations and simulations of fixed inputs are what they were.

The inputs are `house_inputs.py`, run in one child process on the commit before the house and in
another on the checkout. Numbers, shapes and the values of arrays must be equal to the last bit.
Names may differ: fields are matched by name, what is left by its place; a sentence may be worded
anew as long as its numbers stay. Renamed fields and sentences are counted and shown, apart. What
the commit before gave is kept beside its tree, and run again only where the inputs' text changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from house_before import CHECKOUT, NotRunError, before, named, python_in

INPUTS = Path(__file__).with_name("house_inputs.py")
MOST_SHOWN = 12      # differences of one input

# Inputs that may differ, each with the reason.
_ONE_LOOP = "one annealing loop: other draws and moves; judged by placement_ablation.py: "
MAY_DIFFER: dict[str, str] = {
    "time_at_decode": _ONE_LOOP + "552.15 -> 551.96 us planned, 552.74 -> 552.73 held back",
    "time_on_uneven_devices": _ONE_LOOP + "734.22 -> 734.07 us planned, 739.39 -> 739.53 held "
    "back (0.02 %)",
    "balance_on_many_devices": _ONE_LOOP + "1.0298 -> 1.0196 planned, 1.0538 -> 1.0451 held back; "
    "transfers per token 2.25 -> 2.16",
    "dispatch_even": "plans are scored by the dispatch itself: a shortcut for policies blind to "
    "the home rank was off by up to 0.012 a step",
    "scenarios_swept": _ONE_LOOP + "the cells that plan with auto",
    "served_under_control": "one control loop's thinking: plans from the newest window, older ones "
    "only where they have not drifted; drift against 50 shuffles instead of 20",
}

# Steps find requests anywhere in their lives and use every token once, where they began with all
# requests at their first tokens and ended with the first that could not be replaced. With the
# former steps put back, everything here is what it was but for the reasons above, and for bands: of
# a ratio, from 200 draws, without what single steps scatter in a draw of few.
_STEPS = "other steps of the same tokens (`traces/steps.py`)"
_OF_STEPS = (
    "method_contiguous", "method_round_robin", "method_eplb", "method_eplb_hierarchical",
    "method_greedy", "method_anticorrelation", "method_lpt_swap", "method_affinity",
    "method_moetuner", "method_auto", "time_at_decode", "time_at_prefill",
    "time_on_uneven_devices", "balance_on_uneven_devices", "balance_on_many_devices",
    "thorough_on_a_tiny_layer", "experts_of_unequal_size", "traffic_per_rank",
    "traffic_per_node", "traffic_allgather", "traffic_coherent", "traffic_coherent_affinity",
    "dispatch_even", "dispatch_nearest", "dispatch_balanced", "dispatch_fewest_active",
    "dispatch_sglang_static", "dispatch_sglang_dynamic", "dispatch_vllm_hash",
    "dispatch_trtllm_round_robin", "dispatch_ascend_fixed",
    "one_plan_under_every_dispatch_and_payload", "from_a_profile", "rebalance_within_moves",
    "rebalance_within_bytes", "plans_side_by_side", "served", "served_step_by_step",
    "advice_beside_the_plan_in_force", "plans_judged_and_shown", "served_with_faults",
    "served_under_control", "replayed_and_reported", "scenarios_swept", "experts_cached",
    "engines_files", "traces_made_and_read",
)
MAY_DIFFER |= {
    name: "; ".join(filter(None, (MAY_DIFFER.get(name), _STEPS))) for name in _OF_STEPS
}
_PROMISE = "evidence has a promise now, None where nobody judged the plan; loads in finer units"
MAY_DIFFER |= {
    name: "; ".join(filter(None, (MAY_DIFFER.get(name), _PROMISE)))
    for name in ("from_loads_alone", "beside_a_standing_plan")
}

# `auto` scores what every other method would place, on fewer slots too, and keeps the best by the
# steps that decide; ties go to fewer replicas, then moves. A method's own plan changes only where
# its experts do not divide evenly (`contiguous`) or its dispatch is an engine's.
_KNOWN = "auto knows the other methods' plans; ties go to fewer replicas (`layer_search.choose`)"
_ENGINES = "the engines' rules as the engines have them (`dispatch/serving_engines.py`)"
_BY_AUTO = (
    "method_auto", "time_at_decode", "time_at_prefill", "time_on_uneven_devices",
    "balance_on_uneven_devices", "balance_on_many_devices", "thorough_on_a_tiny_layer",
    "experts_of_unequal_size", "traffic_per_rank", "traffic_per_node", "traffic_allgather",
    "traffic_coherent", "dispatch_even", "dispatch_nearest", "dispatch_balanced",
    "dispatch_fewest_active", "dispatch_sglang_dynamic", "dispatch_trtllm_round_robin",
    "from_a_profile", "from_loads_alone", "scenarios_swept",
)
_BY_ENGINE = (
    "dispatch_sglang_static", "dispatch_vllm_hash", "dispatch_ascend_fixed",
    "one_plan_under_every_dispatch_and_payload",
)
MAY_DIFFER |= {
    name: "; ".join(filter(None, (MAY_DIFFER.get(name), reason)))
    for reason, names in ((_KNOWN, _BY_AUTO), (_ENGINES, _BY_ENGINE)) for name in names
}

# Values that are names (one word, before -> after), where a term of the field replaced another.
RENAMED: dict[str, str] = {}

Section = dict[str, Any]


@dataclass
class Difference:
    """What two results of one input do not share."""

    figures: list[str] = field(default_factory=list)     # numbers, shapes, names that are values
    fields: set[str] = field(default_factory=set)        # "old -> new", names of fields
    words: list[str] = field(default_factory=list)       # sentences with the same numbers


def compare(before: Any, after: Any) -> Difference:
    """Walk both results side by side."""
    found = Difference()
    _walk(before, after, "", found)
    return found


def _walk(before: Any, after: Any, at: str, found: Difference) -> None:
    if isinstance(before, dict) and isinstance(after, dict):
        for old, new in _matched(list(before), list(after)):
            if old is None or new is None:
                side = "after" if old is None else "before"
                found.figures.append(f"{at}.{old or new}: only {side}")
                continue
            if old != new:
                found.fields.add(f"{old} -> {new}")
            _walk(before[old], after[new], f"{at}.{old}", found)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            found.figures.append(f"{at}: {len(before)} entries, now {len(after)}")
        for place, (old, new) in enumerate(zip(before, after, strict=False)):
            _walk(old, new, f"{at}[{place}]", found)
    elif isinstance(before, str) and isinstance(after, str):
        _walk_text(before, after, at, found)
    elif before != after or isinstance(before, bool) is not isinstance(after, bool):
        found.figures.append(f"{at}: {_short(before)}, now {_short(after)}")


def _matched(old: list[str], new: list[str]) -> Iterator[tuple[str | None, str | None]]:
    """Fields of both by name; the rest by place where there are as many, else unmatched."""
    left = [name for name in old if name not in new]
    come = [name for name in new if name not in old]
    renamed = dict(zip(left, come, strict=True)) if len(left) == len(come) else {}
    for name in old:
        yield name, name if name in new else renamed.get(name)
    if not renamed:
        for name in come:
            yield None, name


def _walk_text(before: str, after: str, at: str, found: Difference) -> None:
    """Equal, or a sentence whose numbers are the same, or a name that the table lists."""
    if before == after or RENAMED.get(before) == after:
        return
    sentence = " " in before.strip() and " " in after.strip()
    if sentence and _numbers(before) == _numbers(after):
        found.words.append(f"{_short(before)} -> {_short(after)}")
    else:
        found.figures.append(f"{at}: {_short(before)}, now {_short(after)}")


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*(?:e[+-]?\d+)?", text)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def run_inputs(tree: Path, names: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Every input's document, in order, from a child whose package is `tree`."""
    child = python_in(tree, INPUTS, *names)
    assert child.stdout is not None
    found: dict[str, dict[str, Any]] = {}
    home = json.loads(child.stdout.readline() or '{"package": "nothing"}')["package"]
    if Path(home).parent != tree:
        child.kill()
        raise NotRunError(f"the child imported {home}, not {tree}")
    for line in child.stdout:
        document = json.loads(line)
        found[document["name"]] = document
        print(f"  {document['name']} ({tree}): {document['seconds']} s", file=sys.stderr,
              flush=True)
    if child.wait():
        raise NotRunError(f"the inputs ended with {child.returncode} on {tree}")
    return found


def run_before(names: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """The inputs on the commit before; those that were run already are read from where they lie."""
    tree = before()
    text = hashlib.sha256(INPUTS.read_bytes() + sys.version.encode()).hexdigest()[:16]
    kept = tree.parent / f"inputs-{text}"
    kept.mkdir(exist_ok=True)
    known = {path.stem: json.loads(path.read_text()) for path in kept.glob("*.json")}
    wanted = list(names) or input_names()
    missing = [name for name in wanted if name not in known]
    for name, document in (run_inputs(tree, missing) if missing else {}).items():
        part = kept / f"{name}.part{os.getpid()}"
        part.write_text(json.dumps(document))
        part.replace(kept / f"{name}.json")
        known[name] = document
    return {name: known[name] for name in wanted}


def input_names() -> list[str]:
    """Every input's name, in order."""
    with named(CHECKOUT) as checkout:
        child = python_in(checkout, INPUTS, "--list")
        listed, _ = child.communicate()
    return [str(name) for name in json.loads(listed)]


def digest(result: Any) -> str:
    """Fingerprint of one result, names of fields and all."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def plans_unchanged(names: Iterable[str] = ()) -> Section:
    """All inputs on both trees: those that differ by name, and in what."""
    was = run_before(names)
    with named(CHECKOUT) as checkout:
        now = run_inputs(checkout, list(was))
    differing: dict[str, list[str]] = {}
    fields: set[str] = set()
    words: set[str] = set()
    for name, document in was.items():
        seen = compare(document["result"], now[name]["result"])
        if _raised(now[name]) and not _raised(document):
            seen = Difference([f"raises {_raised(now[name])}"])
        fields |= seen.fields
        words |= set(seen.words)
        if seen.figures:
            more = len(seen.figures) - MOST_SHOWN
            differing[name] = seen.figures[:MOST_SHOWN] + [f"... {more} more"] * (more > 0)
    raised = {n: _raised(d) for n, d in was.items() if _raised(d)}
    explained = {n: reason for n, reason in MAY_DIFFER.items() if n in differing}
    identical = sum(digest(was[n]["result"]) == digest(now[n]["result"]) for n in was)
    return {
        "holds": not raised and not set(differing) - set(explained),
        "inputs": len(was), "differing": len(differing), "identical_names_and_all": identical,
        "what_differs": differing, "explained": explained, "raised_before": raised,
        "fields_renamed": sorted(fields), "sentences_reworded": len(words),
        "sentences": sorted(words)[:40],
        "cpu_s": {side: round(sum(d["seconds"] for d in run.values()), 1)
                  for side, run in (("before", was), ("after", now))},
    }


def _raised(document: dict[str, Any]) -> str:
    """The error an input ended with, if it did."""
    result = document["result"]
    return str(result.get("raised", "")) if isinstance(result, dict) else ""


def main() -> None:
    """`python house_plans.py [NAME ...]`: some inputs alone, for work on one of them."""
    print(json.dumps(plans_unchanged(sys.argv[1:]), indent=1))


if __name__ == "__main__":
    main()
