"""The expert weights of one layer's slots on one rank, in the form its backend computes on.

Chooses the backend; knows how experts go in and come out. Knows nothing of rows, routing, plans
or ranks: `grouped.py` checks inputs and calls `run`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, LoadmasterError
from .activation import ExpertActivation
from .backend import BlockSizes, SlotBackend, SlotShape
from .cpu.packed import PackedSlots, packed_available
from .cpu.panel_matrix import panels_available
from .cpu.panels import PanelSlots, panels_preferred
from .cpu.row_blocks import SIZES_TO_TRY
from .cpu.tiles import TILE_ROWS
from .self_check import backend_fault
from .torch_backend import TorchSlots

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "torch", "packed", "panels", "triton")


class ExpertWeights:
    """The expert weights of one layer's slots on one rank, in the form its backend computes on."""

    def __init__(self, backend: SlotBackend, refused: tuple[str, ...] = ()) -> None:
        """refused: which faster backends are not used here, and why."""
        self._backend = backend
        self.refused = refused

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

        backend: `auto` takes the fastest that fits dtype, sizes, device and this machine; the
        other names force one, for tests and benchmarks. On the CPU one is taken only if it gave a
        row of these very sizes the same bits alone and in any company (`self_check.py`); `refused`
        says which ones failed. Ranks give a row the same bits where they have the same backend:
        on processors of one kind. Raises LoadmasterError where no backend passes.
        """
        if dtype not in DTYPES:
            known = ", ".join(str(each) for each in DTYPES)
            raise InputError(f"experts cannot be held as {dtype}; use one of {known}")
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
            device=with_index(torch.device(device)),
            activation=activation,
            bias=bias,
        )
        return cls(*_choose_backend(shape, backend))

    @property
    def shape(self) -> SlotShape:
        """Sizes and kinds of the slots."""
        return self._backend.shape

    @property
    def backend(self) -> str:
        """The name of the backend in use."""
        return self._backend.name

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one expert's logical tensors: what a move between ranks sends."""
        numbers = sum(torch.Size(size).numel() for size in self.shape.tensor_shapes().values())
        return numbers * self.shape.dtype.itemsize

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
        shapes = self.shape.tensor_shapes()
        if set(tensors) != set(shapes):
            raise InputError(
                f"slot {slot} needs exactly {', '.join(shapes)}; got {', '.join(sorted(tensors))}"
            )
        for name, size in shapes.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != size or tensor.dtype != self.shape.dtype:
                raise InputError(
                    f"{name} for slot {slot} is {tuple(tensor.shape)} {tensor.dtype}; "
                    f"it must be {size} {self.shape.dtype}"
                )
        own = {name: tensors[name].detach().to(self.shape.device) for name in shapes}
        self._backend.set_slot(slot, own)

    def get_slot(self, slot: int) -> dict[str, Tensor]:
        """One slot's logical tensors, bit for bit as `set_slot` got them (new tensors)."""
        self._check_slot(slot)
        return self._backend.get_slot(slot)

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        """Compute checked rows; callers use `grouped_experts`."""
        self._backend.run(x_AH, count_S, out_AH)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.shape.slots:
            raise InputError(f"slot {slot} is past the table of {self.shape.slots} slots")


def with_index(device: torch.device) -> torch.device:
    """The device as tensors name theirs: "cuda" alone means the current one, and equals none."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


def _choose_backend(shape: SlotShape, name: str) -> tuple[SlotBackend, tuple[str, ...]]:
    """The first backend that fits and keeps a row's bits, and which ones did not keep them."""
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not known; use one of {', '.join(BACKENDS)}")
    if name == "triton" or (name == "auto" and shape.device.type == "cuda"):
        backend = _triton_backend(shape)
        if backend is not None:
            return backend, ()
    if shape.device.type != "cpu" and name in ("auto", "torch"):
        return TorchSlots(shape, ()), ()
    refused: list[str] = []
    for each, sizes in _candidates(shape, name):
        fault = backend_fault(each, shape, sizes)
        if not fault:
            return each(shape, sizes), tuple(refused)
        blocks = f" in blocks of {', '.join(map(str, sizes))} rows"
        refused.append(f"experts, {each.name}{blocks}: {fault}")
    widths = f"experts of {shape.hidden} x {shape.intermediate} in {shape.dtype}"
    if not refused:
        raise InputError(
            f"backend {name!r} cannot run {shape.dtype} on {shape.device} here; use 'auto'"
        )
    raise LoadmasterError(
        f"{widths}: no backend gives a row the same bits alone and in company on this processor "
        f"({'; '.join(refused)}): serve another dtype, or install another build of torch"
    )


def _candidates(shape: SlotShape, name: str) -> Iterator[tuple[Any, BlockSizes]]:
    """Classes of backends on the CPU and their blocks, the fastest first, `torch` last."""
    packed = packed_available(shape.dtype)
    panels = panels_available(shape.dtype)
    order: list[tuple[Any, tuple[BlockSizes, ...]]] = []
    if packed:
        order.append((PackedSlots, SIZES_TO_TRY))
    if panels:
        best = not packed or panels_preferred(shape.hidden, shape.intermediate, shape.dtype)
        order.insert(0 if best else 1, (PanelSlots, ((TILE_ROWS,),)))
    order.append((TorchSlots, SIZES_TO_TRY))
    for backend, choices in order:
        if name in ("auto", backend.name):
            yield from ((backend, sizes) for sizes in choices)


def _triton_backend(shape: SlotShape) -> SlotBackend | None:
    """The Triton backend, where Triton is installed and runs on this device."""
    try:
        from .gpu.backend import TritonSlots, triton_available
    except ImportError:
        return None
    if shape.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return TritonSlots(shape) if triton_available(shape.device) else None
