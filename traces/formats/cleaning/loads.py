"""Counts per expert, whatever file they are from, as a profile: axes, rows, windows, dead counts.

Axes are told by the format, by the person, by the number of experts or layers, or taken from the
shape with a word; never otherwise. What cannot be is refused with its place, what is empty is left
out and said. Knows arrays. Knows nothing of files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ....errors import InputError
from ...model_config.layer_ranges import written
from ...model_layers import hidden_layers
from ...profile import Profile
from ..asked import LOAD_AXES, Asked
from ..result import LOADS_ONLY, ImportResult
from ..tensors import as_array

LoadArray = npt.NDArray[Any]

NO_TOP_K = "how many experts a token chooses: K is taken as 1"
IDLE_SHARE = 0.5            # of the experts, in every layer: then one rank's counts are suspected
ENOUGH_PER_EXPERT = 8       # assignments per expert, so that chance leaves few of them idle


def loads_result(
    value: Any, asked: Asked, where: str, *, format: str, axes: str | None = None,
    numbers: tuple[int, ...] | None = None, top_k: int | None = None, model_name: str = "",
    notes: tuple[str, ...] = (), cannot_tell: tuple[str, ...] = LOADS_ONLY,
) -> ImportResult:
    """Counts as a profile, checked and cleaned.

    axes: what the format defines ("LE" stands for "WLE" too); None where nothing does. numbers: the
    rows' own layer numbers, where the format has them. Raises InputError naming the place.
    """
    array = as_array(value, where)
    load_WLE, said = _as_WLE(array, asked, axes)
    experts = load_WLE.shape[2]
    if asked.experts() not in (None, experts):
        raise InputError(f"holds {experts} experts per layer, {asked.experts()} were given")
    _refuse_impossible(load_WLE, numbers)
    load_WLE, empty = _without_empty_windows(load_WLE)
    load_WLE, layers, dense = _moe_layers(load_WLE, asked, numbers)
    k = top_k or asked.top_k or (asked.model.top_k if asked.model else None)
    profile = Profile.from_loads(
        load_WLE, top_k=k or 1, layer_indices=layers, model_name=model_name,
    )
    return ImportResult(
        format=format, profile=profile,
        cannot_tell=(*(() if k else (NO_TOP_K,)), *cannot_tell),
        notes=(*notes, *said, *empty, *dense, *one_rank_note(profile.load_LE)),
    )


def one_rank_note(load_LE: LoadArray) -> tuple[str, ...]:
    """A warning where so many experts are idle in every layer that one rank's are suspected."""
    idle_L = (load_LE == 0).mean(axis=1)
    few_L = load_LE.sum(axis=1) < ENOUGH_PER_EXPERT * load_LE.shape[1]
    if idle_L.min() < IDLE_SHARE or few_L.any():
        return ()
    busy = [written(np.flatnonzero(row).tolist()) for row in load_LE]
    which = f" (all but {busy[0]})" if len(set(busy)) == 1 and len(busy[0]) < 60 else ""
    return (
        f"warning: {idle_L.min():.0%} or more of the experts are idle in every layer{which}: these "
        "look like one rank's counts; a plan from them is a plan for that rank: sum the counts of "
        "all ranks (a folder or a file beside its siblings, named …rank0…, …rank1…, is summed)",
    )


# ---- axes -------------------------------------------------------------------------------------


def _as_WLE(
    array: LoadArray, asked: Asked, defined: str | None
) -> tuple[LoadArray, tuple[str, ...]]:
    """[W, L, E], and a word where the axes were not told."""
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise InputError(
            f"loads must be [layers, experts] or [windows, layers, experts]; got shape "
            f"{list(array.shape)}"
        )
    axes = asked.axes
    said: tuple[str, ...] = ()
    if defined is not None:
        defined = {2: defined[-2:], 3: ("W" + defined)[-3:]}[array.ndim]
        if axes not in (None, defined):
            raise InputError(f"the format defines its axes as {defined}: leave --axes out")
        axes = defined
    if axes is None:
        axes, said = _axes_by_shape(array.shape, asked)
    if axes not in LOAD_AXES or len(axes) != array.ndim:
        raise InputError(f"--axes {axes} does not fit loads of shape {list(array.shape)}")
    if array.ndim == 2:
        return array.transpose([axes.index(a) for a in "LE"])[None], said
    return array.transpose([axes.index(a) for a in "WLE"]), said


