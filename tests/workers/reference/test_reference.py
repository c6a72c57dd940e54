"""The reference model: what is shipped loads and predicts, its router tells domains apart."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from scipy.spatial.distance import jensenshannon
from transformers import PreTrainedModel

from benchmarks.reference_model.card import read_card, write_card
from benchmarks.reference_model.corpus import Domain, draw_rows, held_out_rows, read_domains
from benchmarks.reference_model.measure import (
    expert_load,
    load_reference,
    read_rows,
    two_sides,
)
from benchmarks.reference_model.ngram import fit_ngram
from benchmarks.reference_model.train import balance_loss, learning_rate, save, train
from loadmaster.errors import InputError, UsageError
from loadmaster.traces.analysis.drift import jsd_bits
from loadmaster.workers.reference import reference_model_dir
from loadmaster.workers.reference.bytes_tokenizer import decode, encode
from loadmaster.workers.reference.prompts import DOMAINS, SENTENCES, demo_prompts

TEXT = Path(__file__).resolve().parents[4] / "shared" / "data" / "text"
needs_text = pytest.mark.skipif(not TEXT.is_dir(), reason=f"real text not present: {TEXT}")
MODEL = reference_model_dir()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """The shipped checkpoint; one thread, so that a run repeats."""
    torch.set_num_threads(1)
    return load_reference(MODEL)


def prompt_rows(domain: str, count: int, tokens: int) -> np.ndarray:
    """Demo prompts as rows for the model."""
    prompts = demo_prompts(domain, count, tokens, seed=0)
    return np.array([list(prompt) for prompt in prompts], np.int64)


# --- the shipped files ---------------------------------------------------------------------------


def test_shipped_model_is_small_and_finite(model: PreTrainedModel) -> None:
    """All its files together stay under 10 MB; every parameter is a bf16 number."""
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 10_000_000
    for parameter in model.parameters():
        assert parameter.dtype == torch.bfloat16
        assert bool(parameter.isfinite().all())
    assert sum(p.numel() for p in model.parameters()) == read_card(MODEL)["training"]["parameters"]


def test_one_expert_can_be_read_alone(model: PreTrainedModel) -> None:
    """Each expert has its own keys, and they hold what the loaded model computes with."""
    prefix = "model.layers.2.mlp.experts.7"
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        gate, up, down = (
            file.get_tensor(f"{prefix}.{part}_proj.weight") for part in ("gate", "up", "down")
        )
    experts = model.model.layers[2].mlp.experts
    assert torch.equal(torch.cat([gate, up]), experts.gate_up_proj[7])
    assert torch.equal(down, experts.down_proj[7])


def test_readme_quotes_the_card() -> None:
    """The figures in the README are those of the card."""
    text = (MODEL.parent / "README.md").read_text(encoding="utf-8")
    bits = read_card(MODEL)["held_out_bits_per_byte"]
    for domain in bits["model"]:
        row = [f"{bits[label][domain]:.3f}" for label in ("model", "order_3", "unigram")]
        assert f"| {domain} | {' | '.join(row)} |" in text


def test_card_meets_the_bars() -> None:
    """Each domain beats the order-3 model; domains differ by >= 0.05 bits, far above the floor."""
    card = read_card(MODEL)
    bits, routing = card["held_out_bits_per_byte"], card["routing"]
    assert all(bits["model"][name] < bits["order_3"][name] for name in bits["model"])
    assert routing["tokens_a_side"] == 20_000
    assert routing["jsd_bits_between_domains"]["mean"] >= 0.05
    assert routing["jsd_bits_split_half_floor"]["max"] < 0.005


# --- what the model does -------------------------------------------------------------------------


@needs_text
def test_held_out_text_scores_below_the_ngrams(model: PreTrainedModel) -> None:
    """Bits per byte on text it never saw: below unigram and order 3 of the same training text."""
    domains = read_domains(TEXT, 384)
    russian = next(domain for domain in domains if domain.name == "manual_ru")
    rows = held_out_rows(russian, 384)[::20]
    unigram = fit_ngram([domain.train for domain in domains], 0)
    reading = read_rows(model, rows)
    assert reading.bits_BT.size == rows[:, 1:].size
    assert reading.bits_per_byte < 0.5 * unigram.bits_per_byte(russian.held_out)


@needs_text
@pytest.mark.slow
def test_card_repeats(model: PreTrainedModel) -> None:
    """Measuring one domain again gives the card's figures."""
    domains = read_domains(TEXT, 384)
    chinese = next(domain for domain in domains if domain.name == "handbook_zh")
    bits = read_card(MODEL)["held_out_bits_per_byte"]
    order_3 = fit_ngram([domain.train for domain in domains], 3)
    assert order_3.bits_per_byte(chinese.held_out) == pytest.approx(
        bits["order_3"]["handbook_zh"], abs=6e-4
    )
    assert read_rows(model, held_out_rows(chinese, 384)).bits_per_byte == pytest.approx(
        bits["model"]["handbook_zh"], abs=5e-3
    )


