"""Responses, folders, tables and histories: read as what they are, row by row."""

from __future__ import annotations

import base64
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from loadmaster.errors import InputError
from loadmaster.traces.formats import Asked, ImportResult, RoutesResult, import_any, open_any
from loadmaster.traces.formats.tables import row_loads, row_routes
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.storage.store import open_trace, save_blocks
from loadmaster.traces.trace import RoutingTrace

from .test_routes import routing

Ids = npt.NDArray[Any]

MODEL = ModelSpec(
    name="toy", num_layers=2, num_experts=16, top_k=4, layer_indices=(1, 2), total_layers=3
)


def hidden(ids: Ids) -> Ids:
    """As engines return it: a row of zeros for the dense layer 0."""
    return np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1)


def npy(ids: Ids) -> str:
    file = io.BytesIO()
    np.save(file, ids.astype(np.uint8))
    return base64.b64encode(file.getvalue()).decode()


def raw(ids: Ids) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trace_of(found: ImportResult) -> RoutingTrace:
    assert found.trace is not None
    return found.trace


# ---- responses --------------------------------------------------------------------------------

REQUESTS = [routing(tokens=n, layers=2, seed=n) for n in (7, 1, 12)]


@pytest.mark.parametrize("wrap", [
    lambda ids: {"choices": [{"index": 0, "routed_experts": npy(hidden(ids))}]},
    lambda ids: {"meta_info": {"routed_experts": raw(hidden(ids))}, "text": ""},
    lambda ids: {"sglext": {"routed_experts": raw(hidden(ids))}},
    lambda ids: {"nvext": {"routed_experts": npy(hidden(ids))}},
    lambda ids: {"response": {"body": {"choices": [{"routed_experts": hidden(ids).tolist()}]}}},
], ids=["vllm", "sglang", "sglang openai", "dynamo", "batch file of lists"])
def test_responses_are_requests_of_a_trace(tmp_path: Path, wrap: Any) -> None:
    rows = [wrap(ids) for ids in REQUESTS]
    lines = import_any(write_lines(tmp_path / "r.jsonl", rows), model=MODEL)
    (tmp_path / "r.json").write_text(json.dumps(rows))
    document = import_any(tmp_path / "r.json", model=MODEL)
    for found in (lines, document):
        trace = trace_of(found)
        assert np.array_equal(trace.ids, np.concatenate(REQUESTS))
        assert trace.request is not None
        assert trace.request.tolist() == [0] * 7 + [1] + [2] * 12
        assert trace.layer_indices == (1, 2) and "3 requests" in found.notes


def test_without_a_model_shapes_tell_and_numbers_without_one_ask(tmp_path: Path) -> None:
    told = write_lines(tmp_path / "t.jsonl", [{"choices": [{"routed_experts": npy(hidden(ids))}]}
                                              for ids in REQUESTS])
    assert trace_of(import_any(told, num_experts=16)).layer_indices == (1, 2)
    with pytest.raises(InputError, match="give num_experts"):
        import_any(told)
    flat = write_lines(tmp_path / "f.jsonl", [{"meta_info": {"routed_experts": raw(REQUESTS[0])}}])
    with pytest.raises(InputError, match=r"f\.jsonl, row 1: .* without a shape: give model"):
        import_any(flat, num_experts=16)


def test_two_choices_of_a_response_are_two_requests_and_failures_are_skipped(
    tmp_path: Path
) -> None:
    rows = [{"error": "busy"}, {"choices": [{"routed_experts": npy(ids)} for ids in REQUESTS[:2]]}]
    found = import_any(write_lines(tmp_path / "r.jsonl", rows), num_experts=16)
    assert found.notes[:2] == ("2 requests", "1 responses without routed_experts skipped")


