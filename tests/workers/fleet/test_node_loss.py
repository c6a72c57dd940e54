"""A Ray cluster of three nodes loses one for good, goes on with two ranks, and takes a third back.

Runs in a process of its own: it starts Ray nodes, and ends them by their handles.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_a_lost_node_is_done_without_and_a_new_one_is_used(
    checkpoint: Callable[[str], Path],
) -> None:
    process = subprocess.Popen(
        [sys.executable, __file__, str(checkpoint("qwen3_moe"))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    try:
        told, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)      # it ends its nodes itself
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 0, told[-4000:]
    assert "scenario done" in told


def scenario(model: Path) -> None:
    """Serve, lose a node under load, serve on two ranks, add a node, serve on three."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        lose_and_gain(nodes, model)
    finally:
        ray.shutdown()
        nodes.shutdown()
    print("scenario done")


def lose_and_gain(nodes: Any, model: Path) -> None:
    from loadmaster.workers.group.group import Group

    nodes.add_node(num_cpus=1)
    doomed = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    prompts = [[n, n + 1, n + 2, 7] for n in range(6)]
    with Group.start(
        model, ranks=3, name=f"nodes-{os.getpid()}", address=nodes.address, cpus_per_rank=1.0,
        replace_timeout_s=40.0,
    ) as group:
        want = group.generate(prompts, 80)
        got: list[list[list[int]]] = []
        load = threading.Thread(target=lambda: got.append(group.generate(prompts, 80)))
        load.start()
        nodes.remove_node(doomed, allow_graceful=False)
        load.join()
        assert got == [want]
        assert group.plan.num_devices == 2, group.plan.num_devices
        assert [len(r.left) for r in group.status()["recoveries"]] == [1]
        nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        assert group.resize(3).num_devices == 3
        assert group.generate(prompts, 80) == want


if __name__ == "__main__":
    scenario(Path(sys.argv[1]))
