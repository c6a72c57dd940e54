"""A stored trace comes back bit for bit, says so when it cannot, and never eats another file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, LoadmasterError, UsageError
from loadmaster.traces.load import load_trace
from loadmaster.traces.storage.manifest import Manifest, create_manifest, read_manifest
from loadmaster.traces.storage.store import TraceWriter, open_trace, save_trace
from loadmaster.traces.trace import RoutingTrace

COLUMNS = ("gates", "k_of_token", "step", "request", "source", "phase", "domain")


def everything_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its content."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def equal(a: RoutingTrace, b: RoutingTrace) -> bool:
    same = a.digest() == b.digest() and a.domain_names == b.domain_names
    return same and a.layer_indices == b.layer_indices and a.model_name == b.model_name


def test_a_trace_comes_back_as_it_was(make_trace: Any, tmp_path: Path) -> None:
    """All columns, names and layer numbers survive the trip."""
    trace = make_trace()
    save_trace(trace, tmp_path / "t")
    assert equal(load_trace(tmp_path / "t"), trace)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tokens=st.integers(1, 60), layers=st.integers(1, 4), seed=st.integers(0, 9),
    experts=st.sampled_from([2, 256, 257, 900]), full=st.booleans(),
)
def test_any_shape_comes_back(
    make_trace: Any, tmp_path_factory: pytest.TempPathFactory, tokens: int, layers: int,
    experts: int, seed: int, full: bool,
) -> None:
    """One or two bytes per id, one token or many, with and without columns."""
    trace = make_trace(tokens, layers, experts, 2, seed, full)
    folder = tmp_path_factory.mktemp("any") / "t"
    save_trace(trace, folder)
    assert equal(load_trace(folder), trace)


def test_the_folder_is_what_the_documentation_says(make_trace: Any, tmp_path: Path) -> None:
    """One fixed-width binary column per layer, a manifest with a hash per shard, nothing else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    save_trace(make_trace(experts=300), tmp_path / "t")
    files = everything_in(tmp_path / "t")
    assert sorted(files) == ["manifest.json", "rank-000/shard-00000.parquet"]
    schema = pq.read_schema(tmp_path / "t/rank-000/shard-00000.parquet")
    assert schema.field("ids_002").type == pa.binary(2 * 2)
    assert json.loads(files["manifest.json"])["schema_version"] == 1


def test_two_layers_are_read_without_the_rest(make_trace: Any, tmp_path: Path) -> None:
    """Layers and columns come alone; the bytes of other columns are not even looked at."""
    import pyarrow.parquet as pq

    trace = make_trace(tokens=4000, layers=6, experts=64, full=True)
    save_trace(trace, tmp_path / "t")
    shard = tmp_path / "t/rank-000/shard-00000.parquet"
    group = pq.read_metadata(shard).row_group(0)
    spoilt = bytearray(shard.read_bytes())
    for i in range(group.num_columns):
        chunk = group.column(i)
        if chunk.path_in_schema not in ("ids_001", "ids_004", "step"):
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            spoilt[start : start + chunk.total_compressed_size] = b"\xff" * (
                chunk.total_compressed_size
            )
    shard.write_bytes(spoilt)
    part: Any = open_trace(tmp_path / "t", verify=False).read(layers=[4, 1], columns=["step"])
    assert np.array_equal(part.ids, trace.ids[:, [4, 1]])
    assert np.array_equal(part.step, trace.step) and part.request is None
    assert part.layer_indices == (5, 2)
    with pytest.raises(InputError, match="sha256"):
        open_trace(tmp_path / "t")


def test_appended_shards_follow_one_another(make_trace: Any, tmp_path: Path) -> None:
    """A writer's shards are read in the order they were appended."""
    trace = make_trace(tokens=100)
    begin(tmp_path / "t", trace)
    writer = TraceWriter(tmp_path / "t")
    for start in range(0, 100, 30):
        writer.append(trace.select(np.arange(start, min(start + 30, 100))))
    assert [s.tokens for s in read_manifest(tmp_path / "t").shards] == [30, 30, 30, 10]
    assert equal(load_trace(tmp_path / "t"), trace)


