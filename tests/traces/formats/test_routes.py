"""Routing that cannot be is refused with its place, dead routing is left out, and both are said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError
from loadmaster.traces.formats import Asked, import_any
from loadmaster.traces.formats.cleaning import found_routes
from loadmaster.traces.formats.cleaning.found_routes import FoundRoutes
from loadmaster.traces.formats.cleaning.routes import clean_routes
from loadmaster.traces.model_spec import DraftLayers, ModelSpec
from loadmaster.traces.trace import RoutingTrace

Ids = npt.NDArray[np.int64]

# Four hidden layers, of which 1 to 3 route; a draft layer behind them.
MODEL = ModelSpec(
    name="toy", num_layers=3, num_experts=16, top_k=4, layer_indices=(1, 2, 3), total_layers=4,
    draft_layers=DraftLayers(layer_indices=(4,), num_experts=16, top_k=4),
)


def routing(tokens: int = 60, layers: int = 3, experts: int = 16, k: int = 4, seed: int = 0) -> Ids:
    """[T, L, K] choices without an expert twice."""
    score = np.random.default_rng(seed).random((tokens, layers, experts))
    return score.argsort(axis=2)[:, :, :k]


def with_rows(ids: Ids, rows: list[Ids | int]) -> Ids:
    """These rows: an int stands for that number in every choice."""
    tokens, _, k = ids.shape
    return np.stack(
        [np.full((tokens, k), row) if isinstance(row, int) else row for row in rows], axis=1
    )


def read(folder: Path, ids: Any, **said: Any) -> tuple[RoutingTrace, str]:
    """(the trace, all notes) of ids in a file that says its number of experts."""
    np.savez(folder / "r.npz", routed_experts=ids, num_experts=16)
    found = import_any(folder / "r.npz", **said)
    assert found.trace is not None
    return found.trace, " ".join(found.notes)


# ---- which rows are layers --------------------------------------------------------------------


def test_rows_of_zeros_are_dense_layers(tmp_path: Path) -> None:
    """A router cannot choose expert 0 four times; the other rows keep the model's numbers."""
    ids = routing()
    dense = with_rows(ids, [0, ids[:, 0], 0, ids[:, 1], ids[:, 2]])
    trace, notes = read(tmp_path, dense)
    assert np.array_equal(trace.ids, ids) and trace.layer_indices == (1, 3, 4)
    assert "layers 0,2 hold zeros or nothing" in notes and "taken as dense" in notes


def test_rows_of_padding_are_dense_layers_too(tmp_path: Path) -> None:
    ids = routing()
    trace, _ = read(tmp_path, with_rows(ids, [-1, *ids.transpose(1, 0, 2)]))
    assert np.array_equal(trace.ids, ids) and trace.layer_indices == (1, 2, 3)
    assert trace.k_of_token is None


def test_a_top_1_row_of_zeros_may_be_a_layer_and_is_asked_about(tmp_path: Path) -> None:
    ids = with_rows(routing(k=1), [0, *routing(k=1).transpose(1, 0, 2)])
    trace, notes = read(tmp_path, ids)
    assert trace.num_layers == 4 and "dense layers? model tells" in notes
    model = MODEL.model_copy(update={"top_k": 1})
    assert read(tmp_path, ids, model=model)[0].layer_indices == (1, 2, 3)


@pytest.mark.parametrize(("rows", "layers"), [
    ([0, 1, 2, 3], (1, 2, 3)), ([1, 2, 3], (1, 2, 3)), ([0, 1, 2, 3, 4], (1, 2, 3, 4)),
])
def test_a_model_tells_which_rows_are_layers(
    tmp_path: Path, rows: list[int], layers: tuple[int, ...]
) -> None:
    """All hidden layers, MoE layers alone, either with the draft layer behind them."""
    ids = routing(layers=5)
    ids[:, 0] = 0
    trace, notes = read(tmp_path, ids[:, rows], model=MODEL)
    assert trace.layer_indices == layers
    assert np.array_equal(trace.ids, ids[:, list(layers)])
    assert ("dense in toy" in notes) == (0 in rows) and ("draft (MTP)" in notes) == (4 in rows)


def test_a_row_that_routes_is_never_taken_for_a_dense_one(tmp_path: Path) -> None:
    """Three MoE rows and the draft layer's are as many as the hidden layers."""
    ids = routing(layers=4)
    with pytest.raises(InputError, match="row 0 routes tokens, but toy has no MoE layer there"):
        read(tmp_path, ids, model=MODEL)
    assert read(tmp_path, ids, model=MODEL, layers=(1, 2, 3, 4))[0].layer_indices == (1, 2, 3, 4)


def test_some_layers_are_numbered_by_whoever_knows(tmp_path: Path) -> None:
    ids = routing(layers=2)
    with pytest.raises(InputError, match=r"holds 2 rows; toy has 3 MoE layers .* layers='1-2'"):
        read(tmp_path, ids, model=MODEL)
    assert read(tmp_path, ids, model=MODEL, layers=(1, 3))[0].layer_indices == (1, 3)
    with pytest.raises(InputError, match=r"holds layers 1,7, the MoE layers of toy are 1-3"):
        read(tmp_path, ids, model=MODEL, layers=(1, 7))
    with pytest.raises(InputError, match="layers names 3 layers, the file holds 2"):
        read(tmp_path, ids, layers=(1, 2, 3))