@pytest.mark.parametrize(("value", "said"), [
    ("%%%", "row 1: routed_experts is not base64"),
    (base64.b64encode(b"\x93NUMPY\x01\x00").decode(), "row 1: routed_experts is a broken .npy"),
    (npy(REQUESTS[0])[:-8], "row 1: routed_experts is a broken .npy: it says"),
    (7, "row 1: routed_experts is a int"),
    ([[[1, "x"]]], "row 1: routed_experts is no array"),
    ([[1, 2]], r"row 1: holds int64 \[1, 2\], not ids"),
    (base64.b64encode(b"12345").decode(), "nor whole int32"),
])
def test_a_response_that_is_broken_is_named(tmp_path: Path, value: Any, said: str) -> None:
    path = write_lines(tmp_path / "r.jsonl", [{"choices": [{"routed_experts": value}]}])
    with pytest.raises(InputError, match=said) as caught:
        import_any(path, num_experts=16)
    assert "\n" not in str(caught.value)


def test_a_header_that_lies_takes_no_memory(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 3, 4)}
    )
    path = write_lines(tmp_path / "r.jsonl", [
        {"choices": [{"routed_experts": base64.b64encode(file.getvalue()).decode()}]}
    ])
    with pytest.raises(InputError, match=r"it says .* which is not what it holds"):
        import_any(path, num_experts=16)


def test_responses_of_several_models_are_refused(tmp_path: Path) -> None:
    rows = [{"choices": [{"routed_experts": npy(routing(layers=n))}]} for n in (2, 3)]
    with pytest.raises(InputError, match=r"row 2: holds 3 layers x top-4, those before 2 x top-4"):
        import_any(write_lines(tmp_path / "r.jsonl", rows), num_experts=16)


# ---- a folder, one file per request -----------------------------------------------------------


def test_a_folder_of_npy_is_a_trace_of_requests(tmp_path: Path) -> None:
    """In the order of their numbers: req10 after req9."""
    for number in (0, 9, 10):
        np.save(tmp_path / f"req{number}.npy", hidden(routing(tokens=5 + number, layers=2)))
    found = import_any(tmp_path, model=MODEL)
    trace = trace_of(found)
    assert trace.request is not None
    assert np.bincount(trace.request).tolist() == [5, 14, 15]
    assert "3 requests, req0.npy to req10.npy" in found.notes
    np.save(tmp_path / "req11.npy", np.zeros((3, 4), int))
    with pytest.raises(InputError, match=r"req11\.npy: holds int64 \[3, 4\], not ids"):
        import_any(tmp_path, model=MODEL)


