"""What goes wrong during a run: slow devices, jitter, bad links, lost devices and nodes.

Each fault is an `Intervention`: it starts a process that changes what is active at its times. A
lost device ends the running step, sends its requests back to the queue, and the group pauses until
an emergency plan covers every expert on the survivors and their weights are loaded. Knows nothing
of live workers. Fault times and draws do not depend on the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ...errors import InputError, UsageError
from ...foundation.arrays import FloatArray
from ...placement.cluster import Cluster
from ...placement.cost.step_cost import move_cost
from ...placement.plan import Plan
from ...placement.rebalancing.survivors import survivors_plan
from ..serving.event_loop import Process
from ..serving.simulate import Run

Replan = Callable[[Plan, frozenset[int], Cluster], Plan]


@dataclass(frozen=True)
class SlowDevice:
    """One device computes `factor` times as long from `at_us` on, until `until_us` (None = on).

    Several in a row on one device are thermal steps.
    """

    device: int
    factor: float
    at_us: float = 0.0
    until_us: float | None = None
    group: int = 0

    def start(self, run: Run) -> None:
        _check(run, "SlowDevice", self.device, self.group, self.at_us, self.until_us)
        if not (np.isfinite(self.factor) and self.factor >= 1.0):
            raise UsageError(f"SlowDevice.factor {self.factor} must be finite and at least 1")
        run.loop.env.process(self._play(run))

    def _play(self, run: Run) -> Process:
        slow_G, cause = _one(run, self.device, self.factor), run.active.new_cause()
        yield from _wait_until(run, self.at_us)
        run.active.slow(self.group, cause, slow_G)
        run.log("slow", f"device {self.device} takes {self.factor:g} times as long")
        if self.until_us is not None:
            yield from _wait_until(run, self.until_us)
            run.active.slow(self.group, cause, None)
            run.log("recovered", f"device {self.device} at full speed")


@dataclass(frozen=True)
class Jitter:
    """Every device's step time varies: exp(sigma x |normal|), drawn anew each step.

    Several on one device multiply, each with draws of its own.
    """

    sigma: float
    devices: tuple[int, ...] | None = None

    def start(self, run: Run) -> None:
        if not (np.isfinite(self.sigma) and self.sigma >= 0):
            raise UsageError(f"Jitter.sigma {self.sigma} must be finite and >= 0")
        devices = run.router.cluster.num_devices
        chosen = sorted(set(range(devices) if self.devices is None else self.devices))
        for device in chosen:
            _check(run, "Jitter", device, 0, 0.0, None)
        sigma_G = np.zeros(devices)
        sigma_G[chosen] = self.sigma
        run.active.add_jitter(sigma_G)
        run.log("jitter", f"sigma {self.sigma:g} on {len(chosen)} devices")


@dataclass(frozen=True)
class FlappingNic:
    """One device's network port falls to `share` of its rate for `down_us` every `period_us`."""

    device: int
    share: float
    period_us: float
    down_us: float
    at_us: float = 0.0
    until_us: float | None = None
    group: int = 0

    def start(self, run: Run) -> None:
        _check(run, "FlappingNic", self.device, self.group, self.at_us, self.until_us)
        if not 0 < self.share <= 1:
            raise UsageError(f"FlappingNic.share {self.share} must lie in (0, 1]")
        if not 0 < self.down_us < self.period_us < np.inf:
            raise UsageError(
                f"FlappingNic.down_us {self.down_us} must lie in (0, period_us {self.period_us})"
            )
        run.loop.env.process(self._play(run))

    def _play(self, run: Run) -> Process:
        share_G, cause = _one(run, self.device, self.share), run.active.new_cause()
        yield from _wait_until(run, self.at_us)
        run.log("nic flaps", f"device {self.device} at {self.share:g} of its rate at times")
        while not run.loop.finished:
            if self.until_us is not None and run.loop.now_ns >= self.until_us * 1e3:
                run.log("recovered", f"network port of device {self.device}")
                return
            run.active.throttle(self.group, cause, share_G)
            yield run.loop.env.timeout(round(self.down_us * 1e3))
            run.active.throttle(self.group, cause, None)
            yield run.loop.env.timeout(round((self.period_us - self.down_us) * 1e3))


