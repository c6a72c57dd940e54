"""The one entry to the grouped gated expert MLP; chooses the backend.

Knows the weights of one layer's local slots and rows sorted by slot; knows nothing of experts'
names, plans, ranks or networks. Callers never name a backend, except to test one.

Axes: A rows (one per assignment), S local slots, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .activation import ExpertActivation
from .backend import SlotBackend, SlotShape
from .cpu_packed import PackedSlots, packed_available
from .dispatch_table import DispatchTable
from .load_record import LoadRecord
from .routing import route, top_k
from .torch_backend import TorchSlots

__all__ = [
    "DispatchTable",
    "ExpertActivation",
    "ExpertWeights",
    "LoadRecord",
    "grouped_experts",
    "moe_layer",
    "moe_layer_from_logits",
]

BACKENDS = ("auto", "torch", "packed", "triton")


class ExpertWeights:
    """The expert weights of one layer's slots on one rank, in the form its backend computes on."""

    def __init__(self, backend: SlotBackend) -> None:
        self._backend = backend

    @classmethod
    def allocate(
        cls,
        slots: int,
        hidden: int,
        intermediate: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        activation: ExpertActivation,
        bias: bool = False,
        backend: str = "auto",
    ) -> ExpertWeights:
        """Room for `slots` experts, all zero until `set_slot` fills them.

        backend: `auto` takes the fastest that fits dtype, device and this machine; the other
        names force one, for tests and benchmarks.
        """
        if min(slots, hidden, intermediate) < 1:
            raise InputError(
                "slots, hidden and intermediate must be >= 1; "
                f"got {slots}, {hidden}, {intermediate}"
            )
        shape = SlotShape(
            slots=slots,
            hidden=hidden,
            intermediate=intermediate,
            dtype=dtype,
            device=torch.device(device),
            activation=activation,
            bias=bias,
        )
        return cls(_choose_backend(shape, backend))

    @property
    def slots(self) -> int:
        return self._backend.shape.slots

    @property
    def hidden(self) -> int:
        return self._backend.shape.hidden

    @property
    def intermediate(self) -> int:
        return self._backend.shape.intermediate

    @property
    def dtype(self) -> torch.dtype:
        return self._backend.shape.dtype

    @property
    def device(self) -> torch.device:
        return self._backend.shape.device

    @property
    def activation(self) -> ExpertActivation:
        return self._backend.shape.activation

    @property
    def bias(self) -> bool:
        return self._backend.shape.bias

    @property
    def backend(self) -> str:
        """The name of the backend in use."""
        return self._backend.name

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one expert's logical tensors: what a move between ranks sends."""
        numbers = sum(
            torch.Size(size).numel() for size in self._backend.shape.tensor_shapes().values()
        )
        return numbers * self.dtype.itemsize

    def set_slot(
        self,
        slot: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Fill one slot with an expert; packs this slot only.

        gate_up [2I, H] in the row order the activation names, down [H, I], biases [2I] and [H]
        exactly when the weights were allocated with `bias`. The tensors may be reused afterwards.
        """
        given = {
            "gate_up": gate_up,
            "down": down,
            "gate_up_bias": gate_up_bias,
            "down_bias": down_bias,
        }
        self.load_slot(slot, {name: tensor for name, tensor in given.items() if tensor is not None})

    def load_slot(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """`set_slot` from what `get_slot` returned, here or on another rank."""
        self._check_slot(slot)
        shapes = self._backend.shape.tensor_shapes()
        if set(tensors) != set(shapes):
            raise InputError(
                f"slot {slot} needs exactly {', '.join(shapes)}; got {', '.join(sorted(tensors))}"
            )
        for name, size in shapes.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != size or tensor.dtype != self.dtype:
                raise InputError(
                    f"{name} for slot {slot} is {tuple(tensor.shape)} {tensor.dtype}; "
                    f"it must be {size} {self.dtype}"
                )
        own = {name: tensors[name].detach().to(self.device) for name in shapes}
        self._backend.set_slot(slot, own)

    def get_slot(self, slot: int) -> dict[str, Tensor]:
        """One slot's logical tensors, bit for bit as `set_slot` got them (new tensors)."""
        self._check_slot(slot)
        return self._backend.get_slot(slot)

    def copy_slot(self, source: int, target: int) -> None:
        """Give slot `target` the expert of slot `source`; copies no weights."""
        self._check_slot(target)
        order = list(range(self.slots))
        order[target] = source
        self.rearrange(order)

    def rearrange(self, source_S: Sequence[int]) -> None:
        """Slot s takes the expert that slot source_S[s] holds; swaps a table, copies no weights.

        So a plan is applied by filling spare slots and then one `rearrange` between two steps.
        """
        if len(source_S) != self.slots:
            raise InputError(f"rearrange needs {self.slots} sources; got {len(source_S)}")
        for source in source_S:
            self._check_slot(source)
        self._backend.rearrange(source_S)

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        """Compute checked rows; callers use `grouped_experts`."""
        self._backend.run(x_AH, count_S, out_AH)

    def run_layer(self, x_TH: Tensor, slot_TK: Tensor, gate_TK: Tensor, out_TH: Tensor) -> None:
        """Compute a checked layer; callers use `moe_layer`."""
        self._backend.layer(x_TH, slot_TK, gate_TK, out_TH)

    def run_from_logits(
        self,
        x_TH: Tensor,
        logits_TE: Tensor,
        k: int,
        normalize: bool,
        table: DispatchTable | None,
        quota_S: Tensor | None,
        record: LoadRecord | None,
        out_TH: Tensor,
    ) -> bool:
        """Compute a checked layer from logits, if the backend routes by itself; else False."""
        fused = getattr(self._backend, "layer_from_logits", None)
        if fused is None:
            return False
        fused(x_TH, logits_TE, k, normalize, table, quota_S, record, out_TH)
        return True

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise InputError(f"slot {slot} is past the table of {self.slots} slots")


def grouped_experts(
    x_AH: Tensor, count_S: Tensor, weights: ExpertWeights, *, out: Tensor | None = None
) -> Tensor:
    """Run every row through the expert of its slot.

    x_AH: [A, H] rows sorted by slot. count_S: [S] rows of each slot, summing to A.
    Returns y [A, H], rows in the same order, not weighted. A row's bits depend on the row and
    its expert only. Raises InputError when shapes, dtypes or counts do not fit.
    """
    _check_rows(x_AH, weights)
    if tuple(count_S.shape) != (weights.slots,) or count_S.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"count_S is {tuple(count_S.shape)} {count_S.dtype}; "
            f"it must be [{weights.slots}] int32 or int64"
        )
    if count_S.device.type == "cpu":
        counts = count_S.tolist()
        if min(counts) < 0 or sum(counts) != len(x_AH):
            raise InputError(
                f"count_S holds {sum(counts)} rows (lowest count {min(counts)}) for the "
                f"{len(x_AH)} rows given; counts must be >= 0 and sum to the rows"
            )
    out = _output_like(x_AH, out)
    if len(x_AH):
        weights.run(x_AH.detach(), count_S, out)
    return out


