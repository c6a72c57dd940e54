"""Ray's part: connecting, starting rank actors, calling them, noticing that one is gone.

Knows Ray actors, placement groups and their errors. Knows nothing of tokens, plans or experts.
Nothing here ever runs `ray stop`: only what this module started is ended, by handle or by pid.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from ...errors import LoadmasterError
from ...foundation.quiet import quiet_ray
from ...foundation.signals import hangups_held_back, terminations_kept
from ..protocol.settings import RankSettings
from .crossing import crossed
from .fleet import OverdueError, RankLostError
from .joining import require_cluster

# Ray declares few of its types.
ray: Any = importlib.import_module("ray")

NAMESPACE = "loadmaster"
LOOPBACK = "127.0.0.1"

# Ports are drawn before they are bound; on a busy machine someone else may be quicker.
_START_ATTEMPTS = 3


def connect(address: str | None = None, *, num_cpus: int | None = None) -> None:
    """Be connected to a Ray cluster: the one already joined, the one at `address`, or a new one
    on this machine that ends with this process.

    A new cluster listens on the loopback address and requires a token (Ray makes one, or takes
    RAY_AUTH_TOKEN). Raises UsageError for an address or a token that cannot be, and within seconds
    NothingAnswersError where no cluster is.
    """
    if ray.is_initialized():
        return
    quiet_ray()
    with terminations_kept():       # Ray has a handler of its own, which ends the process
        if address is None:
            with hangups_held_back():
                _start_here(num_cpus)
        else:
            _join(require_cluster(address))


def _start_here(num_cpus: int | None) -> None:
    for attempt in range(_START_ATTEMPTS):
        try:
            ray.init(
                address="local",     # else Ray joins whichever cluster this machine last started
                namespace=NAMESPACE,
                log_to_driver=False,
                num_cpus=num_cpus,
                include_dashboard=False,
                logging_level=logging.WARNING,
                _node_ip_address=LOOPBACK,
            )
            return
        except (OSError, RuntimeError, ValueError, RayError) as error:
            ray.shutdown()      # what came up of it
            if attempt == _START_ATTEMPTS - 1:
                raise crossed(error, "starting Ray on this machine") from error


def _join(address: str) -> None:
    """Join a cluster. Ray uses the token it finds only where it looks for the address itself."""
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = address
    try:
        ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False,
                 logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise crossed(error, f"joining the Ray cluster at {address}") from error
    finally:
        if before is None:
            os.environ.pop("RAY_ADDRESS", None)
        else:
            os.environ["RAY_ADDRESS"] = before


def cluster_address() -> str:
    """Where others can join the cluster that this process is connected to."""
    return str(ray.get_runtime_context().gcs_address)


class RankProcess:
    """What lives in a rank's process: the rank, and a probe that is answered while it works."""

    def __init__(self, settings: RankSettings) -> None:
        # Imports torch, which only the rank's own process needs.
        from ..rank.rank import Rank

        self._rank = Rank(settings)

    def run(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call a method of the rank. A GPU that failed answers its process no more: the process
        ends, and is replaced as if it had been killed."""
        torch: Any = importlib.import_module("torch")
        try:
            return getattr(self._rank, method)(*args, **options)
        except torch.OutOfMemoryError as error:
            raise LoadmasterError(
                f"rank {self._rank.settings.rank}: the GPU's memory is full "
                f"({str(error).splitlines()[0]}): use more ranks, or plans with fewer slots"
            ) from error
        except torch.AcceleratorError:
            traceback.print_exc()
            os._exit(1)

    def ping(self) -> tuple[int, str, str]:
        """(process id, node, address)."""
        context = ray.get_runtime_context()
        return os.getpid(), context.get_node_id(), ray.util.get_node_ip_address()


@dataclass(frozen=True)
class Place:
    """One bundle of one of the group's placement groups: resources of one rank."""

    bundles: Any          # the placement group
    group: int            # its number among the group's
    bundle: int


@dataclass
class RankActor:
    """One rank as the fleet sees it."""

    handle: Any           # None: known to be gone
    place: Place | None
    pid: int = 0
    node: str = ""
    host: str = ""


class RayFleet:
    """The rank actors of one group: start, call, watch, replace, end."""

    def __init__(self, group: str, cpus_per_rank: float | None, gpus_per_rank: float) -> None:
        """cpus_per_rank: None shares the cluster's free CPUs among the ranks."""
        self._group = group
        self._cpus, self._gpus = cpus_per_rank, gpus_per_rank
        self._actors: list[RankActor] = []
        self._bundles: dict[int, Any] = {}      # placement groups by number
        self._free: list[Place] = []            # bundles of ranks that left
        self._serial = 0

    @property
    def ranks(self) -> int:
        return len(self._actors)

    @property
    def pids(self) -> list[int]:
        return [a.pid for a in self._actors]

    # ---- starting --------------------------------------------------------------------------

    def start(self, settings: Sequence[RankSettings], timeout_s: float) -> None:
        """One actor per rank, one rank per bundle."""
        places = self._reserve(len(settings), timeout_s)
        self._actors = [self._create(*one) for one in zip(settings, places, strict=True)]
        for actor in self._actors:
            self._identify(actor, timeout_s)

    def attach(self, timeout_s: float) -> list[Any]:
        """Find the ranks of a coordinator that died, by name; those that are gone are left out.

        Their names say which bundles they sit in; the other bundles are free.
        """
        self._bundles = _bundles_of(self._group)
        self._free = [
            Place(bundles, number, bundle)
            for number, bundles in self._bundles.items()
            for bundle in range(bundles.bundle_count)
        ]
        states: list[Any] = []
        for name in _actor_names(self._group):
            serial, number, bundle = (int(x) for x in name.rsplit("-", 1)[1].split("."))
            self._serial = max(self._serial, serial + 1)
            try:
                handle = ray.get_actor(name, namespace=NAMESPACE)
                state = ray.get(handle.run.remote("state", (), {}), timeout=timeout_s)
            except (ValueError, RayActorError, GetTimeoutError):
                continue
            place = Place(self._bundles[number], number, bundle)
            self._free.remove(place)
            states.append((state, RankActor(handle, place)))
        ranks = states[0][0].settings.ranks if states else 0
        self._actors = [RankActor(None, None) for _ in range(ranks)]
        for state, actor in states:
            self._identify(actor, timeout_s)
            self._actors[state.settings.rank] = actor
        return [state for state, _ in states]

    def replace(self, settings: RankSettings, timeout_s: float) -> None:
        old = self._actors[settings.rank].place
        place = self._room(settings.rank, timeout_s) if old is None else old
        self._actors[settings.rank] = self._bring_up(settings, place, timeout_s)

    def add(self, settings: RankSettings, timeout_s: float) -> None:
        place = self._room(settings.rank, timeout_s)
        self._actors.append(self._bring_up(settings, place, timeout_s))

    def _room(self, rank: int, timeout_s: float) -> Place:
        """A bundle that is free (Ray may have moved it to a new node), or a new one."""
        if self._free:
            return self._free.pop(0)
        try:
            return self._reserve(1, timeout_s)[0]
        except LoadmasterError as error:
            raise RankLostError((rank,), str(error)) from error

    def _reserve(self, ranks: int, timeout_s: float) -> list[Place]:
        cpus = self._cpus
        if cpus is None:
            free = ray.available_resources().get("CPU", 1.0)
            cpus = min(1.0, int(100 * free / ranks) / 100)
            self._cpus = cpus
        bundle = {"CPU": cpus} | ({"GPU": self._gpus} if self._gpus else {})
        bundles = placement_group(
            [bundle] * ranks,
            strategy="PACK",
            lifetime="detached",
            name=f"{NAMESPACE}/{self._group}/{len(self._bundles)}",
        )
        if not bundles.wait(timeout_s):
            remove_placement_group(bundles)
            raise LoadmasterError(
                f"the cluster has no room for {ranks} ranks of {bundle}: free are "
                f"{ray.available_resources()}; ask for less per rank or fewer ranks"
            )
        number = len(self._bundles)
        self._bundles[number] = bundles
        return [Place(bundles, number, index) for index in range(ranks)]

    def _create(self, settings: RankSettings, place: Place) -> RankActor:
        remote_rank: Any = ray.remote(concurrency_groups={"watch": 1})(RankProcess)
        name = f"{self._group}/rank-{self._serial}.{place.group}.{place.bundle}"
        self._serial += 1
        handle = remote_rank.options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                place.bundles, placement_group_bundle_index=place.bundle
            ),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}},
        ).remote(settings)
        return RankActor(handle, place)

    def _bring_up(self, settings: RankSettings, place: Place, timeout_s: float) -> RankActor:
        actor = self._create(settings, place)
        try:
            self._identify(actor, timeout_s)
        except (OverdueError, RankLostError) as error:
            ray.kill(actor.handle, no_restart=True)
            self._free.append(place)
            raise RankLostError(
                (settings.rank,), f"no new process for rank {settings.rank}: {error}"
            ) from error
        return actor

    def _identify(self, actor: RankActor, timeout_s: float) -> None:
        ((actor.pid, actor.node, actor.host),) = self.gather([self._ping(actor)], timeout_s)

    # ---- calling ---------------------------------------------------------------------------

    def hosts(self) -> list[str]:
        """The loopback address when one node holds all ranks."""
        if len({a.node for a in self._actors}) == 1:
            return [LOOPBACK] * self.ranks
        return [a.host for a in self._actors]

    def call(self, rank: int, method: str, *args: Any, **options: Any) -> Any:
        return self._actors[rank].handle.run.remote(method, args, options)

    def gather(self, answers: list[Any], timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        waiting = list(answers)
        while waiting:
            ready, waiting = ray.wait(
                waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic())
            )
            if not ready:
                raise OverdueError(f"no answer within {timeout_s:.1f} s")
            _fetch(ready[0])
        results: list[Any] = ray.get(answers)
        return results

    def failures(self, answers: list[Any], timeout_s: float) -> list[Exception]:
        ended, _ = ray.wait(answers, num_returns=len(answers), timeout=timeout_s)
        raised: list[Exception] = []
        for answer in ended:
            try:
                _fetch(answer)
            except LoadmasterError as error:
                raised.append(error)
        return raised

    # ---- watching and ending ---------------------------------------------------------------

    def silent(self, timeout_s: float) -> dict[int, str]:
        answers = [self._ping(actor) for actor in self._actors]
        ray.wait(answers, num_returns=len(answers), timeout=timeout_s)
        silent = {}
        for rank, answer in enumerate(answers):
            try:
                ray.get(answer, timeout=0)
            except GetTimeoutError:
                silent[rank] = f"no sign of life for {timeout_s:.1f} s"
            except RayActorError as error:
                silent[rank] = f"its process died: {str(error).splitlines()[0]}"
        return silent

    def kill(self, rank: int) -> None:
        """By signal: a stopped process reads no messages."""
        actor = self._actors[rank]
        if actor.handle is None:
            return
        end: Any = ray.remote(_end_process)
        here = ray.get_runtime_context().get_node_id()
        if actor.node == here:
            _end_process(actor.pid)
        else:
            there = NodeAffinitySchedulingStrategy(actor.node, soft=False)
            ray.wait(
                [end.options(num_cpus=0, scheduling_strategy=there).remote(actor.pid)], timeout=5.0
            )
        ray.kill(actor.handle, no_restart=True)

    def keep(self, ranks: Sequence[int]) -> None:
        for rank, actor in enumerate(self._actors):
            if rank in ranks:
                continue
            if actor.handle is not None:
                ray.kill(actor.handle, no_restart=True)
            if actor.place is not None and actor.place not in self._free:
                self._free.append(actor.place)
        self._actors = [self._actors[g] for g in ranks]

    def end(self) -> None:
        """Every rank and every bundle of this group; nothing else is touched."""
        for actor in self._actors:
            if actor.handle is not None:
                ray.kill(actor.handle, no_restart=True)
        self._actors = []
        for bundles in self._bundles.values():
            remove_placement_group(bundles)
        self._bundles, self._free = {}, []

    @staticmethod
    def _ping(actor: RankActor) -> Any:
        return actor.handle.ping.options(concurrency_group="watch").remote()


