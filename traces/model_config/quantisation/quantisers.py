"""Which format one document of a quantiser means: its keys, method by method.

Some name an algorithm, some count bits and groups, some keep a dictionary in a dictionary. Knows
the quantisers' keys. Knows nothing of modules' names: `schemes` says what a format is given to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .formats import FORMATS, WeightFormat, format_named

Document = dict[str, Any]


class UnknownFormatError(Exception):
    """A quantiser's word for a format that is not known here; its text says which."""


def format_of_entry(entry: Document, document: Document) -> WeightFormat | None:
    """The format of one entry of `quantized_layers`."""
    algorithm = entry.get("quant_algo")
    if says_nothing(algorithm):
        return None
    form = required_format(algorithm, "quantized_layers").grouped(group_size(entry))
    return blocked_alike(form, document)


def format_of_group(group: Document, document: Document) -> WeightFormat:
    """The format of the weights in a group of compressed-tensors or ModelOptimizer."""
    weights = group["weights"]
    bits, kind = float(weights["num_bits"]), str(weights.get("type", "int"))
    packed = format_named(f"{group.get('format') or document.get('format') or ''}")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    scale = 8.0 if str(weights.get("scale_dtype", "")).endswith(("uint8", "e8m0fnu")) else 16.0
    if kind == "float" and bits == 4:
        if packed is None or packed.name not in ("nvfp4", "mxfp4"):
            packed = FORMATS["mxfp4" if size == 32 else "nvfp4"]
        return packed.grouped(size)
    if kind == "float" and bits == 8:
        if strategy == "channel":
            return WeightFormat("fp8_row", 8, row_bits=scale)
        if strategy == "block" or weights.get("block_structure"):
            return FORMATS["fp8"].blocked(_block(weights.get("block_structure")))
        if size and size > 0:
            return WeightFormat("mxfp8", 8, group=int(size), group_bits=8 if size == 32 else scale)
        return FORMATS["fp8"]
    zero = 0.0 if weights.get("symmetric", True) else bits
    name = f"{'fp' if kind == 'float' else 'int'}{bits:g}"
    if size and size > 0 and strategy != "channel":
        return WeightFormat(name, bits, group=int(size), group_bits=scale + zero)
    row = scale + zero if strategy == "channel" or size == -1 else 0.0
    return WeightFormat(name, bits, row_bits=row)


def _block(written: Any) -> Sequence[int]:
    if isinstance(written, str):
        return [int(size) for size in written.split("x")]
    return written or (128, 128)


def format_of_all(document: Document) -> WeightFormat | None:
    """The format of what no rule names; None where the document quantises nothing by itself."""
    algorithm = document.get("quant_algo") or document.get("quantize")
    if not says_nothing(algorithm) and str(algorithm).upper() != "MIXED_PRECISION":
        form = required_format(algorithm, "quant_algo").grouped(group_size(document))
        return blocked_alike(form, document)
    if "global_quant_config" in document:
        return quark_format(document["global_quant_config"])
    method = str(document.get("quant_method") or document.get("quantization") or "").lower()
    reader = _METHODS.get(method.replace("_", "-"))
    if reader is not None:
        return reader(document)
    if any(document.get(key) for key in _BITS):
        return bits_format(document)
    told = document.get("qformat_weight") or method
    if not told or says_nothing(told) or "quantized_layers" in document:
        return None
    form = required_format(told, "quant_method").grouped(group_size(document))
    return blocked_alike(form, document)


def says_nothing(word: Any) -> bool:
    told = str(word or "").lower()
    return told in ("", "none", "no_quant", "float") or told.startswith("modelopt")


def required_format(word: Any, where: str) -> WeightFormat:
    form = format_named(word)
    if form is None:
        raise UnknownFormatError(f"{where} {str(word)[:60]!r}")
    return form


def group_size(document: Document) -> int | None:
    for key in ("group_size", "q_group_size", "groupsize", "weight_group_size"):
        if isinstance(document.get(key), int):
            return int(document[key])
    return None


def blocked_alike(form: WeightFormat, document: Document) -> WeightFormat:
    """fp8 with a scale per block, where the document gives one."""
    if form.name == "fp8" and document.get("weight_block_size"):
        return form.blocked(document["weight_block_size"])
    return form


