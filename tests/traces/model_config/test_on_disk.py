"""Weights on disk decide: their headers say which layers hold experts, how many, how large."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loadmaster.errors import InputError
from loadmaster.traces.model_config.on_disk import read_experts
from loadmaster.traces.model_spec import ModelSpec

from .conftest import Write

H, W, E = 64, 32, 4
MODEL: dict[str, Any] = dict(
    model_type="deepseek_v3", torch_dtype="bfloat16", hidden_size=H, moe_intermediate_size=W,
    num_hidden_layers=4, n_routed_experts=E, num_experts_per_tok=2, first_k_dense_replace=1,
)
EXPERT = 3 * H * W
Tensors = dict[str, torch.Tensor]
BF16, FP8, U8, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float32


def plain(dtype: torch.dtype = BF16, hidden: int = H, width: int = W) -> Tensors:
    """One expert's tensors."""
    return {
        "gate_proj.weight": torch.zeros(width, hidden, dtype=dtype),
        "up_proj.weight": torch.zeros(width, hidden, dtype=dtype),
        "down_proj.weight": torch.zeros(hidden, width, dtype=dtype),
    }


def nvfp4() -> Tensors:
    """Two weights a byte, an 8-bit scale for 16 of them, two scales for a tensor."""
    made: Tensors = {}
    for name, rows, columns in (("gate", W, H), ("up", W, H), ("down", H, W)):
        made[f"{name}_proj.weight"] = torch.zeros(rows, columns // 2, dtype=U8)
        made[f"{name}_proj.weight_scale"] = torch.zeros(rows, columns // 16, dtype=FP8)
        made[f"{name}_proj.weight_scale_2"] = torch.zeros((), dtype=F32)
        made[f"{name}_proj.input_scale"] = torch.zeros((), dtype=F32)
    return made


def layers(
    expert: Callable[[], Tensors] = plain, which: range = range(1, 4), experts: int = E,
    start: str = "model.layers.", block: str = "mlp",
) -> Tensors:
    """All experts of some layers, and what stands beside them."""
    made = {
        f"{start}{layer}.{block}.experts.{e}.{name}": tensor.clone()
        for layer in which for e in range(experts) for name, tensor in expert().items()
    }
    for layer in range(4):
        made[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.zeros(H, H, dtype=BF16)
        made[f"model.layers.{layer}.mlp.shared_experts.up_proj.weight"] = torch.zeros(W, H)
        made[f"model.layers.{layer}.mlp.gate.weight"] = torch.zeros(E, H)
    return made


def model(write: Write, tensors: Tensors, **fields: Any) -> ModelSpec:
    folder = write(MODEL | fields)
    save_file(tensors, folder / "model.safetensors")
    return ModelSpec.from_pretrained(folder)


def test_weights_that_fit_their_configuration_change_nothing(write: Write) -> None:
    folder = write(MODEL)
    alone = ModelSpec.from_pretrained(folder)
    save_file(layers(), folder / "model.safetensors")
    beside = ModelSpec.from_pretrained(folder)
    dense = {"dense_bytes", "dense_is_estimated"}       # known exactly, where it was reckoned
    assert beside.model_dump(exclude=dense) == alone.model_dump(exclude=dense)
    assert beside.notes == ()
    assert beside.bytes_per_expert_E().tolist() == [2 * EXPERT] * E


def test_a_quantisation_nobody_mentions_is_seen_and_said(write: Write) -> None:
    """The configuration speaks of bfloat16, the files hold four bits and scales."""
    spec = model(write, layers(nvfp4))
    each = EXPERT // 2 + EXPERT // 16 + 3 * 8
    assert spec.bytes_per_expert_E().tolist() == [each] * E
    assert spec.notes == (
        f"bytes per expert: {each} on disk, {2 * EXPERT} by config.json; the weights decide",
    )


def test_a_quantisation_that_is_not_known_is_weighed(write: Write) -> None:
    spec = model(write, layers(nvfp4), quantization_config={"quant_method": "magic"})
    assert spec.knows_sizes and spec.bytes_per_expert_E()[0] == EXPERT // 2 + EXPERT // 16 + 24
    assert spec.notes == ()


def test_a_dtype_nobody_gave_is_seen(write: Write) -> None:
    fields = {"torch_dtype": None}
    assert "no dtype is given" in ModelSpec.from_pretrained(write(MODEL | fields)).notes[0]
    assert model(write, layers(), **fields).notes == ()


def test_scales_of_a_whole_tensor_are_no_difference(write: Write) -> None:
    """24 bytes of an expert's are not worth a word (here they would be: the expert is tiny)."""
    def wide() -> Tensors:
        return {name: torch.zeros(tuple(8 * n for n in t.shape), dtype=t.dtype)
                for name, t in nvfp4().items()}

    spec = model(write, layers(wide, experts=2), hidden_size=8 * H, moe_intermediate_size=8 * W,
                 n_routed_experts=2, quantization_config={"quant_algo": "NVFP4"})
    assert spec.notes == () and spec.bytes_per_expert_E()[0] == 64 * (EXPERT // 2 + EXPERT // 16)


@pytest.mark.parametrize(("start", "block"), [
    ("model.layers.", "mlp"), ("language_model.model.layers.", "block_sparse_moe"),
    ("model.language_model.layers.", "feed_forward"), ("layers.", "ffn"),
    ("backbone.layers.", "mixer"), ("transformer.h.", "moe"), ("transformer.blocks.", "ffn"),
])
def test_whatever_the_model_calls_its_modules(write: Write, start: str, block: str) -> None:
    folder = write(MODEL)
    save_file(layers(start=start, block=block), folder / "model.safetensors")
    found = read_experts(folder, 4)
    assert found is not None and found.layers == (1, 2, 3)
    assert found.bytes_LE[1] == (2 * EXPERT,) * E and found.hidden_first == (H, W)


@pytest.mark.parametrize("stack", [
    {"mlp.experts.gate_up_proj": (E, H, 2 * W), "mlp.experts.down_proj": (E, W, H)},
    {"mlp.experts.gate_up_proj": (E, 2 * W, H), "mlp.experts.down_proj": (E, H, W)},
    {"block_sparse_moe.input_linear.weight": (E, 2 * W, H),
     "block_sparse_moe.output_linear.weight": (E, H, W)},
    {"moe.gate_proj.weight": (E, W, H), "moe.up_proj.weight": (E, W, H),
     "moe.down_proj.weight": (E, H, W)},
    {"ffn.experts.mlp.w1": (E * W, H), "ffn.experts.mlp.v1": (E * W, H),
     "ffn.experts.mlp.w2": (E * W, H)},
])
def test_experts_stacked_in_one_tensor(write: Write, stack: dict[str, tuple[int, ...]]) -> None:
    folder = write(MODEL)
    save_file(
        {f"model.layers.{layer}.{name}": torch.zeros(shape, dtype=BF16)
         for layer in (1, 2, 3) for name, shape in stack.items()},
        folder / "model.safetensors",
    )
    spec = ModelSpec.from_pretrained(folder)
    assert spec.notes == () and spec.bytes_per_expert_E().tolist() == [2 * EXPERT] * E


def test_they_tell_the_layers_of_a_model_nobody_knows(write: Write) -> None:
    """No question is asked where the weights have the answer."""
    spec = model(write, layers(which=range(2, 4)), model_type="nobody_knows",
                 first_k_dense_replace=None)
    assert spec.own_layer_indices() == (2, 3) and spec.total_layers == 4 and spec.notes == ()


@pytest.mark.parametrize(("tensors", "fields", "note", "seen"), [
    (layers(which=range(2, 4)), {}, "layers: the weights on disk hold experts in 2-3, config.json "
     "says 1-3; the weights decide", {"layer_indices": (2, 3)}),
    (layers(experts=3), {}, "experts: the weights on disk hold 3 in a layer, config.json says 4; "
     "the weights decide", {"num_experts": 3}),
    (layers(lambda: plain(width=W // 2)), {}, f"widths: the experts on disk are {H} x {W // 2}, "
     f"config.json says {H} x {W}; the weights decide", {"intermediate": W // 2}),
    (layers(), {"hidden_size": 2 * H}, f"widths: the experts on disk are {H} x {W}, config.json "
     f"says {2 * H} x {W}; the weights decide", {"hidden": H}),
])
def test_where_headers_do_not_fit_the_configuration_they_decide_and_it_is_said(
    write: Write, tensors: Tensors, fields: dict[str, Any], note: str, seen: dict[str, Any]
) -> None:
    spec = model(write, tensors, **fields)
    assert note in spec.notes
    assert {key: getattr(spec, key) for key in seen} == seen


def test_weights_settle_what_two_fields_contradict(write: Write) -> None:
    spec = model(write, layers(), num_experts=2 * E)
    assert spec.num_experts == E
    with pytest.raises(InputError, match="mean the same"):
        model(write, {}, num_experts=2 * E)


def test_fewer_experts_on_disk_than_a_token_chooses_is_refused(write: Write) -> None:
    with pytest.raises(InputError, match="top_k 4 is larger than num_experts 3"):
        model(write, layers(experts=3), num_experts_per_tok=4)


def test_experts_of_several_sizes_are_listed_one_by_one(write: Write) -> None:
    tensors = layers()
    for name in [n for n in tensors if ".experts.2." in n and "shared" not in n]:
        tensors[name] = tensors[name].to(FP8)
    spec = model(write, tensors)
    assert spec.expert_bytes == (2 * EXPERT, 2 * EXPERT, EXPERT, 2 * EXPERT)
    assert spec.knows_sizes


def test_layers_of_several_sizes_are_counted_in_a_note(write: Write) -> None:
    tensors = layers(which=range(1, 3)) | layers(lambda: plain(FP8), which=range(3, 4))
    spec = model(write, tensors)
    assert spec.bytes_per_expert_E()[0] == 2 * EXPERT
    assert spec.notes == (
        "bytes per expert: 1 of 3 layers hold experts of another size on disk; that of most is "
        "taken for all",
    )


def test_draft_layers_are_not_counted_among_the_layers(write: Write) -> None:
    """Numbered after the hidden layers, or under a name of their own."""
    tensors = layers(which=range(1, 5)) | {
        f"mtp.layers.0.mlp.experts.{e}.{name}": tensor.clone()
        for e in range(E) for name, tensor in plain().items()
    }
    spec = model(write, tensors, num_nextn_predict_layers=1)
    assert spec.own_layer_indices() == (1, 2, 3) and spec.notes == ()
    assert spec.draft_layers is not None and spec.draft_layers.layer_indices == (4,)


def test_several_files_are_read_by_their_index(write: Write) -> None:
    folder, tensors = write(MODEL), layers()
    names = sorted(tensors)
    where = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert ModelSpec.from_pretrained(folder).notes == ()
    (folder / "part-1.safetensors").unlink()
    (note,) = ModelSpec.from_pretrained(folder).notes
    assert "part-1.safetensors: not there" in note and "configuration alone is taken" in note


def test_weights_that_lie_there_twice_count_once(write: Write) -> None:
    """As transformers keeps them, and as Mistral does."""
    folder = write(MODEL)
    save_file(layers(), folder / "model.safetensors")
    save_file(layers(start="layers.", block="ffn"), folder / "consolidated.safetensors")
    spec = ModelSpec.from_pretrained(folder)
    assert spec.notes == () and spec.bytes_per_expert_E()[0] == 2 * EXPERT


def test_experts_of_other_parts_are_not_the_language_models(write: Write) -> None:
    """A talker or an encoder with experts of its own, beside the model that thinks."""
    others = {
        f"{start}layers.{layer}.mlp.experts.{e}.{name}": tensor.clone()
        for start in ("talker.model.", "vision_tower.")
        for layer in range(6) for e in range(2) for name, tensor in plain().items()
    }
    spec = model(write, layers(start="thinker.model.layers.") | others)
    assert spec.notes == () and spec.own_layer_indices() == (1, 2, 3)


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def _garble(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"x" * 2000)


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _without_an_expert(folder: Path) -> None:
    tensors = {n: t for n, t in layers().items() if ".layers.2.mlp.experts.1." not in n}
    save_file(tensors, folder / "model.safetensors")


def _misdirect(folder: Path) -> None:
    index = {"weight_map": {"model.layers.1.mlp.experts.0.up_proj.weight": ["a", "list"],
                            "model.norm.weight": "../../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("damage", "said"), [
    (_misdirect, "not there, though"), (_cut, "longer than the file"),
    (_garble, "not a whole safetensors file"),
    (_empty, "longer than the file"), (_without_an_expert, "layer 2 has no expert 1 on disk"),
])
def test_weights_that_cannot_be_read_are_said_and_the_configuration_stands(
    write: Write, damage: Callable[[Path], None], said: str
) -> None:
    """Whoever serves them refuses them; sizes do not need them."""
    folder = write(MODEL)
    save_file(layers(), folder / "model.safetensors")
    damage(folder)
    spec = ModelSpec.from_pretrained(folder)
    assert spec.num_layers == 3 and spec.bytes_per_expert_E()[0] == 2 * EXPERT
    (note,) = spec.notes
    assert said in note and "\n" not in note


def test_only_headers_are_read(write: Write) -> None:
    """A file whose data never arrived still tells its sizes."""
    folder = write(MODEL)
    path = folder / "model.safetensors"
    save_file(layers(nvfp4), path)
    header = path.read_bytes()
    size = 8 + int.from_bytes(header[:8], "little")
    path.write_bytes(header[:size])
    found = read_experts(folder, 4)
    assert found is not None and found.bytes_LE[3] == (EXPERT // 2 + EXPERT // 16 + 24,) * E
