"""The exchange: every row arrives, whatever the payload; nothing is sent across epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from loadmaster.workers.protocol.step_messages import EpochMismatchError, ExchangeError
from loadmaster.workers.rank.exchange import Exchange, Rendezvous, agree, return_tokens, send_tokens

RANKS, SLOTS, HIDDEN = 3, 2, 8
distributed: Any = torch.distributed


def together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run one function per rank at the same time; an exception takes its result's place."""

    def run(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(functions)) as threads:
        return list(threads.map(run, functions))


@pytest.fixture
def exchanges() -> list[Exchange]:
    store = distributed.HashStore()
    return together([lambda g=g: Exchange(store, g, RANKS, timeout_s=5.0) for g in range(RANKS)])


def test_ranks_meet_at_a_port_of_the_loopback_address_only() -> None:
    meeting = Rendezvous.open("127.0.0.1")

    def member(rank: int) -> torch.Tensor:
        at = meeting if rank == 0 else Rendezvous.find("127.0.0.1", meeting.port)
        one = Exchange.meet(at, 7, rank, RANKS, timeout_s=5.0, host="127.0.0.1")
        return one.all_gather(torch.tensor([rank * 10]))

    for table in together([lambda g=g: member(g) for g in range(RANKS)]):
        assert table.flatten().tolist() == [0, 10, 20]
    with open("/proc/net/tcp") as lines:
        bound = [line.split()[1] for line in lines if f":{meeting.port:04X} " in line]
    assert {address.split(":")[0] for address in bound if address} == {"0100007F"}


@pytest.mark.parametrize("first", [6, 4, 3, 1])
def test_agree_gathers_all_counts(exchanges: list[Exchange], first: int) -> None:
    """Four counts: all with the first gather, or the rest in a second one."""
    counts = np.arange(RANKS * 4, dtype=np.int32).reshape(RANKS, 4)
    epoch = 3 + (1 << 40)      # a header holds whole 64-bit numbers
    tables = together(
        [lambda g=g: agree(exchanges[g], epoch, 11, counts[g], first=first) for g in range(RANKS)]
    )
    assert all(np.array_equal(t, counts) for t in tables)


@pytest.mark.parametrize(("epochs", "steps"), [((1, 1, 2), (5, 5, 5)), ((1, 1, 1), (5, 6, 5))])
def test_another_epoch_or_step_is_an_error_on_every_rank(
    exchanges: list[Exchange], epochs: tuple[int, ...], steps: tuple[int, ...]
) -> None:
    """Even where the plans count differently many things."""
    results = together([
        lambda g=g: agree(exchanges[g], epochs[g], steps[g], np.ones(3 * g, np.int32), first=4)
        for g in range(RANKS)
    ])
    assert all(isinstance(r, EpochMismatchError) for r in results)
    assert f"rank 2: epoch {epochs[2]} step {steps[2]}" in str(results[0])


def random_step(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor], np.ndarray]:
    """Tokens and slots of each rank, and the quotas they make: (x_TH, slot_TK, quota_GS)."""
    rng = np.random.default_rng(seed)
    x, slots = [], []
    quota_GS = np.zeros((RANKS, RANKS * SLOTS), np.int32)
    for rank in range(RANKS):
        tokens = int(rng.integers(0, 9))
        x.append(torch.from_numpy(rng.normal(size=(tokens, HIDDEN)).astype(np.float32)).bfloat16())
        chosen = [rng.choice(RANKS * SLOTS, 2, replace=False) for _ in range(tokens)]
        slot_TK = np.array(chosen, np.int64).reshape(tokens, 2)
        slots.append(torch.from_numpy(slot_TK))
        quota_GS[rank] = np.bincount(slot_TK.reshape(-1), minlength=RANKS * SLOTS)
    return x, slots, quota_GS


@pytest.mark.parametrize("payload", ["per_expert", "per_rank"])
@pytest.mark.parametrize("seed", range(5))
def test_rows_go_to_their_slots_and_results_come_home(
    exchanges: list[Exchange], payload: str, seed: int
) -> None:
    """Each 'expert' multiplies by its slot number; physical slots are the other way round."""
    x, slots, quota_GS = random_step(seed)
    physical_C = np.array([1, 0])

    def layer(rank: int) -> tuple[torch.Tensor, int]:
        order_A = torch.argsort(slots[rank].flatten(), stable=True)
        rows, receipt, remote = send_tokens(
            exchanges[rank], x[rank], order_A, 2, quota_GS, physical_C, payload=payload
        )
        count_C = quota_GS.sum(axis=0)[rank * SLOTS : (rank + 1) * SLOTS]
        factor = torch.repeat_interleave(
            torch.tensor([rank * SLOTS + 1, rank * SLOTS]), torch.from_numpy(count_C[physical_C])
        )
        home = return_tokens(exchanges[rank], rows * factor[:, None].bfloat16(), receipt)
        out = torch.empty_like(home)
        out[order_A] = home
        return out, remote

    for rank, (out, remote) in enumerate(together([lambda g=g: layer(g) for g in range(RANKS)])):
        want = x[rank].repeat_interleave(2, dim=0) * slots[rank].flatten()[:, None].bfloat16()
        assert torch.equal(out, want)
        away = (slots[rank] // SLOTS) != rank
        if payload == "per_expert":
            assert remote == int(away.sum())
        else:
            ranks_of = [{int(s) // SLOTS for s in row} - {rank} for row in slots[rank]]
            assert remote == sum(len(r) for r in ranks_of)


def test_a_rank_that_leaves_is_noticed_at_once(exchanges: list[Exchange]) -> None:
    exchanges[2].close()
    row = torch.zeros(4)
    results = together([lambda g=g: exchanges[g].all_gather(row) for g in range(2)])
    assert all(isinstance(r, ExchangeError) for r in results)