@pytest.mark.parametrize("domain", DOMAINS)
def test_prompts_score_below_their_own_byte_entropy(model: PreTrainedModel, domain: str) -> None:
    """Even a unigram model fitted to these very prompts predicts them worse than the model."""
    rows = prompt_rows(domain, count=6, tokens=256)
    own_unigram = fit_ngram([rows.astype(np.uint8).reshape(-1)], 0)
    assert read_rows(model, rows).bits_per_byte < own_unigram.bits_per_byte(
        rows.astype(np.uint8).reshape(-1)
    )


def test_router_tells_code_from_chinese(model: PreTrainedModel) -> None:
    """On demo prompts two domains differ by 0.05 bits or more, two halves of one far less."""
    readings = [read_rows(model, prompt_rows(name, 24, 257)) for name in ("code", "chinese")]
    code, chinese = (two_sides(reading.ids_BTLK, 3_072, seed=0) for reading in readings)

    def differ(one: np.ndarray, other: np.ndarray) -> float:
        return float(jsd_bits(expert_load(one, 32), expert_load(other, 32)).mean())

    between = differ(code[0], chinese[0])
    assert between >= 0.05
    assert between > 5 * max(differ(*code), differ(*chinese))


def test_rows_do_not_see_each_other(model: PreTrainedModel) -> None:
    """A row's bits and experts are the same alone and in company."""
    rows = np.concatenate([prompt_rows(name, 1, 200) for name in ("german", "code", "japanese")])
    together = read_rows(model, rows)
    for b in range(len(rows)):
        alone = read_rows(model, rows[b : b + 1])
        assert np.array_equal(alone.ids_BTLK[0], together.ids_BTLK[b])
        assert np.array_equal(alone.bits_BT[0], together.bits_BT[b])


# --- prompts and bytes ---------------------------------------------------------------------------


