"""Plans in the engines' own files, both ways: one module per engine.

sglang (.json, .pt), trtllm (.yaml), vllm_ascend (.json), eplb (DeepSeek's tensors, .npz or .pt),
omni (OmniPlacement's .npy). Every file is checked line by line, because most engines check nothing.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ...errors import UsageError
from ...traces.spec import ModelSpec
from ..plan import Plan
from . import eplb, omni, sglang, trtllm, vllm_ascend
from .imported import ImportedPlan, Known
from .nearest import nearest_plan

__all__ = ["FORMATS", "ImportedPlan", "export_plan", "import_plan", "nearest_plan"]

_MODULES: dict[str, ModuleType] = {
    "sglang": sglang, "trtllm": trtllm, "vllm_ascend": vllm_ascend, "eplb": eplb, "omni": omni,
}
FORMATS = tuple(_MODULES)


def export_plan(
    plan: Plan,
    format: str,
    path: Path | str,
    *,
    model: ModelSpec | None = None,
    nearest: bool = False,
) -> tuple[str, ...]:
    """Write the plan as an engine's file, whole or not at all; returns what the file cannot say.

    model: for the model's own layer numbers, where the plan does not carry them. nearest: where the
    engine cannot hold the plan, write the nearest one it can (`nearest_plan`) instead of refusing.
    Raises InputError when the engine cannot hold the plan, naming the nearest it can.
    """
    module = _module(format)
    notes: list[str] = []
    if nearest:
        fitted = nearest_plan(plan, duplicates=module.HOLDS_DUPLICATES, uneven=module.HOLDS_UNEVEN)
        changed = int((fitted.slots != plan.slots).sum())
        if changed:
            notes.append(f"{changed} slots differ from the plan: the nearest {format} can hold")
        plan = fitted
    notes.extend(module.write(plan, Path(path), model))
    return (*notes, f"the file does not carry the dispatch ({plan.dispatch.policy} in the plan)")


def import_plan(
    path: Path | str,
    format: str,
    *,
    num_devices: int | None = None,
    num_experts: int | None = None,
    model: ModelSpec | None = None,
) -> ImportedPlan:
    """Read an engine's plan file and check all of it.

    num_devices: needed where the file does not say (sglang, trtllm, eplb). num_experts, model:
    otherwise the highest expert named is taken for the last. model also tells which rows are MoE
    layers (sglang) and checks that none is missing (trtllm).
    Raises InputError naming file, layer and slot.
    """
    path = Path(path)
    if model is not None and num_experts not in (None, model.num_experts):
        raise UsageError(f"--num-experts {num_experts}, but the model has {model.num_experts}")
    known = Known(path, num_devices, model.num_experts if model else num_experts, model)
    imported: ImportedPlan = _module(format).read(known)
    return imported


def _module(format: str) -> ModuleType:
    if format not in _MODULES:
        raise UsageError(f"unknown plan format {format!r}; there are: {', '.join(FORMATS)}")
    return _MODULES[format]
