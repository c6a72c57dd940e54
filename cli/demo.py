"""How the demo's result is printed: verdict, before / predicted / measured, and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..foundation.units import size
from . import output as show

if TYPE_CHECKING:
    from ..workers.demo.result import DemoResult


def print_demo(result: DemoResult) -> None:
    """For people; `--json` prints `DemoResult.to_dict`."""
    show.print_verdict(result.verdict)
    columns = ("", "before", "predicted", "measured")
    show.print_table(
        f"prefill, steps of 4,096 tokens or more ({result.measured.steps} steps each)", columns,
        _rows(result.before, result.predicted, result.measured),
    )
    show.print_verdict(result.decode_verdict)
    show.print_table(
        f"decode ({result.decode_measured.steps} steps each)", columns,
        _rows(result.decode_before, result.decode_predicted, result.decode_measured),
    )
    latency = {name: run.latency for name, run in result.simulated.items()}
    show.print_table(
        "simulated: the same requests under both plans, experts at 70 % load",
        ("plan", "latency p50, ms", "latency p99, ms"),
        [(name, d.p50 / 1e3, d.p99 / 1e3) for name, d in latency.items()],
    )
    applied, overhead, evidence = result.applied, result.overhead, result.planned.evidence
    show.print_table("", ("", "value"), [
        ("outputs identical under both plans, bit for bit", result.outputs_identical),
        ("experts moved by a switch, of slots in all layers", f"{len(applied.moved)} of "
         f"{result.planned.plan.slots.size}"),
        ("bytes moved", size(applied.moved_bytes)),
        ("steps that carried them; the commit step, ms",
         f"{applied.stage_steps}; {applied.commit_us / 1e3:.0f}"),
        ("recording costs, share of CPU time (95 % bound)",
         f"{overhead.share:+.1%} (<= {overhead.upper_95:+.1%})"),
        ("plan: bound and gap on its planning steps",
         f"{show.figure(evidence.bound)} ({evidence.objective_name}), {evidence.gap:.2%}"),
        ("planned in, s", result.planned.seconds),
        ("expert times: median error of the kernel's fit; of live steps",
         f"{result.fit.kernel_error:.1%}; {result.fit.live_error:.1%}"),
        ("spare replicas in all layers", result.planned.plan.spare_slots),
        ("the whole demo, s", result.seconds),
    ])
    show.print_notes(_notes(result))
    show.print_text(f"run folder: {result.folder}")


def _rows(*columns: Any) -> list[tuple[Any, ...]]:
    def row(name: str, field: str, scale: float = 1.0) -> tuple[Any, ...]:
        values = (getattr(c, field) for c in columns)
        return (name, *(None if v is None else v / scale for v in values))

    return [
        row("imbalance, mean", "imbalance_mean"), row("imbalance, p99", "imbalance_p99"),
        row("remote transfers per token and layer", "remote_copies_per_token"),
        row("critical-path expert CPU time, ms a step", "critical_path_us", 1e3),
        row("step wall time, ms", "step_wall_us", 1e3),
    ]


def _notes(result: DemoResult) -> list[str]:
    notes = [
        f"measured in turns: {result.gain.pairs} steps of the same prompts under each plan, the "
        "plans switched live between stretches",
        "predicted: the steps recorded before the switch, replayed under the new plan; the plan "
        "was made from other prompts",
    ]
    if result.cores < result.ranks:
        notes.append(
            f"{result.ranks} ranks share {result.cores} cores: wall time follows the sum of all "
            "work, not the slowest rank, so it is measured but not predicted"
        )
    return notes
