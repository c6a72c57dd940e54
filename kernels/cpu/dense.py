"""A model's dense layers, routers and head on the CPU, so that a row's bits are that row's alone.

torch multiplies one row, few rows and many rows by different code, and with other bits. So the
weights of these layers are replaced: by panels where they are as fast (on every processor with
fused products and without matrix units they are faster), else by a library's product in blocks of
fixed sizes, each tried on the very widths before it is taken. Knows a model's modules and their
weights. Knows nothing of experts, attention or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import LoadmasterError
from ..backend import BlockSizes
from ..self_check import rows_fault
from .packed import pack, packed_available, packed_linear
from .panel_loops import CHUNK_ROWS, dense_rows
from .panel_matrix import Panels, factor_dtype, panels_available
from .panels import panels_preferred
from .row_blocks import SIZES_TO_TRY, compute_in_blocks
from .scalars import as_array
from .scratch import SCRATCH
from .tiles import PANEL, TILE_ROWS

LiveRows = Callable[[int], int]
"""Of so many rows, how many are real: the rest, at the end, are padding that nobody reads."""


class Matrix(Protocol):
    """A matrix [N, K] as one way of multiplying holds it."""

    def __call__(self, x_RK: Tensor, bias: Tensor | None, y_RN: Tensor) -> None:
        """y = x W^T + b."""


class PanelMatrix:
    """bfloat16 or float32 as panels, summed in float32 and rounded once."""

    name = "panels"

    def __init__(self, weight: Tensor, sizes: BlockSizes) -> None:
        columns, depth = weight.shape
        self._panels = Panels(1, columns, depth, weight.dtype)
        self._panels.set(0, weight)
        self._bias: tuple[Tensor, NDArray[np.float32]] | None = None

    def __call__(self, x_RK: Tensor, bias: Tensor | None, y_RN: Tensor) -> None:
        panels = self._panels
        scratch = (
            SCRATCH.take_array(
                "dense_x", CHUNK_ROWS, panels.row_elements, factor_dtype(x_RK.dtype)
            ),
            SCRATCH.take_array("dense_block", CHUNK_ROWS, PANEL, torch.float32),
        )
        held = panels.bias[0] if bias is None else self._padded(bias)
        dense_rows(as_array(x_RK), panels.values[0], held, scratch, as_array(y_RN))

    def _padded(self, bias: Tensor) -> NDArray[np.float32]:
        """A bias as wide as the panels; a layer has one, so the last one is kept."""
        if self._bias is None or self._bias[0] is not bias:
            padded = np.zeros_like(self._panels.bias[0])
            padded[: len(bias)] = bias.detach().float().numpy()
            self._bias = bias, padded
        return self._bias[1]


class PackedMatrix:
    """oneDNN's own layout, in blocks."""

    name = "packed"

    def __init__(self, weight: Tensor, sizes: BlockSizes) -> None:
        self._packed, self._sizes = pack(weight), sizes

    def __call__(self, x_RK: Tensor, bias: Tensor | None, y_RN: Tensor) -> None:
        def product(slot: int, block: Tensor) -> Tensor:
            return packed_linear(block, self._packed, bias)

        compute_in_blocks(x_RK, [len(x_RK)], self._sizes, product, y_RN)


class PlainMatrix:
    """torch's own product, in blocks."""

    name = "torch"

    def __init__(self, weight: Tensor, sizes: BlockSizes) -> None:
        self._weight, self._sizes = weight.clone(memory_format=torch.contiguous_format), sizes

    def __call__(self, x_RK: Tensor, bias: Tensor | None, y_RN: Tensor) -> None:
        def product(slot: int, block: Tensor) -> Tensor:
            y = torch.mm(block, self._weight.T)
            return y if bias is None else y + bias

        compute_in_blocks(x_RK, [len(x_RK)], self._sizes, product, y_RN)


