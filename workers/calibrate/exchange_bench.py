"""Times the exchange between rank processes on this machine: rows for
`simulator/calibrate/fits.py`.

Starts plain processes (no Ray), so that `calibrate` needs no cluster. Knows gloo and the clock.
Knows nothing of models. Times are wall times of the slowest rank; give them a quiet machine.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import LoadmasterError, UsageError

SIZES_BYTES = tuple(1 << power for power in range(10, 25, 2))     # 1 KiB .. 16 MiB per rank
_ROW_BYTES = 512
_MEET_S = 60.0


@dataclass(frozen=True)
class ExchangeTimes:
    """What was measured between `ranks` processes of one node.

    rows: mappings with `nodes`, `port_bytes` (sent to other ranks, per rank) and `latency_us`, as
    `simulator/calibrate/fits.py` reads them. counts_us: one all-gather of [G, E] counts.
    """

    ranks: int
    rows: list[dict[str, float]]
    counts_us: float


def measure_exchange(
    ranks: int = 4,
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    *,
    repeats: int = 20,
    num_experts: int = 256,
) -> ExchangeTimes:
    """Median time of an even all-to-all at each size, and of the counts' all-gather.

    sizes_bytes: what one rank sends in all, its own share included; rounded to whole rows.
    Raises LoadmasterError when a process fails.
    """
    if ranks < 2 or repeats < 1:
        raise UsageError(f"an exchange needs 2 ranks and 1 repeat; got {ranks} and {repeats}")
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    port = spawn.Queue()
    processes = [
        spawn.Process(
            target=_member,
            args=(g, ranks, tuple(sizes_bytes), repeats, num_experts, port, answers),
            daemon=True,
        )
        for g in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        times = [_answer(answers, processes) for _ in processes]
    finally:
        for process in processes:
            process.join(5.0)
            if process.is_alive():
                process.terminate()
    slowest_us = np.max(np.array(times, np.float64), axis=0)      # [sizes + 1, repeats]
    median_us = np.median(slowest_us, axis=1)
    rows = []
    for size, us in zip(sizes_bytes, median_us[1:], strict=True):
        sent = _rows_each(size, ranks) * _ROW_BYTES * (ranks - 1)
        rows.append({"nodes": 1.0, "port_bytes": float(sent), "latency_us": float(us)})
    return ExchangeTimes(ranks, rows, float(median_us[0]))


def _rows_each(size_bytes: int, ranks: int) -> int:
    return max(1, size_bytes // (_ROW_BYTES * ranks))


def _answer(answers: Any, processes: list[Any]) -> Any:
    deadline = time.monotonic() + 10 * _MEET_S
    while time.monotonic() < deadline:
        if not answers.empty():
            return answers.get()
        dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
        if dead:
            raise LoadmasterError(f"a process of the exchange measurement ended with {dead[0]}")
        time.sleep(0.05)
    raise LoadmasterError("the exchange measurement did not end: is the machine overloaded?")


def _member(
    rank: int,
    ranks: int,
    sizes_bytes: tuple[int, ...],
    repeats: int,
    num_experts: int,
    port: Any,
    answers: Any,
) -> None:
    """One rank: [counts, sizes...] x repeats times in microseconds."""
    import torch

    from ..rank.exchange import Exchange, Rendezvous

    torch.set_num_threads(1)
    if rank == 0:
        at = Rendezvous.open("127.0.0.1")
        for _ in range(ranks - 1):
            port.put(at.port)
    else:
        at = Rendezvous.find("127.0.0.1", port.get(timeout=_MEET_S))
    exchange = Exchange.meet(at, "bench", rank, ranks, timeout_s=_MEET_S, host="127.0.0.1")
    counts = torch.zeros(num_experts, dtype=torch.int64)
    times = [_timed(lambda: exchange.all_gather(counts), exchange, repeats)]
    for size in sizes_bytes:
        each = _rows_each(size, ranks)
        rows = torch.zeros(each * ranks, _ROW_BYTES, dtype=torch.uint8)
        split = [each] * ranks
        times.append(
            _timed(
                lambda rows=rows, split=split: exchange.all_to_all(rows, split, split),
                exchange,
                repeats,
            )
        )
    answers.put(times)


def _timed(run: Any, exchange: Any, repeats: int) -> list[float]:
    import torch

    ready = torch.zeros(1)
    times = []
    for repeat in range(repeats + 3):
        exchange.all_gather(ready)      # start together
        began = time.perf_counter()
        run()
        if repeat >= 3:
            times.append((time.perf_counter() - began) * 1e6)
    return times