def test_a_model_of_other_experts_is_refused(tmp_path: Path) -> None:
    other = MODEL.model_copy(update={"num_experts": 8})
    with pytest.raises(InputError, match="the file says 16, model says 8"):
        read(tmp_path, routing(), model=other)


# ---- padding ----------------------------------------------------------------------------------


def test_choices_of_minus_one_do_not_count(tmp_path: Path) -> None:
    """Wherever they stand in a choice; a token that has none at all is padding."""
    ids = routing()
    ids[3, :, 1] = -1
    ids[5, 2, 2:] = -1
    ids[9] = -1
    trace, notes = read(tmp_path, ids)
    assert trace.num_tokens == 59 and trace.k_of_token is not None
    assert trace.k_of_token[3].tolist() == [3, 3, 3] and trace.k_of_token[5].tolist() == [4, 4, 2]
    assert trace.ids[3, 0, :3].tolist() == ids[3, 0, [0, 2, 3]].tolist()
    kept = np.delete(ids, 9, axis=0)
    expected = [np.bincount(kept[:, r][kept[:, r] >= 0], minlength=16) for r in range(3)]
    assert np.array_equal(trace.load_LE(), expected)
    assert "1 of 60 tokens hold no choice" in notes and "5 choices of other tokens are -1" in notes


def test_a_choice_that_nobody_uses_is_no_choice(tmp_path: Path) -> None:
    """An engine that records eight columns for a top-4 model pads the rest."""
    wide = np.concatenate([routing(), np.full((60, 3, 4), -1)], axis=2)
    trace, notes = read(tmp_path, wide)
    assert trace.top_k == 4 and trace.k_of_token is None and "-1" not in notes


def test_tokens_of_zeros_in_every_layer_are_padding(tmp_path: Path) -> None:
    ids = routing()
    ids[7:10] = 0
    trace, notes = read(tmp_path, ids)
    assert np.array_equal(trace.ids, np.delete(ids, [7, 8, 9], axis=0))
    assert "3 of 60 tokens hold zeros in every layer" in notes


def test_columns_stay_with_their_tokens(tmp_path: Path) -> None:
    ids = routing()
    ids[[2, 4]] = -1
    gates = np.random.default_rng(0).random(ids.shape).astype(np.float16)
    ids[6, 0, 0] = -1
    np.savez(tmp_path / "r.npz", ids=ids, num_experts=16, request=np.arange(60), gates=gates)
    trace = import_any(tmp_path / "r.npz").trace
    assert trace is not None and trace.request is not None and trace.gates is not None
    assert trace.request.tolist() == [i for i in range(60) if i not in (2, 4)]
    assert trace.gates[4, 0, :3].tolist() == gates[6, 0, 1:].tolist()


# ---- what cannot be ---------------------------------------------------------------------------


def test_an_expert_twice_in_a_choice_is_refused_with_token_and_layer(tmp_path: Path) -> None:
    ids = routing()
    ids[5, 1] = [3, 9, 7, 3]
    with pytest.raises(InputError, match=r"token 5, layer 1: expert 3 twice .* \[3, 9, 7, 3\]"):
        read(tmp_path, ids)
    with pytest.raises(InputError, match=r"token 5, layer 2: expert 3 twice"):
        read(tmp_path, ids, model=MODEL)       # by the model's own number


@pytest.mark.parametrize("strange", [-2, 32, 4_000])
def test_an_id_that_is_none_is_refused_with_its_place(tmp_path: Path, strange: int) -> None:
    ids = routing()
    ids[8, 2, 0] = strange
    with pytest.raises(InputError, match=r"token 8, layer 2: .* not all in \[0, 16\)"):
        read(tmp_path, ids)


def test_layers_first_is_asked_about(tmp_path: Path) -> None:
    ids = routing(tokens=2_000, layers=2)
    turned = ids.transpose(1, 0, 2)
    with pytest.raises(InputError, match=r"look like \[layers, tokens, top-k\]: say axes='LTK'"):
        read(tmp_path, turned)
    assert np.array_equal(read(tmp_path, turned, axes="LTK")[0].ids, ids)


def test_numbers_without_a_shape_get_it_from_the_model(tmp_path: Path) -> None:
    """SGLang hands over hidden layers x top-k numbers a token."""
    ids = routing()
    flat = with_rows(ids, [0, *ids.transpose(1, 0, 2)]).astype(np.int32).reshape(-1)
    np.savez(tmp_path / "r.npz", routed_experts=flat)
    with pytest.raises(InputError, match=r"without a shape: give model .* top_k"):
        import_any(tmp_path / "r.npz", num_experts=16)
    found = import_any(tmp_path / "r.npz", model=MODEL).trace
    assert found is not None and np.array_equal(found.ids, ids)
    again = import_any(tmp_path / "r.npz", num_experts=16, layers=(0, 1, 2, 3), top_k=4).trace
    assert again is not None and np.array_equal(again.ids, ids)
    np.savez(tmp_path / "r.npz", routed_experts=flat[:-1])
    with pytest.raises(InputError, match="no whole tokens of 4 layers x top-4"):
        import_any(tmp_path / "r.npz", model=MODEL)