@given(st.sampled_from(DOMAINS), st.integers(1, 5), st.integers(1, 3_000), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_prompts_repeat_and_have_the_length_asked_for(
    domain: str, count: int, tokens: int, seed: int
) -> None:
    """Exactly `count` prompts of exactly `tokens` bytes, the same every time."""
    prompts = demo_prompts(domain, count, tokens, seed)
    assert [len(prompt) for prompt in prompts] == [tokens] * count
    assert prompts == demo_prompts(domain, count, tokens, seed)


@pytest.mark.parametrize("domain", DOMAINS)
def test_prompts_differ_and_are_text(domain: str) -> None:
    """Prompts of one call differ, so do seeds; each starts whole and at most its end is cut."""
    prompts = demo_prompts(domain, 6, 400, seed=1)
    assert len(set(prompts)) == len(prompts)
    assert prompts != demo_prompts(domain, 6, 400, seed=2)
    for prompt in prompts:
        whole = prompt.decode("utf-8", errors="ignore")
        assert decode(prompt).removesuffix("\ufffd") == whole


def test_prompts_do_not_depend_on_the_hash_seed() -> None:
    """Another process with another hash seed builds the same prompts, without torch."""
    program = (
        "import sys, loadmaster.workers.reference.prompts as p\n"
        "print([p.demo_prompts(d, 2, 90, 5) for d in p.DOMAINS])\n"
        "assert not {'torch', 'transformers', 'ray', 'numpy'} & set(sys.modules)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{[demo_prompts(d, 2, 90, 5) for d in DOMAINS]}\n".encode()}


@pytest.mark.parametrize("sentences", SENTENCES.values(), ids=SENTENCES)
def test_each_language_has_enough_prose(sentences: list[str]) -> None:
    """At least 1,500 bytes a language, no sentence twice."""
    assert len("".join(sentences).encode()) >= 1_500
    assert len(set(sentences)) == len(sentences)


def test_bad_prompt_requests_say_what_is_wrong() -> None:
    """An unknown domain, nothing asked for, more than there is."""
    with pytest.raises(UsageError, match="'klingon'; known: code, english"):
        demo_prompts("klingon", 1, 10, 0)
    with pytest.raises(UsageError, match="at least 1"):
        demo_prompts("code", 0, 10, 0)
    with pytest.raises(InputError, match="ask for fewer"):
        demo_prompts("english", 1, 10**9, 0)


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    """Encoding and decoding give the text back (lone surrogates are not text)."""
    clean = text.encode("utf-8", errors="ignore").decode()
    ids = encode(clean)
    assert all(0 <= token < 256 for token in ids)
    assert decode(ids) == clean


def test_half_a_character_decodes_to_a_mark() -> None:
    """A cut inside a character is shown, not raised."""
    assert decode(encode("così")[:-1]) == "cos\ufffd"


# --- the measures themselves ---------------------------------------------------------------------


def witten_bell(history: list[bytes], context: bytes, byte: int) -> float:
    """Obvious, slow interpolated probability of one byte after `context`."""
    probability = 1 / 256
    for length in range(len(context) + 1):
        tail = context[len(context) - length :]
        after = Counter(
            text[i + length]
            for text in history
            for i in range(len(text) - length)
            if text[i : i + length] == tail
        )
        if after:
            total, kinds = after.total(), len(after)
            probability = (after[byte] + kinds * probability) / (total + kinds)
    return probability


@given(
    st.lists(st.binary(min_size=6, max_size=40), min_size=1, max_size=3),
    st.binary(min_size=5, max_size=9),
)
@settings(max_examples=40, deadline=None)
def test_ngram_equals_its_definition(history: list[bytes], text: bytes) -> None:
    """Vectorised counting gives the same bits as counting by hand."""
    small = [bytes(b % 3 for b in stream) for stream in history]
    text = bytes(b % 4 for b in text)
    ngram = fit_ngram([np.frombuffer(stream, np.uint8) for stream in small], 3)
    expected = [
        -math.log2(witten_bell(small, text[i - 3 : i], text[i])) for i in range(3, len(text))
    ]
    assert ngram.bits(np.frombuffer(text, np.uint8)) == pytest.approx(expected)


def test_ngram_probabilities_sum_to_one() -> None:
    """Over the 256 next bytes, after a known and an unknown context."""
    ngram = fit_ngram([np.frombuffer(b"abracadabra", np.uint8)], 3)
    for context in (b"abr", b"xyz"):
        nexts = [np.frombuffer(context + bytes([b]), np.uint8) for b in range(256)]
        assert sum(2 ** -ngram.bits_per_byte(text) for text in nexts) == pytest.approx(1)


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_divergence_agrees_with_scipy(seed: int) -> None:
    """Jensen-Shannon in bits, also where an expert was never chosen."""
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, 5, (2, 3, 8)).astype(float)
    one[:, 0] += 1
    other[:, 1] += 1
    expected = jensenshannon(one, other, axis=1, base=2) ** 2
    assert jsd_bits(one, other) == pytest.approx(expected, abs=1e-12)


def test_divergence_of_equal_and_disjoint_loads() -> None:
    """0 bits for the same shares, 1 bit where nothing is shared."""
    load = np.array([[1.0, 3.0, 0.0, 0.0]])
    assert jsd_bits(load, 7 * load) == pytest.approx([0])
    assert jsd_bits(load, load[:, ::-1]) == pytest.approx([1])


