"""`plan-show`, `plan-diff`, `plan-export`, `plan-import`, `schema`: plans as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..app.inputs import model_notes, read_model, require_target
from . import output as show
from .options import Json, ModelSource, MoeLayers, NumExperts

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file.")]
EngineFormat = Annotated[
    str, typer.Option("--format", help="sglang, trtllm, vllm, vllm_ascend, eplb or omni.")
]


def plan_show(
    plan_file: PlanArgument,
    json: Json = False,
) -> None:
    """What a plan says: slots, replicas, dispatch, where it came from and how good it is."""
    from ..placement.inspection.describe import describe_plan
    from ..placement.plan import Plan

    described = describe_plan(Plan.load(plan_file))
    if json:
        show.print_json(described.to_dict())
        return
    show.print_verdict(described.summary)
    show.print_table("", ("plan", ""), described.facts)
    show.print_table("", described.layer_columns, described.layer_rows)
    show.print_notes(described.notes)


def plan_diff(
    old: Annotated[Path, typer.Argument(help="Plan file.")],
    new: Annotated[Path, typer.Argument(help="Plan file.")],
    model: ModelSource = None,
    moe_layers: MoeLayers = None,
    json: Json = False,
) -> None:
    """What changes from one plan to another: experts to move, by layer and device, and bytes."""
    from ..placement.inspection.difference import diff_plans
    from ..placement.plan import Plan

    before, after = Plan.load(old), Plan.load(new)
    spec = read_model(model, moe_layers)
    described = diff_plans(before, after, spec)
    if json:
        show.print_json(described.to_dict())
        return
    show.print_verdict(described.summary)
    if described.rows:
        show.print_table("", described.columns, described.rows)
    if described.device_rows:
        show.print_table("", described.device_columns, described.device_rows)
    show.print_notes((*model_notes(spec), *described.notes))


def plan_export(
    plan_file: PlanArgument,
    format: EngineFormat,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Write the nearest plan the engine can hold.")
    ] = False,
    model: ModelSource = None,
    moe_layers: MoeLayers = None,
    json: Json = False,
) -> None:
    """Write a plan as an engine's own file; refuses what that engine cannot hold."""
    from ..placement.formats import export_plan
    from ..placement.plan import Plan

    require_target(out)
    spec = read_model(model, moe_layers)
    notes = [
        *model_notes(spec),
        *export_plan(Plan.load(plan_file), format, out, model=spec, nearest=nearest),
    ]
    if json:
        show.print_json({"file": str(out), "format": format, "notes": notes})
        return
    show.print_verdict(f"wrote {out} for {format}")
    show.print_notes(notes)


def plan_import(
    source: Annotated[Path, typer.Argument(help="An engine's plan file.")],
    format: EngineFormat,
    out: Annotated[Path, typer.Option("--out", "-o", help="Plan file to write.")],
    devices: Annotated[
        int | None, typer.Option(help="Devices, where the file does not say.")
    ] = None,
    num_experts: NumExperts = None,
    model: ModelSource = None,
    moe_layers: MoeLayers = None,
    json: Json = False,
) -> None:
    """Read an engine's plan, check every line of it, and write it as a plan file."""
    from ..placement.formats import import_plan
    from ..placement.inspection.describe import shape_text

    require_target(out)
    spec = read_model(model, moe_layers)
    found = import_plan(
        source, format, num_devices=devices, num_experts=num_experts, model=spec
    )
    notes = [*model_notes(spec), *found.notes]
    found.plan.save(out)
    shape = shape_text(found.plan)
    if json:
        show.print_json({"file": str(out), "format": format, "plan": shape, "notes": notes})
        return
    show.print_verdict(f"imported {source} ({format}) to {out}: {shape}")
    show.print_notes(notes)


def schema(
    name: Annotated[
        str | None,
        typer.Argument(help="plan, cluster, model, trace, hardware, grid or faults."),
    ] = None,
) -> None:
    """JSON Schema of every file format, or of one."""
    from ..errors import UsageError
    from ..placement.cluster import Cluster
    from ..placement.hardware import HardwareProfile
    from ..placement.plan import plan_schema
    from ..simulator.events.fault_file import faults_schema
    from ..simulator.whatif.grid import grid_schema
    from ..traces.model_spec import ModelSpec
    from ..traces.storage.manifest import Manifest

    schemas = {
        "plan": plan_schema, "cluster": Cluster.model_json_schema,
        "model": ModelSpec.model_json_schema, "trace": Manifest.model_json_schema,
        "hardware": HardwareProfile.model_json_schema,
        "grid": grid_schema, "faults": faults_schema,
    }
    if name is not None and name not in schemas:
        raise UsageError(f"no format {name!r}; there are: {', '.join(schemas)}")
    show.print_json(schemas[name]() if name else {n: make() for n, make in schemas.items()})
