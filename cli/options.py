"""Options that several verbs share, and what they build.

Knows how a cluster, a sampler and a model are named on the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def _whole(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed} must be at least 0, and below 2^63")
    return seed


TraceArgument = Annotated[Path, typer.Argument(help="Trace folder, array file or engine dump.")]
RoutingArgument = Annotated[
    Path, typer.Argument(help="Trace folder or array file: how tokens route.")
]
NumExperts = Annotated[
    int | None, typer.Option(help="Experts per layer, where the file does not say.")
]
Axes = Annotated[
    str | None,
    typer.Option(help="Axes of an array without a word on them: LE, WLE, EL and so on for loads (W "
                 "windows, L layers, E experts), TLK or LTK for routing."),
]
Layers = Annotated[
    str | None, typer.Option(help="The model's own numbers of the file's layers, as in 3-60.")
]
Seed = Annotated[int, typer.Option(help="Same inputs and seed, same result.", callback=_whole)]

ClusterFile = Annotated[
    Path | None,
    typer.Option("--cluster", help="Cluster file (YAML), instead of the sizes below: `loadmaster "
                 "example cluster` has one."),
]
Preset = Annotated[
    str, typer.Option(help="Hardware: h100, h200, b200, gb200, a100, pcie or cpu.")
]
Nodes = Annotated[int, typer.Option(help="Nodes of the cluster.")]
DevicesPerNode = Annotated[int, typer.Option(help="Devices in each node.")]
PlansDevicesPerNode = Annotated[
    int | None, typer.Option(help="Devices in each node [default: the first plan's].")
]
SlotsPerDevice = Annotated[
    int | None,
    typer.Option(help="Expert slots per device and layer [default: an even share + 25 %]."),
]
Oversubscription = Annotated[
    float | None,
    typer.Option(help="Bandwidth of a node's NICs over what its spine carries: 2 for 2:1 "
                 "[default: nothing is oversubscribed, or as in the cluster file]."),
]
def _bytes(size: int | None) -> int | None:
    if size is not None and size < 0:
        raise UsageError(f"--reserve-bytes {size} must be at least 0")
    return size


ReservedBytes = Annotated[
    int | None,
    typer.Option("--reserve-bytes", callback=_bytes,
                 help="Of each device's memory, kept free of weights for KV cache, activations and "
                 "the runtime [default: a tenth, or as in the cluster file]."),
]
TrafficMode = Annotated[
    str,
    typer.Option(
        "--traffic",
        help="return_home/per_expert, return_home/per_rank, return_home/per_node, allgather "
        "or coherent.",
    ),
]
ModelSource = Annotated[
    Path | None,
    typer.Option("--model", help="A published model's name (gpt-oss-20b), a config.json or "
                 "params.json, a checkpoint's folder, or a ModelSpec as JSON: gives times."),
]
SizedModel = Annotated[
    Path,
    typer.Option("--model", help="A published model's name (gpt-oss-20b), a config.json or "
                 "params.json, a checkpoint's folder, or a ModelSpec as JSON: sizes make times."),
]
RowsModel = Annotated[
    Path | None,
    typer.Option("--model", help="A published model's name, a config.json or params.json, a "
                 "checkpoint's folder, or a ModelSpec as JSON: which rows are MoE layers."),
]
MoeLayers = Annotated[
    str | None,
    typer.Option(help="Which of the model's layers are MoE, where its files do not say: 3-60, "
                 "0,2,4 or 1-47/2."),
]
StepTokens = Annotated[int, typer.Option(help="Tokens in a step.")]
Concurrency = Annotated[int, typer.Option(help="Requests in flight.")]
Order = Annotated[str, typer.Option(help="interleaved, recorded, shuffled or stored.")]
Address = Annotated[
    str | None, typer.Option(help="A Ray cluster to run on; 'auto' finds the local one.")
]
