"""Is the headline right? Fifteen cases whose answers are known, asked as a person asks: `honest()`.

Each case makes a trace (or takes real routing, where it is present), runs a verb in a process of
its own and reads the first sentence. What is right is known from how the trace was made, or is
judged apart on requests that the answer never saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from house_before import CHECKOUT, named

import loadmaster as lm
from loadmaster.placement.plan import Plan
from loadmaster.traces.catalogue import catalogue_model
from loadmaster.traces.storage.store import save_trace

Section = dict[str, Any]
ROUTING = Path(__file__).resolve().parents[2] / "shared" / "data" / "routing"
GPT, ESFT = ROUTING / "gptoss20b_decode.npz", ROUTING / "esft_law_translation.npz"
FAST = ("--effort", "fast", "--method", "auto", "--method", "greedy", "--method", "contiguous")
CHEAP = ("--method", "greedy", "--method", "eplb", "--method", "contiguous")
LIMIT_S = 300


def honest() -> Section:
    """Every case by its name: whether the headline is right, and what it was."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, named(CHECKOUT) as checkout:
        for case in CASES:
            at = Path(folder) / case.__name__
            at.mkdir()
            desk = Desk(at, checkout.parent)
            try:
                right, headline = case(desk)
            except NoDataError as error:
                right, headline = False, f"not run: {error}"
            found[case.__name__] = {"right": right, "headline": headline}
            print(f"  {case.__name__}: {'right' if right else 'WRONG'}: {headline}",
                  file=sys.stderr, flush=True)
    wrong = [name for name, seen in found.items() if not seen["right"]]
    return {"holds": not wrong, "cases": len(found), "wrong": wrong, "headlines": found}


class NoDataError(Exception):
    """Real routing is not present."""


class Desk:
    """A folder of a case's own, and the command line at work in it."""

    def __init__(self, folder: Path, packages: Path) -> None:
        self.folder, self._packages = folder, packages

    def ask(self, *arguments: object) -> dict[str, Any]:
        """What a verb prints as JSON."""
        ran = subprocess.run(
            [sys.executable, "-m", "loadmaster", *map(str, arguments), "--json"],
            cwd=self.folder, env=_environment(self._packages), text=True, timeout=LIMIT_S,
            capture_output=True, check=False,
        )
        if ran.returncode not in (0, 4):
            return {"verdict": f"ended with {ran.returncode}: {ran.stderr.strip()[-300:]}",
                    "chosen": "", "rows": [], "notes": []}
        return dict(json.loads(ran.stdout))

    def trace(self, ids: Any, experts: int, request: Any, name: str = "trace") -> Path:
        """Store routing [T, L, K]."""
        made = lm.RoutingTrace.from_arrays(ids, num_experts=experts, request=request)
        save_trace(made, self.folder / name)
        return self.folder / name


def _environment(packages: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(packages)}


def _requests(tokens: int, length: int) -> Any:
    return np.arange(tokens) // length


def _liked(seed: int, tokens: int, liking: Any, taste: float = 0.5, length: int = 50) -> Any:
    """[T, 2, 2] choices among experts, by a common liking and each request's own taste."""
    rng = np.random.default_rng(seed)
    request = _requests(tokens, length)
    own = liking + taste * rng.standard_normal((request[-1] + 1, 2, len(liking)))
    return np.argsort(-(own[request] + rng.gumbel(size=(tokens, 2, len(liking)))), axis=2)[:, :, :2]


def _real(path: Path) -> Path:
    if not path.is_file():
        raise NoDataError(f"no real routing at {path}")
    return path


# ---- the cases: (whether the headline is right, the headline) --------------------------------


def flat_load(desk: Desk) -> tuple[bool, str]:
    """Every expert as likely as any other, no slot to spare: nothing is to be gained."""
    trace = desk.trace(_liked(0, 24_000, np.zeros(32), taste=0), 32, _requests(24_000, 50))
    seen = desk.ask("plan", trace, "--slots-per-device", 4, *FAST)
    return seen["chosen"] == "contiguous" and "contiguous is" in seen["verdict"], seen["verdict"]


def flat_load_under_a_current_plan(desk: Desk) -> tuple[bool, str]:
    """Nearly flat, with slots to spare: replicas gain a little, and everything would move."""
    trace = desk.trace(_liked(1, 240_000, 0.02 * np.arange(16) / 16, taste=0), 16,
                       _requests(240_000, 50))
    now = np.full((2, 4, 5), -1)
    now[:, :, :4] = np.arange(16).reshape(4, 4)
    Plan(slots=now, num_experts=16).save(desk.folder / "now.json")
    seen = desk.ask("plan", trace, "--current", "now.json", "--devices-per-node", 4,
                    "--step-tokens", 32_768, *CHEAP)
    return seen["chosen"] == "current" and _leaves(seen["verdict"]), seen["verdict"]


