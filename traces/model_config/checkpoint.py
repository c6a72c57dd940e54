"""A model's own files as the fields of a ModelSpec.

`checkpoint_fields` puts together what the modules beside it find: the files, the part about
experts, the layers, the weights' formats, draft layers, and the weights themselves where they lie
on disk. What is not understood becomes a note that begins with the figure it would change, or one
question. Reads JSON and safetensors' headers only: knows nothing of torch or transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import InputError
from .differences import experts_on_disk, layers_on_disk, size_on_disk, widths_on_disk
from .draft import Draft, find_draft
from .expert_size import ExpertFormats, Shape
from .families import Family, Kin, find_family
from .fields import FIELDS, Config
from .files import PARAMS, ModelFiles, find_files
from .layer_ranges import MOST_LAYERS, parse_layers, written
from .layers import encoder_then_decoder, listed_layers, ruled_layers
from .on_disk import DiskExperts, read_experts
from .quantisation.formats import FORMATS

_SPEC = (
    "ModelSpec(num_layers=…, num_experts=…, top_k=…, hidden=…, intermediate=…, layer_indices=(…))"
)
_JSON = "give sizes as JSON (`loadmaster example model` has one)"
# What helps where a model cannot be read: in Python, and typed.
BY_HAND = {"call": f"correct it, or describe the model yourself: {_SPEC}",
           "command": f"correct it, or {_JSON}"}


def checkpoint_fields(source: Path, moe_layers: str | None = None) -> dict[str, Any]:
    """ModelSpec's fields from a model's files, which it may still refuse.

    source: a checkpoint's folder, its config.json or its params.json. moe_layers: "3-60", the
    answer where no file says which layers are MoE. Raises InputError; see
    `ModelSpec.from_pretrained`.
    """
    files = find_files(source)
    reading = _Reading(files, Config.of(files.config))
    try:
        return reading.fields(moe_layers)
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise InputError(
            f"{files.path}: a field is written in a way that cannot be read ({error})", **BY_HAND
        ) from error


def vocabulary_size(folder: Path) -> int | None:
    """The checkpoint's vocab_size; None where its configuration does not say."""
    size = Config.of(find_files(folder).config).get("vocab_size")
    return size if isinstance(size, int) else None