def test_a_folder_of_several_kinds_is_a_question(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", routing())
    (tmp_path / "b.csv").write_text("x\n1\n")
    with pytest.raises(InputError, match=r"several kinds \(.npy, .csv\): name one of them"):
        import_any(tmp_path)


# ---- tables of routes -------------------------------------------------------------------------


def by_token(ids: Ids, layers: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(token, layer, expert), token by token."""
    return [(t, layer, int(e)) for t in range(len(ids))
            for layer, row in zip(layers, ids[t], strict=True) for e in row]


def by_layer(ids: Ids, layers: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """As a pass runs: all tokens of a layer, then the next."""
    return [(t, layer, int(e)) for i, layer in enumerate(layers)
            for t in range(len(ids)) for e in ids[t, i]]


def table(path: Path, header: str, rows: list[tuple[Any, ...]]) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.mark.parametrize("order", [by_token, by_layer])
def test_a_table_with_tokens_is_read_in_either_order(tmp_path: Path, order: Any) -> None:
    ids = routing(tokens=30, layers=2)
    path = table(tmp_path / "t.csv", "token,layer,expert", order(ids, (3, 7)))
    trace = trace_of(import_any(path, num_experts=16))
    assert np.array_equal(trace.ids, ids) and trace.layer_indices == (3, 7)


def test_a_table_without_tokens_takes_runs_of_a_layer_with_a_word(tmp_path: Path) -> None:
    ids = routing(tokens=30, layers=2)
    rows = [row[1:] for row in by_token(ids, (0, 1))]
    found = import_any(table(tmp_path / "t.csv", "layer,expert", rows), num_experts=16)
    assert np.array_equal(trace_of(found).ids, ids)
    assert "each 4 rows of one layer are one token's choice" in " ".join(found.notes)


def test_passes_without_tokens_need_the_top_k(tmp_path: Path) -> None:
    ids = routing(tokens=30, layers=2)
    passes = [*by_layer(ids[:10], (0, 1)), *by_layer(ids[10:], (0, 1))]
    path = table(tmp_path / "t.csv", "layer,expert", [row[1:] for row in passes])
    with pytest.raises(InputError, match=r"row 1: expert \d+ twice in 40 rows .* top_k"):
        import_any(path, num_experts=16)
    assert np.array_equal(trace_of(import_any(path, num_experts=16, top_k=4)).ids, ids)


def test_runs_of_other_lengths_need_the_top_k(tmp_path: Path) -> None:
    rows = [(0, 1), (0, 2), (1, 3), (1, 4), (0, 5), (0, 6), (0, 7), (0, 8), (1, 9), (1, 10)]
    path = table(tmp_path / "t.csv", "layer,expert", rows)
    with pytest.raises(InputError, match=r"row 5: 4 rows of one layer, 2 before: .* top_k"):
        import_any(path, num_experts=16)


@pytest.mark.parametrize("write", ["[{0}, {1}, {2}, {3}]", "{0} {1} {2} {3}", "{0};{1};{2};{3}"])
def test_a_row_may_list_a_tokens_experts(tmp_path: Path, write: str) -> None:
    ids = routing(tokens=9, layers=2)
    rows = [(t // 3, t, layer, '"' + write.format(*ids[t, layer]) + '"')
            for t in range(9) for layer in range(2)]
    path = table(tmp_path / "t.csv", "request_id,position,layer_id,topk_ids", rows)
    trace = trace_of(import_any(path, num_experts=16))
    assert np.array_equal(trace.ids, ids)
    assert trace.request is not None and trace.request.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_lines_of_routes_are_the_same(tmp_path: Path) -> None:
    ids = routing(tokens=9, layers=2)
    rows = [{"request": f"r{t // 5}", "token": t, "layer": layer, "experts": ids[t, layer].tolist()}
            for t in range(9) for layer in range(2)]
    trace = trace_of(import_any(write_lines(tmp_path / "t.jsonl", rows), num_experts=16))
    assert np.array_equal(trace.ids, ids)
    assert trace.request is not None and trace.request.tolist() == [0] * 5 + [1] * 4


@pytest.mark.parametrize(("rows", "said"), [
    ([(0, 0, 1), (0, 1, 2), (1, 0, 3)], "a token lacks layer 1"),
    ([(0, 0, 1), (1, 0, 3), (1, 1, 2)], "a token lacks layer 1"),
    ([(0, 0, "x")], "row 1: expert is 'x'"),
    ([(0, -1, 2)], "row 1: layer is '-1'"),
])
def test_a_table_that_is_not_whole_is_named(
    tmp_path: Path, rows: list[tuple[Any, ...]], said: str
) -> None:
    path = table(tmp_path / "t.csv", "token,layer,expert", rows)
    with pytest.raises(InputError, match=said):
        import_any(path, num_experts=16)


def test_columns_that_are_neither_are_told_what_they_should_be(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "a,b", [(1, 2)])
    with pytest.raises(InputError, match=r"columns \['a', 'b'\] are neither .* layer and expert"):
        import_any(path)


def test_a_long_table_is_imported_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of reading and of writing on; the trace is the same as that of the whole."""
    monkeypatch.setattr(row_routes, "FLUSH_TOKENS", 64)
    monkeypatch.setattr("loadmaster.traces.formats.cleaning.found_routes.BLOCK_TOKENS", 256)
    monkeypatch.setattr("loadmaster.traces.formats.cleaning.repeated_routes.SAMPLE_TOKENS", 256)

    def peak(tokens: int) -> int:
        ids = routing(tokens=tokens, layers=2)
        path = table(tmp_path / f"{tokens}.csv", "token,layer,expert", by_token(ids, (0, 1)))
        out = tmp_path / f"{tokens}"
        asked = Asked(num_experts=16)
        tracemalloc.start()
        found = open_any(path, asked)
        assert isinstance(found, RoutesResult)
        save_blocks(found.routes.blocks(), out)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.array_equal(open_trace(out).read().ids, ids)
        return most

    peak(500)                   # what imports take
    assert peak(8_000) < 1.5 * peak(2_000)


# ---- tables of counts -------------------------------------------------------------------------


def test_counts_by_row_are_loads(tmp_path: Path) -> None:
    """An expert that is not named had no token; layers keep their numbers."""
    path = table(tmp_path / "c.csv", "layer_id,expert_id,count",
                 [(3, 0, 5), (3, 2, 7), (5, 1, 2), (5, 0, 1)])
    found = import_any(path, num_experts=4)
    assert found.profile is not None and found.profile.layer_indices == (3, 5)
    assert found.profile.load_WLE.tolist() == [[[5, 0, 7, 0], [1, 2, 0, 0]]]
    guessed = import_any(path)
    assert guessed.profile is not None and guessed.profile.num_experts == 3
    assert "3 experts per layer, going by the largest id" in " ".join(guessed.notes)


def test_counts_of_ranks_beside_each_other_are_summed(tmp_path: Path) -> None:
    for rank, count in ((0, 5), (1, 7), (10, 100)):
        table(tmp_path / f"load_rank{rank}.csv", "layer,expert,count", [(0, 0, count), (0, 1, 1)])
    (tmp_path / "load_rank1.json").write_text("{}")
    for given in (tmp_path / "load_rank0.csv", tmp_path / "load_rank10.csv"):
        found = import_any(given)
        assert found.profile is not None and found.profile.load_LE.tolist() == [[112, 3]]
        assert "counts of 3 ranks summed: load_rank0.csv, load_rank1.csv" in found.notes[0]
    (tmp_path / "load_rank1.json").unlink()
    whole = import_any(tmp_path)
    assert whole.profile is not None and whole.profile.load_LE.tolist() == [[112, 3]]


def test_one_rank_alone_is_warned_of(tmp_path: Path) -> None:
    path = table(tmp_path / "c_rank3.csv", "layer,expert,count", [(0, 0, 5), (0, 1, 1)])
    assert "warning: by its name these are rank 3's counts alone" in import_any(path).notes[0]


def test_lines_of_counts_are_windows(tmp_path: Path) -> None:
    rows = [{"iteration": i, "layer": layer, "tokens_per_expert": [i + 1, layer, 2]}
            for i in range(3) for layer in (4, 6)]
    found = import_any(write_lines(tmp_path / "c.jsonl", rows))
    assert found.profile is not None and found.profile.layer_indices == (4, 6)
    assert found.profile.load_WLE.tolist() == [
        [[i + 1, 4, 2], [i + 1, 6, 2]] for i in range(3)
    ]
    with pytest.raises(InputError, match=r"row 7: lists 2 experts, those before 3"):
        import_any(write_lines(tmp_path / "d.jsonl", [
            *rows, {"iteration": 3, "layer": 4, "tokens_per_expert": [1, 2]}
        ]))


def test_more_windows_than_are_kept_are_summed_to_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_loads, "MOST_WINDOWS", 8)
    rows = [{"step": i, "layer": 0, "expert_counts": [i, 1]} for i in range(100)]
    found = import_any(write_lines(tmp_path / "c.jsonl", rows))
    assert found.profile is not None and found.profile.num_windows <= 8
    assert found.profile.load_LE.tolist() == [[sum(range(100)), 100]]
    assert "16 numbers of step together are a window" in found.notes


# ---- documents of counts ----------------------------------------------------------------------

WINDOWS = np.random.default_rng(0).integers(1, 99, (3, 2, 5)).tolist()


@pytest.mark.parametrize(("document", "expected"), [
    ({"logical_count": WINDOWS[0]}, [WINDOWS[0]]),
    ({"logical_count": WINDOWS}, [np.sum(WINDOWS, axis=0).tolist()]),      # a ring: one window
    ({"load_history": [{"logical_expert_load": w} for w in WINDOWS]}, WINDOWS),
    ([{"expert_load": w, "step": i} for i, w in enumerate(WINDOWS)], WINDOWS),
    ({"expert_load": WINDOWS}, WINDOWS),
    (WINDOWS[0], [WINDOWS[0]]),
    (WINDOWS, WINDOWS),
])
def test_histories_are_read_however_they_are_wrapped(
    tmp_path: Path, document: Any, expected: Any
) -> None:
    (tmp_path / "h.json").write_text(json.dumps(document))
    profile = import_any(tmp_path / "h.json").profile
    assert profile is not None and profile.load_WLE.tolist() == expected


def test_layers_by_number_keep_it(tmp_path: Path) -> None:
    document = {"loads": {"12": WINDOWS[0][0], "3": WINDOWS[0][1]}}
    (tmp_path / "h.json").write_text(json.dumps(document))
    profile = import_any(tmp_path / "h.json").profile
    assert profile is not None and profile.layer_indices == (3, 12)
    assert profile.load_WLE.tolist() == [[WINDOWS[0][1], WINDOWS[0][0]]]


def test_counts_of_slots_are_summed_to_experts(tmp_path: Path) -> None:
    """A line of statistics with the map that was active."""
    rows = [{"record_type": "stats", "expert_load": [[1, 2, 4], [8, 16, 32]],
             "p2l_map": [[0, 1, 0], [1, 1, 0]]}] * 2
    profile = import_any(write_lines(tmp_path / "s.jsonl", rows)).profile
    assert profile is not None
    assert profile.load_WLE.tolist() == [[[5, 2], [32, 24]]] * 2


@pytest.mark.parametrize(("document", "said"), [
    ({"physical_to_logical_map": [[0, 1]]}, "plan-import .* --format sglang"),
    ({"layer_list": []}, "plan-import .* --format vllm_ascend"),
    ([{"conversations": []}], "trace record --text"),
    ([{"timestamp": 1, "input_length": 2}], "simulate .* --arrivals"),
    ({"a": 1}, "neither counts per expert, nor responses"),
    ({"load_history": [{"load": [[1, 2]]}, {"load": [[1, 2, 3]]}]}, "different shapes"),
])
def test_a_document_of_something_else_is_sent_where_it_belongs(
    tmp_path: Path, document: Any, said: str
) -> None:
    (tmp_path / "d.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=said):
        import_any(tmp_path / "d.json")


def test_lines_of_matrices_are_windows_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadmaster.traces.formats.tables.load_documents.MOST_WINDOWS", 8)
    rows = [{"step": i, "expert_load": (np.array(WINDOWS[i % 3]) + i).tolist()} for i in range(50)]
    found = import_any(write_lines(tmp_path / "h.jsonl", rows))
    assert found.profile is not None and found.profile.num_windows == 7
    expected = np.array([row["expert_load"] for row in rows])
    assert np.array_equal(found.profile.load_WLE[0], expected[:8].sum(axis=0))
    assert np.array_equal(found.profile.load_LE, expected.sum(axis=0))
    assert "8 lines together are a window" in found.notes
    with pytest.raises(InputError, match="row 51: holds no loads"):
        import_any(write_lines(tmp_path / "h.jsonl", [*rows, {"step": 50}]))
    with pytest.raises(InputError, match=r"row 51: holds loads \[1, 2\], the lines before"):
        import_any(write_lines(tmp_path / "h.jsonl", [*rows, {"expert_load": [[1, 2]]}]))


# ---- more of the same -------------------------------------------------------------------------


def test_a_column_per_choice_is_a_tokens_choice(tmp_path: Path) -> None:
    ids = routing(tokens=9, layers=2)
    rows = [(t, layer, *ids[t, layer]) for t in range(9) for layer in range(2)]
    path = table(tmp_path / "t.csv", "token,layer,expert_0,expert_1,expert_2,expert_3", rows)
    assert np.array_equal(trace_of(import_any(path, num_experts=16)).ids, ids)
    bare = table(tmp_path / "u.csv", "layer,topk_1,topk_2,topk_3,topk_4", [r[1:] for r in rows])
    assert np.array_equal(trace_of(import_any(bare, num_experts=16)).ids, ids)


def test_a_column_per_expert_is_counts_with_a_word(tmp_path: Path) -> None:
    path = table(tmp_path / "c.csv", "step,layer,expert_0,expert_1,expert_2",
                 [(0, 4, 5, 6, 7), (1, 4, 1, 0, 2)])
    found = import_any(path)
    assert found.profile is not None
    assert found.profile.load_WLE.tolist() == [[[5, 6, 7]], [[1, 0, 2]]]
    assert "taken for the counts of one expert each" in " ".join(found.notes)


@pytest.mark.parametrize("document", [
    {"layers": [{"layer_id": 12, "expert_load": [4, 0, 9]},
                {"layer_id": 3, "expert_load": [7, 1, 2]}]},
    {"layer_12": [4, 0, 9], "layer_3": [7, 1, 2]},
    {"loads": {"12": {"2": 9, "0": 4}, "3": {"0": 7, "1": 1, "2": 2}}},
])
def test_layers_may_be_named_or_listed(tmp_path: Path, document: Any) -> None:
    (tmp_path / "d.json").write_text(json.dumps(document))
    profile = import_any(tmp_path / "d.json").profile
    assert profile is not None and profile.layer_indices == (3, 12)
    assert profile.load_WLE.tolist() == [[[7, 1, 2], [4, 0, 9]]]


def test_arrays_of_ranks_beside_each_other_are_summed_too(tmp_path: Path) -> None:
    loads = np.arange(1, 13).reshape(3, 4)
    for rank in (0, 1, 2):
        np.save(tmp_path / f"load_rank{rank}.npy", loads * (rank + 1))
    found = import_any(tmp_path / "load_rank1.npy")
    assert found.profile is not None and np.array_equal(found.profile.load_LE, loads * 6)
    assert "counts of 3 ranks summed" in found.notes[0]
    np.save(tmp_path / "load_rank3.npy", loads[:2])
    with pytest.raises(InputError, match="other shapes or layers than"):
        import_any(tmp_path / "load_rank1.npy")


@pytest.mark.parametrize("mark", [";", "\t"])
def test_tables_may_be_split_by_semicolons_or_tabs(tmp_path: Path, mark: str) -> None:
    rows = ["layer,expert,count", "0,0,5", "0,1,7"]
    (tmp_path / "c.csv").write_text("\n".join(rows).replace(",", mark))
    profile = import_any(tmp_path / "c.csv").profile
    assert profile is not None and profile.load_LE.tolist() == [[5, 7]]


def test_a_folder_of_responses_is_all_of_them(tmp_path: Path) -> None:
    for part in (0, 1):
        write_lines(tmp_path / f"part{part}.jsonl",
                    [{"choices": [{"routed_experts": npy(ids)}]} for ids in REQUESTS])
    (tmp_path / "notes.json").write_text("{}")
    found = import_any(tmp_path, num_experts=16)
    assert trace_of(found).num_tokens == 40 and "6 requests" in found.notes