def one_step(desk: Desk) -> tuple[bool, str]:
    """A trace of a single step: any plan fits what it was made from."""
    trace = desk.trace(_liked(2, 600, 2.0 * (np.arange(16) < 3)), 16, _requests(600, 20))
    seen = desk.ask("plan", trace, "--devices-per-node", 4, *CHEAP)
    return "not known" in seen["verdict"] and "record more" in seen["verdict"], seen["verdict"]


def few_requests(desk: Desk) -> tuple[bool, str]:
    """Three long requests: enough tokens, and nothing that tells how others would do."""
    trace = desk.trace(_liked(3, 6_000, 2.0 * (np.arange(16) < 3), length=2_000), 16,
                       _requests(6_000, 2_000))
    seen = desk.ask("plan", trace, "--devices-per-node", 4, *CHEAP)
    return "not known" in seen["verdict"] and "record more" in seen["verdict"], seen["verdict"]


def skewed_load(desk: Desk) -> tuple[bool, str]:
    """Three of 16 experts take most tokens, of 240 requests: a plan is plainly better."""
    trace = desk.trace(_liked(4, 24_000, 2.0 * (np.arange(16) < 3)), 16, _requests(24_000, 50))
    seen = desk.ask("plan", trace, "--devices-per-node", 4, *FAST)
    right = "balances better than contiguous" in seen["verdict"]
    return right and "balance, not time" in seen["verdict"], seen["verdict"]


def a_plan_as_good_as_any(desk: Desk) -> tuple[bool, str]:
    """The current plan was made from this very traffic by the same search: leave it."""
    trace = desk.trace(_liked(5, 24_000, 2.0 * (np.arange(16) < 3)), 16, _requests(24_000, 50))
    desk.ask("plan", trace, "--devices-per-node", 4, "-o", "now.json", *FAST)
    seen = desk.ask("plan", trace, "--current", "now.json", "--devices-per-node", 4, *FAST)
    return seen["chosen"] == "current" and _leaves(seen["verdict"]), seen["verdict"]


def hot_layer_without_a_slot(desk: Desk) -> tuple[bool, str]:
    """Top-1 routing, one expert takes nearly all, no slot to spare: one more would end it."""
    trace = _hot(desk)
    seen = desk.ask("plan", trace, "--slots-per-device", 2, *CHEAP)
    right = seen["chosen"] == "contiguous" and "within the slots given" in seen["verdict"]
    return right and "one more slot per device would make it 1." in seen["verdict"], seen["verdict"]


def hot_layer_with_a_slot(desk: Desk) -> tuple[bool, str]:
    """The same with a slot to spare on each device."""
    seen = desk.ask("plan", _hot(desk), "--slots-per-device", 3, *CHEAP)
    right = seen["chosen"] in ("greedy", "eplb") and "one more slot" not in seen["verdict"]
    return right and "balances better than contiguous" in seen["verdict"], seen["verdict"]


def _hot(desk: Desk) -> Path:
    rng = np.random.default_rng(6)
    ids = np.where(rng.random((12_000, 1)) < 0.98, 5, rng.integers(0, 16, (12_000, 1)))
    return desk.trace(ids[:, :, None], 16, _requests(12_000, 50))


def gpt_oss_without_sizes(desk: Desk) -> tuple[bool, str]:
    """A plan that balances and makes steps longer: the headline must not sell it as a gain."""
    seen = desk.ask("plan", _real(GPT), *CHEAP)
    said = seen["verdict"]
    return "this is balance, not time" in said and "--model gpt-oss-20b" in said, said


def gpt_oss_balance_with_sizes(desk: Desk) -> tuple[bool, str]:
    """Balance asked for, sizes known: that its steps take longer stands in the headline."""
    seen = desk.ask("plan", _real(GPT), "--model", "gpt-oss-20b", "--objective", "balance", *CHEAP)
    step_us = {row["name"]: row["step_time_us"] for row in seen["rows"]}
    if seen["chosen"] not in step_us:
        return False, seen["verdict"]
    change = (step_us[seen["chosen"]] / step_us["contiguous"] - 1) * 100
    said = f"balance, not time: step time {step_us['contiguous']:,.0f} us -> "
    return change > 0 and said in seen["verdict"] and f"({change:+.1f} %)" in seen["verdict"], (
        seen["verdict"]
    )


