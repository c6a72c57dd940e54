"""The line to a group's coordinator: asking, waiting through its death, streaming one request.

Knows Ray's errors and the coordinator's methods by name. Knows nothing of what they do. A request
that a dead coordinator took with it is sent again from its prompt; tokens already given out must
come again, or the stream fails.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from ...errors import LoadmasterError
from ..coordinator.request_registry import RequestState, UnknownRequestError
from ..fleet.crossing import crossed
from ..protocol.step_messages import ReplayedRouting

# Ray declares few of its types.
ray: Any = importlib.import_module("ray")

COMEBACK_S = 180.0
_WAIT_S = 10.0


class CoordinatorLostError(LoadmasterError):
    """The coordinator died with this call; what it had begun, its successor finishes or undoes."""


class CoordinatorGoneError(CoordinatorLostError):
    """The coordinator is dead and none will follow it: the group was stopped or killed."""


class Connection:
    """Calls one group's coordinator; its errors come out as they went in."""

    def __init__(self, group: str, actor: Any) -> None:
        self._group, self._actor = group, actor

    def ask(self, method: str, *args: Any, **options: Any) -> Any:
        """Call once. Raises CoordinatorLostError when it dies meanwhile, CoordinatorGoneError
        when there is none and none will come."""
        try:
            return ray.get(getattr(self._actor, method).remote(*args, **options))
        except RayTaskError as error:
            raise self._cause(method, error) from error
        except RayActorError as error:
            raise self._lost(error) from error
        except RayError as error:
            raise crossed(error, self._name) from error

    @property
    def _name(self) -> str:
        return f"the coordinator of group {self._group!r}"

    def _cause(self, method: str, error: RayTaskError) -> LoadmasterError:
        """What went wrong there, as its caller should see it."""
        if isinstance(error.cause, TimeoutError):
            return LoadmasterError(
                f"group {self._group!r} did not get to {method!r} in the time it gives it: what "
                "was asked may still happen", call="`Group.status` shows the state of the group",
                command="ask again; `loadmaster apply PLAN --dry-run` shows what is current",
            )
        return crossed(error, self._name)

    def _lost(self, error: RayActorError) -> CoordinatorLostError:
        if isinstance(error, ActorDiedError) and error.actor_init_failed:
            return CoordinatorGoneError(crossed(error, self._name).what)
        if isinstance(error, ActorDiedError):
            return CoordinatorGoneError(
                f"{self._name} is dead and will not come back: the "
                f"group was stopped or killed ({str(error).splitlines()[0]})"
            )
        return CoordinatorLostError(f"{self._name} died: {str(error).splitlines()[0]}")

    def ask_again(self, method: str, *args: Any, **options: Any) -> Any:
        """Call something that changes nothing, again if the coordinator dies, until it is back."""
        deadline = time.monotonic() + COMEBACK_S
        while True:
            try:
                return self.ask(method, *args, **options)
            except CoordinatorGoneError:
                raise
            except CoordinatorLostError:
                if time.monotonic() > deadline:
                    raise
                self._await_comeback(deadline)

    def _await_comeback(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            try:
                ray.get(self._actor.status.remote(), timeout=5.0)
                return
            except ActorDiedError as error:
                raise self._lost(error) from error
            except (RayActorError, GetTimeoutError):
                time.sleep(0.5)
            except RayError as error:
                raise crossed(error, self._name) from error


@dataclass(frozen=True)
class Order:
    """A request as its sender keeps it, to send it again if need be."""

    prompt: Any
    max_new_tokens: int
    domain: str | None = None
    stop_tokens: tuple[int, ...] = ()
    replay: ReplayedRouting | None = None


def send(line: Connection, orders: Sequence[Order]) -> list[int]:
    """Submit orders that agree on all but prompt, domain and replay; their numbers."""
    first = orders[0]
    domains = None if first.domain is None else [o.domain for o in orders]
    replays = None if first.replay is None else [o.replay for o in orders]
    numbers: list[int] = line.ask_again(
        "submit", [o.prompt for o in orders], first.max_new_tokens, domains,
        list(first.stop_tokens), replays,
    )
    return numbers


def run(line: Connection, orders: Sequence[Order]) -> list[RequestState]:
    """Send orders and wait for all. A request that failed raises LoadmasterError."""
    if not orders:
        return []
    numbers = send(line, orders)
    while True:
        try:
            states: list[RequestState] = line.ask_again("wait_all", numbers, _WAIT_S)
        except UnknownRequestError:
            numbers = send(line, orders)
            continue
        if all(s.done for s in states):
            break
    for state in states:
        if state.error:
            line.ask_again("forget", numbers)
            raise LoadmasterError(state.error)
    return states


class Stream:
    """One request's tokens as they come. Iterate, or ask for the `result`."""

    def __init__(self, line: Connection, order: Order) -> None:
        self._line, self._order = line, order
        (self.number,) = send(line, [order])
        self.retries = 0
        self._given: list[int] = []     # tokens handed to the reader
        self._seen = 0                  # tokens of the request under its present number

    def __iter__(self) -> Iterator[int]:
        while True:
            state = self._news()
            for token in state.tokens:
                if self._check(token):
                    yield token
            if state.error:
                raise LoadmasterError(state.error)
            if state.done:
                break
        self._line.ask_again("forget", [self.number])

    def result(self) -> list[int]:
        """All tokens, once the request is done."""
        for _ in self:
            pass
        return list(self._given)

    def _news(self) -> RequestState:
        while True:
            try:
                states = self._line.ask_again("wait", {self.number: self._seen}, _WAIT_S)
                state: RequestState = states[0]
                self.retries = max(self.retries, state.retries)
                return state
            except UnknownRequestError:
                (self.number,) = send(self._line, [self._order])
                self._seen = 0
                self.retries += 1

    def _check(self, token: int) -> bool:
        """Whether the token is new to the reader; raises when it contradicts what was given."""
        position = self._seen
        self._seen += 1
        if position == len(self._given):
            self._given.append(token)
            return True
        if self._given[position] != token:
            raise LoadmasterError(
                f"request {self.number}: sent again, token {position} came out as {token}, given "
                f"out was {self._given[position]}; stopped"
            )
        return False