def _axes_by_shape(shape: tuple[int, ...], asked: Asked) -> tuple[str, tuple[str, ...]]:
    """The axes that the numbers of experts and layers allow; else the usual order, or a question.

    The usual order has the experts last, and as many of them as layers or more.
    """
    order = "LE" if len(shape) == 2 else "WLE"
    experts, layers = asked.experts(), _layer_counts(asked)
    fits = [
        axes for axes in LOAD_AXES if len(axes) == len(shape)
        and (experts is None or shape[axes.index("E")] == experts)
        and (layers is None or shape[axes.index("L")] in layers)
    ]
    if not fits:
        raise InputError(
            f"loads {list(shape)} fit neither {experts} experts"
            + (f" nor {' or '.join(map(str, sorted(layers)))} layers" if layers else "")
            + f": give --axes, one of {', '.join(a for a in LOAD_AXES if len(a) == len(shape))}"
        )
    names = {"W": "windows", "L": "layers", "E": "experts"}
    told = experts is not None or layers is not None
    if told and order in fits:
        fits = [order]
    if told and len(fits) == 1:
        axes = fits[0]
        if axes == order:
            return axes, ()
    elif not told and shape[-1] >= shape[-2]:
        axes = order
    else:
        usual = order[:-2] + "EL"
        raise InputError(
            f"loads {list(shape)}: fewer in the last axis than in the one before, so perhaps not "
            f"[{', '.join(names[a] for a in order)}]: say --axes {usual} if the last are layers, "
            f"--axes {order} if they are experts"
        )
    word = ", ".join(names[a] for a in axes)
    return axes, (f"axes {list(shape)} taken as [{word}]: --axes says otherwise",)


def _layer_counts(asked: Asked) -> set[int] | None:
    if asked.layers is not None:
        return {len(asked.layers)}
    if asked.model is not None:
        return {asked.model.num_layers, hidden_layers(asked.model)}
    return None


# ---- what cannot be, and what is empty --------------------------------------------------------


def _refuse_impossible(load_WLE: LoadArray, numbers: tuple[int, ...] | None) -> None:
    bad = np.argwhere(~np.isfinite(load_WLE) | (load_WLE < 0))
    if len(bad):
        window, layer, expert = (int(i) for i in bad[0])
        name = numbers[layer] if numbers else layer
        at = f"window {window}, " if len(load_WLE) > 1 else ""
        more = f" ({len(bad) - 1} more such counts)" if len(bad) > 1 else ""
        raise InputError(
            f"{at}layer {name}, expert {expert}: the load is {load_WLE[window, layer, expert]}; "
            f"loads must be finite and >= 0{more}: mend or leave out that window"
        )


def _without_empty_windows(load_WLE: LoadArray) -> tuple[LoadArray, tuple[str, ...]]:
    empty_W = load_WLE.max(axis=(1, 2)) == 0
    if empty_W.all():
        raise InputError("all counts are zero: record while traffic runs")
    if not empty_W.any():
        return load_WLE, ()
    which = written(np.flatnonzero(empty_W).tolist())
    which = f" ({which})" if len(which) < 60 else ""
    return load_WLE[~empty_W], (
        f"{int(empty_W.sum())} of {len(empty_W)} windows are empty and skipped{which}",
    )


def _moe_layers(
    load_WLE: LoadArray, asked: Asked, numbers: tuple[int, ...] | None
) -> tuple[LoadArray, tuple[int, ...], tuple[str, ...]]:
    """(the MoE rows with counts, their layer numbers, what was left out)."""
    found = load_WLE.shape[1]
    told = asked.layer_rows(found, numbers)
    rows = tuple(range(found)) if told is None else told.rows
    layers = rows if told is None else told.layers
    notes = () if told is None else told.notes
    counted_L: npt.NDArray[np.bool_] = load_WLE.max(axis=(0, 2)) > 0
    quiet = [layer for row, layer in zip(rows, layers, strict=True) if not counted_L[row]]
    dropped = [row for row in range(found) if row not in rows and counted_L[row]]
    if dropped:
        raise InputError(
            f"row {dropped[0]} holds counts, but {asked.model.name if asked.model else 'it'} has "
            "no MoE layer there: another model, or number the rows by --layers"
        )
    if quiet:
        how = ("but are MoE layers of the model: not recorded" if asked.model is not None
               else "and are taken as dense")
        notes += (f"layers {written(quiet)} hold no counts {how}",)
    kept = [(row, layer) for row, layer in zip(rows, layers, strict=True) if counted_L[row]]
    if not kept:
        raise InputError("no MoE layer holds counts: record while traffic runs")
    return load_WLE[:, [row for row, _ in kept]], tuple(layer for _, layer in kept), notes
