"""What the coordinator asks of a rank in one step, and what the rank answers.

Plain values that travel between processes. Knows nothing of how they are made or used.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...errors import LoadmasterError
from .phase_plans import Tables
from .transfers import Round

TokenArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ReplayedRouting:
    """Routing to use for one chunk instead of the model's own. [L, rows, K]."""

    ids_LTK: npt.NDArray[np.int64]
    gates_LTK: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Chunk:
    """The next rows of one request: a piece of its prompt, or the token it just produced."""

    request: int
    tokens: TokenArray
    start: int                    # position of the first of these rows in the request
    phase: int                    # traces.trace.PREFILL or DECODE
    domain: int = -1              # index of the request's domain; -1 = unknown
    wants_token: bool = False     # the last of these rows predicts a token to return
    replay: ReplayedRouting | None = None


@dataclass(frozen=True)
class StepWork:
    """One rank's part of one lock-step step; `chunks` is empty where the rank is idle."""

    step: int
    epoch: int
    phase: int = 0                    # whose tables the step runs under; see tables.PhasePlans
    chunks: tuple[Chunk, ...] = ()
    release: tuple[int, ...] = ()     # requests whose keys and values are not needed any more
    record: bool = False
    domain_names: tuple[str, ...] = ()
    digest: bool = False              # answer with a digest of each request's outputs so far
    all_logits: bool = False          # answer with the logits of every row (tests, parity)
    stage: tuple[Round, ...] = ()     # a switch's transfers in this step, for all ranks
    expected: dict[tuple[int, int], str] = field(default_factory=dict)  # fingerprints of arrivals
    commit: Tables | None = None      # switch to these tables before the step
    evict: bool = False              # after the step, drop experts that no active plan needs


@dataclass(frozen=True)
class StepResult:
    """What one rank did in one step."""

    rank: int
    step: int
    epoch: int
    next_token: dict[int, int] = field(default_factory=dict)      # by request
    digest: dict[int, str] = field(default_factory=dict)
    logits: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)  # [rows, V]
    own_ids: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)   # replay: [L, rows, K]
    rows: int = 0
    expert_cpu_us_L: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    tokens_L: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    remote_transfers_L: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    dropped_L: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    peak_L: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    staged: tuple[tuple[int, int], ...] = ()        # (layer, expert) that arrived whole and right
    corrupted: tuple[tuple[int, int], ...] = ()     # arrived wrong and were thrown away
    recording_trouble: str = ""       # what keeps recorded tokens from the disk
    stage_us: float = 0.0             # of wall_us, what moving experts and switching took
    cpu_us: float = 0.0               # of the whole process
    wall_us: float = 0.0


class ExchangeError(LoadmasterError):
    """A collective failed: a peer died, hangs, or left the group."""


class EpochMismatchError(LoadmasterError):
    """Ranks met in one exchange with different active plans; nothing was computed."""
