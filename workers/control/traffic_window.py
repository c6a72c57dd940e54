"""A window of live traffic: what was recorded, and what the very same steps measured.

Knows traces and measurements of one group. Knows nothing of plans or decisions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import LoadmasterError
from ...traces.trace import DECODE, PREFILL, RoutingTrace
from ..coordinator.step_log import Measurements
from .decisions import ControlledGroup


@dataclass(frozen=True)
class Window:
    """Recorded steps and their measurements: the same steps in both."""

    trace: RoutingTrace
    measured: Measurements

    @property
    def steps(self) -> int:
        return len(self.measured.step)

    def of_epoch(self, epoch: int) -> Window:
        """The steps under this plan that carried no expert of a switch."""
        m = self.measured
        return self._only(m.step[(m.epoch == epoch) & ~m.staging])

    def of_phase(self, phase: int | None) -> Window:
        """The steps of one phase, where the phases run in steps of their own; None: all."""
        if phase is None or self.trace.phase is None:
            return self
        assert self.trace.step is not None
        return self._only(np.unique(self.trace.step[self.trace.phase == phase]))

    def busier_phase(self) -> int:
        """The phase whose steps took more of the slowest ranks' time; prefill among equals."""
        us_P = [float(self.of_phase(p).measured.critical_us.sum()) for p in (PREFILL, DECODE)]
        return DECODE if us_P[DECODE] > us_P[PREFILL] else PREFILL

    def _only(self, steps: npt.NDArray[np.integer[Any]]) -> Window:
        return _joined(
            self.trace.select(np.isin(self.trace.step, steps)),  # type: ignore[arg-type]
            self.measured.take(np.isin(self.measured.step, steps)),
        )


@dataclass(frozen=True)
class Taken:
    """Everything recorded since the last window, and the part of it that was measured."""

    trace: RoutingTrace
    whole: Window
    last_step: int


def take_window(group: ControlledGroup, after_step: int) -> Taken:
    """What was recorded after this step. The trace is taken first: under load steps go on, and
    so every recorded step is among those measured, unless the group keeps them no more.

    Raises LoadmasterError when nothing was recorded.
    """
    trace = group.trace(take=True)
    assert trace.step is not None
    if len(trace.step) and int(trace.step.min()) <= after_step:
        trace = trace.select(trace.step > after_step)       # a group that records to files
    if not trace.num_tokens:
        raise LoadmasterError("nothing has been recorded since the last window")
    assert trace.step is not None
    measured = group.measurements(int(trace.step.min()) - 1)
    return Taken(trace, _joined(trace, measured), int(trace.step.max()))


def _joined(trace: RoutingTrace, measured: Measurements) -> Window:
    """Only the steps that both have."""
    assert trace.step is not None
    return Window(
        trace.select(np.isin(trace.step, measured.step)),
        measured.take(np.isin(measured.step, trace.step)),
    )
