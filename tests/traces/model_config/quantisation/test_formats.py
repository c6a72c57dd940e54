"""Bytes of matrices in each format, against a listing of every scale; names of formats."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.traces.model_config.quantisation.formats import (
    FORMATS,
    ExpertBytes,
    WeightFormat,
    format_named,
)


def listed_bits(form: WeightFormat, outputs: int, inputs: int) -> float:
    """Bits of a matrix, weight by weight and scale by scale."""
    bits = 0.0
    blocks = set()
    for row in range(outputs):
        groups = set()
        for column in range(inputs):
            bits += form.bits
            if form.group:
                groups.add(column // form.group)
            if form.block:
                blocks.add((row // form.block[0], column // form.block[1]))
        bits += len(groups) * form.group_bits + form.row_bits
    return bits + len(blocks) * form.block_bits


SMALL = [
    FORMATS["bf16"], FORMATS["fp8"], FORMATS["fp8_row"], FORMATS["nvfp4"], FORMATS["mxfp4"],
    FORMATS["mxfp8"], FORMATS["int8"], FORMATS["int4"].grouped(8), FORMATS["int4"].grouped(-1),
    FORMATS["int4_zero"].grouped(4), FORMATS["fp8"].blocked([3, 5]), FORMATS["nf4"],
]


@given(st.sampled_from(SMALL), st.integers(1, 20), st.integers(1, 40))
def test_a_matrix_takes_its_weights_and_every_scale(
    form: WeightFormat, outputs: int, inputs: int
) -> None:
    """Of groups and blocks that do not come out even, too."""
    bits = listed_bits(form, outputs, inputs)
    assert 8 * form.matrix_bytes(outputs, inputs) - 8 < bits <= 8 * form.matrix_bytes(
        outputs, inputs
    )


@given(st.lists(st.sampled_from(SMALL), min_size=2, max_size=3), st.integers(1, 20),
       st.integers(1, 40), st.sampled_from([0, 2, 4]))
def test_an_expert_takes_its_matrices_and_biases(
    formats: list[WeightFormat], hidden: int, intermediate: int, bias: int
) -> None:
    size = ExpertBytes.of(formats, hidden, intermediate, bias)
    into = formats[:-1]
    wanted = (
        sum(form.matrix_bytes(intermediate, hidden) for form in into)
        + formats[-1].matrix_bytes(hidden, intermediate)
        + bias * (len(into) * intermediate + hidden)
    )
    assert size.total(len(formats), hidden, intermediate) == wanted and size.scale_bytes >= 0


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_total_is_kept(total: int, parameters: int) -> None:
    size = ExpertBytes.of_total(total, parameters)
    assert round(parameters * size.bytes_per_parameter) + size.scale_bytes == total
    assert size.bytes_per_parameter > 0 and size.scale_bytes >= 0


@pytest.mark.parametrize(("names", "form"), [
    (("bfloat16", "torch.bfloat16", "BF16", "bf16"), "bf16"),
    (("float16", "half", "fp16", "torch.float16"), "fp16"), (("float32", "fp32", "float"), "fp32"),
    (("float8_e4m3fn", "FP8", "fp8_e4m3", "e4m3", "F8_E5M2"), "fp8"),
    (("NVFP4", "W4A16_NVFP4", "nvfp4-pack-quantized", "NVFP4_AWQ", "modelopt_nvfp4"), "nvfp4"),
    (("mxfp4", "fp4", "W4A8_MXFP4_FP8", "mxfp4-pack-quantized", "float4_e2m1fn_x2"), "mxfp4"),
    (("MXFP8", "mxfp8"), "mxfp8"), (("FP8_PB_WO", "fp8_block"), "fp8_block"),
    (("FP8_PER_CHANNEL_PER_TOKEN",), "fp8_row"),
    (("W4A8_AWQ", "W4A16_AWQ", "INT4_AWQ", "w4a8_dynamic", "int4", "uint4", "Int4WeightOnlyConfig"),
     "int4"),
    (("W8A8_SQ_PER_CHANNEL", "w8a8_dynamic", "W8A16", "int8", "INT8", "w8a8s"), "int8"),
])
def test_names_of_a_format(names: tuple[str, ...], form: str) -> None:
    assert {name: getattr(format_named(name), "name", None) for name in names} == dict.fromkeys(
        names, form
    )


@pytest.mark.parametrize("name", ["", "magic", "auto", "q", "gguf", "aqlm", None, 3])
def test_names_of_none(name: object) -> None:
    assert format_named(name) is None