@dataclass
class _Reading:
    """One model being read: its files, and what was noted on the way."""

    files: ModelFiles
    config: Config
    notes: list[str] = field(default_factory=list)

    @property
    def where(self) -> Path:
        return self.files.path

    def fields(self, moe_layers: str | None) -> dict[str, Any]:
        """Everything a ModelSpec keeps of this model."""
        kin = find_family(self.config.names())
        if kin is None and self.where.name.endswith(PARAMS):       # Mistral's own layout
            kin = Kin(Family(), PARAMS, exact=True)
        family = kin.family if kin is not None else Family()
        experts = self._experts()
        hidden_layers = self._hidden_layers(family)
        disk = self._on_disk(hidden_layers, experts)
        if disk is None:                        # nothing else can tell which is right
            self.config.require_agreement("experts", str(self.where))
        self.config.require_agreement("top_k", str(self.where))
        listed, layers = self._layers(kin, hidden_layers, experts, moe_layers, disk)
        total = max(hidden_layers or 0, layers[-1] + 1)
        experts = self._number("experts", layers) or experts      # where a list gives each layer's
        top_k = self._required("top_k", self._number("top_k", layers) or family.top_k)
        hidden, intermediate = self._number("hidden", layers), self._number("intermediate", layers)
        if disk is not None:
            where = self.where.name
            experts = experts_on_disk(experts, layers, disk, where, self.notes)
            hidden, intermediate = widths_on_disk(hidden, intermediate, disk, where, self.notes)
        matrices = 3 if self._gated(kin, family) else 2
        formats = ExpertFormats(self.config, self.files, family, self.notes)
        shape = Shape(matrices, hidden or 0, intermediate or 0)
        size, each = formats.size(layers, shape), None
        if disk is not None and shape.parameters:
            size, each = size_on_disk(size, disk, layers, shape, self.where.name, self.notes)
        draft = find_draft(self.config, total, family, listed)
        groups = self._number("groups", layers) or 1
        self._note_zero_experts(experts)
        return dict(
            name=self.files.name, num_layers=len(layers), num_experts=experts, top_k=top_k,
            hidden=hidden, intermediate=intermediate, matrices_per_expert=matrices,
            bytes_per_parameter=size.bytes_per_parameter if size else 2.0,
            scale_bytes_per_expert=size.scale_bytes if size else 0,
            activation_bytes=min(4.0, max(2.0, (formats.stored or FORMATS["bf16"]).bits / 8)),
            num_shared_experts=self._shared(layers, family), num_expert_groups=groups,
            groups_per_token=self._groups_per_token(groups, layers),
            layer_indices=layers, total_layers=total, expert_bytes=each,
            draft_layers=_draft_fields(draft, experts, top_k, shape, formats, disk),
            weights_known=size is not None or each is not None, notes=tuple(self.notes),
        )

    # --- how many ---------------------------------------------------------------------------

    def _experts(self) -> int:
        experts = self.config.most("experts")
        if not experts or experts < 2 or self.config.get("enable_moe_block") is False:
            kind = next(iter(self.config.names()), "")
            raise InputError(
                f"{self.where}: model_type {kind!r} is not a mixture of experts: none of "
                f"{', '.join(FIELDS['experts'][:4])} or their kin says 2 or more",
                call=f"give an MoE checkpoint, or describe the model yourself: {_SPEC}",
                command=f"give an MoE checkpoint, or {_JSON}",
            )
        return experts

    def _hidden_layers(self, family: Family) -> int | None:
        layers = self.config.get(family.layers) or self._number("layers", ())
        if layers is None:
            kinds = self.config.get("layers_block_type") or self.config.get(
                "hybrid_override_pattern"
            )
            layers = len(kinds) if kinds else None
        if layers is not None and layers > MOST_LAYERS:
            raise InputError(
                f"{self.where}: says {layers} layers, at most {MOST_LAYERS} can be"
            )
        return layers

    def _number(self, quantity: str, layers: Sequence[int]) -> int | None:
        return self.config.number(quantity, layers, self.notes)

    def _required(self, quantity: str, number: int | None) -> int:
        if not number:
            raise InputError(
                f"{self.where}: none of {', '.join(FIELDS[quantity][:4])} or their kin is set",
                call=f"add it, or describe the model yourself: {_SPEC}",
                command=f"add it, or {_JSON}",
            )
        return number

    def _shared(self, layers: Sequence[int], family: Family) -> int:
        count = self._number("shared", layers)
        if count is not None:
            return count
        if family.shared is not None:
            return family.shared
        return int(bool(self._number("shared width", layers)))

    def _groups_per_token(self, groups: int, layers: Sequence[int]) -> int | None:
        if groups == 1:
            return None
        chosen = self._number("groups per token", layers)
        if chosen is not None and not 0 < chosen <= groups:
            raise InputError(
                f"{self.where}: a token chooses {chosen} of {groups} expert groups, which cannot "
                "be; correct it"
            )
        return chosen

    def _gated(self, kin: Kin | None, family: Family) -> bool:
        if self.config.get("is_gated_act") is False:
            return False
        if kin is None and self.config.get("mlp_hidden_act") == "relu2":
            return False
        return family.gated

    def _note_zero_experts(self, experts: int) -> None:
        zero = self.config.get("zero_expert_num")
        if isinstance(zero, int) and zero > 0:
            self.notes.append(
                f"experts: the router also chooses among {zero} zero-computation experts (ids "
                f"{experts} to {experts + zero - 1}), which have no weights and never leave a rank"
            )

    # --- which layers -----------------------------------------------------------------------

    def _layers(
        self, kin: Kin | None, hidden_layers: int | None, experts: int, asked: str | None,
        disk: DiskExperts | None,
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """All layers that a list names, draft ones too; and the MoE ones among the hidden."""
        if asked is not None:
            return (), self._asked(asked, hidden_layers)
        if kin is not None and kin.family.encoder_decoder:
            return (), self._nonempty(encoder_then_decoder(self.config, self.notes))
        self._required("layers", hidden_layers or (1 if disk is not None else None))
        count = hidden_layers or max(disk.layers if disk else (0,)) + 1
        found = listed_layers(self.config, count, str(self.where))
        listed = found[1] if found is not None else ()
        if found is None:
            found = ruled_layers(self.config, count, kin.family if kin is not None else None)
        layers = None if found is None else tuple(i for i in found[1] if i < count)
        if disk is not None:
            return listed, layers_on_disk(layers, disk, self.where.name, self.notes)
        if layers is None:
            raise self._question(count, experts)
        self._nonempty(layers)
        if kin is not None and not kin.exact and found is not None and found[0] == "its family":
            self.notes.append(
                f"layers: model_type {self.config.names()[0]!r} is not known; it is read as its "
                f"sibling {kin.name}, MoE in {written(layers)} of {count}; --moe-layers says "
                "otherwise"
            )
        return listed, layers

    def _nonempty(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not layers:
            raise InputError(f"{self.where}: no layer is MoE by its own fields", **BY_HAND)
        return layers

    def _asked(self, asked: str, hidden_layers: int | None) -> tuple[int, ...]:
        layers = parse_layers(asked)
        if hidden_layers is not None and layers[-1] >= hidden_layers:
            raise InputError(
                f"{self.where}: has layers 0 to {hidden_layers - 1}, not layer {layers[-1]}",
                call=f"correct moe_layers={asked!r}", command=f"correct --moe-layers {asked}",
            )
        return layers

    def _question(self, count: int, experts: int) -> InputError:
        kind = next(iter(self.config.names()), "")
        top_k = self.config.number("top_k", (), [])
        last = count - 1
        ways = f"0-{last} for all, 3-{last} for all but three, 1-{last}/2 for every second"
        return InputError(
            f"{self.where}: model_type {kind!r} is not known (it says {experts} experts, top-k "
            f"{top_k}, {count} layers, but not which of them are MoE)",
            call=f"say which with moe_layers: {ways}; or describe the model yourself: {_SPEC}",
            command=f"say which with --moe-layers: {ways}; or {_JSON}",
        )

    # --- what lies on disk ------------------------------------------------------------------

    def _on_disk(self, hidden_layers: int | None, experts: int) -> DiskExperts | None:
        try:
            return read_experts(self.files.folder, hidden_layers, experts)
        except InputError as error:
            self.notes.append(
                f"bytes per expert: the weights beside it are not read ({error}); the "
                "configuration alone is taken"
            )
            return None


def _draft_fields(
    draft: Draft | None, experts: int, top_k: int, shape: Shape, formats: ExpertFormats,
    disk: DiskExperts | None,
) -> dict[str, Any] | None:
    """Of draft layers whose experts are like the others but for what they have of their own."""
    if draft is None:
        return None
    own = draft.num_experts or experts
    width = draft.intermediate or shape.intermediate
    held = next(iter(disk.draft_bytes_LE.values()), ()) if disk is not None else ()
    size = None
    if held:
        own, size = len(held), max(held)
    elif shape.hidden and width:
        size = formats.draft_size(draft.layer_indices[0], replace(shape, intermediate=width))
    return dict(
        layer_indices=draft.layer_indices, num_experts=own,
        top_k=draft.top_k or min(top_k, own), bytes_per_expert=size,
    )
