"""In which format each layer's experts are stored, as a configuration says it.

A `Scheme` is what one document of a quantiser says: rules, each a pattern of modules' names with
the format it gives them, and a format for all others. The first rule that names a matrix decides.
`read_schemes` finds the documents: inside the configuration, and the quantiser's own file beside
it. Knows the quantisers' keys. Knows nothing of widths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .fields import Config
from .files import ModelFiles
from .formats import FORMATS, WeightFormat, format_named
from .module_names import Matrix, layer_of, names_matrix

Document = dict[str, Any]
UNSAID = WeightFormat("unsaid", 0)


class UnknownFormatError(Exception):
    """A quantiser's word for a format that is not known here; its text says which."""


@dataclass(frozen=True)
class Rule:
    """Modules that the pattern names have the format; None: they stay as they were."""

    pattern: str
    form: WeightFormat | None


@dataclass(frozen=True)
class Scheme:
    """What one document says: the first rule that names a matrix, else the format of all."""

    where: str                                  # for notes: the key or file it stands in
    rules: tuple[Rule, ...]
    default: WeightFormat | None
    _seen: dict[tuple[str, Matrix], bool] = field(default_factory=dict, compare=False, repr=False)

    def format_of(self, matrix: Matrix) -> WeightFormat | None:
        """The matrix's format; None where it stays as it was, UNSAID where nothing names it."""
        for rule in self._rules_for(matrix.layer):
            if self._names(rule, matrix):
                return rule.form
        return self.default or UNSAID

    def _names(self, rule: Rule, matrix: Matrix) -> bool:
        # A pattern without a digit says the same of every layer.
        layered = any(sign.isdigit() for sign in rule.pattern)
        asked = matrix if layered or matrix.draft else Matrix(0, matrix.which, 0, matrix.blocks)
        key = (rule.pattern, asked)
        if key not in self._seen:
            self._seen[key] = names_matrix(rule.pattern, asked)
        return self._seen[key]

    def _rules_for(self, layer: int) -> Sequence[Rule]:
        own, general = self._by_layer
        numbers = sorted([*own.get(layer, ()), *general]) if layer in own else general
        return [self.rules[number] for number in numbers]

    @cached_property
    def _by_layer(self) -> tuple[dict[int, list[int]], list[int]]:
        """The numbers of the rules that name one layer, by that layer, and of all others."""
        own: dict[int, list[int]] = {}
        general: list[int] = []
        for number, rule in enumerate(self.rules):
            layer = layer_of(rule.pattern)
            (general if layer is None else own.setdefault(layer, [])).append(number)
        return own, general


def read_schemes(config: Config, files: ModelFiles) -> list[Scheme]:
    """What the configuration and the file beside it say, the one that counts first.

    Raises UnknownFormatError, ValueError or a kin of it where a document cannot be read.
    """
    experts = _experts_own(config)
    found = [
        scheme for scheme in (
            *(_scheme(document, where, experts) for where, document in _documents(config)),
            *_beside(files, experts),
        ) if scheme is not None
    ]
    if not found and experts is not None:
        found = [Scheme(experts.where, (), experts.form)]
    return found


def stored_format(config: Config) -> WeightFormat | None:
    """The format of what no quantiser touched: the configuration's dtype; None where silent."""
    for key in ("dtype", "torch_dtype", "params_dtype"):
        value = config.get(key)
        if isinstance(value, dict):              # by part of the model
            value = value.get("text_config") or value.get("") or next(iter(value.values()), None)
        if isinstance(value, str) and value != "auto":
            form = format_named(value)
            if form is not None:
                return form
    return None


def _documents(config: Config) -> Iterator[tuple[str, Document]]:
    for key in ("quantize", "quantization_config", "quantization", "compression_config",
                "quantize_config"):
        for part in config.parts:
            value = part.get(key)
            if isinstance(value, str) and value.lower() not in ("", "none"):
                value = {"quant_algo": value}
            if isinstance(value, dict) and value:
                yield key, value


def _beside(files: ModelFiles, experts: _Own | None) -> Iterator[Scheme | None]:
    """The quantiser's own file, which may keep everything one level down."""
    if files.sidecar is None or files.sidecar_name is None:
        return
    inner = files.sidecar.get("quantization", files.sidecar)
    if files.sidecar_name.startswith("quant_model_description"):
        yield _by_tensor(files.sidecar, files.sidecar_name)
    elif isinstance(inner, dict):
        yield _scheme(inner, files.sidecar_name, experts)