def test_ranks_share_a_folder_and_are_merged_by_step(make_trace: Any, tmp_path: Path) -> None:
    """Tokens come by step, then rank, in whatever order the ranks committed."""
    trace = make_trace(tokens=96)
    begin(tmp_path / "t", trace, ranks=2)
    odd = np.arange(96) % 2 == 1
    for rank in (1, 0):
        TraceWriter(tmp_path / "t", rank).append(trace.select(odd == bool(rank)))
    order = np.lexsort((np.arange(96), odd, trace.step))
    assert equal(load_trace(tmp_path / "t"), trace.select(order))
    assert equal(open_trace(tmp_path / "t").read(rank=1), trace.select(odd))
    without_step: Any = open_trace(tmp_path / "t").read(columns=["request"])
    assert without_step.step is None
    assert np.array_equal(without_step.request, trace.request[order])


def test_an_empty_trace_can_be_read(make_trace: Any, tmp_path: Path) -> None:
    """Begun and never written to: no tokens, the right shape."""
    begin(tmp_path / "t", make_trace())
    trace: Any = load_trace(tmp_path / "t")
    assert trace.ids.shape == (0, 3, 2) and trace.num_experts == 8


# ---- what is broken says so --------------------------------------------------------------------


@pytest.fixture
def stored(make_trace: Any, tmp_path: Path) -> Any:
    save_trace(make_trace(), tmp_path / "t")
    return tmp_path / "t"


def shard_of(folder: Path) -> Any:
    return folder / "rank-000/shard-00000.parquet"


def test_a_truncated_shard_is_named(stored: Path) -> None:
    shard = shard_of(stored)
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"shard-00000.*cut short"):
        load_trace(stored)


def test_an_altered_shard_is_named(stored: Path) -> None:
    shard = shard_of(stored)
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"shard-00000.*sha256.*altered"):
        load_trace(stored)


def test_a_missing_shard_is_named(stored: Path) -> None:
    shard_of(stored).unlink()
    with pytest.raises(InputError, match=r"shard-00000.*not there"):
        load_trace(stored)


def test_a_link_instead_of_a_shard_is_refused(stored: Path, tmp_path: Path) -> None:
    """A manifest must not be able to make us read files elsewhere."""
    shard = shard_of(stored)
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        load_trace(stored)
    shard.unlink()
    shard.parent.rename(tmp_path / "folder")
    (tmp_path / "folder/shard-00000.parquet").write_bytes((tmp_path / "elsewhere").read_bytes())
    shard.parent.symlink_to(tmp_path / "folder")
    with pytest.raises(InputError, match="is a link"):
        load_trace(stored)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret.parquet", "rank-000/../../x.parquet", "shard-00000.parquet",
             "rank-000/shard-00000.parquet/../../../x"],
)
def test_shard_names_cannot_leave_the_folder(stored: Path, name: str) -> None:
    change_manifest(stored, lambda m: m["shards"][0].update(name=name))
    with pytest.raises(InputError, match=r"shards.*not of the form rank-NNN"):
        load_trace(stored)


def test_a_newer_manifest_is_refused_with_a_way_out(stored: Path) -> None:
    """Also when it has fields that this version cannot know."""
    change_manifest(stored, lambda m: m.update(schema_version=7, compression="quantum"))
    with pytest.raises(InputError, match=r"version 7 is newer.*upgrade"):
        load_trace(stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(num_experts=1), "top_k 2 is larger than num_experts 1"),
        (lambda m: m.update(layer_indices=[1]), "names 1 of 3 layers"),
        (lambda m: m.update(columns=["colour"]), "columns"),
        (lambda m: m["shards"].append(m["shards"][0]), "listed twice"),
        (lambda m: m["shards"][0].update(tokens=0), "tokens"),
        (lambda m: m.pop("schema_version"), "no schema_version"),
        (lambda m: m.update(surprise=1), "surprise"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    stored: Path, change: Any, message: str
) -> None:
    change_manifest(stored, change)
    with pytest.raises(InputError, match=message) as caught:
        load_trace(stored)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_contradicts_its_shard_is_refused(stored: Path) -> None:
    """The shard is whole, but it is another trace's."""
    change_manifest(stored, lambda m: m.update(top_k=1))
    with pytest.raises(InputError, match="ids_000"):
        load_trace(stored)
    change_manifest(stored, lambda m: (m.update(top_k=2), m["shards"][0].update(tokens=3)))
    with pytest.raises(InputError, match="manifest says 3 tokens"):
        load_trace(stored)