def end_group(name: str) -> None:
    """End whatever of a group is left: ranks, bundles, coordinator. Nothing else is touched."""
    for actor_name in [*_actor_names(name), name]:
        try:
            handle = ray.get_actor(actor_name, namespace=NAMESPACE)
        except ValueError:
            continue
        ray.kill(handle, no_restart=True)
    for bundles in _bundles_of(name).values():
        remove_placement_group(bundles)


def _fetch(answer: Any) -> None:
    try:
        ray.get(answer, timeout=0)
    except RayActorError as error:
        reason = str(error).splitlines()[0]
        raise RankLostError((), f"a rank's process died: {reason}") from error
    except GetTimeoutError as error:
        raise RankLostError((), "an answer was announced but never came") from error
    except RayError as error:
        raise crossed(error, "a rank") from error


def _end_process(pid: int) -> None:
    """SIGKILL a rank's process, if the pid is still one: pids are used again."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            ours = b"RankProcess" in file.read()
    except OSError:
        return
    if ours:
        os.kill(pid, signal.SIGKILL)


def _actor_names(group: str) -> list[str]:
    """Names of a group's live rank actors."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    names = [a["name"] for a in listed if a["namespace"] == NAMESPACE]
    return sorted(n for n in names if n.startswith(f"{group}/rank-"))


def _bundles_of(group: str) -> dict[int, Any]:
    """A group's placement groups by number, found by name."""
    table: dict[str, Any] = ray.util.placement_group_table()
    prefix = f"{NAMESPACE}/{group}/"
    names = [
        e["name"] for e in table.values()
        if e["name"].startswith(prefix) and e["state"] != "REMOVED"
    ]
    return {int(name[len(prefix) :]): ray.util.get_placement_group(name) for name in names}
