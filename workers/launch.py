"""Ray's part: connecting, starting rank actors, calling them, noticing that one is gone.

Knows Ray actors, placement groups and their errors. Knows nothing of tokens, plans or experts.
Nothing here ever runs `ray stop`: only what this module started is ended, by handle or by pid.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..errors import LoadmasterError, UsageError
from .fleet import RankLostError
from .settings import RankSettings

# Ray declares few of its types.
ray: Any = importlib.import_module("ray")

NAMESPACE = "loadmaster"
LOOPBACK = "127.0.0.1"


def connect(address: str | None = None, *, num_cpus: int | None = None) -> None:
    """Be connected to a Ray cluster: the one already joined, the one at `address`, or a new one
    on this machine that ends with this process.

    A new cluster listens on the loopback address and asks for a token (Ray makes one, or takes
    RAY_AUTH_TOKEN). Raises UsageError for another machine's address without token authentication.
    """
    if ray.is_initialized():
        return
    if address is not None and not _on_this_machine(address):
        mode = os.environ.get("RAY_AUTH_MODE", "disabled")
        if mode != "token":
            raise UsageError(
                f"{address}: RAY_AUTH_MODE is {mode!r}: another machine's cluster is used with "
                "token authentication only; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            )
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False}
    if address is None:
        options |= {
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "_node_ip_address": LOOPBACK,
        }
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "on this machine" if address is None else f"at {address}"
        raise LoadmasterError(f"no Ray cluster {where}: {str(error).splitlines()[0]}") from error


def _on_this_machine(address: str) -> bool:
    host = address.rsplit("://", 1)[-1].rsplit(":", 1)[0]
    return host in ("auto", "local", "localhost", LOOPBACK, "[::1]")


def _identity(rank: Any) -> tuple[int, str, str]:
    """(process id, node, address), asked inside an actor."""
    return os.getpid(), ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()


class RankProcess:
    """What lives in a rank's process: the rank, and a voice that answers while it works."""

    def __init__(self, settings: RankSettings) -> None:
        # Imports torch, which only the rank's own process needs.
        from .rank import Rank

        self._rank = Rank(settings)

    def run(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call a method of the rank."""
        return getattr(self._rank, method)(*args, **options)

    def ping(self) -> int:
        """The process id."""
        return os.getpid()


@dataclass
class RankActor:
    """One rank as the fleet sees it."""

    handle: Any
    pid: int
    node: str
    host: str


class RayFleet:
    """The rank actors of one group: start, call, watch, end."""

    def __init__(self, name: str, cpus_per_rank: float | None, gpus_per_rank: float) -> None:
        """cpus_per_rank: None shares the cluster's free CPUs among the ranks."""
        self._name = name
        self._cpus, self._gpus = cpus_per_rank, gpus_per_rank
        self._actors: dict[int, RankActor] = {}
        self._bundles: Any = None

    @property
    def ranks(self) -> int:
        return len(self._actors)

    @property
    def pids(self) -> list[int]:
        """Process ids in rank order."""
        return [self._actors[g].pid for g in sorted(self._actors)]

    def start(self, settings: Sequence[RankSettings], timeout_s: float = 120.0) -> None:
        """Start one actor per rank, one per bundle, and wait until all answer."""
        cpus = self._cpus
        if cpus is None:
            free = ray.available_resources().get("CPU", 1.0)
            cpus = min(1.0, int(100 * free / len(settings)) / 100)
        bundle = {"CPU": cpus} | ({"GPU": self._gpus} if self._gpus else {})
        self._bundles = placement_group(
            [bundle] * len(settings), strategy="PACK", lifetime="detached"
        )
        if not self._bundles.wait(timeout_s):
            remove_placement_group(self._bundles)
            raise LoadmasterError(
                f"the cluster has no room for {len(settings)} ranks of {bundle}: it offers "
                f"{ray.available_resources()}; ask for less per rank or fewer ranks"
            )
        for index, one in enumerate(settings):
            self._actors[one.rank] = RankActor(self._create(one, index, bundle), 0, "", "")
        for g in list(self._actors):
            self._identify(g, timeout_s)

    def _create(self, settings: RankSettings, bundle_index: int, bundle: dict[str, float]) -> Any:
        remote_rank = ray.remote(concurrency_groups={"watch": 1})(RankProcess)
        return remote_rank.options(
            name=f"{self._name}/rank-{settings.rank}",
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._bundles, placement_group_bundle_index=bundle_index
            ),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}},
        ).remote(settings)

    def _identify(self, rank: int, timeout_s: float) -> None:
        actor = self._actors[rank]
        answer = actor.handle.__ray_call__.remote(_identity)
        ((actor.pid, actor.node, actor.host),) = self.gather([answer], timeout_s)

    def hosts(self) -> list[str]:
        """Each rank's address for the exchange; the loopback address when one node holds all."""
        actors = [self._actors[g] for g in sorted(self._actors)]
        if len({a.node for a in actors}) == 1:
            return [LOOPBACK] * len(actors)
        return [a.host for a in actors]

    def call(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Start a method on one rank; the answer is fetched with `gather`."""
        return self._actors[rank].handle.run.remote(method, args, kwargs)

    def ping(self, rank: int) -> Any:
        """Ask a rank's process for a sign of life; it answers while a step runs."""
        return self._actors[rank].handle.ping.options(concurrency_group="watch").remote()

    def call_all(self, method: str, *args: Any) -> list[Any]:
        """Start a method with the same arguments on every rank, in rank order."""
        return [self.call(g, method, *args) for g in sorted(self._actors)]

    def gather(self, answers: list[Any], timeout_s: float) -> list[Any]:
        """All answers in order. The first failure is raised at once, without waiting for others.

        Raises RankLostError when an actor died or did not answer in time; an error raised inside a
        rank's method comes out as it went in.
        """
        deadline = time.monotonic() + timeout_s
        waiting = list(answers)
        while waiting:
            ready, waiting = ray.wait(
                waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic())
            )
            if not ready:
                raise RankLostError((), f"no answer within {timeout_s:.1f} s")
            self._fetch(ready[0])
        return ray.get(answers)  # type: ignore[no-any-return]

    @staticmethod
    def _fetch(answer: Any) -> None:
        try:
            ray.get(answer, timeout=0)
        except RayActorError as error:
            reason = str(error).splitlines()[0]
            raise RankLostError((), f"a rank's process died: {reason}") from error
        except GetTimeoutError as error:
            raise RankLostError((), "an answer was announced but never came") from error
        except RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, LoadmasterError) else error from None

    def end(self) -> None:
        """End every rank and give back the bundles. Nothing else is touched."""
        for actor in self._actors.values():
            ray.kill(actor.handle, no_restart=True)
        self._actors.clear()
        if self._bundles is not None:
            remove_placement_group(self._bundles)
            self._bundles = None