@dataclass(frozen=True)
class LostDevices:
    """Devices, or a whole node, are gone at `at_us`.

    detect_us: until it is noticed. replan_us: until the emergency plan is there; then the missing
    weights are loaded (from survivors, else from host memory) and serving goes on. back_after_us:
    the devices return, are loaded under the plan made for them, and serve again; those that another
    loss keeps away stay empty. replan: (plan, lost devices, cluster) -> plan for the survivors;
    None = `survivors_plan`.
    """

    at_us: float
    devices: tuple[int, ...] = ()
    node: int | None = None
    detect_us: float = 1e6
    replan_us: float = 1e6
    back_after_us: float | None = None
    group: int = 0
    replan: Replan | None = field(default=None, compare=False)

    def start(self, run: Run) -> None:
        for device in self.devices:
            _check(run, "LostDevices", device, self.group, self.at_us, None)
        if not self.lost(run):
            raise UsageError("LostDevices needs devices or a node")
        for name in ("at_us", "detect_us", "replan_us", "back_after_us"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < np.inf:
                raise UsageError(f"LostDevices.{name} {value} must be finite and >= 0")
        if not 0 <= self.group < len(run.loop.groups):
            raise InputError(
                f"LostDevices.group {self.group}: there are {len(run.loop.groups)} groups"
            )
        run.loop.env.process(self._play(run))

    def lost(self, run: Run) -> frozenset[int]:
        """The devices this takes out."""
        node_G = run.router.cluster.node_G
        if self.node is not None and not 0 <= self.node <= int(node_G[-1]):
            raise InputError(f"LostDevices.node {self.node}: the cluster has {node_G[-1] + 1}")
        whole = () if self.node is None else np.flatnonzero(node_G == self.node).tolist()
        return frozenset(self.devices) | frozenset(whole)

    def _play(self, run: Run) -> Process:
        yield from _wait_until(run, self.at_us)
        if run.loop.finished:
            return
        lost = self.lost(run)
        group = run.loop.groups[self.group]
        orphans = run.active.lose(self.group, lost)
        group.at_boundary(lambda _now: self._recover(run, lost))
        group.interrupt("devices lost")
        retried = group.lanes.lose_devices(lost, run.loop.queue)
        run.log("lost", f"devices {sorted(lost)}: {orphans} experts without a replica, "
                        f"{retried} requests start over")
        if self.back_after_us is not None:
            yield run.loop.env.timeout(round(self.back_after_us * 1e3))
            group.at_boundary(lambda _now: self._return(run, lost))

    def _recover(self, run: Run, lost: frozenset[int]) -> int:
        """Put the emergency active plan; the group pauses until it is loaded."""
        current = run.active.of(self.group).plan
        plan = self._survivors(run, current)
        pause_us, text = _load(run, current, plan, self.group)
        pause_ns = round((self.detect_us + self.replan_us + pause_us) * 1e3)
        run.log("emergency plan", text, pause_ns)
        return pause_ns

    def _return(self, run: Run, lost: frozenset[int]) -> int:
        current = run.active.of(self.group).plan
        back = run.active.regain(self.group, lost)
        plan = self._survivors(run, run.active.whole_plan[self.group])
        pause_us, text = _load(run, current, plan, self.group)
        run.loop.groups[self.group].lanes.regain_devices(back)
        run.log("back", f"devices {sorted(back)}; {text}", round(pause_us * 1e3))
        return round(pause_us * 1e3)

    def _survivors(self, run: Run, plan: Plan) -> Plan:
        """The plan for the devices that are there."""
        lost = run.active.of(self.group).lost
        if not lost:
            return plan
        if self.replan is not None:
            return self.replan(plan, lost, run.router.cluster)
        return survivors_plan(plan, lost, run.router.cluster, run.router.model)


def _load(run: Run, current: Plan, plan: Plan, group: int) -> tuple[float, str]:
    """Switch to `plan` at once; (microseconds of loading, what was loaded)."""
    lost = run.active.of(group).lost
    plan = run.active.current_plan(group, plan)
    moves = current.moves_to(plan)
    cost = move_cost(moves, current, run.router.model, run.router.cluster, unavailable=lost)
    run.moved_bytes += cost.bytes
    run.switch_plan(group, plan)
    from_host = int(cost.host_bytes_G.sum())
    return cost.us, f"{cost.moves} experts, {cost.bytes} bytes moved, {from_host} from the host"


def _one(run: Run, device: int, value: float) -> FloatArray:
    """Ones, and `value` at one device."""
    values = np.ones(run.router.cluster.num_devices)
    values[device] = value
    return values


def _wait_until(run: Run, at_us: float) -> Process:
    wait_ns = round(at_us * 1e3) - run.loop.now_ns
    if wait_ns > 0:
        yield run.loop.env.timeout(wait_ns)


def _check(
    run: Run, what: str, device: int, group: int, at_us: float, until_us: float | None
) -> None:
    devices = run.router.cluster.num_devices
    if not 0 <= device < devices:
        raise InputError(f"{what}.device {device}: the cluster has devices 0..{devices - 1}")
    if not 0 <= group < len(run.loop.groups):
        raise InputError(f"{what}.group {group}: there are {len(run.loop.groups)} groups")
    ends_us = at_us if until_us is None else until_us
    if not 0 <= at_us <= ends_us < np.inf:
        raise UsageError(
            f"{what}: at_us {at_us} and until_us {until_us} must be finite, >= 0 and in order"
        )
