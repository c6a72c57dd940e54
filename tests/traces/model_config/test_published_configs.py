"""Published configurations, as the packages that ship them have them: each read right.

What is right was reckoned twice: by hand (`published_configs.csv`, with the sum that gives the
bytes) and by listing an expert's tensors (`expert_tensors.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.oracles.expert_tensors import (
    first_reckoning,
    published_folder,
    second_reckoning,
)
from loadmaster.traces.catalogue import catalogue_model
from loadmaster.traces.model_spec import ModelSpec

EXPECTED = first_reckoning()
FOLDER = published_folder()
published = pytest.mark.skipif(
    FOLDER is None, reason="aiconfigurator-core, which ships these configurations, is not installed"
)


def figures(spec: ModelSpec) -> dict[str, int | None]:
    layers = spec.own_layer_indices()
    return {
        "first": layers[0], "last": layers[-1], "layers": len(layers),
        "experts": spec.num_experts, "top_k": spec.top_k, "hidden": spec.hidden,
        "intermediate": spec.intermediate, "shared": spec.num_shared_experts,
        "bytes": int(spec.bytes_per_expert_E()[0]),
    }


def drafts(spec: ModelSpec) -> tuple[int, ...]:
    return () if spec.draft_layers is None else spec.draft_layers.layer_indices


def present(model: str) -> Path:
    assert FOLDER is not None
    path = FOLDER / f"{model}_config.json"
    if not path.is_file():
        pytest.skip(f"this version of the package has no {model}")
    return path


@published
@pytest.mark.parametrize("model", EXPECTED)
def test_a_published_configuration_is_read_right(model: str) -> None:
    spec = ModelSpec.from_pretrained(present(model))
    assert figures(spec) == EXPECTED[model]
    assert spec.name == model


@published
@pytest.mark.parametrize("model", EXPECTED)
def test_both_reckonings_agree(model: str) -> None:
    path = present(model)
    assert second_reckoning(path.parent, model) == EXPECTED[model]


@published
@pytest.mark.parametrize("model", EXPECTED)
def test_the_catalogue_has_it_as_its_configuration_does(model: str) -> None:
    """By the name it is published under; a format in the name does not tell its finest scales."""
    read = ModelSpec.from_pretrained(present(model))
    known = catalogue_model(model.replace("--", "/"))
    bytes_, told = figures(known).pop("bytes"), figures(read).pop("bytes")
    assert bytes_ == (pytest.approx(told, rel=5e-4) if known.notes else told)
    assert figures(known) | {"bytes": told} == figures(read)
    assert known.own_layer_indices() == read.own_layer_indices()
    for same in ("total_layers", "num_expert_groups", "groups_per_token", "matrices_per_expert"):
        assert getattr(known, same) == getattr(read, same), same
    assert drafts(known) == drafts(read)


@published
def test_every_moe_configuration_of_the_package_is_in_the_list() -> None:
    """Whoever updates the package reckons what is new; dense models are refused as such."""
    assert FOLDER is not None
    for path in sorted(FOLDER.glob("*_config.json")):
        name = path.name.removesuffix("_config.json")
        if path.name.endswith("_hf_quant_config.json") or name in EXPECTED:
            continue
        with pytest.raises(ValueError, match="not a mixture of experts"):
            ModelSpec.from_pretrained(path)
