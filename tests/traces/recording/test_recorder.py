"""What a server tells the recorder is what the trace holds, and no disk can hurt the server."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, LoadmasterError, UsageError
from loadmaster.traces.load import load_trace
from loadmaster.traces.merge import concatenate
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.recording import token_buffer
from loadmaster.traces.recording.recorder import Recorder
from loadmaster.traces.storage.manifest import read_manifest
from loadmaster.traces.storage.shard_file import read_shard
from loadmaster.traces.storage.store import TraceWriter


def feed(
    recorder: Recorder, step: int, tokens: int, seed: int = 0, **begin: Any
) -> npt.NDArray[np.int64]:
    """One whole step of random ids; returns them [T, L, K]."""
    model = recorder.model
    rng = np.random.default_rng((seed, step))
    ids = rng.integers(0, model.num_experts, (tokens, model.num_layers, model.top_k))
    recorder.begin_step(step, np.arange(tokens) + 100 * step, **begin)
    for layer in range(model.num_layers):
        recorder.layer(layer, ids[:, layer])
    recorder.end_step()
    return ids


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_steps_come_back_in_order(spec: ModelSpec, tmp_path: Path, where: str) -> None:
    """Steps smaller and larger than the buffer, with every column, during and after recording."""
    recorder = Recorder(
        tmp_path / "t" if where == "folder" else None, spec, rank=2, ranks=3, buffer_tokens=20,
        domain_names=("chat", "code"),
    )
    ids = [
        feed(recorder, step, tokens, phase_T="prefill" if step % 2 else "decode",
             domain_T=np.full(tokens, step % 2))
        for step, tokens in enumerate([7, 13, 1, 45, 20, 3])
    ]
    trace: Any = recorder.trace()
    assert np.array_equal(trace.ids, np.concatenate(ids))
    assert trace.ids.dtype == np.uint8
    assert np.array_equal(trace.step, np.repeat(range(6), [7, 13, 1, 45, 20, 3]))
    assert np.array_equal(trace.phase, 1 - trace.step % 2)
    assert np.array_equal(trace.domain, trace.step % 2)
    assert trace.domain_names == ("chat", "code") and set(trace.source) == {2}
    assert trace.request[0] == 0 and trace.request[7] == 100
    summary: Any = recorder.close()
    assert (summary.tokens, summary.steps, summary.failure) == (89, 6, None)
    if where == "folder":
        assert load_trace(tmp_path / "t").digest() == trace.digest()


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_what_is_new_is_given_once_and_old_shards_are_not_read_again(
    spec: ModelSpec, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = None if where == "memory" else tmp_path / "t"
    recorder = Recorder(target, spec, buffer_tokens=5)
    read: list[str] = []

    def counted(path: Path, *arguments: object) -> object:
        read.append(path.name)
        return read_shard(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("loadmaster.traces.storage.store.read_shard", counted)
    parts = []
    for window in range(4):
        for step in range(3 * window, 3 * window + 3):
            feed(recorder, step, 2)
        parts.append(recorder.trace(new=True))
    assert [p.num_tokens for p in parts] == [6] * 4
    joined: Any = concatenate(parts)
    whole: Any = recorder.trace()
    assert np.array_equal(joined.step, whole.step) and np.array_equal(joined.ids, whole.ids)
    if where == "folder":
        assert read.count("shard-00000.parquet") == 2       # once new, once with the whole
    recorder.close()


def test_dummy_and_aborted_passes_are_recorded_nowhere(spec: ModelSpec) -> None:
    """A warm-up, a pass that never ended, a pass that lacks a layer: none of them is traffic."""
    recorder = Recorder(None, spec)
    first = feed(recorder, 0, 5)
    feed(recorder, 1, 50, dummy=True)
    recorder.begin_step(2, np.arange(4))
    recorder.layer(0, np.zeros((4, 2), int))
    recorder.begin_step(3, np.arange(4))   # the step above was aborted
    for layer in (0, 2):
        recorder.layer(layer, np.zeros((4, 2), int))
    recorder.end_step()                    # layer 1 never came
    last = feed(recorder, 4, 6)
    assert np.array_equal(recorder.trace().ids, np.concatenate([first, last]))
    summary: Any = recorder.close()
    assert (summary.dummy_steps, summary.abandoned_steps, summary.steps) == (1, 2, 2)


def test_tensors_of_any_type_are_taken(spec: ModelSpec) -> None:
    """What torch routers hand out: int64 or int32 ids, bfloat16 gates, strided views."""
    torch = pytest.importorskip("torch")
    recorder = Recorder(None, spec, gates=True)
    ids = torch.tensor([[7, 1], [2, 3]])
    gates = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.bfloat16)
    recorder.begin_step(0, [0, 1])
    recorder.layer(0, ids, gates)
    recorder.layer(1, ids.to(torch.int32).repeat(1, 2)[:, ::2], gates.float())
    recorder.layer(2, ids.flip(0), gates.double())
    recorder.end_step()
    trace: Any = recorder.trace()
    assert trace.ids.tolist() == [[[7, 1], [7, 7], [2, 3]], [[2, 3], [2, 2], [7, 1]]]
    assert trace.gates.tolist() == [[[0.75, 0.25]] * 3, [[0.5, 0.5]] * 3]


def test_a_recording_without_requests_does_not_tell_who_spoke(
    spec: ModelSpec, tmp_path: Path
) -> None:
    """Nothing of the request column reaches memory or disk."""
    recorder = Recorder(tmp_path / "t", spec, requests=False)
    feed(recorder, 0, 9)
    recorder.close()
    assert load_trace(tmp_path / "t").request is None
    assert "request" not in read_manifest(tmp_path / "t").columns


def test_tokens_without_a_domain_stay_without(spec: ModelSpec, tmp_path: Path) -> None:
    """No labels at all: no domains. Some labels: the others are called unlabelled."""
    plain = Recorder(tmp_path / "plain", spec)
    feed(plain, 0, 3)
    plain.close()
    assert load_trace(tmp_path / "plain").domain is None
    mixed = Recorder(tmp_path / "mixed", spec, buffer_tokens=4)
    feed(mixed, 0, 4)
    mixed.domain_names = ("chat",)   # the name came up later
    feed(mixed, 1, 2, domain_T=[0, 0])
    mixed.close()
    trace: Any = load_trace(tmp_path / "mixed")
    assert trace.domain_names == ("unlabelled", "chat")
    assert trace.domain.tolist() == [0] * 4 + [1] * 2


@pytest.mark.parametrize("bad", [8, 255, 256, -1, -(2**40), 2**40])
def test_an_id_that_is_no_expert_never_wraps_into_one(spec: ModelSpec, bad: int) -> None:
    """The step is dropped and the caller told; later steps are recorded."""
    recorder = Recorder(None, spec)
    recorder.begin_step(0, [0, 1])
    with pytest.raises(InputError, match="logical experts"):
        recorder.layer(1, np.array([[0, 1], [bad, 2]]))
    ids = feed(recorder, 1, 3)
    assert np.array_equal(recorder.trace().ids, ids)


def test_a_gate_that_is_no_number_drops_its_step(spec: ModelSpec, tmp_path: Path) -> None:
    """One NaN must not make the whole recording unreadable."""
    recorder = Recorder(tmp_path / "t", spec, gates=True)
    for step, gate in enumerate([0.5, np.nan, 1e6, 0.25]):
        recorder.begin_step(step, [0])
        try:
            for layer in range(3):
                recorder.layer(layer, np.array([[0, 1]]), np.array([[gate, 0.5]]))
            recorder.end_step()
        except InputError as error:
            assert "record without gates" in str(error)
    assert recorder.close().abandoned_steps == 2
    assert load_trace(tmp_path / "t").step.tolist() == [0, 3]  # type: ignore[union-attr]


def test_misuse_is_named(spec: ModelSpec) -> None:
    """Calls out of order, wrong shapes, unnamed domains, missing gates."""
    recorder = Recorder(None, spec, gates=True)
    ids = np.zeros((2, 2), int)
    with pytest.raises(UsageError, match="outside"):
        recorder.layer(0, ids)
    with pytest.raises(UsageError, match="without begin_step"):
        recorder.end_step()
    with pytest.raises(UsageError, match="0 have a name"):
        recorder.begin_step(0, [0, 1], domain_T=[0, 0])
    for layer, given_ids, gates in ((0, ids[:1], ids), (3, ids, ids), (0, ids, None)):
        recorder.begin_step(0, [0, 1])
        with pytest.raises(UsageError, match=f"layer {layer}"):
            recorder.layer(layer, given_ids, gates)
    recorder.close()
    with pytest.raises(UsageError, match="closed"):
        recorder.begin_step(1, [0])
    with pytest.raises(UsageError, match="rank 1 of 1"):
        Recorder(None, spec, rank=1)


def test_an_existing_folder_is_left_alone(spec: ModelSpec, tmp_path: Path) -> None:
    """Of another model, of the same one, or of something else entirely."""
    first = Recorder(tmp_path / "t", spec)
    feed(first, 0, 5)
    first.close()
    before = {p: p.read_bytes() for p in (tmp_path / "t").rglob("*.*")}
    other = ModelSpec(num_layers=3, num_experts=8, top_k=1)
    for model in (spec, other):
        with pytest.raises(UsageError, match="never overwritten"):
            Recorder(tmp_path / "t", model)
    assert {p: p.read_bytes() for p in (tmp_path / "t").rglob("*.*")} == before


def test_a_restarted_worker_goes_on(spec: ModelSpec, tmp_path: Path) -> None:
    """resume=True adds to what this rank committed before."""
    first = Recorder(tmp_path / "t", spec)
    a = feed(first, 0, 5)
    first.close()
    second = Recorder(tmp_path / "t", spec, resume=True)
    b = feed(second, 1, 6)
    assert np.array_equal(second.trace().ids, np.concatenate([a, b]))
    second.close()
    assert np.array_equal(load_trace(tmp_path / "t").ids, np.concatenate([a, b]))


def test_ranks_record_at_once(spec: ModelSpec, tmp_path: Path) -> None:
    """Four threads, one folder, many small shards: nothing is lost or mixed up."""
    found: dict[int, list[npt.NDArray[np.int64]]] = {}

    def serve(rank: int) -> None:
        recorder = Recorder(tmp_path / "t", spec, rank=rank, ranks=4, buffer_tokens=8)
        found[rank] = [feed(recorder, step, 5, seed=rank) for step in range(8)]
        recorder.close()

    threads = [threading.Thread(target=serve, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [found[rank][step] for step in range(8) for rank in range(4)]
    trace: Any = load_trace(tmp_path / "t")
    assert np.array_equal(trace.ids, np.concatenate(expected))
    assert np.array_equal(trace.source, np.tile(np.repeat(range(4), 5), 8))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12), buffer=st.integers(1, 15),
    broken=st.sets(st.integers(0, 11)),
)
def test_whatever_the_buffer_every_whole_step_is_kept(
    spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory, sizes: Any, buffer: int, broken: Any
) -> None:
    """Property: the trace is the concatenation of the steps that were completed."""
    folder = tmp_path_factory.mktemp("steps") / "t"
    recorder = Recorder(folder, spec, buffer_tokens=buffer)
    kept = [np.empty((0, 3, 2), int)]
    for step, tokens in enumerate(sizes):
        if step in broken:
            recorder.begin_step(step, np.arange(tokens))
            recorder.layer(0, np.zeros((tokens, 2), int))
        else:
            kept.append(feed(recorder, step, tokens))
    assert np.array_equal(recorder.trace().ids, np.concatenate(kept))
    recorder.close()
    assert np.array_equal(load_trace(folder).ids, np.concatenate(kept))


# ---- the disk fails ----------------------------------------------------------------------------


def test_a_disk_error_ends_the_recording_and_not_the_server(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What was committed stays; the failure has a reason, a log line and a count."""
    recorder = Recorder(tmp_path / "t", spec, buffer_tokens=10)
    kept = np.concatenate([feed(recorder, step, 5) for step in range(2)])
    feed(recorder, 2, 5)                        # hands the first ten tokens to the writer
    assert recorder.trace().num_tokens == 15
    monkeypatch.setattr(TraceWriter, "append", no_space)
    with caplog.at_level(logging.ERROR):
        for step in range(3, 12):
            feed(recorder, step, 5)             # the server never notices
        summary: Any = recorder.close()
    assert "no space left" in summary.failure and "no space left" in caplog.text
    assert summary.tokens == 10 and summary.tokens + summary.lost_tokens == 60
    assert np.array_equal(load_trace(tmp_path / "t").ids, kept)