def test_two_sides_share_no_row() -> None:
    """Sides are cut from disjoint rows, and too few rows are refused."""
    ids = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(8, axis=1)
    one, other = two_sides(ids, side_tokens=30, seed=3)
    assert len(one) == len(other) == 30
    assert not set(one.reshape(-1)) & set(other.reshape(-1))
    with pytest.raises(ValueError, match="cannot give two sides"):
        two_sides(ids, side_tokens=41, seed=3)


# --- text and training ---------------------------------------------------------------------------


def small_domains() -> list[Domain]:
    """Two domains with nothing in common."""
    low = np.tile(np.arange(10, 40, dtype=np.uint8), 40)
    high = np.tile(np.arange(200, 240, dtype=np.uint8), 30)
    return [Domain("low", low, low[:400]), Domain("high", high, high[:400])]


def test_rows_come_from_one_domain_each() -> None:
    """Rows follow the domains' order and never cross from one into the next."""
    rows = draw_rows(small_domains(), 3, 50, np.random.default_rng(0))
    assert rows.shape == (6, 51)
    assert (rows[:3] < 100).all() and (rows[3:] > 100).all()


def test_held_out_rows_predict_each_byte_once() -> None:
    """Targets in order are the held-out bytes but the first."""
    domain = small_domains()[0]
    rows = held_out_rows(domain, 50)
    assert np.array_equal(rows[:, 1:].reshape(-1), domain.held_out[1 : rows[:, 1:].size + 1])


def test_text_directory_is_checked(tmp_path: Path) -> None:
    """No text, and too little text, are each said in a line; notices are no domain."""
    (tmp_path / "NOTICES.txt").write_text("terms")
    with pytest.raises(InputError, match=r"no \.txt files"):
        read_domains(tmp_path, 10)
    (tmp_path / "b.txt").write_bytes(bytes(200))
    (tmp_path / "a.txt").write_bytes(bytes(300))
    domains = read_domains(tmp_path, 10)
    assert [(d.name, len(d.train), len(d.held_out)) for d in domains] == [
        ("a", 270, 30),
        ("b", 180, 20),
    ]
    with pytest.raises(InputError, match=r"b\.txt: 200 bytes"):
        read_domains(tmp_path, 20)


def test_balance_loss_is_one_when_even_and_greatest_when_collapsed() -> None:
    """Even use costs 1; everything on K of E experts costs E / K."""
    collapsed = torch.tensor([[50.0, 50.0, 0.0, 0.0]]).repeat(6, 1)
    even = torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]).repeat(3, 1)
    assert balance_loss([collapsed], top_k=2).item() == pytest.approx(2)
    assert balance_loss([even], top_k=2).item() == pytest.approx(1)
    assert balance_loss([even, collapsed], top_k=2).item() == pytest.approx(1.5)


def test_learning_rate_rises_then_falls() -> None:
    """Warm-up to the peak, then down to two percent of it."""
    rates = [learning_rate(step, 500) for step in range(501)]
    peak = max(rates)
    assert rates.index(peak) == 99
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))
    assert rates[500] == pytest.approx(0.02 * peak)


def test_training_repeats_and_saves_what_it_trained(tmp_path: Path) -> None:
    """The same seed gives the same bits, another seed others; the checkpoint is its bf16 copy."""
    torch.set_num_threads(1)
    first, again, other = (train(small_domains(), 2, seed, out=None) for seed in (0, 0, 1))
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    save(first, tmp_path)
    loaded = load_reference(tmp_path)
    for name, parameter in first.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16()), name


def test_card_is_replaced_whole(tmp_path: Path) -> None:
    """What is written is read; a directory without a card says what to do."""
    with pytest.raises(InputError, match=r"card\.json: no such file"):
        read_card(tmp_path)
    for card in ({"training": {"steps": 1}}, {"training": {"steps": 2}}):
        write_card(tmp_path, card)
        assert read_card(tmp_path) == card
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]
    assert json.loads((tmp_path / "card.json").read_text()) == card