def test_ids_out_of_range_in_a_shard_are_refused(stored: Path) -> None:
    """A whole, hashed shard may still hold ids that are no experts of the manifest's model."""
    change_manifest(stored, lambda m: m.update(num_experts=5))
    with pytest.raises(InputError, match=r"not all in \[0, 5\)"):
        load_trace(stored)


def test_cut_manifests_never_crash(stored: Path) -> None:
    """Whatever prefix of a manifest is left: one line, no traceback of another kind."""
    manifest = stored / "manifest.json"
    text = manifest.read_text()
    for cut in range(0, len(text) - 2, 37):
        manifest.write_text(text[:cut])
        with pytest.raises(InputError):
            load_trace(stored)
    manifest.write_text("[" * 100_000)
    with pytest.raises(InputError, match="not JSON that can be read: nested too deeply"):
        load_trace(stored)


def test_what_is_not_a_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such"):
        open_trace(tmp_path / "absent")
    with pytest.raises(InputError, match="not a stored trace"):
        open_trace(tmp_path)


def test_layers_and_columns_that_are_not_there_are_named(stored: Path) -> None:
    opened: Any = open_trace(stored)
    with pytest.raises(InputError, match=r"layers 0\.\.2"):
        opened.read(layers=[3])
    with pytest.raises(InputError, match="did not record"):
        opened.read(columns=["step", "colour"])


# ---- writing never harms -----------------------------------------------------------------------