def test_a_folder_that_turns_read_only_is_said_before_anything_is_lost(
    spec: ModelSpec, anyones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is, where it can be written again in time."""
    monkeypatch.setattr(token_buffer, "LOOK_EVERY_S", 0.0)
    recorder = Recorder(anyones / "t", spec, buffer_tokens=1000)
    kept = [feed(recorder, 0, 5)]
    assert recorder.trouble is None
    with read_only(anyones / "t"):
        kept.append(feed(recorder, 1, 5))
        assert "t: cannot be written to any more; what is recorded waits" in str(recorder.trouble)
    assert recorder.trouble is None
    assert recorder.close().lost_tokens == 0
    assert np.array_equal(load_trace(anyones / "t").ids, np.concatenate(kept))


def test_a_folder_that_stays_read_only_ends_the_recording_and_says_so_at_once(
    spec: ModelSpec, anyones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_buffer, "LOOK_EVERY_S", 0.0)
    recorder = Recorder(anyones / "t", spec, buffer_tokens=10)
    feed(recorder, 0, 10)
    with read_only(anyones / "t"):
        for step in range(1, 4):                # hands the first ten tokens to the writer
            feed(recorder, step, 10)
        assert "nothing more is recorded" in (recorder.trouble or "")
        summary = recorder.close()
    assert summary.tokens + summary.lost_tokens == 40 and summary.lost_tokens >= 30
    assert "ermission denied" in (summary.failure or "")


@pytest.fixture
def anyones() -> Iterator[Path]:
    """A folder that whoever the process becomes may look into."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder refuses writes meanwhile; root, whom no permission stops, becomes somebody."""
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def no_space(writer: TraceWriter, trace: object) -> None:
    raise LoadmasterError("cannot write: no space left on device")


FULL_DISK = """
import resource, signal, sys, numpy as np
from loadmaster.traces.recording import token_buffer
from loadmaster.traces.recording.recorder import Recorder
from loadmaster.traces.model_spec import ModelSpec
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = Recorder(sys.argv[1], ModelSpec(num_layers=3, num_experts=8, top_k=2), buffer_tokens=64)
for step in range(100):
    if step == 4:
        recorder.trace()  # waits until the first 64 tokens are committed
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    recorder.begin_step(step, np.arange(32))
    for layer in range(3):
        recorder.layer(layer, np.full((32, 2), step % 8))
    recorder.end_step()
print(recorder.close())
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """The operating system refuses bytes in the middle of a recording in another process."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "t")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "File too large" in done.stdout, done.stderr
    trace: Any = load_trace(tmp_path / "t")
    assert trace.num_tokens == 64 and (trace.ids[:32] == 0).all()
    leftovers = [p for p in (tmp_path / "t").rglob("*") if p.name.startswith(".")]
    assert leftovers == []
