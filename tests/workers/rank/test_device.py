"""Ranks whose tensors lie on a device of their own: the same answers.

The device here is pretended (there is no GPU in most places tests run): whatever mixes it with the
host's memory fails, so these tests show that each tensor crosses where it must. There is one rank:
torch's devices of this kind are not safe in several threads. On a machine with GPUs the same is run
on them.
"""

from __future__ import annotations

import pytest
import torch

from loadmaster.errors import UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.dispatch.token_limit import CapacityRule
from loadmaster.workers.protocol.settings import RankSettings
from loadmaster.workers.rank.expert_store import ExpertStore
from loadmaster.workers.rank.model import MoeCheckpoint, fingerprint
from loadmaster.workers.rank.rank import Rank
from loadmaster.workers.rank.staging import from_bytes, to_bytes

from . import pretended_device

PROMPTS = [[5, 80, 200, 17], [9, 31, 2]]
NEW_TOKENS = 2


@pytest.fixture(
    params=[
        "pretended",
        pytest.param("cuda", marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="no GPU on this machine"
        )),
    ]
)
def device(request) -> str:
    if request.param != "pretended":
        return request.param
    return pretended_device.install()


@pytest.mark.parametrize(("architecture", "payload", "rule"), [
    ("qwen3_moe", "per_expert", None),
    ("gpt_oss", "per_rank", None),
    ("deepseek_v3", "per_expert", None),
    ("mixtral", "per_expert", CapacityRule("reroute", 0.8)),
])
def test_a_device_gives_the_answers_of_the_host(
    architecture, payload, rule, device, checkpoint, start_threads, serve
) -> None:
    model, options = checkpoint(architecture), {"payload": payload, "capacity": rule, "ranks": 1}
    home = start_threads(model, dtype="float32", **options)
    away = start_threads(model, dtype="float32", device=device, **options)
    for group in (home, away):
        group.configure(recording=True, digests=True)
    expected, found = (serve(group, PROMPTS, NEW_TOKENS) for group in (home, away))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert all(len(digest) == 64 for _, digest in found)
    trace = away.trace()
    assert trace.num_tokens == sum(map(len, PROMPTS)) + len(PROMPTS) * (NEW_TOKENS - 1)


def test_an_expert_leaves_a_device_and_arrives_on_another_bit_for_bit(device, checkpoint) -> None:
    source = MoeCheckpoint(checkpoint("gpt_oss"))
    read = source.read_expert(0, 3, torch.bfloat16)
    stores = [
        ExpertStore(lambda slots: source.shape.allocate(slots, torch.bfloat16, device))
        for _ in range(2)
    ]
    stores[0].put(3, read)
    travelling = to_bytes(stores[0].get(3))
    assert travelling.device.type == "cpu"
    stores[1].put(3, from_bytes(travelling, source.shape.empty_expert(torch.bfloat16)))
    assert fingerprint(stores[1].get(3)) == fingerprint(read)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_rank_without_the_gpu_it_was_promised_says_so(checkpoint) -> None:
    model = checkpoint("qwen3_moe")
    cluster = Cluster.preset("cpu", slots_per_device=8)
    with pytest.raises(UsageError, match=r"no GPU can be seen .* gpus_per_rank at 0"):
        Rank(RankSettings(0, 1, str(model), cluster, device="cuda")).load()
