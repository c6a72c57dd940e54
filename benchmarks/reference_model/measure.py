"""Measures the reference model on held-out text and writes what it finds into its card.

`python -m benchmarks.reference_model.measure --text DIR --model DIR`

Knows how well the model predicts bytes (beside n-gram models of the same training text) and how its
router differs between domains. Knows nothing of training, serving or placement. `card.json` in the
model's directory keeps the figures; none of them depends on a machine's speed.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from loadmaster.errors import InputError
from loadmaster.foundation.arrays import FloatArray
from loadmaster.traces.analysis.drift import jsd_bits

from .card import read_card, write_card
from .corpus import Domain, held_out_rows, read_domains
from .ngram import fit_ngram

SIDE_TOKENS = 20_000
BATCH_ROWS = 16
SPLIT_SEED = 0
BASELINE_ORDERS = {"unigram": 0, "order_3": 3}

# Axes: B rows, T tokens, L MoE layers, K choices per token, E experts.
Routes = NDArray[np.uint8]


def load_reference(directory: Path) -> PreTrainedModel:
    """The checkpoint in bf16 on the CPU, ready to be evaluated. Never asks a network for it."""
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: no config.json; give a directory that train.py wrote")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, local_files_only=True
    )
    model.train(False)
    return model


@contextmanager
def watch_routers(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """While open, collects the expert ids [tokens, K] of each MoE layer's router, in call order."""
    chosen: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[2]))
        for layer in model.model.layers
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Reading:
    """What the model made of some rows: bits of each predicted byte, experts of each input byte."""

    bits_BT: FloatArray
    ids_BTLK: Routes

    @property
    def bits_per_byte(self) -> float:
        """Mean over all predicted bytes."""
        return float(self.bits_BT.mean())


@torch.inference_mode()
def read_rows(model: PreTrainedModel, rows_BT: NDArray[np.int64]) -> Reading:
    """Runs rows of bytes through the model; the last byte of a row is only predicted.

    A row sees nothing of another row. Cost: one forward pass, in batches of BATCH_ROWS.
    """
    bits, ids = [], []
    for start in range(0, len(rows_BT), BATCH_ROWS):
        rows = torch.from_numpy(rows_BT[start : start + BATCH_ROWS])
        with watch_routers(model) as chosen:
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        nats = nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        )
        bits.append((nats / np.log(2)).view(len(rows), -1).double().numpy())
        layers = torch.stack(chosen, dim=1)
        ids.append(layers.view(len(rows), -1, *layers.shape[1:]).to(torch.uint8).numpy())
    return Reading(np.concatenate(bits), np.concatenate(ids))


def expert_load(ids_TLK: Routes, experts: int) -> FloatArray:
    """How often each expert was chosen: [L, E] counts."""
    layers = ids_TLK.shape[1]
    flat = ids_TLK.astype(np.int64) + np.arange(layers)[None, :, None] * experts
    counts = np.bincount(flat.reshape(-1), minlength=layers * experts)
    return counts.reshape(layers, experts).astype(np.float64)


def two_sides(ids_BTLK: Routes, side_tokens: int, seed: int) -> tuple[Routes, Routes]:
    """Two disjoint random sets of rows of one domain, cut to `side_tokens` tokens each: [T, L, K].

    Whole rows go to one side: the tokens of a row are strongly dependent.
    """
    rows, row_tokens = ids_BTLK.shape[:2]
    side_rows = -(-side_tokens // row_tokens)
    if 2 * side_rows > rows:
        raise ValueError(f"{rows} rows of {row_tokens} cannot give two sides of {side_tokens}")
    order = np.random.default_rng(seed).permutation(rows)
    one, other = order[:side_rows], order[side_rows : 2 * side_rows]
    shape = (-1, *ids_BTLK.shape[2:])
    return (
        ids_BTLK[one].reshape(shape)[:side_tokens],
        ids_BTLK[other].reshape(shape)[:side_tokens],
    )


def routing_card(readings: dict[str, Reading], experts: int) -> dict[str, Any]:
    """How the router tells domains apart, and how unevenly it uses experts."""
    sides = {
        name: [
            expert_load(side, experts)
            for side in two_sides(reading.ids_BTLK, SIDE_TOKENS, SPLIT_SEED)
        ]
        for name, reading in readings.items()
    }
    pairs = {
        (a, b): float(jsd_bits(sides[a][0], sides[b][0]).mean())
        for a, b in itertools.combinations(sides, 2)
    }
    floor = [float(jsd_bits(one, other).mean()) for one, other in sides.values()]
    mixed_LE = np.sum([one for one, _ in sides.values()], axis=0)
    closest, farthest = min(pairs, key=lambda p: pairs[p]), max(pairs, key=lambda p: pairs[p])
    return {
        "tokens_a_side": SIDE_TOKENS,
        "jsd_bits_between_domains": {
            "mean": round(float(np.mean(list(pairs.values()))), 4),
            "min": {"domains": list(closest), "bits": round(pairs[closest], 4)},
            "max": {"domains": list(farthest), "bits": round(pairs[farthest], 4)},
        },
        "jsd_bits_split_half_floor": {
            "mean": round(float(np.mean(floor)), 4),
            "max": round(max(floor), 4),
        },
        "hottest_over_mean_per_layer": {
            "all_domains_mixed": _hottest(mixed_LE),
            **{name: _hottest(one) for name, (one, _) in sides.items()},
        },
    }


def _hottest(load_LE: FloatArray) -> list[float]:
    ratio_L = load_LE.max(axis=1) / load_LE.mean(axis=1)
    return [round(float(ratio), 2) for ratio in ratio_L]


def held_out_card(domains: list[Domain], readings: dict[str, Reading]) -> dict[str, Any]:
    """Bits per held-out byte by domain: the model beside n-grams of the same training text."""
    table = {"model": {name: r.bits_per_byte for name, r in readings.items()}}
    for label, order in BASELINE_ORDERS.items():
        ngram = fit_ngram([domain.train for domain in domains], order)
        table[label] = {domain.name: ngram.bits_per_byte(domain.held_out) for domain in domains}
    rounded: dict[str, Any] = {}
    for label, by_domain in table.items():
        mean = sum(by_domain.values()) / len(by_domain)
        rounded[label] = {name: round(bits, 3) for name, bits in by_domain.items()}
        rounded[label]["mean"] = round(mean, 3)
    rounded["bytes"] = {name: int(r.bits_BT.size) for name, r in readings.items()}
    return rounded


def measure(directory: Path, text: Path) -> dict[str, Any]:
    """All figures of the checkpoint on the held-out tenth of every file in `text`."""
    model = load_reference(directory)
    card = read_card(directory)
    context = int(card["training"]["context_tokens"])
    domains = read_domains(text, context)
    readings = {d.name: read_rows(model, held_out_rows(d, context)) for d in domains}
    card["held_out_bits_per_byte"] = held_out_card(domains, readings)
    card["routing"] = routing_card(readings, model.config.num_experts)
    return card


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, required=True, help="directory of *.txt, one a domain")
    parser.add_argument("--model", type=Path, required=True, help="directory of the checkpoint")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    card = measure(options.model, options.text)
    write_card(options.model, card)
    print(json.dumps({k: card[k] for k in ("held_out_bits_per_byte", "routing")}, indent=1))


if __name__ == "__main__":
    main()
