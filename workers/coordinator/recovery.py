"""A group's ranks: start them, find which are lost, replace them or shrink, serve again.

Knows settings, tables and a fleet. Knows nothing of requests, queues or plan switches. A rank is
admitted only after every expert it read matches the model's manifest of fingerprints.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import InputError, LoadmasterError
from ...placement.cluster import Cluster
from ...placement.plan import EMPTY, Plan, PlanError, Provenance
from ...placement.rebalancing.survivors import plan_without
from ..fleet.fleet import Fleet, RankLostError
from ..fleet.heartbeat import LOADING_ANSWER_S, gather_watched, silent_for_certain
from ..protocol.phase_plans import PhasePlans, Tables
from ..protocol.settings import GroupSettings, RankSettings

_SETTLE_S = 10.0

Fingerprints = dict[tuple[int, int], str]


@dataclass(frozen=True)
class Recovered:
    """The group after a failure or a change of size."""

    reason: str
    replaced: tuple[int, ...]       # ranks that got a new process
    left: tuple[int, ...]           # ranks lost for good, in the old numbering
    plans: PhasePlans
    epoch: int
    noticed_at: float = 0.0         # time.time() when the failure was seen
    seconds: float = 0.0            # from then until the group stood again

    def timed(self, noticed_at: float) -> Recovered:
        """The same, with its times, now that the group serves."""
        return dataclasses.replace(
            self, noticed_at=noticed_at, seconds=time.time() - noticed_at
        )


class WorkerSet:
    """The ranks of one group."""

    def __init__(
        self, settings: GroupSettings, fleet: Fleet,
        announce: Callable[[int, PhasePlans], None] = lambda epoch, plans: None,
    ) -> None:
        """announce: called with the epoch and plans of fewer ranks before any of them leaves."""
        self._settings = settings
        self._announce = announce
        self._fleet = fleet
        self._ranks: list[RankSettings] = list(settings.ranks)
        self._generation = 0
        self._resized: tuple[PhasePlans, int] | None = None   # of a change of size that got so far
        self.fingerprints: Fingerprints = {}
        self.loaded: Any = None
        self._backends: set[str] = set()       # what ranks compute their experts with
        self._notes: dict[str, None] = {}      # what ranks had to say on loading, each line once

    @property
    def cluster(self) -> Cluster:
        """The cluster of the ranks."""
        return self._ranks[0].cluster

    def all(self, method: str, *args: Any, **options: Any) -> list[Any]:
        """Call a method of every rank and wait."""
        ranks = range(self._fleet.ranks)
        return self._answers([self._fleet.call(g, method, *args, **options) for g in ranks])

    def _answers(self, calls: list[Any]) -> list[Any]:
        """What these calls came to; a rank that hangs meanwhile is lost."""
        return gather_watched(self._fleet, calls, self._settings.start_timeout_s)

    def _load(self, ranks: Iterable[int]) -> Any:
        """These ranks read the model without its experts; what they learnt from it."""
        calls = [self._fleet.call(g, "load") for g in ranks]
        limit_s = self._settings.start_timeout_s
        found = gather_watched(self._fleet, calls, limit_s, answer_s=LOADING_ANSWER_S)
        for loaded in found:
            self._backends.add(loaded.experts_backend)
            self._notes.update(dict.fromkeys(loaded.notes))
        return found[0]

    @property
    def experts_backend(self) -> str:
        """What the ranks compute their experts with."""
        return ", ".join(sorted(self._backends))

    @property
    def notes(self) -> list[str]:
        """What is not used on the ranks' machines, or not promised there, and why."""
        mixed = (
            f"ranks compute experts in different ways ({self.experts_backend}): a token's bits "
            "depend on which of them computes it; use machines of one kind"
        )
        return [*self._notes, *([mixed] if len(self._backends) > 1 else [])]

    # ---- starting -----------------------------------------------------------------------

    def start_all(self, tables: Tables) -> None:
        """Start all ranks; each reads its experts; the group forms under the tables."""
        self._fleet.start(self._ranks, self._settings.start_timeout_s)
        self.loaded = self._load(range(self._fleet.ranks))
        self._form(tables)

    def take_over(self, plans: PhasePlans) -> tuple[list[int], int]:
        """Lead ranks that a coordinator before this one started, in no group yet: `recover` is
        next. Which of them are lost, and the last step that one of them has run.

        There are then as many as the plans have devices: a change of size begun is finished.
        """
        states = self._fleet.attach(self._settings.start_timeout_s)
        if not states:
            raise LoadmasterError(
                "no rank outlived the coordinator: stop the group and start it again"
            )
        present = {s.settings.rank: s.settings for s in states}
        size = states[0].settings.ranks
        first = self._ranks[0]
        self._ranks = [
            present.get(g, dataclasses.replace(first, rank=g, ranks=size)) for g in range(size)
        ]
        held = sorted(present)
        self.loaded = self._load(held)
        self._answers([self._fleet.call(g, "abort") for g in held])
        self._manifest(held)
        lost, wanted = sorted(set(range(size)) - set(present)), plans.prefill.num_devices
        if wanted < size:       # the lost ones first, then the last
            leaving = (lost + held[::-1])[: size - wanted]
            self._keep([g for g in range(size) if g not in leaving])
            lost = [g for g, one in enumerate(self._ranks) if one.rank in lost]
        elif wanted > size:
            self._fit(wanted)
        return lost, max(s.step for s in states)

    def _manifest(self, ranks: Sequence[int]) -> None:
        """Fingerprints of everything these ranks hold; replicas must agree."""
        found = self._answers([self._fleet.call(g, "fingerprints") for g in ranks])
        for rank, read in zip(ranks, found, strict=True):
            for key, digest in read.items():
                if self.fingerprints.setdefault(key, digest) != digest:
                    raise LoadmasterError(
                        f"expert {key[1]} of layer {key[0]} on rank {rank} differs from another "
                        "rank's copy: stop the group and start it from the checkpoint"
                    )

    def _rehydrate(self, tables: Tables) -> None:
        """The ranks read what the tables give them and they lack; nothing wrong is admitted."""
        ranks = range(self._fleet.ranks)
        calls = [self._fleet.call(g, "hold", tables.experts_of(g)) for g in ranks]
        for rank, read in enumerate(self._answers(calls)):
            for (layer, expert), digest in read.items():
                known = self.fingerprints.setdefault((layer, expert), digest)
                if known != digest:
                    raise InputError(
                        f"expert {expert} of layer {layer} on rank {rank} differs from the one the "
                        "group started with: the checkpoint changed on disk, put it back"
                    )

    def _form(self, tables: Tables) -> None:
        """All ranks read what they lack, meet at a fresh port under the next generation, and adopt
        the tables."""
        self._rehydrate(tables)
        self._generation += 1
        generation = f"{self._generation}-{time.monotonic_ns()}"
        hosts = self._fleet.hosts()
        (port,) = self._answers([self._fleet.call(0, "host_meeting", hosts[0])])
        calls = [
            self._fleet.call(
                g, "meet", (hosts[0], host), port, generation, self._settings.step_timeout_s
            )
            for g, host in enumerate(hosts)
        ]
        self._answers(calls)
        self.all("forget_requests")
        self.all("commit", tables)
        self.all("evict")

    # ---- after a failure -------------------------------------------------------------------

    def recover(
        self, known_lost: Sequence[int], reason: str, plans: PhasePlans, epoch: int
    ) -> Recovered:
        """Replace the ranks that are lost; where none comes up, go on without them.

        Raises InfeasibleError when the survivors cannot hold every expert.
        """
        if self._resized is not None and plans.prefill.num_devices != self._fleet.ranks:
            plans, epoch = self._resized     # what failed got as far as that
            known_lost = ()                  # given in the old numbering
        lost = sorted({*known_lost, *silent_for_certain(self._fleet)})
        for rank in lost:
            self._fleet.kill(rank)
        survivors = [g for g in range(self._fleet.ranks) if g not in lost]
        self._fleet.failures([self._fleet.call(g, "leave") for g in survivors], _SETTLE_S)
        gone = [rank for rank in lost if not self._try_replace(rank)]
        if gone:
            return self._go_on_without(gone, reason, plans, epoch + 1)
        # What was staged serves only if it is part of the tables; the rest is thrown away.
        self._form(Tables.of(plans, epoch))
        return Recovered(reason, tuple(lost), (), plans, epoch)

    def _go_on_without(
        self, gone: list[int], reason: str, plans: PhasePlans, epoch: int
    ) -> Recovered:
        smaller = without_ranks(plans, gone, self._settings.most_slots)
        self._announce(epoch, smaller)
        self._resized = smaller, epoch
        self._keep([g for g in range(self._fleet.ranks) if g not in gone])
        self._form(Tables.of(smaller, epoch))
        return Recovered(reason, (), tuple(gone), smaller, epoch)

    def plans_for(
        self, ranks: int, plans: PhasePlans, target: PhasePlans | None
    ) -> PhasePlans:
        """The plans of a group of that many ranks: the target, or the active ones made to fit.

        Raises PlanError where they are not for so many, InfeasibleError where they do not fit.
        """
        if ranks < 1:
            raise PlanError(f"a group needs at least one rank, not {ranks}")
        if target is not None:
            if target.prefill.num_devices != ranks:
                raise PlanError(
                    f"the plan is for {target.prefill.num_devices} devices, not {ranks}"
                )
            return target
        left = list(range(ranks, self._fleet.ranks))
        if left:
            return without_ranks(plans, left, self._settings.most_slots)
        return with_more_ranks(plans, ranks)

    def resize(self, plans: PhasePlans, epoch: int) -> Recovered:
        """As many ranks as these plans have devices: the last ones leave, or new ones join.

        Raises PlanError where none can join: then all is as it was.
        """
        ranks, now = plans.prefill.num_devices, self._fleet.ranks
        self._fit(ranks)
        self._resized = plans, epoch
        self._form(Tables.of(plans, epoch))
        return Recovered("resized", (), tuple(range(ranks, now)), plans, epoch)

    def _fit(self, ranks: int) -> None:
        now = self._fleet.ranks
        self._ranks += self._join(range(now, ranks))
        if ranks < now:
            self._keep(list(range(ranks)))
        self._renumber()

    def _join(self, ranks: range) -> list[RankSettings]:
        """New ranks, started and loaded. Where one does not come up none stays, and all serve on.

        Raises PlanError then: it is the wish that failed, not a rank of the group.
        """
        joining = [
            dataclasses.replace(self._ranks[0], rank=rank, resume_recording=False)
            for rank in ranks
        ]
        try:
            for one in joining:
                self._fleet.add(one, self._settings.replace_timeout_s)
                self._load([one.rank])
        except LoadmasterError as error:
            self._fleet.keep(list(range(len(self._ranks))))
            raise PlanError(
                f"the group stays at {len(self._ranks)} ranks: {error}; make room in the cluster "
                "or ask for fewer"
            ) from error
        return joining

    def _keep(self, ranks: list[int]) -> None:
        self._fleet.keep(ranks)
        self._ranks = [self._ranks[g] for g in ranks]
        self._renumber()

    def _renumber(self) -> None:
        """Tell every rank its number, the group's size and its cluster."""
        size = len(self._ranks)
        first = self._ranks[0].cluster
        devices = tuple(
            first.devices[min(one.rank, first.num_devices - 1)] for one in self._ranks
        )
        nodes = sorted({d.node for d in devices})
        cluster = first.model_copy(
            update={
                "devices": tuple(
                    d.model_copy(update={"node": nodes.index(d.node)}) for d in devices
                )
            }
        )
        cluster = type(first).model_validate(cluster.model_dump())
        self._ranks = [
            dataclasses.replace(one, rank=g, ranks=size, cluster=cluster)
            for g, one in enumerate(self._ranks)
        ]
        self._answers([self._fleet.call(g, "renumber", one) for g, one in enumerate(self._ranks)])

    def _try_replace(self, rank: int) -> bool:
        self._ranks[rank] = dataclasses.replace(
            self._ranks[rank], resume_recording=self._ranks[rank].record_to is not None
        )
        try:
            self._fleet.replace(self._ranks[rank], self._settings.replace_timeout_s)
            self._load([rank])
        except RankLostError:
            return False
        return True


def without_ranks(plans: PhasePlans, lost: Sequence[int], most_slots: int | None) -> PhasePlans:
    """The plans on the surviving ranks, in their old order, with every expert covered.

    `placement/rebalancing/survivors.py` decides what goes where. most_slots: that a rank may use in
    a layer. Raises InfeasibleError, with the numbers, when the survivors cannot hold it.
    """
    decode = plan_without(plans.decode, lost, most_slots) if plans.apart else None
    return PhasePlans.both(plan_without(plans.prefill, lost, most_slots), decode)


def with_more_ranks(plans: PhasePlans, ranks: int) -> PhasePlans:
    """The same plans with empty ranks added at the end, up to `ranks`."""

    def grown(plan: Plan) -> Plan:
        layers, devices, width = plan.slots.shape
        slots = np.full((layers, ranks, width), EMPTY, np.int16)
        slots[:, :devices] = plan.slots
        return dataclasses.replace(
            plan, slots=slots, cluster_digest="", evidence=None,
            provenance=Provenance(method="grown"),
        )

    return PhasePlans.both(grown(plans.prefill), grown(plans.decode) if plans.apart else None)
