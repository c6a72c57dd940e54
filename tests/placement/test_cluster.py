"""Clusters: presets, files, and the errors a person sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.cluster import PRESETS, Cluster, Traffic, preset_hardware


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_source_and_error_and_survives_a_file(name: str, tmp_path: Path) -> None:
    hardware = preset_hardware(name)
    assert hardware.name == name and len(hardware.source) > 40 and len(hardware.error) > 20
    cluster = Cluster.preset(name, nodes=2, devices_per_node=3, slots_per_device=4,
                             traffic="return_home/per_node", speeds=[1, 2, 1, 1, 1, 0.5])
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster.to_yaml())
    assert Cluster.from_yaml(path) == cluster
    assert Cluster.from_yaml(path).digest() == cluster.digest()


def test_presets_are_ordered_as_the_hardware_is() -> None:
    """Faster memory and links in newer devices; a PCIe box and a CPU far behind."""
    memory = {n: preset_hardware(n).compute.hbm_bytes_per_s for n in PRESETS}
    assert memory["gb200"] >= memory["b200"] > memory["h200"] > memory["h100"] > memory["a100"]
    assert memory["a100"] > memory["pcie"] > 10 * memory["cpu"]
    link = {n: preset_hardware(n).dispatch.nvlink_bytes_per_s for n in PRESETS}
    assert link["b200"] > link["h200"] > link["h100"] > link["a100"] > 10 * link["pcie"]


def test_the_short_form_and_a_presets_name_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({
        "nodes": 2, "devices_per_node": 2, "slots_per_device": 5, "hardware": "b200",
        "traffic": "allgather",
    }))
    cluster = Cluster.from_yaml(path)
    assert cluster.num_devices == 4 and cluster.num_nodes == 2 and cluster.total_slots == 20
    assert cluster.traffic == Traffic(mode="allgather")
    assert cluster.hardware == preset_hardware("b200")
    assert cluster.node_G.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hardware": "h300"}, "unknown hardware preset 'h300'"),
        ({"devices": [{"node": 0, "slots": 0}]}, r"devices\.0\.slots: Input should be greater"),
        ({"devices": [{"node": 0, "slots": 1, "speed": 0}]}, r"devices\.0\.speed"),
        ({"devices": [{"node": 0, "slots": 1, "speed": float("inf")}]}, "speed must be finite"),
        ({"devices": [{"node": 1, "slots": 1}]}, "node by node"),
        ({"devices": [{"node": 0, "slots": 1}, {"node": 2, "slots": 1}]}, "node by node"),
        ({"devices": []}, "devices"),
        ({"devices": [{"node": 0, "slots": 10**9}]}, r"devices\.0\.slots"),
        ({"color": "red"}, "color: no such field; there are: name, devices"),
        ({"traffic": "pigeons"}, "unknown traffic 'pigeons'"),
    ],
)
def test_bad_files_name_the_field(change: dict[str, object], message: str, tmp_path: Path) -> None:
    data = {"hardware": "h100", "devices": [{"node": 0, "slots": 2}]} | change
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises((InputError, UsageError), match=message):
        Cluster.from_yaml(path)


def test_more_devices_than_memory_holds_are_refused_before_they_are_made(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("{hardware: h100, nodes: 100000000, devices_per_node: 100000, "
                    "slots_per_device: 5}")
    with pytest.raises(InputError, match="at most 65536 devices"):
        Cluster.from_yaml(path)
    with pytest.raises(UsageError, match="at most 65536 devices"):
        Cluster.preset("h100", nodes=10**8, devices_per_node=10**5, slots_per_device=5)


@pytest.mark.parametrize("number", [".nan", ".inf"])
def test_hardware_of_no_finite_speed_is_refused(tmp_path: Path, number: str) -> None:
    data = Cluster.preset("h100", devices_per_node=1, slots_per_device=4).model_dump(mode="json")
    data["hardware"]["compute"]["hbm_bytes_per_s"] = float(number[1:])
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match="hbm_bytes_per_s: Input should be a finite number"):
        Cluster.from_yaml(path)


def test_a_file_nested_too_deep_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("[" * 20_000)
    with pytest.raises(InputError, match="not YAML"):
        Cluster.from_yaml(path)


def test_files_that_are_no_cluster(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such cluster file"):
        Cluster.from_yaml(tmp_path / "none.yaml")
    path = tmp_path / "cluster.yaml"
    with pytest.raises(InputError, match="cannot be read: a folder, not a file"):
        Cluster.from_yaml(tmp_path)
    for text, message in (("- a", "is a mapping"), ("a: [", "not YAML")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            Cluster.from_yaml(path)


@pytest.mark.parametrize(("sizes", "message"), [
    ("nodes: two\nslots_per_device: 4", "nodes: must be a whole number of at least 1, not 'two'"),
    ("nodes: 1.5\nslots_per_device: 4", "nodes: must be a whole number"),
    ("devices_per_node: 0\nslots_per_device: 4", "devices_per_node: must be a whole number"),
    ("nodes: 1", "slots_per_device: is missing"),
])
def test_sizes_that_are_none_are_named_with_their_file(
    sizes: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"hardware: h100\n{sizes}\n")
    with pytest.raises(InputError, match=f"cluster.yaml: {message}") as raised:
        Cluster.from_yaml(path)
    assert "\n" not in str(raised.value)
    path.write_text("hardware: abacus\nslots_per_device: 1\n")
    with pytest.raises(InputError, match=r"cluster.yaml: unknown hardware preset 'abacus'"):
        Cluster.from_yaml(path)


def test_what_the_digest_sees() -> None:
    base = Cluster.preset("h100", devices_per_node=2, slots_per_device=2)
    assert base.digest() == base.model_copy(update={"name": "mine"}).digest()
    others = [
        base.with_slots(3), base.with_traffic("allgather"),
        Cluster.preset("h200", devices_per_node=2, slots_per_device=2),
        Cluster.preset("h100", devices_per_node=2, slots_per_device=2, speeds=[1, 2]),
    ]
    assert len({c.digest() for c in [base, *others]}) == 5


def test_impossible_sizes_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="must all be at least 1"):
        Cluster.preset("h100", slots_per_device=0)
    with pytest.raises(UsageError, match="2 values for 8 devices"):
        Cluster.preset("h100", slots_per_device=1, speeds=[1, 1])
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="finite and above 0"):
            Cluster.preset("h100", devices_per_node=1, slots_per_device=1, speeds=[bad])


def test_an_oversubscribed_spine_is_sized_by_a_nodes_nics(tmp_path: Path) -> None:
    plain = Cluster.preset("h100", nodes=2, devices_per_node=4, slots_per_device=1)
    half = plain.with_oversubscription(2)
    for leg in ("dispatch", "combine"):
        link = getattr(half.hardware, leg)
        assert link.spine_bytes_per_s == 2 * link.nic_bytes_per_s
    assert half.digest() != plain.digest()
    (tmp_path / "cluster.yaml").write_text(half.to_yaml())
    assert Cluster.from_yaml(tmp_path / "cluster.yaml") == half
    for bad in (0.5, 0.0, -2.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="at least 1"):
            plain.with_oversubscription(bad)


def test_traffic_is_written_as_it_is_read() -> None:
    for text in ("return_home/per_expert", "return_home/per_rank", "return_home/per_node",
                 "allgather", "coherent"):
        assert str(Traffic.parse(text)) == text
    assert str(Traffic.parse("return_home")) == "return_home/per_expert"
    for text in ("allgather/per_rank", "return_home/per_token", ""):
        with pytest.raises(UsageError, match="unknown traffic"):
            Traffic.parse(text)


def test_devices_may_differ() -> None:
    data = {"hardware": preset_hardware("h100"), "devices": [
        {"node": 0, "slots": 3, "speed": 2.0, "expert_memory_bytes": 10**9},
        {"node": 0, "slots": 1},
    ]}
    cluster = Cluster.model_validate(data)
    assert cluster.slots_G.tolist() == [3, 1] and cluster.total_slots == 4
    assert np.array_equal(cluster.speed_G, [2, 1])
