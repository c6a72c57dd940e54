"""What the demo is asked (`DemoSize`) and what it found (`DemoResult`). Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...placement.comparison.compare import Comparison
from ...placement.planning.planner import PlanResult
from ...simulator.serving.result import SimulationResult
from ...traces.trace import RoutingTrace
from ..calibrate.expert_fit import ExpertFit
from ..coordinator.step_log import Measurements
from ..protocol.plan_switch import ApplyReport
from .measure import (
    Figures,
    Gain,
    Overhead,
)


@dataclass(frozen=True)
class DemoSize:
    """How much the demo serves; the default stays well under three minutes on two cores."""

    plan_steps: int = 24
    judge_steps: int = 36
    rounds: int = 4             # stretches of the judged traffic, each served under both plans
    decode_prompts: int = 32
    decode_tokens: int = 8
    overhead_pairs: int = 6


@dataclass(frozen=True)
class ServedTurn:
    """One plan's turn: what came out, what it took, what was recorded."""

    outputs: tuple[object, ...]      # a digest per prompt, then the tokens generated
    steps: Measurements
    decode_steps: Measurements
    trace: RoutingTrace | None = None
    decode_trace: RoutingTrace | None = None


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found out."""

    verdict: str
    before: Figures
    predicted: Figures
    measured: Figures
    decode_verdict: str
    decode_before: Figures
    decode_predicted: Figures
    decode_measured: Figures
    gain: Gain
    outputs_identical: bool
    applied: ApplyReport
    overhead: Overhead
    fit: ExpertFit
    planned: PlanResult
    comparison: Comparison
    simulated: dict[str, SimulationResult]
    ranks: int
    cores: int
    seconds: float
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        moved = self.applied
        return {
            "verdict": self.verdict,
            "prefill": {n: vars(getattr(self, n)) for n in ("before", "predicted", "measured")},
            "decode": {
                "verdict": self.decode_verdict,
                **{n: vars(getattr(self, f"decode_{n}"))
                   for n in ("before", "predicted", "measured")},
            },
            "measured_gain": vars(self.gain),
            "outputs_identical": self.outputs_identical,
            "moved_experts": len(moved.moved), "moved_bytes": moved.moved_bytes,
            "commit_us": moved.commit_us, "stage_steps": moved.stage_steps,
            "recording_overhead": vars(self.overhead),
            "fit": {**vars(self.fit), "compute": self.fit.compute.model_dump(mode="json")},
            "bound": self.planned.evidence.bound, "gap": self.planned.evidence.gap,
            "plan_seconds": self.planned.seconds,
            "simulated_latency_us": {n: vars(s.latency) for n, s in self.simulated.items()},
            "ranks": self.ranks, "cores": self.cores, "seconds": self.seconds,
            "run_folder": str(self.folder),
        }
