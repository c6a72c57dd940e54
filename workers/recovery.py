"""The ranks as a crew: muster it, find who is lost, replace or do without, stand again.

Knows settings, tables and a fleet. Knows nothing of requests, queues or plan switches. A rank is
admitted only after every expert it read matches the model's manifest of fingerprints.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, LoadmasterError
from ..placement.plan import PlanError
from .fleet import Fleet, RankLostError
from .membership import with_more_ranks, without_ranks
from .settings import GroupSettings, RankSettings
from .tables import PhasePlans, Tables

SIGN_OF_LIFE_S = 1.0
_SETTLE_S = 10.0

Fingerprints = dict[tuple[int, int], str]


@dataclass(frozen=True)
class Recovered:
    """How the group stands after a failure or a change of size."""

    reason: str
    replaced: tuple[int, ...]       # ranks that got a new process
    left: tuple[int, ...]           # ranks lost for good, in the old numbering
    plans: PhasePlans
    epoch: int
    noticed_at: float = 0.0         # time.time() when the failure was seen
    seconds: float = 0.0            # from then until the group stood again

    def timed(self, noticed_at: float) -> Recovered:
        """The same, with its times, now that the group stands."""
        return dataclasses.replace(
            self, noticed_at=noticed_at, seconds=time.time() - noticed_at
        )


class Crew:
    """The ranks of one group."""

    def __init__(self, settings: GroupSettings, fleet: Fleet) -> None:
        self._settings = settings
        self._fleet = fleet
        self._ranks: list[RankSettings] = list(settings.ranks)
        self._generation = 0
        self._shrunk: tuple[PhasePlans, int] | None = None    # what fewer ranks were to serve under
        self.fingerprints: Fingerprints = {}
        self.loaded: Any = None

    def all(self, method: str, *args: Any, **options: Any) -> list[Any]:
        """Call a method of every rank and wait."""
        answers = self._fleet.call_all(method, *args, **options)
        return self._fleet.gather(answers, self._settings.start_timeout_s)

    # ---- standing up -----------------------------------------------------------------------

    def muster(self, tables: Tables) -> None:
        """Start all ranks; each reads its experts; the group forms under the tables."""
        self._fleet.start(self._ranks, self._settings.start_timeout_s)
        self.loaded = self.all("load")[0]
        self._rehydrate(range(self._fleet.ranks), tables)
        self._form(tables)

    def take_over(self, tables: Tables) -> None:
        """Lead ranks that a coordinator before this one started, lost ones replaced."""
        states = self._fleet.attach(self._settings.start_timeout_s)
        present = {s.settings.rank: s.settings for s in states}
        size = states[0].settings.ranks if states else len(self._ranks)
        first = self._ranks[0]
        self._ranks = [
            present.get(g, dataclasses.replace(first, rank=g, ranks=size)) for g in range(size)
        ]
        lost = sorted(set(range(len(self._ranks))) - set(present))
        for rank in lost:
            self._replace(rank)
        self.loaded = self.all("load")[0]
        self.all("abort")
        self._manifest()
        self._rehydrate(range(self._fleet.ranks), tables)
        self._form(tables)

    def _manifest(self) -> None:
        """Fingerprints of everything the ranks hold; replicas must agree."""
        for rank, read in enumerate(self.all("fingerprints")):
            for key, digest in read.items():
                if self.fingerprints.setdefault(key, digest) != digest:
                    raise LoadmasterError(
                        f"expert {key[1]} of layer {key[0]} on rank {rank} differs from another "
                        "rank's copy: stop the group and start it from the checkpoint"
                    )

    def _rehydrate(self, ranks: Sequence[int] | range, tables: Tables) -> None:
        """These ranks read what the tables give them and they lack; nothing wrong is admitted."""
        answers = [self._fleet.call(g, "hold", tables.experts_of(g)) for g in ranks]
        for rank, read in zip(
            ranks, self._fleet.gather(answers, self._settings.start_timeout_s), strict=True
        ):
            for (layer, expert), digest in read.items():
                known = self.fingerprints.setdefault((layer, expert), digest)
                if known != digest:
                    raise InputError(
                        f"expert {expert} of layer {layer} on rank {rank} differs from the one the "
                        "group started with: the checkpoint changed on disk, put it back"
                    )

    def _form(self, tables: Tables) -> None:
        """All ranks meet at a fresh port under the next generation, and adopt the tables."""
        self._generation += 1
        generation = f"{self._generation}-{time.monotonic_ns()}"
        timeout_s = self._settings.start_timeout_s
        hosts = self._fleet.hosts()
        (port,) = self._fleet.gather(
            [self._fleet.call(0, "host_meeting", hosts[0])], timeout_s
        )
        answers = [
            self._fleet.call(
                g, "meet", (hosts[0], host), port, generation, self._settings.step_timeout_s
            )
            for g, host in enumerate(hosts)
        ]
        self._fleet.gather(answers, timeout_s)
        self.all("forget_requests")
        self.all("commit", tables)
        self.all("retire")

    # ---- after a failure -------------------------------------------------------------------

    def recover(
        self, known_lost: Sequence[int], reason: str, plans: PhasePlans, epoch: int
    ) -> Recovered:
        """Replace the ranks that are lost; where none comes up, go on without them.

        Raises InfeasibleError when the survivors cannot hold every expert.
        """
        if self._shrunk is not None and plans.prefill.num_devices != self._fleet.ranks:
            plans, epoch = self._shrunk      # the recovery before this one got as far as that
            known_lost = ()                  # said in the old numbering
        lost = sorted({*known_lost, *self._fleet.silent(SIGN_OF_LIFE_S)})
        for rank in lost:
            self._fleet.kill(rank)
        survivors = [g for g in range(self._fleet.ranks) if g not in lost]
        self._fleet.failures([self._fleet.call(g, "leave") for g in survivors], _SETTLE_S)
        gone = [rank for rank in lost if not self._try_replace(rank)]
        if gone:
            return self._go_on_without(gone, reason, plans, epoch + 1)
        # What was staged serves only if it is part of the tables; the rest is thrown away.
        tables = Tables.of(plans, epoch)
        self._rehydrate(range(self._fleet.ranks), tables)
        self._form(tables)
        return Recovered(reason, tuple(lost), (), plans, epoch)

    def _go_on_without(
        self, gone: list[int], reason: str, plans: PhasePlans, epoch: int
    ) -> Recovered:
        smaller = without_ranks(plans, gone, self._settings.most_slots)
        self._shrunk = smaller, epoch
        self._keep([g for g in range(self._fleet.ranks) if g not in gone])
        tables = Tables.of(smaller, epoch)
        self._rehydrate(range(self._fleet.ranks), tables)
        self._form(tables)
        return Recovered(reason, (), tuple(gone), smaller, epoch)

    def resize(
        self, ranks: int, plans: PhasePlans, target: PhasePlans | None, epoch: int
    ) -> Recovered:
        """Another number of ranks, at their own wish or for lack of them."""
        now = self._fleet.ranks
        if ranks < 1:
            raise PlanError(f"a group needs at least one rank, not {ranks}")
        if target is not None and target.prefill.num_devices != ranks:
            raise PlanError(f"the plan is for {target.prefill.num_devices} devices, not {ranks}")
        left: list[int] = list(range(ranks, now))
        if target is None and left:
            target = without_ranks(plans, left, self._settings.most_slots)
        if target is None:
            target = with_more_ranks(plans, ranks)
        self._ranks += self._join(range(now, ranks))
        if left:
            self._keep(list(range(ranks)))
        self._renumber()
        tables = Tables.of(target, epoch)
        self._rehydrate(range(ranks), tables)
        self._form(tables)
        return Recovered("resized", (), tuple(left), target, epoch)

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
                self._fleet.gather(
                    [self._fleet.call(one.rank, "load")], self._settings.start_timeout_s
                )
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
        """Tell every rank its number, the group's size and the cluster it stands in."""
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
        answers = [self._fleet.call(g, "renumber", one) for g, one in enumerate(self._ranks)]
        self._fleet.gather(answers, self._settings.start_timeout_s)

    def _try_replace(self, rank: int) -> bool:
        try:
            self._replace(rank)
        except RankLostError:
            return False
        return True

    def _replace(self, rank: int) -> None:
        self._ranks[rank] = dataclasses.replace(
            self._ranks[rank], resume_recording=self._ranks[rank].record_to is not None
        )
        self._fleet.replace(self._ranks[rank], self._settings.replace_timeout_s)
        self._fleet.gather(
            [self._fleet.call(rank, "load")], self._settings.start_timeout_s
        )
