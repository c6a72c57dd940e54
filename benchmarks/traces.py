"""What recording and storing routing costs.

    python benchmarks/traces.py [--json] [--only write codecs recorder overhead]

write     MB of raw ids stored per CPU second at L=58, K=8, E=256 (encoding, sha256, fsync and
          manifest included), and the size of the id columns over the entropy of the ids
codecs    the same for every Parquet codec and encoding that could be used
recorder  CPU time of the Recorder's calls per token and layer, writer thread included
overhead  share of CPU time that recording adds to a small MoE model in one process, on and off
          interleaved, with an upper 95 % bound; and the recorder's own CPU time over the model's
Set OMP_NUM_THREADS=1. CPU time is that of the whole process, all its threads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from loadmaster.traces.analysis.drift import entropy_bits
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.recording.recorder import Recorder
from loadmaster.traces.storage.manifest import Manifest, create_manifest
from loadmaster.traces.storage.shard_file import ids_column
from loadmaster.traces.storage.store import SHARD_TOKENS, TraceWriter, open_trace
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.traces.trace import RoutingTrace

REPEATS = 5
_SPEC = ModelSpec(name="synth", num_layers=58, num_experts=256, top_k=8)
_COLUMNS = ("request", "phase", "domain")


def write() -> dict[str, Any]:
    """trace_write_mb_s and trace_size_vs_entropy of the store as it is."""
    trace = _shard_of_tokens()
    seconds = []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(REPEATS):
            folder = Path(scratch) / str(repeat)
            create_manifest(folder, Manifest.of_model(
                _SPEC, columns=_COLUMNS, domain_names=trace.domain_names
            ))
            writer = TraceWriter(folder)
            seconds.append(_cpu_s(lambda writer=writer: writer.append(trace)))
        folder = Path(scratch) / "0"
        size = _id_bytes_stored(folder)
        read_s = min(_cpu_s(lambda: open_trace(folder).read()) for _ in range(REPEATS))
        two_s = min(
            _cpu_s(lambda: open_trace(folder, verify=False).read(layers=[0, 57], columns=[]))
            for _ in range(REPEATS)
        )
    raw_mb = trace.ids.nbytes / 1e6
    return {
        "trace_write_mb_s": raw_mb / float(np.median(seconds)),
        "trace_size_vs_entropy": size / _entropy_bytes(trace),
        "trace_write_detail": {
            "tokens": trace.num_tokens, "layers": 58, "top_k": 8, "experts": 256,
            "raw_mb": raw_mb, "mb_s_each": [raw_mb / s for s in seconds],
            "size_vs_raw": size / trace.ids.nbytes,
            "read_verified_mb_s": raw_mb / read_s, "read_two_layers_ms": two_s * 1e3,
        },
    }


def codecs() -> dict[str, Any]:
    """Speed and size of the id columns under every codec and encoding worth a look."""
    import pyarrow as pa

    trace = _shard_of_tokens()
    columns = {}
    for layer in range(trace.num_layers):
        ids = np.ascontiguousarray(trace.ids[:, layer])
        columns[ids_column(layer)] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(ids.shape[1]), len(ids), [None, pa.py_buffer(ids)]
        )
    table, entropy = pa.table(columns), _entropy_bytes(trace)
    plain = {"use_dictionary": False, "write_statistics": False}
    settings: dict[str, dict[str, Any]] = {
        f"zstd {level}": {"compression": "zstd", "compression_level": level}
        for level in (-1, 1, 3, 6)
    }
    settings |= {name: {"compression": name} for name in ("none", "snappy", "lz4", "brotli")}
    settings |= {
        f"byte_stream_split zstd {level}": {
            "compression": "zstd", "compression_level": level, "use_byte_stream_split": True
        }
        for level in (1, 3)
    }
    rows = {}
    for name, setting in settings.items():
        sink = pa.BufferOutputStream()
        seconds = _cpu_s(lambda sink=sink, s=setting: pq.write_table(table, sink, **plain, **s))
        size = len(sink.getvalue())
        rows[name] = {"mb_s": trace.ids.nbytes / 1e6 / seconds, "size_vs_entropy": size / entropy}
    return {"trace_codecs": rows}


def recorder(step_tokens: int = 4096) -> dict[str, Any]:
    """CPU time of recording per token and layer: calls only, and with the writer.

    The same step's ids are recorded 16 times: a router's output is fresh in the cache, too.
    """
    trace = _shard_of_tokens()
    step_ids = [np.ascontiguousarray(trace.ids[:step_tokens, i], np.int64) for i in range(58)]
    steps = trace.num_tokens // step_tokens
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in (("calls", None), ("with_writer", Path(scratch) / "trace")):
            made = Recorder(folder, _SPEC)
            seconds = _cpu_s(lambda made=made: _record(made, step_ids, steps))
            tokens = steps * step_tokens
            results[f"{name}_ns_per_token_layer"] = seconds * 1e9 / (tokens * 58)
            if name == "with_writer":
                results["raw_mb_s"] = tokens * 58 * 8 / 1e6 / seconds
    return {"recorder_cpu": {"step_tokens": step_tokens, "ids": "int64", **results}}


def overhead(rounds: int = 48, step_tokens: int = 2048) -> dict[str, Any]:
    """CPU time recording adds to a 6-layer, 32-expert, top-4 model of width 128, on against off."""
    import torch

    torch.set_num_threads(1)
    model, forward = _small_model(step_tokens)
    from loadmaster.traces.recording.record_model import recording

    spec = ModelSpec(num_layers=6, num_experts=32, top_k=4)
    pairs = []
    with tempfile.TemporaryDirectory() as scratch:
        made = Recorder(Path(scratch) / "trace", spec, buffer_tokens=16 * step_tokens)
        forward()
        for step in range(rounds):
            cost = {}
            for recorded in (True, False) if step % 2 else (False, True):
                if recorded:
                    with recording(model, spec, made):
                        cost[True] = _cpu_s(
                            lambda step=step: _recorded_step(made, forward, step, step_tokens)
                        )
                else:
                    cost[False] = _cpu_s(forward)
            pairs.append((cost[True], cost[False]))
        tail_s = _cpu_s(made.close)
    on_R, off_R = np.array(pairs).T
    share_R = (on_R + tail_s / rounds) / np.median(off_R) - off_R / np.median(off_R)
    ids = [np.zeros((step_tokens, 4), np.int64) + np.arange(4)] * 6
    with tempfile.TemporaryDirectory() as scratch:
        alone = Recorder(Path(scratch) / "trace", spec, buffer_tokens=16 * step_tokens)
        own_s = _cpu_s(lambda: _record(alone, ids, rounds))
    rng = np.random.default_rng(0)
    resampled = np.median(share_R[rng.integers(0, rounds, (2000, rounds))], axis=1)
    return {"recorder_overhead": {
        "median_share": float(np.median(share_R)),
        "upper_95": float(np.quantile(resampled, 0.95)),
        "recorder_alone_share": own_s / float(rounds * np.median(off_R)), "rounds": rounds,
        "step_tokens": step_tokens, "forward_cpu_s": float(np.median(off_R)),
    }}


def _record(made: Recorder, step_ids: list[Any], steps: int) -> None:
    request = np.arange(len(step_ids[0])) // 300
    for step in range(steps):
        made.begin_step(step, request, "prefill")
        for layer, ids_TK in enumerate(step_ids):
            made.layer(layer, ids_TK)
        made.end_step()
    summary = made.close()
    if summary.failure is not None:
        raise RuntimeError(summary.failure)


def _recorded_step(
    made: Recorder, forward: Callable[[], Any], step: int, step_tokens: int
) -> None:
    made.begin_step(step, np.arange(step_tokens) // 512, "prefill")
    forward()
    made.end_step()


def _small_model(step_tokens: int) -> tuple[Any, Callable[[], Any]]:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, intermediate_size=256, moe_intermediate_size=128,
        num_experts=32, num_experts_per_tok=4,
    )).eval()
    tokens = torch.randint(0, 256, (step_tokens // 512, 512))

    def forward() -> Any:
        with torch.inference_mode():
            return model(input_ids=tokens, use_cache=False, logits_to_keep=1)

    return model, forward


def _shard_of_tokens() -> RoutingTrace:
    """One shard of the trace that the figures are about: synth, zipf 1.0, its other defaults."""
    return synth_trace(layers=58, experts=256, top_k=8, tokens=SHARD_TOKENS, zipf=1.0, seed=0)


def _entropy_bytes(trace: RoutingTrace) -> float:
    """Order-0 entropy of each layer's ids, summed over layers, in bytes for all tokens."""
    load_LE = trace.load_LE()
    shares = load_LE / load_LE.sum(axis=1, keepdims=True)
    return float(entropy_bits(shares).sum()) * trace.num_tokens * trace.top_k / 8


def _id_bytes_stored(folder: Path) -> int:
    """Bytes of the id columns on disk, by the Parquet footers."""
    total = 0
    for path in sorted(folder.glob("rank-*/*.parquet")):
        meta = pq.read_metadata(path)
        for group in range(meta.num_row_groups):
            row_group = meta.row_group(group)
            for column in range(row_group.num_columns):
                chunk = row_group.column(column)
                if chunk.path_in_schema.startswith("ids_"):
                    total += chunk.total_compressed_size
    return total


def _cpu_s(action: Callable[[], Any]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "write": write, "codecs": codecs, "recorder": recorder, "overhead": overhead,
}


def main() -> None:
    """Run the parts asked for and print them."""
    parser = argparse.ArgumentParser(description="cost of recording and storing routing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for part in options.only:
        found |= PARTS[part]()
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name}: {json.dumps(value, indent=1) if isinstance(value, dict) else value}")


if __name__ == "__main__":
    main()
