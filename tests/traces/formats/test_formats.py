"""Importers: the right routing out of other tools' files, and a plain word on what is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import InputError
from loadmaster.traces.formats import ImportResult, import_any
from loadmaster.traces.load import load_trace
from loadmaster.traces.storage.store import save_trace

torch = pytest.importorskip("torch")
save_torch = pytest.importorskip("safetensors.torch").save_file


def trace_of(result: ImportResult) -> Any:
    """The trace, which must be there."""
    assert result.trace is not None
    return result.trace


# ---- arrays ------------------------------------------------------------------------------------


def test_npz_with_the_usual_names(make_trace: Any, tmp_path: Path) -> None:
    """seq, dom, weights and n_experts are understood; what is absent is said."""
    trace = make_trace(full=False)
    np.savez(
        tmp_path / "log.npz", ids=trace.ids, seq=np.arange(200) // 20, dom=np.arange(200) % 2,
        domains=["law", "code"], weights=np.full((200, 3, 2), 0.5, np.float16), n_experts=8,
        layers=[1, 2, 5],
    )
    result: Any = import_any(tmp_path / "log.npz")
    got = result.trace
    assert np.array_equal(got.ids, trace.ids) and got.num_experts == 8
    assert got.domain_names == ("law", "code") and got.layer_indices == (1, 2, 5)
    assert got.request[25] == 1 and got.gates[0, 0, 0] == 0.5
    assert [text.split(":")[0] for text in result.cannot_tell] == [
        "which tokens ran in one step", "home ranks", "prefill or decode"
    ]
    assert "request read from 'seq'" in result.notes


def test_names_of_ones_own_are_given(make_trace: Any, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    trace = make_trace(full=False)
    save_file(
        {"chosen": trace.ids, "conversation": np.arange(200)}, tmp_path / "log.safetensors"
    )
    keys = {"ids": "chosen", "request": "conversation"}
    got: Any = import_any(tmp_path / "log.safetensors", num_experts=8, keys=keys).trace
    assert np.array_equal(got.ids, trace.ids) and got.request[7] == 7
    with pytest.raises(InputError, match=r"no array 'x' for ids.*chosen"):
        import_any(tmp_path / "log.safetensors", num_experts=8, keys={"ids": "x"})
    with pytest.raises(InputError, match="unknown column"):
        import_any(tmp_path / "log.safetensors", num_experts=8, keys={"colour": "x"})
    with pytest.raises(InputError, match="no ids: name the array"):
        import_any(tmp_path / "log.safetensors", num_experts=8)


def test_an_npy_holds_ids_alone_and_needs_the_number_of_experts(
    make_trace: Any, tmp_path: Path
) -> None:
    """The largest id need not be the last expert, so E is never guessed."""
    np.save(tmp_path / "ids.npy", make_trace(full=False).ids.astype(np.int64))
    assert trace_of(import_any(tmp_path / "ids.npy", num_experts=8)).num_experts == 8
    with pytest.raises(InputError, match="give num_experts"):
        import_any(tmp_path / "ids.npy")
    with pytest.raises(InputError, match="K=2 experts but a layer has only E=1"):
        import_any(tmp_path / "ids.npy", num_experts=1)
    np.savez(tmp_path / "both.npz", ids=make_trace().ids, n_experts=8)
    with pytest.raises(InputError, match="the file says 8, num_experts says 9"):
        import_any(tmp_path / "both.npz", num_experts=9)


def test_arrays_of_loads_become_a_profile(tmp_path: Path) -> None:
    np.savez(tmp_path / "load.npz", load=np.arange(1, 25).reshape(2, 3, 4), layers=[4, 5, 6])
    result: Any = import_any(tmp_path / "load.npz")
    assert result.trace is None and result.profile.load_WLE.shape == (2, 3, 4)
    assert result.profile.layer_indices == (4, 5, 6)
    assert "planning is for load only" in " ".join(result.cannot_tell)


def test_pickles_lies_and_rubbish_are_refused(tmp_path: Path) -> None:
    """Nothing is unpickled; a header that claims terabytes allocates none of them."""
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "object.npz", ids=np.array([{}], dtype=object))
    with (tmp_path / "lie.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 58, 8)}
        )
        file.write(b"123")
    (tmp_path / "rubbish.npz").write_bytes(b"PK\x03\x04 not a zip")
    (tmp_path / "rubbish.safetensors").write_bytes(b"\xff" * 40)
    for name in ("object.npy", "object.npz", "lie.npy", "rubbish.npz", "rubbish.safetensors"):
        with pytest.raises(InputError, match=name) as caught:
            import_any(tmp_path / name, num_experts=8)
        assert "\n" not in str(caught.value)


TOKENS = 12
SOUND: dict[str, Any] = {
    "ids": np.tile(np.arange(4).reshape(1, 2, 2), (TOKENS, 1, 1)), "num_experts": np.int64(8),
}


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({"request": np.full(TOKENS, "req-0")}, "request must be whole numbers"),
        ({"request": np.full(TOKENS, 0.5)}, "request must be whole numbers"),
        ({"request": np.full(TOKENS, 2**63, np.uint64)}, "request of token 0 is"),
        ({"request": np.arange(TOKENS - 1)}, "request has shape"),
        ({"phase": np.full(TOKENS, 256)}, "phase of token 0 is 256"),
        ({"phase": np.full(TOKENS, "prefill")}, "phase must be whole numbers"),
        ({"source": np.full(TOKENS, -1)}, "source of token 0 is -1"),
        ({"source": np.full(TOKENS, 2**40)}, "source of token 0 is"),
        ({"domain": np.full(TOKENS, 2 * 10**8)}, "has no name"),  # no 200 million names are made
        ({"domain": np.full(TOKENS, b"law")}, "whole numbers or strings"),
        ({"k_of_token": np.full((TOKENS, 2), 1.5)}, "k_of_token must be whole numbers"),
        ({"k_of_token": np.full((TOKENS, 2), "1")}, "k_of_token must be whole numbers"),
        ({"gates": np.full((TOKENS, 2, 2), 1e6)}, "more than float16 can"),
        ({"gates": np.full((TOKENS, 2, 2), np.nan)}, "NaN"),
        ({"gates": np.full((TOKENS, 2, 2), 1j)}, "gates must be numbers"),
        ({"layers": np.array(["a", "b"])}, "layer_indices must be whole numbers"),
        ({"layers": np.array([[0], [1]])}, "layer_indices must be whole numbers"),
        ({"layers": np.array([1, 1])}, "each once"),
        ({"layers": np.array([-1, 0])}, "from 0"),
        ({"num_experts": "many"}, "num_experts must be one whole number"),
        ({"num_experts": np.nan}, "num_experts must be one whole number"),
        ({"num_experts": np.array([8, 16])}, "num_experts must be one whole number"),
        ({"ids": np.empty((0, 2, 2), int)}, "holds no tokens"),
        ({"ids": np.full((TOKENS, 2, 2), -1)}, "no layer routes"),
        ({"ids": np.tile([[0, 1], [2, -2]], (TOKENS, 1, 1))}, "not all in"),
    ],
)
def test_a_column_that_cannot_be_is_refused_not_changed(
    tmp_path: Path, column: dict[str, Any], said: str
) -> None:
    """The line names the file and the column; no value is wrapped, rounded or cut to fit."""
    np.savez(tmp_path / "sound.npz", **SOUND)
    assert import_any(tmp_path / "sound.npz").trace is not None
    np.savez(tmp_path / "bad.npz", **(SOUND | column))
    with pytest.raises(InputError, match=said) as caught:
        import_any(tmp_path / "bad.npz")
    assert str(caught.value).startswith(str(tmp_path / "bad.npz"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", ["x", 1e308, 1j])
def test_loads_that_are_no_numbers_are_refused(tmp_path: Path, load: Any) -> None:
    np.savez(tmp_path / "bad.npz", logical_count=np.full((2, 4), load))
    with pytest.raises(InputError, match=r"bad\.npz: loads must be"):
        import_any(tmp_path / "bad.npz")


def test_other_tensors_of_a_safetensors_file_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """numpy has no bfloat16: that matters only where such a tensor is asked for."""
    tensors = {"ids": torch.from_numpy(SOUND["ids"]), "num_experts": torch.tensor(8),
               "logits": torch.zeros(3, dtype=torch.bfloat16)}
    save_torch(tensors, tmp_path / "sound.safetensors")
    assert import_any(tmp_path / "sound.safetensors").trace is not None
    save_torch(tensors | {"gates": torch.zeros(TOKENS, 2, 2, dtype=torch.bfloat16)},
               tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=r"gates.*convert it"):
        import_any(tmp_path / "bad.safetensors")


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        import_any(tmp_path / "pipe.npz")


def test_real_logs_have_the_published_facts(real_data: Path) -> None:
    """Tokens, layers, experts, top-k, requests and the skew of both logs."""
    facts: dict[str, Any] = {
        "gptoss20b_decode": ((103_387, 24, 4), 32, 291, (1.92, 2.46, 3.91)),
        "esft_law_translation": ((16_578, 26, 6), 64, 73, (2.40, 3.43, 4.38)),
    }
    for name, (shape, experts, requests, skew) in facts.items():
        trace: Any = import_any(real_data / f"routing/{name}.npz").trace
        assert trace.ids.shape == shape and trace.num_experts == experts
        assert len(np.unique(trace.request)) == requests
        load = trace.load_LE()
        assert np.quantile(load.max(1) / load.mean(1), (0, 0.5, 1)) == pytest.approx(
            skew, abs=0.005
        )


# ---- SGLang ------------------------------------------------------------------------------------

# Layer 0 is dense: six experts in eight slots; slots 6 and 7 hold copies.
SLOT_MAP = torch.tensor(
    [[0, 1, 2, 3, 4, 5, 0, 1], [5, 2, 1, 3, 4, 0, 5, 2], [1, 4, 0, 5, 3, 2, 1, 4]]
)


def test_stat_is_one_sum_over_its_ring_buffer(tmp_path: Path) -> None:
    """Rows are in no order; dense layers are left out; the global counts are already logical."""
    count = torch.zeros(5, 3, 6, dtype=torch.int32)
    count[0, 1:], count[3, 1:] = 2, torch.arange(6)
    torch.save(
        {"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None},
        tmp_path / "expert_distribution_recorder_1.pt",
    )
    result: Any = import_any(tmp_path / "expert_distribution_recorder_1.pt")
    assert result.profile.load_WLE.tolist() == [[[2, 3, 4, 5, 6, 7]] * 2]
    assert result.profile.layer_indices == (1, 2)
    assert "wrap around" in " ".join(result.cannot_tell)
    assert result.notes == ("layers 0 hold no counts and are taken as dense",)
    with pytest.raises(InputError, match="loads per expert, not routing per token"):
        load_trace(tmp_path / "expert_distribution_recorder_1.pt")


def passes(rank: int) -> dict[str, Any]:
    """Pass 7 and 9 of a rank: slot s of layer l gets l * (s + 1) + rank tokens."""
    count = torch.arange(3)[:, None] * (torch.arange(8) + 1 + rank)
    records = [
        {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary",
         "global_physical_count": (count * factor).to(torch.int32)}
        for number, factor in ((9, 1), (7, 10))
    ]
    return {"records": records, "last_physical_to_logical_map": SLOT_MAP}


def test_per_pass_sums_ranks_and_maps_slots_to_experts(tmp_path: Path) -> None:
    """One window per forward pass, in their order; replicas of an expert count together."""
    for rank in range(2):
        torch.save(passes(rank), tmp_path / f"recorder_{rank}.pt")
    result: Any = import_any(tmp_path)
    slots = np.arange(1, 9) * 2 + 1                      # of layer 1, both ranks
    expected = np.bincount(SLOT_MAP[1].numpy(), slots, 6)
    assert result.profile.load_WLE.shape == (2, 2, 6)
    assert np.array_equal(result.profile.load_WLE[:, 0], np.outer([10, 1], expected))
    assert "placement changed" in " ".join(result.cannot_tell)


def token_record(
    number: int, rank: int, tokens: list[int], slots: Any, mode: int, lengths: Any = None
) -> dict[str, Any]:
    """A per_token record: slots [L, T, <=8], padded to eight with -1."""
    slots = torch.tensor(slots, dtype=torch.int32)
    padded = torch.full((*slots.shape[:2], 8), -1, dtype=torch.int32)
    padded[..., : slots.shape[2]] = slots
    return {
        "forward_pass_id": number, "rank": rank, "gatherer_key": "primary",
        "input_ids": tokens, "positions": list(range(len(tokens))), "extend_seq_lens": lengths,
        "forward_mode": mode, "topk_ids_of_layer": padded, "misc_objects": [],
        "global_physical_count": torch.zeros(3, 8, dtype=torch.int32),
    }


def save_tokens(path: Path, *records: dict[str, Any]) -> None:
    torch.save({"records": list(records), "last_physical_to_logical_map": SLOT_MAP}, path)


NONE = [[-1, -1], [-1, -1]]   # a dense layer's two tokens


def test_per_token_slots_become_experts_with_steps_ranks_and_phases(tmp_path: Path) -> None:
    """By pass, then rank; a padding token is dropped; fewer than K is recorded as such."""
    save_tokens(
        tmp_path / "r_1.pt",
        token_record(4, 1, [30, 31], [NONE, [[7, 0], [2, -1]], [[1, 3], [7, 6]]], mode=2),
    )
    save_tokens(
        tmp_path / "r_0.pt",
        token_record(5, 0, [12, 13], [NONE, [[6, 3], [-1, -1]], [[0, 2], [-1, -1]]], mode=2),
        token_record(4, 0, [10, 11], [NONE, [[0, 1], [4, 5]], [[5, 4], [3, 2]]], mode=1),
    )
    result: Any = import_any(tmp_path)
    trace = result.trace
    assert trace.layer_indices == (1, 2) and trace.num_experts == 6 and trace.top_k == 2
    assert trace.step.tolist() == [4, 4, 4, 4, 5] and trace.source.tolist() == [0, 0, 1, 1, 0]
    assert trace.phase.tolist() == [0, 0, 1, 1, 1]
    assert trace.ids[:3].tolist() == [[[5, 2], [2, 3]], [[4, 0], [5, 0]], [[2, 5], [4, 5]]]
    assert trace.k_of_token[3].tolist() == [1, 2] and trace.ids[3, 0, 0] == 1
    assert trace.ids[4].tolist() == [[5, 3], [1, 0]]
    text = " ".join(result.cannot_tell)
    assert "requests" in text and "last map" in text and "cut to 8" not in text


def test_a_mixed_pass_tells_phases_by_sequence_lengths(tmp_path: Path) -> None:
    """A sequence of one token decodes, a longer one is a prompt; unknown modes are not guessed."""
    three = [[[-1]] * 3, [[0]] * 3, [[1]] * 3]
    save_tokens(tmp_path / "a.pt", token_record(0, 0, [1, 2, 3], three, mode=3, lengths=[1, 2]))
    assert trace_of(import_any(tmp_path / "a.pt")).phase.tolist() == [1, 0, 0]
    save_tokens(tmp_path / "b.pt", token_record(0, 0, [1, 2, 3], three, mode=9))
    result: Any = import_any(tmp_path / "b.pt")
    assert result.trace.phase is None and "forward mode" in " ".join(result.cannot_tell)


def test_ranks_that_all_saw_the_same_tokens_count_once(tmp_path: Path) -> None:
    """Tensor-parallel attention repeats tokens on every rank; data-parallel ones differ."""
    same = [NONE, [[0, 1], [4, 5]], [[5, 4], [3, 2]]]
    for rank in range(2):
        save_tokens(tmp_path / f"{rank}.pt", *(
            token_record(number, rank, [10 + number, 11], same, mode=1) for number in range(3)
        ))
    result: Any = import_any(tmp_path)
    assert result.trace.num_tokens == 6 and "those of one are kept" in " ".join(result.notes)
    save_tokens(tmp_path / "1.pt", *(
        token_record(number, 1, [20 + number, 11], same, mode=1) for number in range(3)
    ))
    assert trace_of(import_any(tmp_path)).num_tokens == 12
    one = import_any(sorted(tmp_path.glob("*.pt"))[0])
    assert "1 more lie beside it: name the folder" in " ".join(one.notes)


def test_sglang_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """Pickled code, other maps, slots outside the map, mixed kinds, nothing recorded."""
    bad = tmp_path / "bad.pt"
    torch.save({"records": [Path("/etc")]}, bad)
    with pytest.raises(InputError, match=r"bad\.pt.*without unpickling"):
        import_any(bad)
    torch.save([1, 2], bad)
    with pytest.raises(InputError, match="neither SGLang's recording nor tensors by name"):
        import_any(bad)
    torch.save({"weights": 1}, bad)
    with pytest.raises(InputError, match=r"holds \['weights'\] but no ids"):
        import_any(bad)
    save_tokens(bad)
    with pytest.raises(InputError, match="no forward pass"):
        import_any(bad)
    save_tokens(bad, token_record(3, 0, [1], [[[-1]], [[8]], [[0]]], mode=1))
    with pytest.raises(InputError, match=r"pass 3: slots lie in \[-1, 8\].*8 slots"):
        import_any(bad)
    save_tokens(bad, token_record(3, 0, [1], [[[1]], [[1]]], mode=1))
    with pytest.raises(InputError, match="3 layers"):
        import_any(bad)
    torch.save({"logical_count": torch.zeros(2, 3, 4)}, bad)
    with pytest.raises(InputError, match="all counts are zero"):
        import_any(bad)
    torch.save(passes(0), tmp_path / "passes.pt")
    with pytest.raises(InputError, match="mixes recordings"):
        import_any(tmp_path)
    torch.save({**passes(1), "last_physical_to_logical_map": SLOT_MAP.flip(1)}, bad)
    with pytest.raises(InputError, match="its slot map differs"):
        import_any(tmp_path)


TOKEN = token_record(1, 0, [1, 2], [NONE, [[0, 1], [2, 3]], [[0, 1], [2, 3]]], mode=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"records": [1, 2]}, "no dictionaries"),
        ({"records": [{**passes(0)["records"][0], "forward_pass_id": "x"}]}, "forward_pass_id 'x'"),
        ({"records": [{"global_physical_count": torch.ones(3, 8)}]}, "forward_pass_id"),
        ({"records": [{"forward_pass_id": 1, "global_physical_count": "abc"}]}, "no array"),
        ({"last_physical_to_logical_map": [[1], [1, 2]]}, "no array"),
        ({"last_physical_to_logical_map": None}, "no array"),
        ({"last_physical_to_logical_map": SLOT_MAP[:0]}, "not .layers, slots."),
        ({"last_physical_to_logical_map": SLOT_MAP * 10**9}, "not .layers, slots."),
        ({"records": [TOKEN | {"forward_mode": "x"}]}, "forward_mode 'x'"),
        ({"records": [TOKEN | {"extend_seq_lens": "abc"}]}, "extend_seq_lens"),
        ({"records": [TOKEN | {"input_ids": "abc"}]}, "input_ids"),
        ({"records": [TOKEN | {"forward_pass_id": 2**70}]}, "forward_pass_id"),
        ({"records": [TOKEN | {"rank": -3}]}, "source of token 0 is -3"),
    ],
)
def test_a_recording_with_a_bad_field_is_one_line_that_names_it(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    torch.save(passes(0) | change, tmp_path / "bad.pt")
    with pytest.raises(InputError, match=said) as caught:
        import_any(tmp_path / "bad.pt")
    assert str(caught.value).startswith(str(tmp_path / "bad.pt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    {"extend_seq_lens": torch.tensor([1, 1])}, {"extend_seq_lens": [3, -1]},
    {"input_ids": None, "positions": None}, {"forward_mode": None},
])
def test_what_a_record_may_leave_out_is_not_missed(tmp_path: Path, change: dict[str, Any]) -> None:
    save_tokens(tmp_path / "r.pt", TOKEN | change)
    assert trace_of(import_any(tmp_path / "r.pt")).num_tokens == 2


def test_counts_of_any_kind_of_tensor_are_read(tmp_path: Path) -> None:
    counts = torch.arange(1, 13).reshape(2, 6)
    for name, count in (("bf16", counts.bfloat16()), ("sparse", counts.to_sparse()),
                        ("grad", counts.float().requires_grad_())):
        torch.save({"logical_count": count}, tmp_path / f"{name}.pt")
        result: Any = import_any(tmp_path / f"{name}.pt")
        assert result.profile.load_LE.tolist() == counts.tolist()


# ---- TensorRT-LLM ------------------------------------------------------------------------------


@pytest.fixture
def statistics(tmp_path: Path) -> Any:
    """Iterations 100..102, layers 3 and 4, two ranks: rank r counts r + iteration + layer."""
    from safetensors.numpy import save_file

    folder = tmp_path / "stats"
    folder.mkdir()
    (folder / "meta_info.json").write_text(
        json.dumps({"num_experts": 4, "num_experts_per_token": 2})
    )
    for rank in range(2):
        save_file(
            {f"{i}_{layer}": np.full(4, rank + i + layer, np.int64)
             for i in (100, 101, 102) for layer in (3, 4)},
            folder / f"rank{rank}.safetensors",
        )
    return folder


def test_statistics_sum_ranks_and_keep_the_models_layer_numbers(statistics: Path) -> None:
    """One window per iteration; K is known; routing per token is not."""
    result: Any = import_any(statistics)
    profile = result.profile
    assert profile.layer_indices == (3, 4) and profile.top_k == 2
    assert profile.load_WLE[1].tolist() == [[209] * 4, [211] * 4]
    assert "affinity" in " ".join(result.cannot_tell)


def test_statistics_with_holes_are_refused(statistics: Path) -> None:
    """A rank, an iteration or a layer missing; a raw file; a broken one."""
    from safetensors.numpy import load_file, save_file

    rank1 = statistics / "rank1.safetensors"
    whole = load_file(rank1)
    for change, message in (
        ({k: v for k, v in whole.items() if k != "102_4"}, "other iterations or layers"),
        ({**whole, "100_3": np.zeros(5, np.int64)}, r"\[5\] is not a count"),
        ({**whole, "raw": np.zeros(4, np.int64)}, "raw"),
    ):
        save_file(change, rank1)
        with pytest.raises(InputError, match=message):
            import_any(statistics)
    rank1.write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        import_any(statistics)
    rank1.rename(statistics / "rank2.safetensors")
    with pytest.raises(InputError, match=r"without a gap.*\[0, 2\]"):
        import_any(statistics)
    (statistics / "rank2.safetensors").unlink()
    rank0 = statistics / "rank0.safetensors"
    save_file({k: v for k, v in whole.items() if not k.startswith("101")}, rank0)
    with pytest.raises(InputError, match="have a gap"):
        import_any(statistics)
    save_file({k: v for k, v in whole.items() if k != "102_4"}, rank0)
    with pytest.raises(InputError, match="5 counts for 3 iterations x 2 layers"):
        import_any(statistics)
    (statistics / "meta_info.json").write_text("{}")
    with pytest.raises(InputError, match="num_experts_per_token"):
        import_any(statistics)


@pytest.mark.parametrize("counts", [
    {}, {"0_0": np.zeros(4, np.int64)}, {"0_0": np.full(4, 1.5)}, {"0_0": np.full(4, np.nan)},
    {"0_0": np.full(4, True)},
])
def test_statistics_without_whole_counts_are_refused(
    statistics: Path, counts: dict[str, Any]
) -> None:
    """None at all, all zero, and kinds that a cast would round or make up."""
    from safetensors.numpy import save_file

    (statistics / "rank1.safetensors").unlink()
    save_file(counts, statistics / "rank0.safetensors")
    with pytest.raises(InputError, match=r"no counts|all counts are zero|is not a count"):
        import_any(statistics)


@pytest.mark.parametrize("number", ["8.7", "-4", "Infinity", "NaN", "true", '"4"', "[" * 10**5])
def test_statistics_of_no_whole_number_of_experts_are_refused(
    statistics: Path, number: str
) -> None:
    meta = statistics / "meta_info.json"
    meta.write_text(f'{{"num_experts": {number}, "num_experts_per_token": 2}}')
    with pytest.raises(InputError, match="num_experts") as caught:
        import_any(statistics)
    assert str(meta) in str(caught.value) and "\n" not in str(caught.value)


# ---- which format ------------------------------------------------------------------------------


def test_a_stored_trace_is_recognised(make_trace: Any, tmp_path: Path) -> None:
    save_trace(make_trace(), tmp_path / "t")
    assert trace_of(import_any(tmp_path / "t")).digest() == make_trace().digest()


def test_what_is_nothing_known_is_told_the_known_formats(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "x.txt"):
        with pytest.raises(InputError, match=r"SGLang.*TensorRT-LLM"):
            import_any(path)
    with pytest.raises(InputError, match="no such file"):
        import_any(tmp_path / "absent")
