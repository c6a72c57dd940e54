"""The serving loop on simpy: arrivals, batches, steps, completions, and what interrupts them.

Time is integer nanoseconds. One process per serving group, one event per step. Knows queues and
the clock. Knows nothing of experts or devices' speed: a step's duration comes from the `StepTimer`
it is given, so a single-server queue and a 256-device cluster run through this same loop.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Collection, Generator
from typing import Any, Protocol

import simpy

from ...errors import LoadmasterError
from .batching import Batch, BatchLimits, Lanes, Prefill, RequestLog, require_fits
from .workload import Workload

Process = Generator[Any, Any, None]
BoundaryAction = Callable[[int], int]


class StepTimer(Protocol):
    """How long a batch takes, in nanoseconds (above 0)."""

    def step_ns(self, batch: Batch, group: ServingGroup) -> int: ...


class StepLog:
    """One row per step that ran to its end."""

    def __init__(self) -> None:
        self.start_ns, self.duration_ns = array("q"), array("q")
        self.prefill_tokens, self.decode_tokens = array("q"), array("q")
        self.group, self.epoch = array("q"), array("q")

    def append(
        self, start_ns: int, duration_ns: int, batch: Batch, group: int, epoch: int
    ) -> None:
        self.start_ns.append(start_ns)
        self.duration_ns.append(duration_ns)
        self.prefill_tokens.append(batch.prefill_tokens)
        self.decode_tokens.append(batch.decode_tokens)
        self.group.append(group)
        self.epoch.append(epoch)

    def __len__(self) -> int:
        return len(self.start_ns)


class ServingGroup:
    """One set of devices that steps in lock-step and takes requests from the shared queue."""

    def __init__(self, loop: ServingLoop, index: int, num_devices: int) -> None:
        self.loop, self.index = loop, index
        self.lanes = Lanes(loop.workload, loop.limits, num_devices, loop.requests)
        self.boundary: deque[BoundaryAction] = deque()
        self.next_boundary: deque[BoundaryAction] = deque()
        self.on_start: list[Callable[[Batch, int], None]] = []    # batch, its nanoseconds
        self.on_step: list[Callable[[], None]] = []
        self.paused_ns = 0
        self.lost_steps = 0
        self.epoch = 0    # of the active plan; counted up by whatever switches plans
        self.stepping = False
        self.wake: simpy.Event | None = None
        self.process = loop.env.process(self._run())

    def at_boundary(self, action: BoundaryAction) -> None:
        """Run `action(now_ns)` before the next step; it returns how long the group pauses."""
        self.boundary.append(action)
        self.rouse()

    def after_step(self, action: BoundaryAction) -> None:
        """The same, but not before another step has run (or the group has fallen idle)."""
        self.next_boundary.append(action)
        self.rouse()

    def rouse(self) -> bool:
        """Wake the group if it is idle; whether it was."""
        if self.wake is None:
            return False
        wake, self.wake = self.wake, None
        wake.succeed()
        return True

    def interrupt(self, cause: object) -> None:
        """End the running step without its tokens; an idle or paused group just goes on."""
        if self.wake is None and self.stepping:
            self.process.interrupt(cause)
        else:
            self.rouse()

    def _run(self) -> Process:
        loop = self.loop
        env, lanes = loop.env, self.lanes
        while True:
            yield from self._boundary_actions()
            batch = lanes.next_batch(loop.queue, loop.now_ns)
            if batch is None:
                if self._turn_boundary():
                    continue
                if loop.finished:
                    return
                self.wake = env.event()
                yield self.wake
                continue
            start_ns = loop.now_ns
            epoch, duration_ns = self.epoch, loop.timer.step_ns(batch, self)
            for told_of in self.on_start:
                told_of(batch, duration_ns)
            self.stepping = True
            try:
                yield env.timeout(duration_ns)
            except simpy.Interrupt:
                self.lost_steps += 1
                continue
            finally:
                self.stepping = False
            loop.steps.append(start_ns, duration_ns, batch, self.index, epoch)
            loop.note_ended(lanes.complete(batch, loop.now_ns))
            self._turn_boundary()
            for callback in self.on_step:
                callback()

    def _turn_boundary(self) -> bool:
        """Bring forward what waited for a step; whether there was any."""
        waiting = bool(self.next_boundary)
        self.boundary.extend(self.next_boundary)
        self.next_boundary.clear()
        return waiting

    def _boundary_actions(self) -> Process:
        while self.boundary:
            pause_ns = self.boundary.popleft()(self.loop.now_ns)
            if pause_ns > 0:
                self.paused_ns += pause_ns
                yield self.loop.env.timeout(pause_ns)


class ServingLoop:
    """A workload, a queue, one or more serving groups; `run` plays it to the last request."""

    def __init__(
        self,
        workload: Workload,
        timer: StepTimer,
        limits: BatchLimits,
        *,
        num_devices: int = 1,
        groups: int = 1,
    ) -> None:
        require_fits(workload, limits)
        self.env = simpy.Environment(initial_time=0)
        self.workload, self.timer, self.limits = workload, timer, limits
        self.queue: deque[Prefill] = deque()
        self.requests, self.steps = RequestLog(len(workload)), StepLog()
        self.unfinished = len(workload)
        self.on_finish: list[Callable[[], None]] = []
        self.env.process(self._arrivals())
        self.groups = [ServingGroup(self, k, num_devices) for k in range(groups)]

    @property
    def now_ns(self) -> int:
        """The clock; whole nanoseconds, as every wait is."""
        return int(self.env.now)

    @property
    def finished(self) -> bool:
        """Whether every request has been answered."""
        return self.unfinished == 0

    def run(self) -> None:
        """Play until nothing happens any more. Raises LoadmasterError if requests are left over."""
        self.env.run()
        if self.unfinished:
            raise LoadmasterError(
                f"{self.unfinished} of {len(self.workload)} requests were never answered: "
                f"{len(self.queue)} wait for KV memory or devices that did not come back"
            )

    def note_ended(self, requests: int) -> None:
        """Count answered requests; the last one lets idle groups go home."""
        if not requests:
            return
        self.unfinished -= requests
        if self.unfinished == 0:
            for group in self.groups:
                group.rouse()
            for callback in self.on_finish:
                callback()

    def rouse_one(self) -> None:
        """Wake the first idle group."""
        for group in self.groups:
            if group.rouse():
                return

    def _arrivals(self) -> Process:
        env, workload = self.env, self.workload
        arrival_ns = workload.arrival_ns.tolist()
        prompt, output = workload.prompt_tokens.tolist(), workload.output_tokens.tolist()
        for request, at_ns in enumerate(arrival_ns):
            if at_ns > env.now:
                yield env.timeout(at_ns - env.now)
            self.queue.append(Prefill(request, prompt[request], output[request]))
            self.rouse_one()


def lose_devices(group: ServingGroup, lost: Collection[int]) -> int:
    """Take devices out at once: the running step is lost, their requests start over."""
    group.interrupt("device lost")
    return group.lanes.lose_devices(frozenset(lost), group.loop.queue)