@dataclass(frozen=True)
class _Own:
    """A format that a field of the experts' own gives them, whatever holds for all else."""

    where: str
    form: WeightFormat
    published: WeightFormat | None       # under a quantiser that leaves its draft layers alone


def _experts_own(config: Config) -> _Own | None:
    quantisers = [value for _, value in _documents(config)]
    told = {
        key: value
        for key in ("moe_quant_algo", "expert_dtype", "experts_dtype", "moe_dtype")
        for part in (*config.parts[::-1], *quantisers[::-1])
        if isinstance(value := part.get(key), str) and value.lower() not in ("", "none", "auto")
    }
    forms = {key: _required(value, key) for key, value in told.items()}
    if forms:
        where, form = next(iter(forms.items()))
        if where == "moe_quant_algo":
            form = form.grouped(next((_group_of(q) for q in quantisers if where in q), None))
        others = [other for key, other in forms.items() if key != "moe_quant_algo"]
        return _Own(where, form, others[0] if others else None)
    if config.get("use_fp8_experts") is True:
        block = next((q.get("weight_block_size") for q in quantisers), None)
        return _Own("use_fp8_experts", FORMATS["fp8"].blocked(block), None)
    return None


_IGNORED = (
    "ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "exclude",
    "llm_int8_skip_modules",
)


def _scheme(
    document: Document, where: str, experts: _Own | None
) -> Scheme | None:
    rules: list[Rule] = []
    for name, entry in _entries(document.get("quantized_layers")):
        rules.append(Rule(name, _of_entry(entry, document)))
    ignored = [
        str(name) for key in _IGNORED for name in document.get(key) or ()
    ]
    if experts is not None:
        rules += [Rule(name, experts.published) for name in ignored if "mtp" in name]
        rules.append(Rule("*.experts.*", _blocked_alike(experts.form, document)))
    for name, entry in _entries(document.get("dynamic")):          # GPTQModel
        if name.startswith("-:"):
            rules.append(Rule(f"re:{name[2:]}", None))
        else:
            rules.append(Rule(f"re:{name.removeprefix('+:')}", _bits({**document, **entry})))
    for name, entry in _entries(document.get("extra_config")):     # AutoRound
        whole = entry.get("bits", document.get("bits")) or 16
        rules.append(Rule(name, None if whole >= 16 else _bits({**document, **entry})))
    rules += [Rule(name, None) for name in ignored]
    for name, entry in _entries(document.get("layer_quant_config")):     # Quark
        rules.append(Rule(name, _quark(entry)))
    groups = document.get("config_groups")
    if isinstance(groups, dict) and groups:
        for group in sorted(groups.values(), key=_is_general):
            form = _of_group(group, document)
            rules += [Rule(str(target), form) for target in group.get("targets") or ("Linear",)]
        return Scheme(where, tuple(rules), None)
    try:
        default = _of_all(document)
    except UnknownFormatError:
        if experts is None:
            raise
        default = None
    if default is None and not rules:
        return None
    return Scheme(where, tuple(rules), default)


def _entries(value: Any) -> Iterator[tuple[str, Document]]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield str(name), entry if isinstance(entry, dict) else {"quant_algo": entry}


def _is_general(group: Document) -> bool:
    """Whether a group means every linear module, so that more explicit ones come before it."""
    return "Linear" in (group.get("targets") or ("Linear",))


def _of_entry(entry: Document, document: Document) -> WeightFormat | None:
    """The format of one entry of `quantized_layers`."""
    algorithm = entry.get("quant_algo")
    if _says_nothing(algorithm):
        return None
    form = _required(algorithm, "quantized_layers").grouped(_group_of(entry))
    return _blocked_alike(form, document)


def _of_group(group: Document, document: Document) -> WeightFormat | None:
    """The format of a group of compressed-tensors or ModelOptimizer; None: not its weights."""
    weights = group.get("weights")
    if weights is None:
        return None
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


def _of_all(document: Document) -> WeightFormat | None:
    """The format of what no rule names; None where the document quantises nothing by itself."""
    algorithm = document.get("quant_algo") or document.get("quantize")
    if not _says_nothing(algorithm) and str(algorithm).upper() != "MIXED_PRECISION":
        form = _required(algorithm, "quant_algo").grouped(_group_of(document))
        return _blocked_alike(form, document)
    if "global_quant_config" in document:
        return _quark(document["global_quant_config"])
    method = str(document.get("quant_method") or document.get("quantization") or "").lower()
    reader = _METHODS.get(method.replace("_", "-"))
    if reader is not None:
        return reader(document)
    if any(document.get(key) for key in _BITS):
        return _bits(document)
    told = document.get("qformat_weight") or method
    if not told or _says_nothing(told) or "quantized_layers" in document:
        return None
    return _blocked_alike(_required(told, "quant_method").grouped(_group_of(document)), document)


