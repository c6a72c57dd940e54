"""Trains the reference model: a byte-level mixture-of-experts model in the Qwen3-MoE layout.

`python -m benchmarks.reference_model.train --text DIR --out DIR --steps N --seed 0`

Knows the architecture, the optimiser and the schedule. Knows nothing of serving or placement.
One torch thread and explicit seeds: on one kind of machine the same arguments give the same bytes.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from .card import write_card
from .corpus import Domain, draw_rows, read_domains

CONTEXT_TOKENS = 384
ROWS_PER_DOMAIN = 1
PEAK_LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE_SHARE = 0.02
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
GRADIENT_NORM = 1.0
BALANCE_COEFFICIENT = 4e-3
LOG_EVERY = 25
SAVE_EVERY = 250
TIMED_STEPS = 12


ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,  # of dense layers, of which there are none
    "moe_intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
    "router_aux_loss_coef": BALANCE_COEFFICIENT,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def reference_config() -> Qwen3MoeConfig:
    """6 layers of 32 experts, top-4, over the 256 byte values; byte 0 ends a sequence."""
    config = Qwen3MoeConfig(**ARCHITECTURE)
    config._experts_implementation = "grouped_mm"
    config._attn_implementation = "sdpa"
    return config


def balance_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """How unevenly a batch uses the experts, mean over layers: 1 when even, E/K at worst.

    Per layer E x sum over experts of (share of choices) x (mean probability), as in the Switch
    Transformer. Taken over a batch of mixed domains, so one domain alone may stay skewed; and per
    layer, because counts pooled over layers (as in transformers' own) hide a layer's skew.
    """
    losses = []
    for logits_TE in router_logits:
        experts = logits_TE.shape[-1]
        probability_TE = torch.softmax(logits_TE.float(), dim=-1)
        chosen = probability_TE.topk(top_k, dim=-1).indices
        share_E = torch.bincount(chosen.reshape(-1), minlength=experts) / chosen.numel()
        losses.append(experts * (share_E * probability_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a small share of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    low = FINAL_LEARNING_RATE_SHARE
    return PEAK_LEARNING_RATE * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW; norms and embeddings are not decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and "embed_tokens" not in name
        (decayed if matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


@dataclass(frozen=True)
class StepLoss:
    """One training step: nats per byte, and the balance loss before its coefficient."""

    nats_per_byte: float
    balance: float


def train_step(
    model: Qwen3MoeForCausalLM, optimizer: torch.optim.AdamW, rows_BT: Tensor, rate: float
) -> StepLoss:
    """One AdamW step on rows of bytes; the last byte of a row is only a target."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    body = model.model(input_ids=rows_BT[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(body.last_hidden_state)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows_BT[:, 1:].flatten())
    balance = balance_loss(body.router_logits, model.config.num_experts_per_tok)
    torch.autograd.backward(loss + BALANCE_COEFFICIENT * balance)
    nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepLoss(loss.item(), balance.item())


def save(model: Qwen3MoeForCausalLM, directory: Path) -> None:
    """Writes a bf16 copy of the model as a transformers checkpoint; the model stays fp32."""
    copy = nn.Module.to(Qwen3MoeForCausalLM(model.config), torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(directory)


def train(domains: list[Domain], steps: int, seed: int, out: Path | None) -> Qwen3MoeForCausalLM:
    """Trains from scratch for `steps` steps, saving to `out` on the way and at the end."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Qwen3MoeForCausalLM(reference_config())
    model.train()
    optimizer = make_optimizer(model)
    began = time.monotonic()
    for step in range(steps):
        rows = torch.from_numpy(draw_rows(domains, ROWS_PER_DOMAIN, CONTEXT_TOKENS, rng))
        loss = train_step(model, optimizer, rows, learning_rate(step, steps))
        done = step + 1
        if out is not None and (done % LOG_EVERY == 0 or done == steps):
            seconds = time.monotonic() - began
            rate = done * rows.shape[0] * CONTEXT_TOKENS / seconds
            print(
                f"step {done}/{steps}  bits/byte {loss.nats_per_byte / math.log(2):.3f}  "
                f"balance {loss.balance:.3f}  {rate:.0f} tokens/s  {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        if out is not None and (done % SAVE_EVERY == 0 or done == steps):
            save(model, out)
    return model


def steps_for_minutes(domains: list[Domain], minutes: float, seed: int) -> int:
    """How many steps fit in `minutes` on this machine, from a few timed and thrown-away steps."""
    train(domains, 2, seed, out=None)
    began = time.monotonic()
    train(domains, TIMED_STEPS, seed, out=None)
    return max(1, int(minutes * 60 * TIMED_STEPS / (time.monotonic() - began)))


def training_card(
    model: Qwen3MoeForCausalLM, domains: list[Domain], steps: int, seed: int
) -> dict[str, Any]:
    """What one needs to know of a run to repeat it; text files by the sha256 of all their bytes."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "seed": seed,
        "context_tokens": CONTEXT_TOKENS,
        "rows_per_step": ROWS_PER_DOMAIN * len(domains),
        "tokens": steps * ROWS_PER_DOMAIN * len(domains) * CONTEXT_TOKENS,
        "optimizer": "AdamW",
        "peak_learning_rate": PEAK_LEARNING_RATE,
        "balance_coefficient": BALANCE_COEFFICIENT,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "text_sha256": {domain.name: domain.sha256 for domain in domains},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the training run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, required=True, help="directory of *.txt, one a domain")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="exact length: repeats a run")
    length.add_argument("--minutes", type=float, help="as many steps as fit on this machine")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    domains = read_domains(options.text, CONTEXT_TOKENS)
    steps = options.steps or steps_for_minutes(domains, options.minutes, options.seed)
    print(f"process {os.getpid()}: {steps} steps", file=sys.stderr, flush=True)
    model = train(domains, steps, options.seed, options.out)
    write_card(options.out, {"training": training_card(model, domains, steps, options.seed)})


if __name__ == "__main__":
    main()
