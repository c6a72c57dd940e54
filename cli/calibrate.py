"""`calibrate`: measure this machine into a hardware profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..app.inputs import read_model, require_targets, writing
from . import output as show
from .options import Json, MoeLayers, SizedModel
from .serving_options import whole

if TYPE_CHECKING:
    from ..placement.hardware import HardwareProfile


def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Hardware profile to write (YAML).")],
    model: SizedModel,
    ranks: Annotated[
        int, typer.Option(help="Processes that exchange tokens.", callback=whole("--ranks", 2))
    ] = 4,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    moe_layers: MoeLayers = None,
    json: Json = False,
) -> None:
    """Measure this machine: experts alone, exchange between processes; fit a hardware profile."""
    import yaml

    from ..errors import UsageError
    from ..foundation.atomic_file import replacing
    from ..workers.calibrate.machine import calibrate_machine

    require_targets(out)
    spec = read_model(model, moe_layers)
    if spec is None or not spec.knows_sizes:
        raise UsageError(f"{model}: calibrate needs the hidden and intermediate sizes")
    with show.progress_bar() as bar:
        task = bar.add_task("measuring", total=None)
        profile = calibrate_machine(
            spec, ranks=ranks, dtype=dtype,
            progress=lambda text: bar.update(task, description=text),
        )
    with writing(out), replacing(out) as file:
        file.write(yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False).encode())
    if json:
        show.print_json(profile.model_dump(mode="json"))
    else:
        _print(profile, out)


def _print(profile: HardwareProfile, out: Path) -> None:
    show.print_verdict(f"wrote {out}: {profile.error}")
    compute = profile.compute
    show.print_table("experts", ("tokens on an expert", "us"), list(
        zip(map(int, compute.expert_table_tokens), compute.expert_table_us, strict=True)
    ))
    show.print_table("exchange", ("", "value"), [
        ("start, us", profile.dispatch.alpha_us),
        ("rate, GB/s", profile.dispatch.nvlink_bytes_per_s / 1e9),
        ("counts collective, us", profile.counts_collective_us),
    ])