class RowwiseWeight:
    """Stands where a module's weight stood; `F.linear` with it keeps every row's bits its own.

    torch hands calls that take this for a tensor to `__torch_function__`. Anything but `linear`
    and a change of type is done with the tensor it replaces, where that was kept.
    """

    def __init__(
        self, choice: DenseChoice, weight: Tensor, live_rows: LiveRows, *, keep: bool
    ) -> None:
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self._choice, self._live_rows = choice, live_rows
        self._matrix = choice.matrix(weight)
        self._kept = weight if keep else None
        self._as: dict[torch.dtype, RowwiseWeight] = {weight.dtype: self}

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if isinstance(given["weight"], RowwiseWeight):
                return given["weight"].linear(given["input"], given.get("bias"))
        return func(*map(_plain, args), **{k: _plain(v) for k, v in kwargs.items()})

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] W^T + b; padding rows come out as zeros."""
        outputs, inputs = self.shape
        if x.dtype != self.dtype or x.shape[-1] != inputs:
            raise LoadmasterError(
                f"a layer of {inputs} inputs in {self.dtype} was given {tuple(x.shape)} {x.dtype}"
            )
        rows = x.reshape(-1, inputs).contiguous()
        y = torch.empty(len(rows), outputs, dtype=x.dtype)
        live = self._live_rows(len(rows))
        self._matrix(rows[:live], bias, y[:live])
        y[live:] = 0
        return y.view(*x.shape[:-1], outputs)

    def to(self, dtype: torch.dtype) -> RowwiseWeight:
        """The same weights in another type; made once."""
        if dtype not in self._as:
            made = RowwiseWeight(
                self._choice, _plain(self).to(dtype), self._live_rows, keep=True
            )
            self._as[dtype] = made
        return self._as[dtype]

    type = to

    def float(self) -> RowwiseWeight:
        return self.to(torch.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(_plain(self), name)


def _plain(value: Any) -> Any:
    """The tensor behind a replaced weight; anything else as it is."""
    if not isinstance(value, RowwiseWeight):
        return value
    kept = value.__dict__.get("_kept")
    if kept is None:
        raise LoadmasterError(
            f"a dense layer's weight {tuple(value.shape)} is used for more than its product: this "
            "architecture is not served live"
        )
    return kept


@dataclass
class DenseChoice:
    """Which way of multiplying each shape of a model takes here; tried once per shape."""

    backends: dict[str, int] = field(default_factory=dict)      # name -> matrices
    refused: list[str] = field(default_factory=list)            # what failed, and how
    _passed: dict[tuple[Any, ...], tuple[Any, BlockSizes]] = field(default_factory=dict)

    def matrix(self, weight: Tensor) -> Matrix:
        key = (*weight.shape, weight.dtype)
        if key in self._passed:
            kind, sizes = self._passed[key]
            made: Any = kind(weight, sizes)
        else:
            made = self._first_that_passes(weight, key)
        self.backends[made.name] = self.backends.get(made.name, 0) + 1
        return made  # type: ignore[no-any-return]

    def _first_that_passes(self, weight: Tensor, key: tuple[Any, ...]) -> Any:
        outputs, inputs = weight.shape
        for kind, sizes in _candidates(inputs, outputs, weight.dtype):
            made = kind(weight, sizes)

            def compute(x: Tensor, made: Any = made) -> Tensor:
                y = torch.empty(len(x), outputs, dtype=x.dtype)
                made(x, None, y)
                return y

            fault = rows_fault(compute, inputs, weight.dtype, sizes)
            if not fault:
                self._passed[key] = kind, sizes
                return made
            blocks = f" in blocks of {', '.join(map(str, sizes))} rows"
            self.refused.append(f"dense {inputs} x {outputs}, {kind.name}{blocks}: {fault}")
        raise LoadmasterError(
            f"a dense layer of {inputs} x {outputs} in {weight.dtype}: no product gives a row the "
            "same bits alone and in company on this processor; serve another dtype, or install "
            "another build of torch"
        )


def _candidates(
    inputs: int, outputs: int, dtype: torch.dtype
) -> Iterator[tuple[Any, BlockSizes]]:
    """Ways of multiplying and their blocks, the fastest first."""
    packed = [(PackedMatrix, sizes) for sizes in SIZES_TO_TRY if packed_available(dtype)]
    panels = [(PanelMatrix, (TILE_ROWS,))] if panels_available(dtype) else []
    best = panels_preferred(inputs, outputs, dtype)
    yield from (*panels, *packed) if best else (*packed, *panels)
    yield from ((PlainMatrix, sizes) for sizes in SIZES_TO_TRY)


def make_rowwise(model: nn.Module, live_rows: LiveRows = lambda rows: rows) -> DenseChoice:
    """Replace the weights of the model's linear layers and routers, where they are on the CPU.

    Routers are modules with a matrix called `weight` that look nothing up in it. Returns what is
    used, which grows when a router first asks for another type. Raises LoadmasterError where no
    way of multiplying keeps a row's bits.
    """
    choice = DenseChoice()
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
            continue
        if weight.device.type != "cpu" or not weight.is_floating_point():
            continue
        linear = type(module) is nn.Linear
        made = RowwiseWeight(choice, weight.detach(), live_rows, keep=not linear)
        del module.weight
        module.weight = made  # type: ignore[assignment]
    return choice