def gpt_oss_small_steps(desk: Desk) -> tuple[bool, str]:
    """Sizes known: time decides, and what is chosen is no slower on requests nobody saw."""
    with np.load(_real(GPT)) as file:
        whole = lm.RoutingTrace.from_arrays(file["ids"], num_experts=32, request=file["seq"])
    known, unseen = whole.split(0.6, seed=1)
    trace = desk.trace(known.ids, 32, known.request)
    seen = desk.ask("plan", trace, "--model", "gpt-oss-20b", "-o", "plan.json", *FAST)
    if not (desk.folder / "plan.json").is_file():
        return False, seen["verdict"]
    chosen = Plan.load(desk.folder / "plan.json")
    cluster = lm.Cluster.preset("h100", devices_per_node=8, slots_per_device=5)
    plain = lm.plan(known, cluster, method="contiguous").plan
    table = lm.compare({"contiguous": plain, "chosen": chosen}, unseen, cluster,
                       model=catalogue_model("gpt-oss-20b"))
    gains = "is better than contiguous: step time" in seen["verdict"]
    right = seen["metric"] == "step_time_us" and not table.row("chosen").worse
    return right and gains == (seen["chosen"] != "contiguous"), seen["verdict"]


def esft_in_large_steps(desk: Desk) -> tuple[bool, str]:
    """Prefill of DeepSeek-V2-Lite: contiguous is far off, and the model is known by its shape."""
    seen = desk.ask("plan", _real(ESFT), *CHEAP)
    said = seen["verdict"]
    return "balances better than contiguous" in said and "deepseek-v2-lite" in said, said


def traffic_unlike_its_own(desk: Desk) -> tuple[bool, str]:
    """A plan from legal prompts, judged on translations: the promise is not kept, and it says so.
    """
    law, translation = _domains()
    trace = desk.trace(law.ids, 64, law.request)
    desk.ask("plan", trace, "-o", "plan.json", *CHEAP)
    other = desk.trace(translation.ids, 64, translation.request, "other")
    notes = desk.ask("evaluate", other, "plan.json")["notes"]
    said = [n for n in notes if "promised" in n]
    return bool(said) and "beyond the noise" in said[0], said[0] if said else str(notes)


def traffic_like_its_own(desk: Desk) -> tuple[bool, str]:
    """Other requests of the same kind keep the promise, and no note says otherwise."""
    with np.load(_real(GPT)) as file:
        whole = lm.RoutingTrace.from_arrays(file["ids"], num_experts=32, request=file["seq"])
    first, second = whole.split(0.5, seed=2)
    desk.ask("plan", desk.trace(first.ids, 32, first.request), "-o", "plan.json", *CHEAP)
    seen = desk.ask("evaluate", desk.trace(second.ids, 32, second.request, "other"), "plan.json")
    said = [n for n in seen["notes"] if "promised" in n]
    return bool(seen["rows"]) and not said, said[0] if said else seen["verdict"]


def _domains() -> tuple[lm.RoutingTrace, lm.RoutingTrace]:
    with np.load(_real(ESFT)) as file:
        ids, request = file["ids"], file["seq"]
        law = np.array([str(name) for name in file["domains"]])[file["dom"]] == "law"
    first, second = (
        lm.RoutingTrace.from_arrays(ids[mine], num_experts=64, request=request[mine])
        for mine in (law, ~law)
    )
    return first, second


def long_enough_only_where_its_table_agrees(desk: Desk) -> tuple[bool, str]:
    """`trace info` on every second length of one trace: its last row and its sentence agree."""
    ids = _liked(7, 96_000, 1.5 * (np.arange(32) < 5), taste=0.3)
    said = ""
    for tokens in (1_500, 6_000, 24_000, 48_000, 96_000):
        trace = desk.trace(ids[:tokens], 32, _requests(tokens, 50), f"first-{tokens}")
        seen = desk.ask("trace", "info", trace)
        points = [point["imbalance"] for point in seen["learning_curve"]["points"]]
        said = seen["verdict"]
        if said.startswith("long enough") and points[-2] - points[-1] > 0.01:
            return False, said
    return said.startswith("long enough"), said


def _leaves(verdict: str) -> bool:
    return verdict.startswith(("leave it", "current is"))


CASES: tuple[Callable[[Desk], tuple[bool, str]], ...] = (
    flat_load, flat_load_under_a_current_plan, one_step, few_requests, skewed_load,
    a_plan_as_good_as_any, hot_layer_without_a_slot, hot_layer_with_a_slot, gpt_oss_without_sizes,
    gpt_oss_balance_with_sizes, gpt_oss_small_steps, esft_in_large_steps, traffic_unlike_its_own,
    traffic_like_its_own, long_enough_only_where_its_table_agrees,
)
