"""RoutingTrace: which logical experts every token chose, and what is known of the token.

Knows tokens, layers, requests, domains. Knows nothing of devices, plans or files.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..foundation.arrays import BoolArray

PREFILL, DECODE = 0, 1
PHASES = ("prefill", "decode")

IntArray = npt.NDArray[np.integer[Any]]

# Beyond so many, numbers without names are taken for something else than domains.
MOST_UNNAMED_DOMAINS = 65_536
# What a column may hold, where that is less than its dtype can.
_RANGE = {"phase": (PREFILL, DECODE), "source": (0, 2**31 - 1), "domain": (0, 2**31 - 1)}

PER_TOKEN = ("gates", "k_of_token", "step", "request", "source", "phase", "domain")


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Recorded routing. Axes: T tokens, L MoE layers, K experts per token, E experts per layer.

    ids [T, L, K] uint8 or uint16, logical experts. Where a router picks fewer than K,
    `k_of_token [T, L]` says how many of the K count; the rest are ignored.
    All per-token columns are None where the source did not record them.
    """

    ids: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    num_experts: int
    gates: npt.NDArray[np.float16] | None = None      # [T, L, K]
    k_of_token: npt.NDArray[np.uint8] | None = None   # [T, L]
    step: npt.NDArray[np.int64] | None = None         # [T]
    request: npt.NDArray[np.int64] | None = None      # [T]
    source: npt.NDArray[np.int32] | None = None       # [T] home rank
    phase: npt.NDArray[np.uint8] | None = None        # [T] PREFILL or DECODE
    domain: npt.NDArray[np.int32] | None = None       # [T] index into domain_names
    domain_names: tuple[str, ...] = ()
    layer_indices: tuple[int, ...] = ()               # [L] the model's own layer numbers
    model_name: str = ""

    @classmethod
    def from_arrays(
        cls,
        ids: npt.ArrayLike,
        *,
        num_experts: int,
        gates: npt.ArrayLike | None = None,
        k_of_token: npt.ArrayLike | None = None,
        step: npt.ArrayLike | None = None,
        request: npt.ArrayLike | None = None,
        source: npt.ArrayLike | None = None,
        phase: npt.ArrayLike | None = None,
        domain: npt.ArrayLike | None = None,
        domain_names: Sequence[str] = (),
        layer_indices: Sequence[int] = (),
        model_name: str = "",
    ) -> Self:
        """Check everything once and build a trace.

        ids: integers [T, L, K] in [0, num_experts), one row per token, no expert twice in a
        token's choice of a layer (checked where foreign files are read, `formats/routes.py`).
        `domain` may be indices into `domain_names`, or strings.
        Raises InputError naming the column and the first bad place.
        """
        ids_TLK = _checked_ids(ids, num_experts, k_of_token)
        tokens, layers, _ = ids_TLK.shape
        names = tuple(str(n) for n in domain_names)
        if domain is not None and np.asarray(domain).dtype.kind in "UO":
            unique, domain = np.unique(np.asarray(domain).astype(str), return_inverse=True)
            names = tuple(str(n) for n in unique)
        columns = {
            "gates": _column("gates", gates, np.float16, ids_TLK.shape),
            "k_of_token": _column("k_of_token", k_of_token, np.uint8, (tokens, layers)),
            "step": _column("step", step, np.int64, (tokens,)),
            "request": _column("request", request, np.int64, (tokens,)),
            "source": _column("source", source, np.int32, (tokens,)),
            "phase": _column("phase", phase, np.uint8, (tokens,)),
            "domain": _column("domain", domain, np.int32, (tokens,)),
        }
        own_layers = _layer_numbers(layer_indices, layers)
        columns_ok = columns["domain"]
        if columns_ok is not None and columns_ok.size:
            top = int(columns_ok.max())
            if not names and 0 <= top < MOST_UNNAMED_DOMAINS:
                names = tuple(f"domain-{i}" for i in range(top + 1))
            if columns_ok.min() < 0 or top >= len(names):
                raise InputError(
                    f"domain {top} has no name among {len(names)} domain_names: name them all"
                )
        return cls(
            ids=ids_TLK,
            num_experts=int(num_experts),
            domain_names=names,
            layer_indices=own_layers or tuple(range(layers)),
            model_name=model_name,
            **columns,
        )

    # ---- shape ----------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        return int(self.ids.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.ids.shape[2])

    # ---- counting -------------------------------------------------------------------------

    def load_LE(self, tokens: IntArray | None = None) -> npt.NDArray[np.int64]:
        """[L, E] assignments per expert, of all tokens or of those indexed by `tokens`."""
        ids = self.ids if tokens is None else self.ids[tokens]
        valid = self.valid_TLK(tokens)
        load = np.empty((self.num_layers, self.num_experts), np.int64)
        for layer in range(self.num_layers):
            chosen = ids[:, layer] if valid is None else ids[:, layer][valid[:, layer]]
            load[layer] = np.bincount(chosen.reshape(-1), minlength=self.num_experts)
        return load

    def valid_TLK(self, tokens: IntArray | None = None) -> BoolArray | None:
        """[T, L, K] which choices count; None when all do."""
        if self.k_of_token is None:
            return None
        k_TL = self.k_of_token if tokens is None else self.k_of_token[tokens]
        valid: BoolArray = np.arange(self.top_k) < k_TL[:, :, None]
        return valid

    def home_rank_T(self, num_devices: int) -> npt.NDArray[np.int32]:
        """[T] the rank a token starts from: recorded `source`, else request mod G.

        Without requests, blocks of 256 tokens stand for requests (see `request_T`).
        """
        if self.source is not None:
            if self.source.size and int(self.source.max()) >= num_devices:
                raise InputError(
                    f"the trace was recorded on at least {int(self.source.max()) + 1} ranks, "
                    f"the cluster has {num_devices} devices: drop `source` to re-home requests"
                )
            return self.source
        return (self.request_T() % num_devices).astype(np.int32)

    def request_T(self) -> npt.NDArray[np.int64]:
        """[T] request of each token; blocks of 256 tokens where none was recorded."""
        if self.request is not None:
            return self.request
        return np.arange(self.num_tokens, dtype=np.int64) // 256

    # ---- slicing --------------------------------------------------------------------------

    def select(self, tokens: IntArray | BoolArray) -> Self:
        """The trace of these tokens (indices or a mask [T]), in the order given."""
        taken: dict[str, Any] = {}
        for name in PER_TOKEN:
            column = getattr(self, name)
            taken[name] = None if column is None else column[tokens]
        return dataclasses.replace(self, ids=self.ids[tokens], **taken)

    def slice_steps(self, start: int, stop: int) -> Self:
        """Tokens whose recorded step lies in [start, stop)."""
        step = self._need("step")
        return self.select((step >= start) & (step < stop))

    def slice_requests(self, requests: Iterable[int]) -> Self:
        """Tokens of these requests."""
        return self.select(np.isin(self.request_T(), np.fromiter(requests, np.int64)))

    def slice_domains(self, domains: Iterable[str | int]) -> Self:
        """Tokens of these domains, given by name or index. Raises InputError on an unknown one."""
        domain = self._need("domain")
        wanted = []
        for d in domains:
            if isinstance(d, str):
                if d not in self.domain_names:
                    raise InputError(f"no domain {d!r}; there are: {', '.join(self.domain_names)}")
                d = self.domain_names.index(d)
            wanted.append(d)
        return self.select(np.isin(domain, wanted))

    def slice_phase(self, phase: Literal["prefill", "decode"]) -> Self:
        """Tokens of one phase."""
        return self.select(self._need("phase") == PHASES.index(phase))

    def split(
        self, fraction: float = 0.5, *, by: Literal["request", "time"] = "request", seed: int = 0
    ) -> tuple[Self, Self]:
        """Two traces that share no request: (about `fraction` of them, the rest).

        by="request": requests drawn at random, an i.i.d. test. by="time": the earlier requests
        (by first token) against the later ones; a test of drift. Never splits inside a request.
        """
        if not 0.0 < fraction < 1.0:
            raise InputError(f"fraction {fraction} must lie strictly between 0 and 1")
        request = self.request_T()
        unique, first = np.unique(request, return_index=True)
        if len(unique) < 2:
            raise InputError("a split needs at least 2 requests; the trace holds fewer")
        if by == "request":
            order = np.random.default_rng(seed).permutation(unique)
        else:
            order = unique[np.argsort(first, kind="stable")]
        cut = min(max(1, round(fraction * len(order))), len(order) - 1)
        chosen = np.isin(request, order[:cut])
        return self.select(chosen), self.select(~chosen)

    # ---- identity -------------------------------------------------------------------------

    def digest(self) -> str:
        """Fingerprint of ids and every recorded column."""
        state = hashlib.sha256(repr((self.ids.shape, self.num_experts)).encode())
        state.update(np.ascontiguousarray(self.ids).view(np.uint8).data)
        for name in PER_TOKEN:
            column = getattr(self, name)
            if column is not None:
                state.update(name.encode())
                state.update(np.ascontiguousarray(column).view(np.uint8).data)
        return state.hexdigest()[:16]

    def _need(self, name: str) -> Any:
        column = getattr(self, name)
        if column is None:
            raise InputError(f"this trace did not record `{name}`: it cannot be sliced by it")
        return column


