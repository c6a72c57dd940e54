"""Recording a checkpoint on text: what the model routed is what the trace holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from loadmaster.errors import InputError, UsageError
from loadmaster.traces.load import load_trace
from loadmaster.traces.recording.record_model import Text, record_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=256, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
             num_key_value_heads=2, head_dim=16)


def saved(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-MoE whose middle layer is dense."""
    return saved(transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=64, moe_intermediate_size=16, num_experts=8,
        num_experts_per_tok=2, mlp_only_layers=[1],
    ), tmp_path_factory.mktemp("qwen"))


TEXTS = [Text("the quick brown fox jumps over the lazy dog", "en"), Text("le renard brun", "fr")]


def test_the_trace_holds_what_the_router_chose(checkpoint: Path, tmp_path: Path) -> None:
    """Against the router logits of a plain forward pass of every request."""
    summary = record_model(checkpoint, TEXTS, tmp_path / "t", request_tokens=16, step_tokens=32)
    trace: Any = load_trace(tmp_path / "t")
    assert summary.tokens == trace.num_tokens == 43 + 14
    assert trace.layer_indices == (0, 2) and trace.domain_names == ("en", "fr")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    pieces = [t.text.encode()[i : i + 16] for i, t in ((0, TEXTS[0]), (0, TEXTS[1]), (16, TEXTS[0]),
                                                       (32, TEXTS[0]))]
    for request, piece in enumerate(pieces):
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([list(piece)]), output_router_logits=True)
        expected = np.stack([logits.topk(2).indices for logits in out.router_logits], axis=1)
        kept = trace.request == request
        assert np.array_equal(np.sort(trace.ids[kept]), np.sort(expected))
        assert set(trace.domain[kept]) == {1 if request == 1 else 0}


def test_equal_lengths_run_together_and_nothing_is_padded(checkpoint: Path, tmp_path: Path) -> None:
    """Steps hold whole requests up to the limit; all of it is prefill."""
    record_model(checkpoint, ["x" * 80], tmp_path / "t", request_tokens=16, step_tokens=32)
    trace: Any = load_trace(tmp_path / "t")
    assert np.bincount(trace.step).tolist() == [32, 32, 16]
    assert (trace.phase == 0).all() and len(np.unique(trace.request)) == 5


