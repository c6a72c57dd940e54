"""Capacity-aware serving: one step's overflow dropped or rerouted, the same on every rank.

Off unless a group is started with a rule. The rule itself is `placement/dispatch/token_limit.py`'s;
here all ranks' choices are brought together, so that it sees the whole step, and each rank takes
its rows of the answer. Knows tensors and the exchange. A rule changes the model's output, and makes
it depend on the other requests in the step: bit-exactness across plans holds without it only.

Axes: T tokens at home here, K choices, E experts, G ranks, C slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import InputError
from ...placement.dispatch.token_limit import CapacityRule, apply_capacity
from .exchange import Exchange


@dataclass(frozen=True)
class Limited:
    """One rank's tokens after the rule; dropped choices have id -1 and gate 0."""

    ids_TK: Tensor
    gates_TK: Tensor
    dropped: int          # of this rank's choices


class RouterScores:
    """What the router in front of an experts module thought of every expert, step by step."""

    def __init__(self, model: Any, expert_module: str, where: str) -> None:
        """Listens to the module next to the experts whose first output is [tokens, experts]."""
        self._logits_TE = torch.empty(0)
        self._sigmoid = hasattr(model.config.get_text_config(), "routed_scaling_factor")
        parent = model.get_submodule(expert_module.rpartition(".")[0])
        routers = [m for name, m in parent.named_children() if name in ("gate", "router")]
        if len(routers) != 1:
            raise InputError(
                f"{where}: no router found beside {expert_module}; overflow can be dropped for "
                "this architecture, not rerouted"
            )
        routers[0].register_forward_hook(self._listen)

    def _listen(self, module: Any, inputs: Any, output: Any) -> None:
        self._logits_TE = output[0] if isinstance(output, tuple) else output

    def scaled(self, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """[T, E] scores on the scale of the gates: a token's best choice scores its gate."""
        logits = self._logits_TE.reshape(-1, self._logits_TE.shape[-1])[: len(ids_TK)].float().cpu()
        score_TE = torch.sigmoid(logits) if self._sigmoid else torch.softmax(logits, dim=-1)
        best_T = gates_TK.float().argmax(dim=1, keepdim=True)
        own = score_TE.gather(1, ids_TK.gather(1, best_T).long())
        return score_TE * (gates_TK.float().gather(1, best_T) / own.clamp_min(1e-30))


def limit(
    exchange: Exchange,
    rule: CapacityRule,
    ids_TK: Tensor,
    gates_TK: Tensor,
    score_TE: Tensor | None,
    slots_GC: npt.NDArray[np.int16],
    num_experts: int,
) -> Limited:
    """Apply the rule to the step of all ranks together. Every rank must call this at once."""
    rows_G = exchange.all_gather(torch.tensor([len(ids_TK)])).flatten().tolist()
    columns = [ids_TK.float(), gates_TK.float()]
    if score_TE is not None:
        columns.append(score_TE)
    all_rows = _gather(exchange, torch.cat(columns, dim=1), rows_G)
    choices = ids_TK.shape[1]
    ids, gates = all_rows[:, :choices].astype(np.int64), all_rows[:, choices : 2 * choices]
    home_T = np.repeat(np.arange(exchange.ranks), rows_G)
    holds_GE = np.zeros((exchange.ranks, num_experts), bool)
    for rank, row in enumerate(slots_GC):
        holds_GE[rank, row[row >= 0]] = True
    result = apply_capacity(
        ids, gates, num_experts, rule,
        score_TE=all_rows[:, 2 * choices :] if score_TE is not None else None,
        home_T=home_T, holds_GE=holds_GE,
    )
    mine = slice(sum(rows_G[: exchange.rank]), sum(rows_G[: exchange.rank + 1]))
    kept = result.ids_TK[mine]
    return Limited(
        torch.from_numpy(kept),
        torch.from_numpy(result.gates_TK[mine]).to(gates_TK.dtype),
        int((ids[mine] >= 0).sum() - (kept >= 0).sum()),
    )


def _gather(exchange: Exchange, rows: Tensor, rows_G: list[int]) -> npt.NDArray[np.float32]:
    """All ranks' rows, one rank after another. float32 holds expert ids exactly."""
    longest = max(rows_G)
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: len(rows)] = rows
    table = exchange.all_gather(padded).numpy()
    whole: npt.NDArray[np.float32] = np.concatenate(
        [table[g, :count] for g, count in enumerate(rows_G)]
    )
    return whole