def id_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """uint8 up to 256 experts, uint16 above."""
    return np.uint8 if num_experts <= 256 else np.uint16


def _checked_ids(
    ids: npt.ArrayLike, num_experts: int, k_of_token: npt.ArrayLike | None
) -> Any:
    raw = np.asarray(ids)
    if raw.ndim != 3 or raw.dtype.kind not in "iu":
        raise InputError(f"ids must be integers [T, L, K]; got {raw.dtype} {list(raw.shape)}")
    if not 1 <= num_experts <= 65536:
        raise InputError(f"num_experts {num_experts} must lie in [1, 65536]")
    if raw.shape[2] > num_experts:
        raise InputError(
            f"each token chooses K={raw.shape[2]} experts but a layer has only E={num_experts}: "
            "check num_experts"
        )
    if raw.shape[1] < 1 or raw.shape[2] < 1:
        raise InputError(f"ids {list(raw.shape)} hold no layer or no choice")
    checked = raw
    if k_of_token is not None:
        k_TL = checked_k(np.asarray(k_of_token), raw.shape)
        checked = np.where(np.arange(raw.shape[2]) < k_TL[:, :, None], raw, 0)
    if checked.size and (int(checked.max()) >= num_experts or int(checked.min()) < 0):
        t, layer, _ = np.argwhere((checked < 0) | (checked >= num_experts))[0]
        raise InputError(
            f"token {t}, layer {layer}: expert ids {raw[t, layer].tolist()} are not all in "
            f"[0, {num_experts}): wrong num_experts, or physical slots recorded as experts"
        )
    return checked.astype(id_dtype(num_experts), copy=False)