def test_existing_files_are_never_overwritten(
    make_trace: Any, stored: Path, tmp_path: Path
) -> None:
    """Neither by a second save, nor by a writer, nor where other files lie, nor over a file."""
    before = everything_in(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    for target in ("t", "notes", "file"):
        with pytest.raises(UsageError, match="never overwritten"):
            save_trace(make_trace(seed=1), tmp_path / target)
    with pytest.raises(UsageError, match="never overwritten"):
        TraceWriter(stored)
    with pytest.raises(UsageError, match="never overwritten"):
        begin(stored, make_trace())
    after = everything_in(tmp_path)
    assert after.pop("notes/mine.txt") == b"mine" and after.pop("file") == b"a file"
    assert after == before


def test_a_bad_trace_leaves_nothing_behind(make_trace: Any, tmp_path: Path) -> None:
    """Ids out of range are found before a byte is written."""
    trace = make_trace(full=False)
    ids = trace.ids.copy()
    ids[7, 1, 0] = 9
    bad = RoutingTrace(ids=ids, num_experts=8, layer_indices=trace.layer_indices)
    with pytest.raises(InputError, match="token 7, layer 1"):
        save_trace(bad, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_another_model_are_refused(make_trace: Any, tmp_path: Path) -> None:
    begin(tmp_path / "t", make_trace())
    writer = TraceWriter(tmp_path / "t")
    with pytest.raises(InputError, match="one model"):
        writer.append(make_trace(layers=2))
    with pytest.raises(InputError, match="lack them"):
        writer.append(make_trace(full=False))
    assert read_manifest(tmp_path / "t").shards == ()


def test_ranks_must_name_domains_alike(make_trace: Any, tmp_path: Path) -> None:
    trace = make_trace()
    begin(tmp_path / "t", trace, ranks=2)
    TraceWriter(tmp_path / "t").append(trace)
    other = RoutingTrace(**{**vars(trace), "domain_names": ("code", "chat")})
    with pytest.raises(InputError, match="number them alike"):
        TraceWriter(tmp_path / "t", 1).append(other)


def test_a_rank_that_is_not_part_of_the_recording_is_refused(
    make_trace: Any, tmp_path: Path
) -> None:
    begin(tmp_path / "t", make_trace(), ranks=2)
    with pytest.raises(InputError, match="2 ranks, rank 2"):
        TraceWriter(tmp_path / "t", 2)


def test_a_shard_that_a_crash_left_uncommitted_does_not_count(
    make_trace: Any, tmp_path: Path
) -> None:
    """The manifest is written last: without its line a shard is not there, nor in the way."""
    trace = make_trace(tokens=60)
    begin(tmp_path / "t", trace)
    TraceWriter(tmp_path / "t").append(trace.select(np.arange(30)))
    orphan = tmp_path / "t/rank-000/shard-00001.parquet"
    orphan.write_bytes(b"half a shard")
    assert load_trace(tmp_path / "t").num_tokens == 30
    writer = TraceWriter(tmp_path / "t", resume=True)
    assert writer.tokens == 30
    writer.append(trace.select(np.arange(30, 60)))
    assert equal(load_trace(tmp_path / "t"), trace)
    assert orphan.read_bytes() == b"half a shard"


WRITE_FOREVER = """
import sys, numpy as np
from loadmaster.traces.storage.store import TraceWriter
from loadmaster.traces.trace import RoutingTrace
writer = TraceWriter(sys.argv[1])
ids = np.zeros((500, 3, 2), np.uint8) + np.arange(2, dtype=np.uint8)
piece = RoutingTrace.from_arrays(ids, num_experts=8)
print("ready", flush=True)
while True:
    writer.append(piece)
"""


@pytest.mark.parametrize("wait_shards", [1, 3])
def test_killed_while_writing_the_committed_shards_are_whole(
    make_trace: Any, tmp_path: Path, wait_shards: int
) -> None:
    """SIGKILL at any moment: the trace opens and holds whole shards only."""
    begin(tmp_path / "t", make_trace(full=False))
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(tmp_path / "t")], stdout=subprocess.PIPE
    )
    while len(read_manifest(tmp_path / "t").shards) < wait_shards:
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trace: Any = load_trace(tmp_path / "t")
    assert trace.num_tokens >= 500 * wait_shards and trace.num_tokens % 500 == 0
    TraceWriter(tmp_path / "t", resume=True).append(trace)
    assert load_trace(tmp_path / "t").num_tokens == 2 * trace.num_tokens


FULL_DISK = """
import resource, signal, sys, numpy as np
from loadmaster.errors import LoadmasterError
from loadmaster.traces.storage.store import save_trace
from loadmaster.traces.trace import RoutingTrace
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ids = np.random.default_rng(0).integers(0, 8, (20000, 3, 1))
trace = RoutingTrace.from_arrays(ids, num_experts=8)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_trace(trace, sys.argv[1])
except LoadmasterError as error:
    print(error)
"""


def test_a_full_disk_leaves_no_folder(tmp_path: Path) -> None:
    """The operating system refuses bytes: one line says so, and nothing is half written."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "t")], capture_output=True, text=True
    )
    assert "cannot write: File too large" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_reported(make_trace: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadmasterError, match=r"file/t: .* is no folder"):
        save_trace(make_trace(), tmp_path / "file/t")


def begin(folder: Path, trace: RoutingTrace, ranks: int = 1) -> None:
    """An empty trace for this one's tokens."""
    create_manifest(folder, Manifest(
        model_name=trace.model_name, num_layers=trace.num_layers, num_experts=trace.num_experts,
        top_k=trace.top_k, layer_indices=trace.layer_indices, ranks=ranks,
        columns=tuple(c for c in COLUMNS if getattr(trace, c) is not None),
    ))


def change_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
