"""How many bytes an expert takes, as a configuration says it.

Every layer's matrices have a format; what most layers have is the model's, and a note counts the
others. Knows formats and widths. Knows nothing of where either was found, or of weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .families import Family
from .fields import Config
from .files import ModelFiles
from .layer_ranges import written
from .quantisation.formats import FORMATS, ExpertBytes, WeightFormat
from .quantisation.module_names import Matrix
from .quantisation.quantisers import UnknownFormatError
from .schemes import UNSAID, Scheme, read_schemes, stored_format

UNKNOWN = "bytes per expert: unknown"
NO_DTYPE = "bytes per expert: no dtype is given, 16 bits a weight are taken"

Formats = tuple[WeightFormat | None, ...]       # of an expert's matrices; None: not quantised


@dataclass(frozen=True)
class Shape:
    """An expert's matrices: how many, and their widths where both are known."""

    matrices: int
    hidden: int
    intermediate: int

    @property
    def parameters(self) -> int:
        """Weights of an expert."""
        return self.matrices * self.hidden * self.intermediate


class ExpertFormats:
    """The formats of a model's experts; what is not understood is appended to `notes`."""

    def __init__(
        self, config: Config, files: ModelFiles, family: Family, notes: list[str]
    ) -> None:
        self.family, self.notes = family, notes
        self.stored = stored_format(config)
        self.schemes: list[Scheme] | None = None
        try:
            self.schemes = read_schemes(config, files)
        except UnknownFormatError as error:
            notes.append(
                f"{UNKNOWN}, for {error} is not known here, so there are neither bytes nor times; "
                "a ModelSpec as JSON gives them (bytes_per_parameter)"
            )

    def size(self, layers: Sequence[int], shape: Shape) -> ExpertBytes | None:
        """Bytes of an expert as most layers keep it; None where their format is not known."""
        if self.schemes is None:
            return None
        asked = {layer: self._of_layer(layer, shape.matrices) for layer in layers}
        said = {layer: forms for layer, forms in asked.items() if forms is not None}
        if said and len(said) < len(layers):
            self.notes.append(
                f"bytes per expert: the format is given for the experts of layers "
                f"{written(tuple(said))} only; the others are taken to be alike"
            )
        counted = Counter(said.values()) or Counter([(None,) * shape.matrices])
        (most, many), *others = counted.most_common()
        if None in most and self.stored is None:
            self.notes.append(NO_DTYPE)
        for other, fewer in others:
            self.notes.append(
                f"bytes per expert: {fewer} of {len(layers)} layers keep their experts in "
                f"{self._named(other)}; {self._named(most)}, that of {many}, is taken for all"
            )
        return self._bytes(most, shape)

    def draft_size(self, layer: int, shape: Shape) -> int | None:
        """Bytes of an expert of a draft layer; None where nothing is quantised or known."""
        if not self.schemes:
            return None
        formats = self._of_layer(layer, shape.matrices, draft=True)
        size = self._bytes(formats or (None,) * shape.matrices, shape)
        return size.total(shape.matrices, shape.hidden, shape.intermediate)

    def _of_layer(self, layer: int, matrices: int, draft: bool = False) -> Formats | None:
        """The formats of a layer's matrices by the first document that says any; None: unsaid."""
        answers: list[tuple[str, Formats]] = []
        for scheme in self.schemes or ():
            forms = tuple(
                scheme.format_of(Matrix(layer, which, 0, self.family.blocks, draft))
                for which in range(3 - matrices, 3)
            )
            if any(form is not UNSAID for form in forms):
                plain = tuple(None if form is UNSAID else form for form in forms)
                answers.append((scheme.where, plain))
        if not answers:
            return None
        (where, first), *others = answers
        for other, forms in others if not draft else ():
            note = (
                f"bytes per expert: {where} says {self._named(first)}, {other} "
                f"{self._named(forms)}; the first is taken"
            )
            if forms != first and note not in self.notes:
                self.notes.append(note)
        return first

    def _bytes(self, formats: Formats, shape: Shape) -> ExpertBytes:
        forms = self._stored(formats)
        biases = 0
        if self.family.biases:          # as stored; in 16 bits beside quantised weights
            biases = 2 if any(formats) else round(forms[0].bits / 8)
        return ExpertBytes.of(forms, shape.hidden, shape.intermediate, biases)

    def _stored(self, formats: Formats) -> list[WeightFormat]:
        return [form or self.stored or FORMATS["bf16"] for form in formats]

    def _named(self, formats: Formats) -> str:
        return "/".join(dict.fromkeys(form.name for form in self._stored(formats)))