def checked_k(k_TL: npt.NDArray[Any], shape_TLK: tuple[int, ...]) -> npt.NDArray[Any]:
    """How many choices of each token and layer count. Raises InputError on what they cannot be."""
    if k_TL.dtype.kind not in "iu":
        raise InputError(f"k_of_token must be whole numbers [T, L]; got {k_TL.dtype}")
    if k_TL.shape != shape_TLK[:2] or (k_TL > shape_TLK[2]).any() or (k_TL < 0).any():
        raise InputError(f"k_of_token must be [T, L] in 0..{shape_TLK[2]}")
    return k_TL


def _layer_numbers(layer_indices: Sequence[int], layers: int) -> tuple[int, ...]:
    """The model's own layer numbers, checked; empty where none are given."""
    own = tuple(int(i) for i in layer_indices)
    if own and len(own) != layers:
        raise InputError(f"layer_indices names {len(own)} layers, ids have {layers}")
    if len(set(own)) != len(own) or min(own, default=0) < 0:
        raise InputError(
            f"layer_indices {list(own)[:8]} must be the model's own layer numbers, from 0, each "
            "once: correct them, or leave them out"
        )
    return own


def _column(
    name: str, values: npt.ArrayLike | None, dtype: Any, shape: tuple[int, ...]
) -> Any:
    """The column in its dtype. Raises InputError rather than change a value."""
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != shape:
        raise InputError(f"{name} has shape {list(array.shape)}, must be {list(shape)}")
    if name == "gates":
        return _gates(array)
    if array.dtype.kind not in "iu":
        raise InputError(
            f"{name} must be whole numbers{' or strings' if name == 'domain' else ''}; got "
            f"{array.dtype}: number them, or leave {name} out"
        )
    low, high = _RANGE.get(name, (np.iinfo(dtype).min, np.iinfo(dtype).max))
    if array.size and not low <= int(array.min()) <= int(array.max()) <= high:
        at = tuple(np.argwhere((array < low) | (array > high))[0])
        raise InputError(f"{name} of token {at[0]} is {array[at]}, must lie in [{low}, {high}]")
    return array.astype(dtype, copy=False)


def _gates(array: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    if array.dtype.kind not in "fiu":
        raise InputError(f"gates must be numbers; got {array.dtype}: leave them out")
    with np.errstate(over="ignore"):  # found by the next line
        gates = array.astype(np.float16, copy=False)
    if not np.isfinite(gates).all():
        raise InputError(
            "gates hold NaN, infinity or more than float16 can: record them again, or leave them "
            "out"
        )
    return gates
