"""Whether a request's bits depend on its company in this model: tried before the model serves.

Products, attention and experts are each written, and checked, so that they do not. What lies
between them is the model's own code, which nobody here has written; so requests of several lengths
run through the whole model together and alone, and every row is compared. Experts are left out:
each token gets itself, weighted as its router says. Knows a model with packed attention. Knows
nothing of ranks or plans.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from ...kernels.routing import combine
from . import attention
from .attention import PackedStep, RequestCache

# One row, a few, and more than a step of padding holds.
LENGTHS = (1, 5, 70)

_FAULTS: dict[tuple[object, ...], str] = {}
_CHECKING = threading.Lock()


def company_fault(
    model: Any, expert_modules: list[str], vocabulary: int, name: tuple[object, ...]
) -> str:
    """What depends on a request's company, in one line; "" where nothing does.

    name: of the checkpoint and the type it is held in; each is tried once a process.
    """
    key = (*name, torch.get_num_threads())
    with _CHECKING:
        if key not in _FAULTS:
            _FAULTS[key] = _company_fault(model, expert_modules, vocabulary)
        return _FAULTS[key]


class _RouterAlone:
    """Stands for an expert layer; the router's weights enter, and no other row does."""

    def forward(self, x_TH: Tensor, ids_TK: Tensor, gate_TK: Tensor) -> Tensor:
        return combine(x_TH[:, None].expand(-1, gate_TK.shape[1], -1), gate_TK)


@torch.inference_mode()
def _company_fault(model: Any, expert_modules: list[str], vocabulary: int) -> str:
    for name in expert_modules:
        model.get_submodule(name).loadmaster_layer = _RouterAlone()
    draw = torch.Generator().manual_seed(0)
    requests = [torch.randint(vocabulary, (rows,), generator=draw) for rows in LENGTHS]
    together = _rows(model, requests)
    for request, packed in zip(requests, together, strict=True):
        (alone,) = _rows(model, [request])
        if not torch.equal(alone, packed):
            differ = int((alone != packed).any(dim=1).sum())
            return (
                f"{differ} of the {len(request)} rows of a request have other bits in company "
                "than alone: this model's own code mixes rows, and a plan may change its output"
            )
    return ""


def _rows(model: Any, requests: list[Tensor]) -> list[Tensor]:
    """Last hidden state and logits of each request's rows."""
    step = PackedStep([len(r) for r in requests], [RequestCache() for _ in requests])
    tokens = torch.zeros(step.padded_rows, dtype=torch.int64)
    tokens[: step.rows] = torch.cat(requests)
    positions = torch.zeros(step.padded_rows, dtype=torch.int64)
    positions[: step.rows] = torch.cat([torch.arange(len(r)) for r in requests])
    kept: list[Tensor] = []
    hook = model.base_model.register_forward_hook(
        lambda module, inputs, output: kept.append(output.last_hidden_state[0])
    )
    try:
        with attention.running(step):
            out = model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False
            )
    finally:
        hook.remove()
    rows = torch.cat((kept[0].float(), out.logits[0].float()), dim=1)[: step.rows]
    return list(torch.split(rows, [len(r) for r in requests]))
