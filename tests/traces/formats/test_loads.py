"""Counts per expert: axes told or said, what cannot be refused, what is empty left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import InputError, UsageError, as_parameters
from loadmaster.traces.formats import Asked, ImportResult, import_any, read_any
from loadmaster.traces.model_spec import ModelSpec

MODEL = ModelSpec(
    name="toy", num_layers=3, num_experts=6, top_k=2, layer_indices=(1, 2, 3), total_layers=4
)


def counts(*shape: int) -> Any:
    return np.random.default_rng(0).integers(1, 99, shape)


def read(folder: Path, loads: Any, name: str = "expert_load", **said: Any) -> ImportResult:
    np.savez(folder / "l.npz", **{name: loads})
    return import_any(folder / "l.npz", **said)


def loads_of(found: ImportResult) -> Any:
    assert found.profile is not None
    return found.profile.load_WLE


# ---- axes -------------------------------------------------------------------------------------


def test_the_usual_order_is_taken_with_a_word(tmp_path: Path) -> None:
    two, three = counts(4, 6), counts(5, 4, 6)
    found = read(tmp_path, two)
    assert loads_of(found).tolist() == [two.tolist()]
    assert "axes [4, 6] taken as [layers, experts]: axes says otherwise" in found.notes
    found = read(tmp_path, three)
    assert loads_of(found).tolist() == three.tolist()
    assert "axes [5, 4, 6] taken as [windows, layers, experts]: axes says otherwise" in (
        found.notes
    )


@pytest.mark.parametrize(("axes", "shape"), [
    ("LE", (4, 6)), ("EL", (6, 4)), ("WLE", (5, 4, 6)), ("LWE", (4, 5, 6)), ("WEL", (5, 6, 4)),
    ("ELW", (6, 4, 5)),
])
def test_axes_that_are_told_are_taken(tmp_path: Path, axes: str, shape: tuple[int, ...]) -> None:
    loads = counts(*shape)
    found = read(tmp_path, loads, axes=axes)
    order = [axes.index(a) for a in ("LE" if len(axes) == 2 else "WLE")]
    assert np.array_equal(loads_of(found)[0 if len(axes) == 2 else slice(None)],
                          loads.transpose(order))
    assert not any("axes" in note for note in found.notes)


def test_fewer_in_the_last_axis_is_a_question(tmp_path: Path) -> None:
    """[32, 8] may be 32 layers of 8 experts, or 8 layers of 32."""
    with pytest.raises(InputError, match=r"\[32, 8\].*axes='EL' if the last are layers, axes='LE'"):
        read(tmp_path, counts(32, 8))
    assert loads_of(read(tmp_path, counts(32, 8), axes="LE")).shape == (1, 32, 8)
    with pytest.raises(InputError, match=r"say axes='WEL' if"):
        read(tmp_path, counts(5, 6, 4))


def test_the_number_of_experts_or_the_model_decides(tmp_path: Path) -> None:
    assert loads_of(read(tmp_path, counts(32, 8), num_experts=8)).shape == (1, 32, 8)
    found = read(tmp_path, counts(32, 8), num_experts=32)
    assert loads_of(found).shape == (1, 8, 32)
    assert "taken as [experts, layers]" in " ".join(found.notes)
    assert loads_of(read(tmp_path, counts(6, 3), model=MODEL)).shape == (1, 3, 6)
    assert loads_of(read(tmp_path, counts(3, 9, 6), model=MODEL)).shape == (9, 3, 6)
    with pytest.raises(InputError, match="fit neither 7 experts"):
        read(tmp_path, counts(4, 6), num_experts=7)


def test_an_engines_own_name_has_its_own_axes(tmp_path: Path) -> None:
    """logical_count is [layers, experts] whatever its shape."""
    found = read(tmp_path, counts(32, 8), "logical_count")
    assert loads_of(found).shape == (1, 32, 8)
    assert not any("axes" in note for note in found.notes)
    with pytest.raises(InputError, match="the format defines its axes as LE"):
        read(tmp_path, counts(32, 8), "logical_count", axes="EL")


def test_a_lone_array_is_told_by_its_shape_and_kind(tmp_path: Path) -> None:
    np.save(tmp_path / "two.npy", counts(4, 6))
    assert loads_of(import_any(tmp_path / "two.npy")).shape == (1, 4, 6)
    np.save(tmp_path / "shares.npy", counts(5, 4, 6) / 7)
    assert loads_of(import_any(tmp_path / "shares.npy")).shape == (5, 4, 6)
    np.save(tmp_path / "three.npy", counts(5, 4, 6))
    with pytest.raises(InputError, match=r"look like loads: say axes='WLE'"):
        import_any(tmp_path / "three.npy")
    found = import_any(tmp_path / "three.npy", axes="WLE")
    assert np.array_equal(loads_of(found), counts(5, 4, 6))
    np.savez(tmp_path / "unnamed.npz", counts(4, 6))
    assert loads_of(import_any(tmp_path / "unnamed.npz")).shape == (1, 4, 6)


def test_tensors_of_a_scripts_own_are_read_without_unpickling(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.from_numpy(counts(4, 6)), tmp_path / "lone.pt")
    assert loads_of(import_any(tmp_path / "lone.pt")).shape == (1, 4, 6)
    torch.save({"expert_load": torch.from_numpy(counts(5, 4, 6)).bfloat16(), "step": 7},
               tmp_path / "named.pt")
    assert np.array_equal(loads_of(import_any(tmp_path / "named.pt")), counts(5, 4, 6))
    ids = torch.rand(50, 2, 8).argsort(2)[:, :, :2]
    torch.save({"topk_ids": ids, "request": torch.arange(50), "num_experts": torch.tensor(8)},
               tmp_path / "routes.pt")
    trace = import_any(tmp_path / "routes.pt").trace
    assert trace is not None and np.array_equal(trace.ids, ids.numpy())
    torch.save(list(ids.unbind(1)), tmp_path / "by_layer.pt")
    trace = import_any(tmp_path / "by_layer.pt", num_experts=8).trace
    assert trace is not None and np.array_equal(trace.ids, ids.numpy())
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(InputError, match="neither SGLang's recording nor tensors by name"):
        import_any(tmp_path / "list.pt")


# ---- what cannot be, and what is empty --------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_count_that_cannot_be_is_refused_with_its_place(tmp_path: Path, bad: float) -> None:
    loads = counts(5, 4, 6).astype(float)
    loads[2, 1, 3] = bad
    with pytest.raises(InputError, match=r"window 2, layer 1, expert 3: the load is .*>= 0"):
        read(tmp_path, loads)
    np.savez(tmp_path / "l.npz", load=loads, layers=[3, 4, 5, 6])
    with pytest.raises(InputError, match="window 2, layer 4, expert 3"):
        import_any(tmp_path / "l.npz")


def test_empty_windows_are_skipped_with_a_note(tmp_path: Path) -> None:
    loads = counts(5, 4, 6)
    loads[[0, 3]] = 0
    found = read(tmp_path, loads)
    assert np.array_equal(loads_of(found), loads[[1, 2, 4]])
    assert "2 of 5 windows are empty and skipped (0,3)" in found.notes
    with pytest.raises(InputError, match="all counts are zero"):
        read(tmp_path, loads * 0)


def test_rows_without_counts_are_dense(tmp_path: Path) -> None:
    loads = counts(5, 6)
    loads[[0, 3]] = 0
    found = read(tmp_path, loads)
    assert found.profile is not None and found.profile.layer_indices == (1, 2, 4)
    assert "layers 0,3 hold no counts and are taken as dense" in found.notes


def test_a_model_tells_dense_rows_from_layers_that_were_not_recorded(tmp_path: Path) -> None:
    """Rows 0 and 2 hold nothing: 0 is dense in the model, 2 is a layer nobody counted."""
    loads = counts(4, 6)
    loads[[0, 2]] = 0
    found = read(tmp_path, loads, model=MODEL)
    assert found.profile is not None and found.profile.layer_indices == (1, 3)
    assert found.profile.top_k == 2
    said = " ".join(found.notes)
    assert "layers 0 are dense in toy: left out" in said
    assert "layers 2 hold no counts but are MoE layers of the model: not recorded" in said
    loads[0] = 5
    with pytest.raises(InputError, match="row 0 holds counts, but toy has no MoE layer there"):
        read(tmp_path, loads, model=MODEL)


@pytest.mark.parametrize(("busy", "warned"), [(4, True), (16, True), (17, False), (32, False)])
def test_one_ranks_counts_are_suspected(tmp_path: Path, busy: int, warned: bool) -> None:
    """Half of the experts or more idle in every layer, with tokens enough for all."""
    loads = np.zeros((3, 32))
    loads[:, :busy] = 1_000
    said = " ".join(read(tmp_path, loads).notes)
    assert ("these look like one rank's counts" in said) == warned


def test_few_tokens_leave_experts_idle_by_chance(tmp_path: Path) -> None:
    loads = np.zeros((3, 32))
    loads[:, :8] = 3
    assert "one rank" not in " ".join(read(tmp_path, loads).notes)


def test_advice_is_in_the_interface_of_whoever_asks(tmp_path: Path) -> None:
    """Parameters for a caller in Python, options for whoever typed; commands stay commands."""
    np.savez(tmp_path / "l.npz", expert_load=counts(32, 8))
    with pytest.raises(InputError, match="say axes='EL' if the last are layers, axes='LE' if"):
        import_any(tmp_path / "l.npz")
    with pytest.raises(InputError) as typed:
        read_any(tmp_path / "l.npz", Asked())
    assert "say --axes EL if the last are layers, --axes LE if" in typed.value.typed
    with pytest.raises(UsageError, match="axes='XY': loads are"):
        import_any(tmp_path / "l.npz", axes="XY")
    assert as_parameters("`loadmaster plan x --axes EL` or --top-k 4, --layers 3-60") == (
        "`loadmaster plan x --axes EL` or top_k=4, layers='3-60'"
    )
