"""One layer's search, from a packing to the slots that are kept.

  1. Start from a packing of average loads: heaviest first, then exchanges (`_starts`).
  2. Anneal on scenarios: in rounds, each on the recorded steps, moved away from their mean, and on
     freshly drawn traffic of other kinds (`scenarios.py`), under the objective that models how the
     dispatch shares tokens (`annealing/`), cooling from round to round (`_by_rows`). Where token
     transfers cost, again at some prices of a transfer; where time is the objective, again on time
     (`time_search.py`), with and without replicas; where replicas share by a rule that is blind to
     load, with fewer slots.
  3. Score each candidate on steps that were held back (`layer_task.judged`).
  4. Keep the best: the fastest; or the flattest; or, where transfers cost, the one with fewest
     among those nearly as flat (`choose`).

What each step is worth is measured in `benchmarks/placement_ablation.py`. `search_layer` is pure:
the same task gives the same answer on any machine, unless its deadline expires. Knows the searches
and when each applies. Knows nothing of other layers or executors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from ...errors import InfeasibleError, InputError
from ...foundation.arrays import SlotArray
from ...foundation.compiled import random_state
from ..cost.token_transfers import TransferModel, no_transfers, transfer_model
from ..dispatch.policies import NEAREST_RULES, TENSOR_PARALLEL, parameter_vector
from ..methods.baselines import LayerLoads, greedy, lpt_swap
from .annealing.annealer import Found, Overload, Schedule, SearchSpace, search_space
from .annealing.even_average import improve_average
from .annealing.exact_balance import MOST_DEVICES, improve_exact_balance
from .annealing.fixed_shares import FIRST_NEAR, IN_TURN, NEAREST, improve_fixed_shares
from .annealing.water_filled import improve_water_filled
from .known_candidates import (
    complete,
    known_candidates,
    widened,
    with_fewer_slots,
    without_duplicates,
)
from .layer_task import Candidate, LayerAnswer, LayerTask, answer_with, best_of, judged
from .scenarios import home_rows, request_kinds, search_rows
from .time_search import time_candidates

Improve = Callable[..., Found]

EFFORTS = {"fast": 0.3, "normal": 1.0, "thorough": 4.0}   # units of work
# Rounds of moves, each with fresh scenarios; the last one with more of them, cold. More on few
# devices where transfers are free: on a shifted mix no farther from fewer than seeds are from each
# other. Where transfers cost, more rounds saved fewer (28.9 % of those between nodes, not 31.0 %).
ROUNDS, ROUNDS_BALANCE = 6, 24
# Moves over all rounds: so many per slot, and at least so many. Within a budget of moves most break
# it, and cost nothing.
PER_SLOT_FEW, FEWEST_FEW, FEWEST_BALANCE = 200, 6_000, 16_000
SMALL = 128          # experts · devices of a layer that is searched at every lower effort too
PER_SLOT_BUDGETED, FEWEST_BUDGETED = 1_000, 30_000
PER_SLOT_MANY, FEWEST_MANY = 9, 3_000
SCENARIOS_FEW, SCENARIOS_MANY = 192, 48   # fresh rows of each kind, each round: few are overfitted
SCENARIOS_TRANSFERS = 48     # the same where transfers cost: more would ask for useless capacity
HOT, COLD = 3e-3, 3e-5       # temperatures, in units of imbalance
BEND = 1.0                   # weight of squared overload: the tail counts more
TRANSFER_TOKENS = 4_096          # tokens whose transfers are counted while searching
# Price of one transfer per token against overload: a search each on few devices, one on many.
TRANSFER_WEIGHTS_FEW, TRANSFER_WEIGHT = (1.0, 2.0, 4.0), 0.3


def search_layer(task: LayerTask) -> LayerAnswer:
    """Search one layer and choose among its candidates by the steps held back."""
    candidates: list[Candidate] = []
    truncated, judge = False, task.hurried()
    for effort in _efforts(task):
        part = replace(task, effort=effort)
        truncated = _judge(part, judge, _candidates(part), candidates)
        if not truncated and _leaves_slots_empty(part, choose(part, candidates)):
            truncated = _judge(part, judge, _without_replicas(part), candidates)
        if truncated:
            break
    return replace(answer_with(judge, choose(task, candidates)), truncated=truncated)


def _judge(
    task: LayerTask, judge: LayerTask, found: Iterator[tuple[str, SlotArray]],
    candidates: list[Candidate],
) -> bool:
    """Add candidates, each once, as `judge` sees them; whether the time limit fired meanwhile."""
    seen = {candidate.slots_GC.tobytes() for candidate in candidates}
    for name, slots in found:
        known = slots.tobytes() in seen or not complete(slots, task.traffic.num_experts)
        if known or not task.fits(slots):
            continue
        seen.add(slots.tobytes())
        candidates.append(judged(judge, name, slots))
        if task.expired():
            return True
    return False


def _efforts(task: LayerTask) -> list[str]:
    """The task's; for a small layer all lower ones too: more moves find other slots, and on the few
    steps that decide those may be worse."""
    small = task.traffic.num_experts * len(task.slots_G) <= SMALL
    efforts = list(EFFORTS)
    return efforts[: efforts.index(task.effort) + 1] if small else [task.effort]


def _leaves_slots_empty(task: LayerTask, best: Candidate) -> bool:
    """Whether fewer than half of the spare slots are worth their weight reads."""
    spare = int(task.loads().usable_slots_G().sum()) - task.traffic.num_experts
    filled = int((best.slots_GC >= 0).sum()) - task.traffic.num_experts
    return task.objective == "time" and 2 * filled < spare


def search_from(task: LayerTask, start_GC: SlotArray) -> SlotArray:
    """One search from given slots, within the task's budget of moves.

    Raises InputError where a device holds more than its slots in this layer.
    """
    loads = task.loads()
    start_GC = within_slots(without_duplicates(start_GC), loads.usable_slots_G())
    if not loads.load_WE.any():
        return start_GC
    if task.traffic.load_WE is not None and task.dispatch.policy != "balanced":
        return _average(task, loads, start_GC)
    return _by_rows(task, loads, start_GC, TRANSFER_WEIGHT if task.counts_transfers else 0.0)


def within_slots(
    slots_GC: SlotArray, most_G: npt.NDArray[np.int64], width: int | None = None
) -> SlotArray:
    """The same contents, each device's in its first most_G[g] slots; what lies there stays there.

    width: C of the result; None = as given, at least the widest device's. Raises InputError where
    a device holds more.
    """
    widest = int(most_G.max())
    fitted = np.full((len(slots_GC), max(slots_GC.shape[1], widest)), -1, np.int16)
    for g, (row, most) in enumerate(zip(slots_GC, most_G.tolist(), strict=True)):
        fitted[g, : len(row[:most])] = row[:most]
        beyond = row[most:][row[most:] >= 0]
        free = np.flatnonzero(fitted[g, :most] < 0)
        if len(beyond) > len(free):
            raise InputError(
                f"the current plan holds {int((row >= 0).sum())} experts on device {g} in a layer "
                f"in which it has {most} slots"
            )
        fitted[g, free[: len(beyond)]] = beyond
    return fitted if width is None else fitted[:, :width]


def choose(task: LayerTask, candidates: list[Candidate]) -> Candidate:
    """The best candidate (`best_of`); of those that tie, the one with fewest replicas, then with
    fewest experts moved from where they are, then a searched one: it knows other traffic too."""
    sizes = [
        (int((c.slots_GC >= 0).sum()), _moves(task, c.slots_GC), not c.name.startswith("search"))
        for c in candidates
    ]
    return candidates[best_of(
        [c.decisive for c in candidates], sizes,
        task.objective, task.slack if task.counts_transfers else None,
    )]


def _moves(task: LayerTask, slots_GC: SlotArray) -> int:
    """Experts that devices would have to be sent; 0 where nothing is there yet."""
    if task.start_GC is None:
        return 0
    rows = zip(task.start_GC, slots_GC, strict=True)
    return sum(len(np.setdiff1d(after[after >= 0], before)) for before, after in rows)


def _candidates(task: LayerTask) -> Iterator[tuple[str, SlotArray]]:
    """(name, slots), cheap ones first, so that there is something to choose when time is up."""
    loads = task.loads()
    if task.start_GC is not None:
        yield "current", task.start_GC
    starts = _starts(task, loads)
    yield from starts
    start = starts[0][1]
    if not loads.load_WE.any():
        return                       # a layer nobody used: any placement is as good
    yield from known_candidates(task, loads)
    if task.traffic.load_WE is not None:
        yield "search, average loads", _average(task, loads, start)
        if task.dispatch.policy != "balanced":
            return
    yield from _searched(task, loads, start)
    if task.dispatch.policy in NEAREST_RULES:
        yield from _with_fewer_replicas(task, loads)


def _searched(
    task: LayerTask, loads: LayerLoads, start_GC: SlotArray
) -> Iterator[tuple[str, SlotArray]]:
    """(name, slots) searched for balance, for few transfers, for time."""
    found = _by_rows(task, loads, start_GC, 0.0)
    yield "search", found
    if task.counts_transfers:
        few = loads.devices <= MOST_DEVICES
        for weight in TRANSFER_WEIGHTS_FEW if few else (TRANSFER_WEIGHT,):
            yield f"search, transfers {weight}", _by_rows(task, loads, found, weight)
    if task.objective == "time":
        yield from time_candidates(task, loads, _space(task, loads), found, EFFORTS[task.effort])


def _starts(task: LayerTask, loads: LayerLoads) -> list[tuple[str, SlotArray]]:
    """(name, slots) packed by load, the first to search from; where nothing packs these experts
    into memory but the current plan does, that. Raises InfeasibleError where neither does."""
    try:
        starts = [("lpt_swap", lpt_swap(loads))]
        if task.dispatch.policy in NEAREST_RULES:
            starts.append(("greedy", greedy(loads)))
    except InfeasibleError:
        if task.start_GC is None or not task.fits(task.start_GC):
            raise
        kept_GC = within_slots(without_duplicates(task.start_GC), loads.usable_slots_G())
        return [("current, no duplicates", kept_GC)]
    return starts


def _without_replicas(task: LayerTask) -> Iterator[tuple[str, SlotArray]]:
    """The same searches as if no slot were spare: what a placement without replicas can save in
    transfers is found best where none can be made. So no spare slot makes a plan worse."""
    loads = task.loads()
    if not loads.load_WE.any():
        return
    fewest = [bare for keep, bare in with_fewer_slots(loads) if keep == loads.experts]
    if not fewest:
        return
    bare = fewest[0]
    try:
        start = lpt_swap(bare)
    except InfeasibleError:              # memory needs more slots than these
        return
    for name, slots_GC in _searched(replace(task, slots_G=bare.slots_G), bare, start):
        yield f"{name}, no replicas", widened(slots_GC, loads.most_slots)


def _with_fewer_replicas(task: LayerTask, loads: LayerLoads) -> Iterator[tuple[str, SlotArray]]:
    """Searched with slots left empty: under a rule that is blind to load a replica takes few tokens
    but disturbs the rest."""
    slots = int(loads.usable_slots_G().sum())
    for keep, fewer in with_fewer_slots(loads):
        part = replace(task, slots_G=fewer.slots_G)
        try:
            start = lpt_swap(fewer)
        except InfeasibleError:          # memory needs more slots than these
            return
        found = _by_rows(part, fewer, start, 0.0)
        yield f"search, {keep} of {slots} slots", widened(found, loads.most_slots)


def _average(task: LayerTask, loads: LayerLoads, start_GC: SlotArray) -> SlotArray:
    moves = round(MOVES_PER_SLOT_AVERAGE * int(loads.slots_G.sum()) * EFFORTS[task.effort])
    return improve_average(
        _space(task, loads), start_GC, loads.load_E, moves, random_state(task.seed, task.layer),
        task.until(),
    )


MOVES_PER_SLOT_AVERAGE = 600


def _by_rows(
    task: LayerTask, loads: LayerLoads, start_GC: SlotArray, transfer_weight: float
) -> SlotArray:
    """Anneal in rounds, each on home steps and fresh scenarios; the last is cold and has more."""
    few = loads.devices <= MOST_DEVICES
    improve = _improver(task, few)
    space = _space(task, loads)
    transfers = _transfers(task, transfer_weight)
    rng = np.random.default_rng([task.seed, task.layer])
    state = random_state(task.seed, task.layer)
    home = home_rows(task.traffic.search_WE(), float(loads.speed_G.sum()))
    kinds = request_kinds(task.traffic.request_RE())
    scenarios = SCENARIOS_FEW if few else SCENARIOS_MANY
    if transfer_weight > 0.0:
        scenarios = min(scenarios, SCENARIOS_TRANSFERS)
    rounds, moves = _rounds(task, few, int(np.asarray(space.slots_G).sum()))
    heat = HOT * (COLD / HOT) ** (np.arange(rounds) / (rounds - 1))
    free = 1.0 if transfer_weight == 0.0 else 1.0 + task.slack / 2
    found_GC = start_GC
    for turn in range(rounds):
        last = turn == rounds - 1
        rows = search_rows(
            home, kinds, scenarios * (3 if last else 1), float(loads.speed_G.sum()), rng
        )
        schedule = Schedule(
            moves, float(heat[turn]), float(COLD / 10 if last else heat[turn + 1]), task.until()
        )
        found = improve(
            space, rows.load_WE, rows.weight_W, found_GC, schedule, Overload(BEND, free),
            transfers, state,
        )
        found_GC = found.best_GC if last else found.last_GC
        if task.expired():
            return found.best_GC
    return found_GC


def _rounds(task: LayerTask, few: bool, slots: int) -> tuple[int, int]:
    """(rounds, moves in each)."""
    rounds = ROUNDS
    if not few:
        moves = max(FEWEST_MANY, PER_SLOT_MANY * slots)
    elif task.move_budget is not None:
        moves = max(FEWEST_BUDGETED, PER_SLOT_BUDGETED * slots)
    elif task.counts_transfers:
        moves = max(FEWEST_FEW, PER_SLOT_FEW * slots)
    else:
        rounds, moves = ROUNDS_BALANCE, max(FEWEST_BALANCE, PER_SLOT_FEW * slots)
    return rounds, round(moves * EFFORTS[task.effort] / rounds)


def _space(task: LayerTask, loads: LayerLoads) -> SearchSpace:
    """Devices as the searches see them; a budget of moves counts from the current plan."""
    budget = task.move_budget
    return search_space(
        loads.usable_slots_G(), loads.speed_G, loads.experts, loads.size_E, loads.capacity_G,
        current_GC=None if budget is None else task.start_GC,
        move_price_E=task.move_price_E, move_budget=0.0 if budget is None else budget,
    )


def _improver(task: LayerTask, few: bool) -> Improve:
    """The search that models how the dispatch shares tokens among replicas."""
    if task.dispatch.policy in ("balanced", "fewest_active"):
        return improve_exact_balance if few else improve_water_filled
    if task.dispatch.policy in NEAREST_RULES:
        rule = FIRST_NEAR if task.dispatch.policy == "sglang_static" else NEAREST
        return partial(improve_fixed_shares, rule=rule, node_G=task.cluster.node_G)
    if task.dispatch.policy == "ascend_fixed":
        tensor_parallel = int(parameter_vector(task.dispatch, task.cluster)[TENSOR_PARALLEL])
        return partial(improve_fixed_shares, rule=IN_TURN, tensor_parallel=tensor_parallel)
    return improve_fixed_shares


def _transfers(task: LayerTask, weight: float) -> TransferModel:
    """Transfers of a sample of the tokens; none where they cost nothing."""
    trace = task.traffic.trace
    if weight == 0.0 or trace is None:
        return no_transfers(task.cluster.num_devices)
    # Drawn at random from all requests, those held back too: which experts go together differs more
    # from request to request than loads do, and the steps held back still decide on balance.
    rng = np.random.default_rng([task.seed, task.layer, 3])
    token = rng.permutation(trace.num_tokens)[:TRANSFER_TOKENS]
    ids_TK = trace.ids[token, 0].astype(np.int32)
    valid = trace.valid_TLK(token)
    if valid is not None:
        ids_TK[~valid[:, 0]] = -1
    home_T = trace.home_rank_T(task.cluster.num_devices)[token]
    model = transfer_model(ids_TK, home_T, task.traffic.num_experts, task.cluster, weight)
    return no_transfers(task.cluster.num_devices) if model is None else model
