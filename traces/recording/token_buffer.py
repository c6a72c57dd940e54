"""Where recorded steps wait, and the thread that writes them out.

Knows buffers of one recording and its folder. Knows nothing of steps, layers' order or engines.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import LoadmasterError
from ..storage.manifest import Manifest
from ..storage.store import TraceWriter
from ..trace import RoutingTrace, id_dtype

LOOK_EVERY_S = 1.0
_log = logging.getLogger(__name__)
_DTYPES = {"step": np.int64, "request": np.int64, "source": np.int32, "phase": np.uint8,
           "domain": np.int32}


class TokenBuffer:
    """Room for some tokens of a recording, made once and reused. Ids lie layer by layer."""

    def __init__(self, manifest: Manifest, capacity: int) -> None:
        shape = (manifest.num_layers, capacity, manifest.top_k)
        self.manifest, self.capacity, self.used = manifest, capacity, 0
        self.ids_LTK: Any = np.zeros(shape, id_dtype(manifest.num_experts))
        self.gates_LTK: npt.NDArray[np.float16] | None = None
        if "gates" in manifest.columns:
            self.gates_LTK = np.zeros(shape, np.float16)
        self.columns: dict[str, npt.NDArray[Any]] = {
            name: np.zeros(capacity, _DTYPES[name])
            for name in manifest.columns if name != "gates"
        }

    def as_trace(self, domain_names: tuple[str, ...], *, copy: bool = False) -> RoutingTrace:
        """The tokens that count; a view of the buffer unless `copy`."""
        n = self.used
        ids = self.ids_LTK[:, :n].transpose(1, 0, 2)
        gates = None if self.gates_LTK is None else self.gates_LTK[:, :n].transpose(1, 0, 2)
        columns: dict[str, Any] = {name: c[:n] for name, c in self.columns.items()}
        if copy:
            ids, gates = ids.copy(order="K"), None if gates is None else gates.copy(order="K")
            columns = {name: c.copy() for name, c in columns.items()}
        return RoutingTrace(
            ids=ids, num_experts=self.manifest.num_experts, gates=gates, **columns,
            domain_names=domain_names, layer_indices=self.manifest.layer_indices,
            model_name=self.manifest.model_name,
        )


class BackgroundWriter:
    """Writes full buffers in one thread, so that a step never waits for the disk.

    At most one buffer is on its way; who hands over the next one waits. After an error nothing
    more is written: `failure` holds the reason, `lost_tokens` what did not reach the disk.
    """

    def __init__(self, writer: TraceWriter) -> None:
        self.failure: str | None = None
        self.lost_tokens = 0
        self._writer = writer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trace-writer")
        self._pending: Future[None] | None = None
        self._refusal: str | None = None
        self._looked = -LOOK_EVERY_S

    @property
    def refusal(self) -> str | None:
        """Why a buffer handed over now would be lost; looked at now and then."""
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked, self._refusal = time.monotonic(), self._writer.refusal()
        return self._refusal

    def hand_over(self, buffer: TokenBuffer, domain_names: tuple[str, ...]) -> None:
        """Write this buffer; it must not be touched until the next `wait` or `hand_over`."""
        self.wait()
        self._pending = self._pool.submit(self._write, buffer, domain_names)

    def wait(self) -> None:
        """Until everything handed over is committed or lost."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Finish the last buffer and end the thread."""
        self.wait()
        self._pool.shutdown()

    def _write(self, buffer: TokenBuffer, domain_names: tuple[str, ...]) -> None:
        if self.failure is None:
            try:
                self._writer.append(buffer.as_trace(domain_names))
                return
            except (LoadmasterError, MemoryError) as error:
                self.failure = str(error) or type(error).__name__
                _log.error("recording stopped, serving goes on: %s", self.failure)
        self.lost_tokens += buffer.used
