"""In which format each layer's experts are stored, as a configuration says it.

A `Scheme` is what one document of a quantiser says: rules, each a pattern of modules' names with
the format it gives them, and a format for all others. The first rule that names a matrix decides.
`read_schemes` finds the documents: inside the configuration, and the quantiser's own file beside
it. Knows what formats are given to. Knows nothing of widths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .fields import Config
from .files import ModelFiles
from .quantisation.formats import FORMATS, WeightFormat, format_named
from .quantisation.module_names import Matrix, layer_of, names_matrix
from .quantisation.quantisers import (
    Document,
    UnknownFormatError,
    bits_format,
    blocked_alike,
    format_of_all,
    format_of_entry,
    format_of_group,
    group_size,
    quark_format,
    required_format,
    says_nothing,
)

UNSAID = WeightFormat("unsaid", 0)


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
    for part in config.parts:
        for key in ("dtype", "torch_dtype", "params_dtype"):
            value = part.get(key)
            if isinstance(value, dict):              # by part of the model
                value = value.get("text_config") or value.get("")
            form = format_named(value) if isinstance(value, str) else None
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
    """What `moe_quant_algo`, `expert_dtype` or their kin say, inside or beside a quantiser's."""
    quantisers = [value for _, value in _documents(config)]
    told = {
        key: value
        for key in ("moe_quant_algo", "expert_dtype", "experts_dtype", "moe_dtype")
        for part in (*config.parts[::-1], *quantisers[::-1])
        if isinstance(value := part.get(key), str) and value.lower() not in ("", "none", "auto")
    }
    forms = {key: required_format(value, key) for key, value in told.items()}
    if forms:
        where, form = next(iter(forms.items()))
        if where == "moe_quant_algo":
            form = form.grouped(next((group_size(q) for q in quantisers if where in q), None))
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


def _scheme(document: Document, where: str, experts: _Own | None) -> Scheme | None:
    """One document's rules, the most explicit first; None where it says nothing of weights."""
    rules: list[Rule] = []
    for name, entry in _entries(document.get("quantized_layers")):
        rules.append(Rule(name, format_of_entry(entry, document)))
    ignored = [str(name) for key in _IGNORED for name in document.get(key) or ()]
    if experts is not None:
        rules += [Rule(name, experts.published) for name in ignored if "mtp" in name]
        rules.append(Rule("*.experts.*", blocked_alike(experts.form, document)))
    for name, entry in _entries(document.get("dynamic")):          # GPTQModel
        if name.startswith("-:"):
            rules.append(Rule(f"re:{name[2:]}", None))
        else:
            rules.append(Rule(f"re:{name.removeprefix('+:')}", bits_format({**document, **entry})))
    for name, entry in _entries(document.get("extra_config")):     # AutoRound
        whole = entry.get("bits", document.get("bits")) or 16
        rules.append(Rule(name, None if whole >= 16 else bits_format({**document, **entry})))
    rules += [Rule(name, None) for name in ignored]
    for name, entry in _entries(document.get("layer_quant_config")):     # Quark
        rules.append(Rule(name, quark_format(entry)))
    groups = document.get("config_groups")
    if isinstance(groups, dict) and groups:
        for group in sorted(groups.values(), key=_is_general):
            if group.get("weights") is None:         # of activations only
                continue
            form = format_of_group(group, document)
            rules += [Rule(str(target), form) for target in group.get("targets") or ("Linear",)]
        return Scheme(where, tuple(rules), None)
    chosen = str(document.get("modules_in_block_to_quantize") or "experts")      # GPTQ
    if "experts" not in chosen:
        rules.append(Rule("*.experts.*", None))
    try:
        default = format_of_all(document)
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


def _by_tensor(document: Document, where: str) -> Scheme | None:
    """msmodelslim's file: a word for each tensor, "W8A8_DYNAMIC" or "FLOAT"."""
    words: Counter[str] = Counter(
        str(word) for name, word in document.items()
        if ".experts." in name and name.endswith(".weight") and isinstance(word, str)
    )
    if not words:
        return None
    word = words.most_common(1)[0][0]
    return Scheme(where, (), None if says_nothing(word) else required_format(word, where))