# ---- experts that compute nothing -------------------------------------------------------------


def test_ids_beyond_the_experts_compute_nothing_and_are_counted_apart(tmp_path: Path) -> None:
    """The file says 16 experts and uses 24 ids: 8 of them never leave the rank."""
    ids = routing(experts=24)
    trace, notes = read(tmp_path, ids)
    real = ids < 16
    assert trace.k_of_token is not None and np.array_equal(trace.k_of_token, real.sum(axis=2))
    expected = [np.bincount(ids[:, r][real[:, r]], minlength=16) for r in range(3)]
    assert np.array_equal(trace.load_LE(), expected)
    assert f"{(~real).mean():.1%} of the choices are ids 16 to 23" in notes
    assert "counted apart" in notes and "zero_experts=0 refuses them" in notes


def test_where_the_person_gives_the_number_beyond_is_asked_about(tmp_path: Path) -> None:
    """A wrong num_experts looks the same."""
    np.save(tmp_path / "r.npy", routing(tokens=200, experts=24))
    with pytest.raises(InputError, match=r"zero-computation experts \(zero_experts=8\)"):
        import_any(tmp_path / "r.npy", num_experts=16)
    assert import_any(tmp_path / "r.npy", num_experts=16, zero_experts=8).trace is not None
    np.savez(tmp_path / "r.npz", ids=routing(experts=24), num_experts=16)
    with pytest.raises(InputError, match=r"not all in \[0, 16\)"):
        import_any(tmp_path / "r.npz", zero_experts=0)


# ---- warm-up ----------------------------------------------------------------------------------


def test_one_route_in_many_tokens_is_warned_of_and_can_be_dropped(tmp_path: Path) -> None:
    ids = routing(tokens=400)
    ids[:100] = ids[0]
    trace, notes = read(tmp_path, ids)
    assert trace.num_tokens == 400
    assert "warning: one route in 25.0% of the tokens (100 of 400, first token 0)" in notes
    assert "drop_repeated" in notes
    trace, notes = read(tmp_path, ids, drop_repeated=True)
    assert np.array_equal(trace.ids, ids[100:]) and "left out" in notes


def test_routes_that_differ_are_not_warned_of(tmp_path: Path) -> None:
    ids = routing(tokens=400)
    ids[::20] = ids[0]          # the first token of each request is the same everywhere
    assert "one route" not in read(tmp_path, ids)[1]


# ---- whole and in blocks ----------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.booleans(), st.booleans())
def test_blocks_joined_are_the_whole(seed: int, tokens: int, padded: bool, zero: bool) -> None:
    rng = np.random.default_rng(seed)
    ids = routing(tokens=tokens, experts=20 if zero else 16, seed=seed)
    if padded:
        ids = np.where(rng.random(ids.shape) < 0.3, -1, ids)
    ids[0, 0] = [3, 1, 2, 0]
    found = FoundRoutes(ids, {"request": np.arange(tokens)}, num_experts=16)
    before, found_routes.BLOCK_TOKENS = found_routes.BLOCK_TOKENS, 7
    try:
        clean = clean_routes(found, Asked())
        whole, parts = clean.whole(), list(clean.blocks())
    finally:
        found_routes.BLOCK_TOKENS = before
    assert np.array_equal(np.concatenate([p.ids for p in parts]), whole.ids)
    for name in ("k_of_token", "request"):
        column = getattr(whole, name)
        joined = [getattr(p, name) for p in parts]
        assert column is None or np.array_equal(np.concatenate(joined), column)
    counts = [np.bincount(ids[:, r][(ids[:, r] >= 0) & (ids[:, r] < 16)], minlength=16)
              for r in whole.layer_indices]
    assert np.array_equal(whole.load_LE(), counts)


def test_the_samples_of_the_field_are_cleaned(real_data: Path) -> None:
    """The same tokens with and without the dense row; padding; experts that compute nothing."""
    dumps = real_data / "field" / "dumps"
    if not dumps.is_dir():
        pytest.skip(f"samples not present: {dumps}")
    dense = import_any(dumps / "routed_experts_tiny_v3_dense_row.npz").trace
    plain = import_any(dumps / "routed_experts_tiny_v3_moe_rows_only.npz").trace
    assert dense is not None and plain is not None
    assert np.array_equal(dense.ids, plain.ids) and dense.layer_indices == (1, 2, 3)
    padded = import_any(dumps / "routed_experts_minus_one.npz").trace
    assert padded is not None and padded.num_tokens == 290
    with pytest.raises(InputError, match="token 5, layer 1"):
        import_any(dumps / "dup_in_token.npz")