_BITS = ("bits", "w_bit", "nbits", "num_bits", "weight_bits", "wbits")


def bits_format(document: Document) -> WeightFormat:
    """Whole numbers of some bits with 16-bit scales and a zero point per group: GPTQ, AWQ, ..."""
    bits = next((document[key] for key in _BITS if document.get(key)), None)
    if bits is None:
        raise UnknownFormatError(f"quant_method {document.get('quant_method')!r} without bits")
    kind = str(document.get("data_type") or "int").lower()
    if kind.startswith("mx"):
        return FORMATS[f"mxfp{bits:g}"]
    if kind.startswith("nv"):
        return FORMATS["nvfp4"]
    if "fp" in kind or "float" in kind:
        return required_format(f"fp{bits:g}", "data_type")
    group = group_size(document)
    scales = 16.0 + float(bits)
    if group is not None and group < 0:
        return WeightFormat(f"int{bits:g}", float(bits), row_bits=scales)
    if not group:
        return WeightFormat(f"int{bits:g}", float(bits))
    return WeightFormat(f"int{bits:g}", float(bits), group=group, group_bits=scales)


def _bitsandbytes(document: Document) -> WeightFormat:
    """4 bits with a 32-bit scale per 64 weights, itself in 8 bits where doubly quantised."""
    if not (document.get("load_in_4bit") or document.get("_load_in_4bit")):
        return WeightFormat("int8", 8, row_bits=32)
    double = document.get("bnb_4bit_use_double_quant")
    return WeightFormat("nf4", 4, group=64, group_bits=8 + 32 / 256 if double else 32)


def quark_format(document: Document) -> WeightFormat | None:
    weight = document.get("weight")
    if isinstance(weight, list):                 # stages: the last is how it is stored
        weight = weight[-1] if weight else None
    if not isinstance(weight, dict):
        return None
    dtype = weight.get("dtype")
    if dtype == "mx":
        dtype = f"mx{weight.get('mx_element_dtype')}"
    form = required_format(dtype, "quark")
    scheme = str(weight.get("qscheme") or "")
    if scheme == "per_group":
        return form.grouped(group_size(weight))
    if scheme == "per_channel":
        return WeightFormat(form.name, form.bits, row_bits=32 if form.bits == 8 else 16)
    return WeightFormat(form.name, form.bits) if scheme == "per_tensor" else form


def _hqq(document: Document) -> WeightFormat:
    weights = (document.get("quant_config") or {}).get("weight_quant_params") or {}
    return bits_format({**weights, "quant_method": "hqq"})


def _torchao(document: Document) -> WeightFormat:
    kind = document.get("quant_type")
    if isinstance(kind, dict):
        kind = kind.get("default", next(iter(kind.values()), None))
    if isinstance(kind, dict):
        group = group_size(kind.get("_data") or {})
        return required_format(str(kind.get("_type")), "quant_type").grouped(group)
    group = group_size(document.get("quant_type_kwargs") or {})
    return required_format(str(kind), "quant_type").grouped(group)


def _named(name: str) -> Callable[[Document], WeightFormat]:
    return lambda document: blocked_alike(FORMATS[name].grouped(group_size(document)), document)


_METHODS: dict[str, Callable[[Document], WeightFormat | None]] = {
    **dict.fromkeys(
        ("gptq", "gptq-marlin", "awq", "awq-marlin", "auto-round", "intel/auto-round", "autoround",
         "moe-wna16"), bits_format,
    ),
    "bitsandbytes": _bitsandbytes, "hqq": _hqq, "torchao": _torchao,
    "fp8": _named("fp8"), "finegrained-fp8": _named("fp8"), "deepseek-v4-fp8": _named("fp8"),
    "fbgemm-fp8": _named("fp8_row"), "ptpc-fp8": _named("fp8_row"),
    "mxfp4": _named("mxfp4"), "mxfp8": _named("mxfp8"), "nvfp4": _named("nvfp4"),
    "modelopt-fp4": _named("nvfp4"), "experts-int8": _named("int8"), "eetq": _named("int8"),
    "blockwise-int8": _named("int8"), "w8a8-int8": _named("int8"), "w8a8-fp8": _named("fp8_row"),
    "w4afp8": _named("int4"),
}
