"""Plans in the engines' own files: one module per engine, both ways.

An engine's file holds less than a plan: neither evidence nor provenance. What an engine cannot
hold (uneven slots, an expert twice on a device) is refused, naming the nearest plan that it can.
Keep the plan file with an exported one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError, UsageError
from ...traces.model_config.layer_ranges import written
from ...traces.model_spec import ModelSpec
from ..cost.unplanned import completed, layers_of
from ..plan import Plan
from . import eplb, omni, sglang, trtllm, vllm, vllm_ascend
from .imported import ImportedPlan, Known
from .nearest import nearest_plan

__all__ = ["FORMATS", "ImportedPlan", "export_plan", "import_plan", "nearest_plan"]


@dataclass(frozen=True)
class _Format:
    engine: str
    read: Callable[[Known], ImportedPlan]
    write: Callable[[Plan, Path, ModelSpec | None], tuple[str, ...]]
    suffixes: tuple[str, ...]
    policies: tuple[str, ...] = ()      # how the engine chooses among replicas, where it is known
    duplicates: bool = True             # may hold an expert twice on a device
    uneven: bool = False                # may fill more slots here than there


_FORMATS = {
    "sglang": _Format(
        "SGLang", sglang.read, sglang.write, (".json", ".pt"), tuple(sglang.DISPATCH_OPTIONS)
    ),
    "trtllm": _Format(
        "TensorRT-LLM", trtllm.read, trtllm.write, (".yaml", ".yml"), ("trtllm_round_robin",)
    ),
    "vllm_ascend": _Format(
        "vllm-ascend", vllm_ascend.read, vllm_ascend.write, (".json",), ("ascend_fixed",),
        duplicates=False,
    ),
    "vllm": _Format("vLLM", vllm.read, vllm.write, (".json",), ("vllm_hash",)),
    "eplb": _Format("EPLB", eplb.read, eplb.write, (".npz", ".pt")),
    "omni": _Format(
        "OmniPlacement", omni.read, omni.write, (".npy",), duplicates=False, uneven=True
    ),
}
FORMATS = tuple(_FORMATS)


def export_plan(
    plan: Plan,
    format: str,
    path: Path | str,
    *,
    model: ModelSpec | None = None,
    nearest: bool = False,
) -> tuple[str, ...]:
    """Write `plan` as the engine's own file, whole or not at all; returns what to know about it.

    model: needed by sglang (all hidden layers) and, unless the plan knows its model's layer
    numbers, by trtllm. nearest: where the engine cannot hold the plan, write the nearest one that
    it can (`nearest_plan`). Raises UsageError on an unknown format or ending, or a model that is
    needed; InputError on a plan that the engine cannot hold or that is another model's, or where
    the file cannot be written.
    """
    path, kind = Path(path), _format(format)
    if path.suffix not in kind.suffixes:
        raise UsageError(
            f"{path}: {kind.engine}'s plan ends in {' or '.join(kind.suffixes)}: name it so"
        )
    notes: tuple[str, ...] = ()
    if model is not None:
        given, plan = plan, completed(plan, model)
        notes = _completed_notes(given, plan)
    if nearest:
        given, plan = plan, nearest_plan(plan, duplicates=kind.duplicates, uneven=kind.uneven)
        notes += _nearest_notes(given, plan)
    try:
        notes += kind.write(plan, path, model)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    return notes + _export_notes(plan, kind)


def import_plan(
    path: Path | str,
    format: str,
    *,
    num_devices: int | None = None,
    num_experts: int | None = None,
    model: ModelSpec | None = None,
) -> ImportedPlan:
    """Read an engine's plan and check every entry of it.

    num_devices: needed by sglang, trtllm and eplb, whose files do not say. num_experts or model:
    else the largest id in the file tells. model also tells which rows are MoE layers (sglang) and
    that none is missing. The plan's dispatch is the engine's own. Raises UsageError on an unknown
    format or a missing or contradicting number, InputError on anything in the file that is not a
    whole plan, naming layer and device.
    """
    kind = _format(format)
    found = kind.read(Known(Path(path), num_devices, num_experts, model))
    notes = found.notes + _duplicate_notes(found.plan)
    if not kind.policies and found.plan.spare_slots:
        notes += ("how tokens choose among replicas is not in the file: the plan says 'even'",)
    return ImportedPlan(found.plan, notes)


def _format(name: str) -> _Format:
    if name not in _FORMATS:
        raise UsageError(f"no plan format {name!r}; there are: {', '.join(FORMATS)}")
    return _FORMATS[name]


def _completed_notes(given: Plan, written_plan: Plan) -> tuple[str, ...]:
    added = sorted(set(written_plan.layer_indices) - set(layers_of(given)))
    if written_plan is given or not added:
        return ()
    return (
        f"the plan holds {given.num_layers} of the model's {written_plan.num_layers} MoE layers; "
        f"{written(added)} get the engines' default layout",
    )


def _export_notes(plan: Plan, kind: _Format) -> tuple[str, ...]:
    notes = _duplicate_notes(plan)
    if kind.policies and plan.spare_slots and plan.dispatch.policy not in kind.policies:
        notes += (
            f"the plan is for dispatch {plan.dispatch.policy}; {kind.engine} chooses among "
            "replicas by its own rule: `loadmaster evaluate --dispatch "
            f"{kind.policies[0]}` judges it so",
        )
    return notes


def _nearest_notes(given: Plan, written: Plan) -> tuple[str, ...]:
    if written is given:
        return ()
    change_LGE = written.replicas_LGE() - given.replicas_LGE()
    dropped, added = int(-change_LGE[change_LGE < 0].sum()), int(change_LGE[change_LGE > 0].sum())
    return (
        f"not the plan but the nearest that can be held: {dropped:,} replicas dropped, {added:,} "
        "added; import it to judge it",
    )


def _duplicate_notes(plan: Plan) -> tuple[str, ...]:
    if not plan.duplicates:
        return ()
    return (f"{plan.duplicates} slots repeat an expert that their device already holds: wasted",)