def moe_layer(
    x_TH: Tensor,
    ids_TK: Tensor,
    gate_TK: Tensor,
    weights: ExpertWeights,
    *,
    slot_TK: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One whole expert layer in one process: sort, compute, combine. Returns [T, H].

    ids_TK: the experts chosen; gate_TK: their weights. slot_TK: the slot of every assignment
    (`assign_slots`); without it expert e stands in slot e. Negative ids or slots, and an id
    equal to the number of slots (transformers' mark for an expert that lives elsewhere), are
    left out: they add nothing to their token.
    """
    _check_rows(x_TH, weights)
    if ids_TK.dim() != 2 or len(ids_TK) != len(x_TH) or gate_TK.shape != ids_TK.shape:
        raise InputError(
            f"x is {tuple(x_TH.shape)}, ids {tuple(ids_TK.shape)}, gates {tuple(gate_TK.shape)}; "
            "ids and gates must both be [T, K]"
        )
    if slot_TK is None:
        slot_TK = torch.where(ids_TK == weights.slots, -1, ids_TK)
    if slot_TK.shape != ids_TK.shape:
        raise InputError(f"slot_TK is {tuple(slot_TK.shape)}; it must be {tuple(ids_TK.shape)}")
    if slot_TK.device.type == "cpu" and slot_TK.numel() and int(slot_TK.max()) >= weights.slots:
        raise InputError(
            f"slot {int(slot_TK.max())} is past the table of {weights.slots} slots"
        )
    out = _output_like(x_TH, out)
    gate = gate_TK.detach().float().contiguous()
    weights.run_layer(x_TH.detach(), slot_TK.long().contiguous(), gate, out)
    return out


def moe_layer_from_logits(
    x_TH: Tensor,
    logits_TE: Tensor,
    weights: ExpertWeights,
    *,
    k: int,
    normalize: bool,
    table: DispatchTable | None = None,
    quota_S: Tensor | None = None,
    record: LoadRecord | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`moe_layer` from router logits: top-k, replicas, counts and the layer. Returns [T, H].

    table: the expert of every slot; without it expert e stands in slot e. quota_S: [slots] tokens
    of this step for every slot, needed where an expert has several. record: adds this step's
    tokens per expert and per slot where its flag is set. On a GPU nothing waits for the device;
    quotas that do not add up are settled by an expert's last slot there, refused on the CPU.
    """
    _check_rows(x_TH, weights)
    if logits_TE.dim() != 2 or len(logits_TE) != len(x_TH) or not 1 <= k <= logits_TE.shape[1]:
        raise InputError(
            f"x is {tuple(x_TH.shape)} and logits {tuple(logits_TE.shape)}; logits must be [T, E] "
            f"and k from 1 to E, not {k}"
        )
    experts = weights.slots if table is None else table.experts
    listed = weights.slots if table is None else len(table.slot_expert_S)
    if experts != logits_TE.shape[1] or listed != weights.slots:
        raise InputError(
            f"the slot table holds {experts} experts in {listed} slots; the logits name "
            f"{logits_TE.shape[1]} experts and the weights {weights.slots} slots"
        )
    if quota_S is None and table is not None and table.has_replicas:
        raise InputError("an expert stands in several slots: give quota_S, the tokens of each")
    if quota_S is not None and tuple(quota_S.shape) != (weights.slots,):
        raise InputError(f"quota_S is {tuple(quota_S.shape)}; it must be [{weights.slots}]")
    out = _output_like(x_TH, out)
    x_TH, logits_TE = x_TH.detach(), logits_TE.detach()
    if weights.run_from_logits(x_TH, logits_TE, k, normalize, table, quota_S, record, out):
        return out
    gate_TK, ids_TK = top_k(logits_TE, k, normalize=normalize)
    slot_expert = list(range(weights.slots)) if table is None else table.slot_expert_S
    routing = route(ids_TK, torch.tensor(slot_expert), quota_S=quota_S, record=record)
    weights.run_layer(x_TH, routing.slot_TK, gate_TK, out)
    return out


def _choose_backend(shape: SlotShape, name: str) -> SlotBackend:
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not known; use one of {', '.join(BACKENDS)}")
    if name == "triton" or (name == "auto" and shape.device.type == "cuda"):
        backend = _triton_backend(shape)
        if backend is not None:
            return backend
    packed = shape.device.type == "cpu" and packed_available(shape.dtype)
    if name == "triton" or (name == "packed" and not packed):
        raise InputError(
            f"backend {name!r} cannot run {shape.dtype} on {shape.device} here; use 'auto'"
        )
    return PackedSlots(shape) if packed and name != "torch" else TorchSlots(shape)


def _triton_backend(shape: SlotShape) -> SlotBackend | None:
    """The Triton backend, where Triton is installed and runs on this device."""
    try:
        from .triton_backend import TritonSlots, triton_available
    except ImportError:
        return None
    if shape.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return TritonSlots(shape) if triton_available(shape.device) else None


def _output_like(x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise InputError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}; "
            f"it must be {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    return out


def _check_rows(x: Tensor, weights: ExpertWeights) -> None:
    if x.dim() != 2 or x.shape[1] != weights.hidden:
        raise InputError(f"rows are {tuple(x.shape)}; they must be [rows, {weights.hidden}]")
    if x.dtype != weights.dtype or x.device != weights.device:
        raise InputError(
            f"rows are {x.dtype} on {x.device} but the weights {weights.dtype} on "
            f"{weights.device}; convert one of them"
        )
