"""How many bytes an expert's matrices take in each weight format.

A format says the bits of a weight and what its scales add: one per group of weights along the
input, per row of outputs, or per block of both. The few bytes of a scale per whole tensor are left
out, as are paddings of kernels. Knows numbers and names of formats. Knows nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil


@dataclass(frozen=True)
class WeightFormat:
    """Bits of a weight, and of the scales (and zero points) it shares with its neighbours."""

    name: str
    bits: float
    group: int | None = None                 # weights along the input that share a scale
    group_bits: float = 0.0                  # bits of a group's scale and zero point
    row_bits: float = 0.0                    # bits of an output row's scale
    block: tuple[int, int] | None = None     # outputs x inputs that share a scale
    block_bits: float = 32.0

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a weight and its part of a group's scale; rows and blocks add to it."""
        return (self.bits + (self.group_bits / self.group if self.group else 0.0)) / 8

    def matrix_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of one matrix with its scales."""
        bits = self.bits * outputs * inputs + self.row_bits * outputs
        if self.group:
            bits += self.group_bits * outputs * ceil(inputs / self.group)
        if self.block:
            bits += self.block_bits * ceil(outputs / self.block[0]) * ceil(inputs / self.block[1])
        return ceil(bits / 8)

    def grouped(self, group: int | None) -> WeightFormat:
        """The same with another size of groups; -1 or 0: one scale for each row."""
        if not group or group == self.group or (self.group is None and self.bits >= 8):
            return self
        if group < 0:
            return replace(self, group=None, group_bits=0.0, row_bits=self.group_bits or 16.0)
        return replace(self, group=group, group_bits=self.group_bits or 16.0)

    def blocked(self, block: Sequence[int] | None) -> WeightFormat:
        """The same with a scale per block of outputs x inputs; itself without one."""
        if block is None:
            return self
        outputs, inputs = (int(size) for size in block)
        if outputs < 1 or inputs < 1:
            raise ValueError(f"blocks of {outputs} x {inputs} weights")
        return replace(self, block=(outputs, inputs))


FORMATS = {
    form.name: form
    for form in (
        WeightFormat("fp64", 64), WeightFormat("fp32", 32), WeightFormat("bf16", 16),
        WeightFormat("fp16", 16),
        WeightFormat("fp8", 8),
        WeightFormat("fp8_block", 8, block=(128, 128)),
        WeightFormat("fp8_row", 8, row_bits=32),
        WeightFormat("mxfp8", 8, group=32, group_bits=8),
        WeightFormat("mxfp6", 6, group=32, group_bits=8),
        WeightFormat("mxfp4", 4, group=32, group_bits=8),
        WeightFormat("nvfp4", 4, group=16, group_bits=8),
        WeightFormat("int8", 8, row_bits=16),
        WeightFormat("int4", 4, group=128, group_bits=16),
        WeightFormat("int4_zero", 4, group=128, group_bits=16 + 4),
        WeightFormat("nf4", 4),
    )
}

# What files and tools call them, lower case, without punctuation; the first that fits counts.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"nvfp4", "nvfp4"),
    (r"mxfp4|^fp4$|^e2m1$|float4e2m1.*", "mxfp4"),
    (r"mxfp6", "mxfp6"),
    (r"mxfp8|mxint8", "mxfp8"),
    (r"fp8(pb|block|2d)|blockfp8|fp8wo.*block", "fp8_block"),
    (r"fp8(row|perchannel|pertoken)|ptpcfp8|fbgemmfp8", "fp8_row"),
    (r"w4a8awq|w4a16awq|int4awq|w4afp8|w4a8fp8|w4a8$|w4a8[^m]|w4a16|int4|uint4|^u4|^w4$|^s4|^4bit",
     "int4"),
    (r"nf4", "nf4"),
    (r"w8a8fp8|fp8|float8|e4m3|e5m2", "fp8"),
    (r"w8a|int8|uint8|^w8$|^i8|^s8|^8bit|eetq", "int8"),
    (r"bfloat16|bf16", "bf16"),
    (r"float16|fp16|^f16$|^half$", "fp16"),
    (r"float32|fp32|^f32$|^float$", "fp32"),
    (r"float64|fp64|^f64$|^double$", "fp64"),
)


def format_named(name: object) -> WeightFormat | None:
    """The format that a dtype's or algorithm's name means ("NVFP4", "torch.bfloat16"), or None."""
    squashed = re.sub(r"[^a-z0-9]", "", str(name).lower().removeprefix("torch."))
    for pattern, form in _NAMES:
        if re.search(pattern, squashed):
            return FORMATS[form]
    return None


@dataclass(frozen=True)
class ExpertBytes:
    """An expert's bytes as ModelSpec keeps them: in each weight, and what comes on top."""

    bytes_per_parameter: float
    scale_bytes: int

    @classmethod
    def of(
        cls, formats: Sequence[WeightFormat], hidden: int, intermediate: int, bias_bytes: int = 0
    ) -> ExpertBytes:
        """Of matrices of these formats: into the intermediate width, the last one back.

        bias_bytes: of each of an expert's biases; 0: it has none.
        """
        *inward, outward = formats
        parameters = len(formats) * hidden * intermediate
        nominal = sum(form.bytes_per_weight for form in formats) / len(formats)
        exact = sum(form.matrix_bytes(intermediate, hidden) for form in inward)
        exact += outward.matrix_bytes(hidden, intermediate)
        exact += bias_bytes * (len(inward) * intermediate + hidden)
        return cls(nominal, exact - round(parameters * nominal))

    @classmethod
    def of_total(cls, total: int, parameters: int) -> ExpertBytes:
        """Of an expert that takes so many bytes in all."""
        per_weight = next(
            (size for size in (4.0, 2.0, 1.0, 0.5) if 0 <= total - parameters * size < total / 4),
            total / parameters,
        )
        return cls(per_weight, total - round(parameters * per_weight))

    def total(self, matrices: int, hidden: int, intermediate: int) -> int:
        """Bytes of the whole expert."""
        return round(matrices * hidden * intermediate * self.bytes_per_parameter) + self.scale_bytes
