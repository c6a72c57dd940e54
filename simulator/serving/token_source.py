"""Which recorded tokens stand for the tokens of a simulated request.

Every request reads its own stretch of the trace, from tokens of its domain and phase, in recorded
order: neighbours in a request stay neighbours, so steps mix as a server's do. The draw depends on
the seed and the request alone, so every plan sees the same routing. Knows nothing of plans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...foundation.arrays import IntArray
from ...traces.trace import DECODE, PREFILL, RoutingTrace
from ..random_streams import stream
from .workload import Workload


@dataclass(frozen=True, eq=False)
class _Stream:
    """Tokens of one domain and phase, request after request, read as a ring."""

    token: IntArray
    request_start: IntArray    # where each recorded request begins in `token`
    request_id: IntArray       # which one it is

    def start_of(self, request_id: int, fallback: float) -> int:
        """Where a recorded request begins; a drawn other one where this stream lacks it."""
        at = int(np.searchsorted(self.request_id, request_id))
        if at < len(self.request_id) and self.request_id[at] == request_id:
            return int(self.request_start[at])
        return int(self.request_start[int(fallback * len(self.request_start))])


class TokenSource:
    """The trace tokens of every request of a workload.

    Where the trace recorded phases, prompts read prefill tokens and answers decode tokens;
    otherwise an answer reads on where the prompt stopped. A trace with one phase only serves both.
    Raises InputError when the trace lacks a domain of the workload.
    """

    def __init__(self, trace: RoutingTrace, workload: Workload, *, seed: int) -> None:
        self.notes: list[str] = []
        domain_R = _trace_domains(trace, workload)
        by_phase = self._phases(trace)
        rng = stream(seed, "routing")
        pick_R, fallback_R = rng.random(len(workload)), rng.random(len(workload))
        self.streams: list[_Stream] = []
        index: dict[tuple[int, int], int] = {}
        for domain in np.unique(domain_R).tolist():
            for phase, chosen in enumerate(by_phase):
                index[domain, phase] = len(self.streams)
                self.streams.append(_stream(trace, domain, chosen))
        self.stream_PR = np.empty((2, len(workload)), np.int64)
        self.start_PR = np.empty((2, len(workload)), np.int64)
        for r, domain in enumerate(domain_R.tolist()):
            first, second = index[domain, 0], index[domain, 1]
            prompts = self.streams[first]
            chosen_request = int(pick_R[r] * len(prompts.request_id))
            self.stream_PR[:, r] = first, second
            self.start_PR[0, r] = prompts.request_start[chosen_request]
            self.start_PR[1, r] = (
                self.start_PR[0, r] + workload.prompt_tokens[r]
                if self.continues
                else self.streams[second].start_of(
                    int(prompts.request_id[chosen_request]), fallback_R[r]
                )
            )

    def _phases(self, trace: RoutingTrace) -> list[npt.NDArray[np.bool_]]:
        """[prefill, decode] masks over the trace's tokens."""
        everything = np.ones(trace.num_tokens, bool)
        self.continues = True
        if trace.phase is None:
            self.notes.append(
                "the trace recorded no phase: prompts and answers are read in the same way"
            )
            return [everything, everything]
        prefill, decode = trace.phase == PREFILL, trace.phase == DECODE
        if not prefill.any() or not decode.any():
            only = "decode" if decode.any() else "prefill"
            self.notes.append(f"the trace holds {only} tokens only: they stand for both phases")
            return [everything, everything]
        self.continues = False
        return [prefill, decode]

    def prompt(self, request: int, first: int, count: int) -> IntArray:
        """Trace tokens of `count` prompt tokens from `first` on."""
        return self._read(0, request, first, count)

    def answers(self, requests: IntArray, written: IntArray) -> IntArray:
        """The trace token of the next answer token of each request, `written` so far."""
        tokens = np.empty(len(requests), np.int64)
        streams = self.stream_PR[1, requests]
        at = self.start_PR[1, requests] + written
        for s in np.unique(streams).tolist():
            mine = streams == s
            ring = self.streams[s].token
            tokens[mine] = ring[at[mine] % len(ring)]
        return tokens

    def _read(self, phase: int, request: int, first: int, count: int) -> IntArray:
        ring = self.streams[int(self.stream_PR[phase, request])].token
        at = int(self.start_PR[phase, request]) + first + np.arange(count)
        read: IntArray = ring[at % len(ring)]
        return read


def _trace_domains(trace: RoutingTrace, workload: Workload) -> IntArray:
    """[R] the trace's index of each request's domain; -1 = any."""
    if workload.domain is None:
        return np.full(len(workload), -1, np.int64)
    if trace.domain is None:
        raise InputError("workload.domain names domains, the trace recorded none")
    index = {name: i for i, name in enumerate(trace.domain_names)}
    used = np.unique(workload.domain)
    missing = [n for n in (workload.domain_names[i] for i in used) if n not in index]
    if missing:
        raise InputError(
            f"workload.domain {missing[0]!r} is not in the trace; it holds: "
            f"{', '.join(trace.domain_names)}"
        )
    of_name = np.array([index.get(n, -1) for n in workload.domain_names], np.int64)
    chosen: IntArray = of_name[workload.domain]
    return chosen


def _stream(trace: RoutingTrace, domain: int, chosen: npt.NDArray[np.bool_]) -> _Stream:
    if domain >= 0 and trace.domain is not None:
        name = trace.domain_names[domain]
        chosen = chosen & (trace.domain == domain)
        if not chosen.any():
            raise InputError(f"the trace holds no token of domain {name!r} in a phase it serves")
    token = np.flatnonzero(chosen)
    request = trace.request_T()[token]
    token = token[np.argsort(request, kind="stable")]
    request_id, start = np.unique(trace.request_T()[token], return_index=True)
    return _Stream(token, start.astype(np.int64), request_id.astype(np.int64))
