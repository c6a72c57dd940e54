"""What a person says of a file that the file does not say itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import InputError, UsageError
from ..model_config.layer_ranges import written
from ..model_layers import LayerRows, hidden_layers, rows_of_model
from ..model_spec import ModelSpec

LOAD_AXES = ("LE", "EL", "WLE", "WEL", "LWE", "LEW", "EWL", "ELW")
ID_AXES = ("TLK", "LTK")


@dataclass(frozen=True)
class Asked:
    """All None or empty: nothing was said. Names are those of `import_any`."""

    num_experts: int | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    axes: str | None = None
    layers: tuple[int, ...] | None = None
    model: ModelSpec | None = None
    top_k: int | None = None
    zero_experts: int | None = None
    drop_repeated: bool = False

    def __post_init__(self) -> None:
        if self.axes is not None and self.axes not in (*LOAD_AXES, *ID_AXES):
            raise UsageError(
                f"--axes {self.axes}: loads are {', '.join(LOAD_AXES)} (W windows, L layers, E "
                f"experts), routing {' or '.join(ID_AXES)} (T tokens, K choices)"
            )
        for name, value in (("top-k", self.top_k), ("num-experts", self.num_experts)):
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value} must be at least 1")

    def experts(self, stored: int | None = None) -> int | None:
        """E: what file, person and model say, which must not differ; None where none says it.

        Raises InputError where they differ.
        """
        said = {"the file": stored, "--num-experts": self.num_experts,
                "--model": None if self.model is None else self.model.num_experts}
        told = {who: count for who, count in said.items() if count is not None}
        if len(set(told.values())) > 1:
            raise InputError(
                "experts per layer: " + ", ".join(f"{who} says {n}" for who, n in told.items())
                + ": leave the wrong one out"
            )
        return next(iter(told.values()), None)

    def layer_rows(self, found: int, numbers: tuple[int, ...] | None) -> LayerRows | None:
        """Which rows are which layers, as far as --layers, the file or --model tell; else None."""
        if self.layers is not None:
            if len(self.layers) != found:
                raise InputError(
                    f"--layers names {len(self.layers)} layers, the file holds {found}"
                )
            numbers = self.layers
        if self.model is not None:
            own = written(self.model.own_layer_indices()[:found])
            return rows_of_model(
                self.model, found, numbers,
                f", or the rows are some of its layers: number them, as in --layers {own}",
            )
        return None if numbers is None else LayerRows(tuple(range(found)), numbers)

    def token_shape(self, numbers: int, where: str) -> tuple[int, int]:
        """(rows, K) of each token in `numbers` numbers that came without a shape.

        SGLang sends them so, with a row for every hidden layer. Raises InputError where nobody
        tells the shape, or it does not fit.
        """
        model = self.model
        rows = len(self.layers) if self.layers else hidden_layers(model) if model else None
        top_k = self.top_k or (model.top_k if model else None)
        if rows is None or top_k is None:
            raise InputError(
                f"{where}: {numbers:,} numbers without a shape: give --model (its hidden layers "
                "and top-k tell it), or --layers and --top-k, as in --layers 0-26 --top-k 6"
            )
        if numbers % (rows * top_k):
            raise InputError(
                f"{where}: {numbers:,} numbers are no whole tokens of {rows} layers x top-{top_k}: "
                "another model, or check --layers and --top-k"
            )
        return rows, top_k