def _says_nothing(word: Any) -> bool:
    told = str(word or "").lower()
    return told in ("", "none", "no_quant", "float") or told.startswith("modelopt")


def _required(word: Any, where: str) -> WeightFormat:
    form = format_named(word)
    if form is None:
        raise UnknownFormatError(f"{where} {str(word)[:60]!r}")
    return form


def _group_of(document: Document) -> int | None:
    for key in ("group_size", "q_group_size", "groupsize", "weight_group_size"):
        if isinstance(document.get(key), int):
            return int(document[key])
    return None


def _blocked_alike(form: WeightFormat, document: Document) -> WeightFormat:
    """fp8 with a scale per block, where the document gives one."""
    if form.name == "fp8" and document.get("weight_block_size"):
        return form.blocked(document["weight_block_size"])
    return form


_BITS = ("bits", "w_bit", "nbits", "num_bits", "weight_bits", "wbits")


def _bits(document: Document) -> WeightFormat:
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
        return _required(f"fp{bits:g}", "data_type")
    group = _group_of(document)
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


def _quark(document: Document) -> WeightFormat | None:
    weight = document.get("weight")
    if isinstance(weight, list):                 # stages: the last is how it is stored
        weight = weight[-1] if weight else None
    if not isinstance(weight, dict):
        return None
    form = _required(weight.get("dtype"), "quark")
    scheme = str(weight.get("qscheme") or "")
    if scheme == "per_group":
        return form.grouped(_group_of(weight))
    if scheme == "per_channel":
        return WeightFormat(form.name, form.bits, row_bits=32 if form.bits == 8 else 16)
    return WeightFormat(form.name, form.bits) if scheme == "per_tensor" else form


def _hqq(document: Document) -> WeightFormat:
    weights = (document.get("quant_config") or {}).get("weight_quant_params") or {}
    return _bits({**weights, "quant_method": "hqq"})


def _torchao(document: Document) -> WeightFormat:
    kind = document.get("quant_type")
    if isinstance(kind, dict):
        kind = kind.get("default", next(iter(kind.values()), None))
    if isinstance(kind, dict):
        group = _group_of(kind.get("_data") or {})
        return _required(str(kind.get("_type")), "quant_type").grouped(group)
    group = _group_of(document.get("quant_type_kwargs") or {})
    return _required(str(kind), "quant_type").grouped(group)


def _named(name: str) -> Callable[[Document], WeightFormat]:
    return lambda document: _blocked_alike(FORMATS[name].grouped(_group_of(document)), document)


_METHODS: dict[str, Callable[[Document], WeightFormat | None]] = {
    "gptq": _bits, "gptq-marlin": _bits, "awq": _bits, "awq-marlin": _bits, "auto-round": _bits,
    "intel/auto-round": _bits, "autoround": _bits, "moe-wna16": _bits,
    "bitsandbytes": _bitsandbytes, "hqq": _hqq, "torchao": _torchao,
    "fp8": _named("fp8"), "finegrained-fp8": _named("fp8"), "deepseek-v4-fp8": _named("fp8"),
    "fbgemm-fp8": _named("fp8_row"), "ptpc-fp8": _named("fp8_row"),
    "mxfp4": _named("mxfp4"), "mxfp8": _named("mxfp8"), "nvfp4": _named("nvfp4"),
    "modelopt-fp4": _named("nvfp4"), "experts-int8": _named("int8"), "eetq": _named("int8"),
    "blockwise-int8": _named("int8"), "w8a8-int8": _named("int8"), "w8a8-fp8": _named("fp8_row"),
    "w4afp8": _named("int4"),
}


def _by_tensor(document: Document, where: str) -> Scheme | None:
    """msmodelslim's file: a word for each tensor, "W8A8_DYNAMIC" or "FLOAT"."""
    words: Counter[str] = Counter(
        str(word) for name, word in document.items()
        if ".experts." in name and name.endswith(".weight") and isinstance(word, str)
    )
    if not words:
        return None
    word = words.most_common(1)[0][0]
    return Scheme(where, (), None if _says_nothing(word) else _required(word, where))