def test_generated_tokens_are_decode_steps_of_their_requests(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Two requests of one length decode together, one token each per step."""
    record_model(checkpoint, ["abcd", "efgh"], tmp_path / "t", request_tokens=4, step_tokens=8,
                 decode_tokens=3)
    trace: Any = load_trace(tmp_path / "t")
    assert np.bincount(trace.step).tolist() == [8, 2, 2, 2]
    assert trace.phase.tolist() == [0] * 8 + [1] * 6
    assert trace.request[8:].tolist() == [0, 1] * 3


def test_more_tokens_than_any_context_holds_are_not_generated(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="decode_tokens 100000000000000000000 must be at most"):
        record_model(checkpoint, TEXTS, tmp_path / "t", decode_tokens=10**20)
    assert not (tmp_path / "t").exists()


def test_weights_that_do_not_fit_the_config_are_refused_and_nothing_is_made_up(
    checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"hidden_size": 64}))
    with pytest.raises(InputError, match=r"tensor \S+ has shape \[.*config.json it is \[.*64"):
        record_model(other, TEXTS, tmp_path / "t", request_tokens=16, step_tokens=32)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        record_model(other, TEXTS, tmp_path / "t", request_tokens=16, step_tokens=32)
    assert not (tmp_path / "t").exists()


def test_gates_come_along_and_requests_may_stay_away(checkpoint: Path, tmp_path: Path) -> None:
    record_model(checkpoint, ["hello"], tmp_path / "t", gates=True, requests=False)
    trace: Any = load_trace(tmp_path / "t")
    assert trace.request is None
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([list(b"hello")]), output_router_logits=True)
    expected = np.stack([x.softmax(-1).topk(2).values for x in out.router_logits], axis=1)
    assert np.sort(trace.gates.astype(float)) == pytest.approx(np.sort(expected), abs=1e-3)


def test_a_limit_keeps_all_domains(checkpoint: Path, tmp_path: Path) -> None:
    """Texts are cut in turn, so the first text does not use up the whole limit."""
    record_model(checkpoint, [Text("a" * 900, "a"), Text("b" * 900, "b")], tmp_path / "t",
                 request_tokens=32, step_tokens=64, max_tokens=128)
    trace: Any = load_trace(tmp_path / "t")
    assert np.bincount(trace.domain).tolist() == [64, 64]


def test_progress_counts_up_to_the_whole(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    record_model(checkpoint, ["x" * 40], tmp_path / "t", request_tokens=16, step_tokens=16,
                 progress=lambda done, of: seen.append((done, of)))
    assert seen == [(16, 40), (32, 40), (40, 40)]


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "mixtral", "olmoe"])
def test_other_architectures_are_recorded_alike(tmp_path: Path, family: str) -> None:
    """Biases and clamps, groups and dense first layers: one interface serves them all."""
    configs = {
        "gpt_oss": lambda: transformers.GptOssConfig(
            **SIZES, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2),
        "mixtral": lambda: transformers.MixtralConfig(
            **SIZES, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2),
        "olmoe": lambda: transformers.OlmoeConfig(
            **{k: v for k, v in SIZES.items() if k != "head_dim"}, intermediate_size=16,
            num_experts=8, num_experts_per_tok=2),
        "deepseek_v3": lambda: transformers.DeepseekV3Config(
            vocab_size=256, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=32, moe_intermediate_size=16,
            n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, kv_lora_rank=8,
            q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
            first_k_dense_replace=1),
    }
    folder = saved(configs[family](), tmp_path / "model")
    record_model(folder, ["the same text for everyone"], tmp_path / "t")
    trace: Any = load_trace(tmp_path / "t")
    assert trace.ids.shape == (26, 2 if family == "deepseek_v3" else 3, 2)
    if family == "deepseek_v3":  # both choices lie in one of the two groups
        assert (trace.ids[..., 0] // 4 == trace.ids[..., 1] // 4).all()
        assert trace.layer_indices == (1, 2)


def test_what_cannot_be_recorded_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    """Not MoE, no tokenizer, nothing to read, settings that cannot be, a folder in use."""
    dense = saved(transformers.LlamaConfig(**SIZES, intermediate_size=32), tmp_path / "dense")
    with pytest.raises(InputError, match="not a mixture of experts"):
        record_model(dense, ["x"], tmp_path / "t")
    words = saved(transformers.MixtralConfig(
        **{**SIZES, "vocab_size": 300}, intermediate_size=16, num_local_experts=4,
    ), tmp_path / "words")
    with pytest.raises(InputError, match="a vocabulary of 300 is not the 256 bytes"):
        record_model(words, ["x"], tmp_path / "t")
    with pytest.raises(InputError, match="no tokens"):
        record_model(checkpoint, [""], tmp_path / "t")
    with pytest.raises(UsageError, match="request_tokens"):
        record_model(checkpoint, ["x"], tmp_path / "t", request_tokens=9, step_tokens=8)
    with pytest.raises(UsageError, match="max_tokens 0"):
        record_model(checkpoint, ["x"], tmp_path / "t", max_tokens=0)
    (checkpoint_copy := tmp_path / "copy").mkdir()
    (checkpoint_copy / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(InputError, match="transformers cannot load it"):
        record_model(checkpoint_copy, ["x"], tmp_path / "t")
    assert not (tmp_path / "t").exists()
    with pytest.raises(UsageError, match="never overwritten"):
        record_model(checkpoint, ["x"], checkpoint_copy)


def test_stopped_before_the_first_step_leaves_no_folder_and_later_what_was_recorded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    texts = ["abcdefgh" * 4]
    with pytest.raises(KeyboardInterrupt):      # progress comes after a whole step
        record_model(checkpoint, texts, tmp_path / "some", request_tokens=8, step_tokens=8,
                     progress=stop)
    assert load_trace(tmp_path / "some").num_tokens == 8
    monkeypatch.setattr("loadmaster.traces.recording.recorder.Recorder.begin_step", stop)
    with pytest.raises(KeyboardInterrupt):
        record_model(checkpoint, texts, tmp_path / "none", request_tokens=8, step_tokens=8)
    assert not (tmp_path / "none").exists()


def test_an_architecture_outside_the_interface_is_refused(tmp_path: Path) -> None:
    """Known shapes, but experts that transformers does not route through its interface."""
    text = transformers.Llama4TextConfig(
        **SIZES, intermediate_size=16, intermediate_size_mlp=32, num_local_experts=4,
        num_experts_per_tok=1, layer_types=["full_attention"] * 3, no_rope_layers=[1, 1, 1],
    )
    folder = saved(text, tmp_path / "model")
    with pytest.raises(InputError, match=r"routes 0 layers.*engine that serves it"):
        record_model(folder, ["x"], tmp_path / "t")
    assert not (tmp_path / "t").exists()
