"""A Hugging Face checkpoint on disk: which tensor lies where, and one expert's tensors on demand.

Knows safetensors files and transformers' renaming of checkpoint keys. Knows nothing of ranks,
plans, networks or forward passes. Nothing but safetensors is read: a pickle is never opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import InputError
from ...foundation.documents import read_json

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")

# One expert's tensors: gate_up [2I, H], down [H, I] and, where the model has them, both biases.
ExpertTensors = dict[str, Tensor]


class TensorFiles:
    """The safetensors of one checkpoint directory, opened on first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of = _weight_map(directory)
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._file_of)

    def read(self, key: str) -> Tensor:
        """A whole tensor. Raises InputError when it is missing or its file is damaged."""
        try:
            return self._handle(key).get_tensor(key)  # type: ignore[no-any-return]
        except SafetensorError as error:
            raise self._damaged(key, error) from error

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, from its file's header."""
        return tuple(self._handle(key).get_slice(key).get_shape())

    def misfit(self, key: str, fault: str) -> InputError:
        """What to say of a tensor that is not as the config makes it."""
        return InputError(
            f"{self.directory / self._file_of[key]}: {fault}: the two are not of one model, put "
            "its own config.json beside the weights"
        )

    def read_row(self, key: str, row: int) -> Tensor:
        """Row `row` of a stacked tensor, with its leading axis kept: [1, ...]; reads no other."""
        try:
            return self._handle(key).get_slice(key)[row : row + 1]  # type: ignore[no-any-return]
        except SafetensorError as error:
            raise self._damaged(key, error) from error

    def _handle(self, key: str) -> Any:
        if key not in self._file_of:
            raise InputError(
                f"{self.directory}: tensor {key} is missing from the checkpoint: "
                "download or save it again"
            )
        name = self._file_of[key]
        if name not in self._open:
            path = self.directory / name
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"{path}: not a whole safetensors file ({error}): download or save it again"
                ) from error
        return self._open[name]

    def _damaged(self, key: str, error: Exception) -> InputError:
        return InputError(
            f"{self.directory / self._file_of[key]}: cannot read {key} ({error}): "
            "download or save the checkpoint again"
        )


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or the single file's header."""
    index = directory / _INDEX_FILE
    if index.is_file():
        document = read_json(index)
        try:
            file_of = {str(key): str(name) for key, name in document["weight_map"].items()}
        except (KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: not a safetensors index: {error}") from error
        for name in sorted(set(file_of.values())):
            if Path(name).name != name or not (directory / name).is_file():
                raise InputError(
                    f"{index}: names the file {name!r}, which is not in {directory}: "
                    "the checkpoint is incomplete or was tampered with"
                )
        return file_of
    single = directory / _SINGLE_FILE
    if not single.is_file():
        raise InputError(
            f"{directory}: no {_SINGLE_FILE} and no {_INDEX_FILE}; weights are read from "
            "safetensors only: convert the checkpoint with save_pretrained"
        )
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{single}: not a whole safetensors file ({error}): download or save it again"
        ) from error


class ExpertIndex:
    """Where every parameter of every expert lies in the files, and how to make it from them.

    A model's stacked parameter (say `layers.3.mlp.experts.gate_up_proj`) may lie in the files as
    one stacked tensor or as one tensor per expert and matrix. transformers' own converters say
    how the parts become the whole; they are run on a stack of one expert.
    """

    def __init__(self, files: TensorFiles, model: Any, expert_modules: list[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        self._files = files
        self._model = model
        self._meta: dict[str, Tensor] = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._renamings: list[Any] = [t for t in transforms if not isinstance(t, WeightConverter)]
        self._parameters = {
            f"{module}.{name}": None
            for module in expert_modules
            for name, _ in model.get_submodule(module).named_parameters()
        }
        # stacked parameter -> [(converter's source pattern, expert or None, key)]
        self._parts: dict[str, list[tuple[str | None, int | None, str]]] = {}
        self.dense_keys: list[str] = []
        renamed = [(key, *self._place(key)) for key in files.names]
        self._refuse_quantised()
        for key, target, pattern in renamed:
            if pattern is None and target in self._meta:
                self._require_fit(key, tuple(self._meta[target].shape))

    def _require_fit(self, key: str, wanted: tuple[int, ...]) -> None:
        held = self._files.shape(key)
        if held != wanted:
            raise self._files.misfit(
                key, f"tensor {key} has shape {list(held)}, by config.json it is {list(wanted)}"
            )

    def _place(self, key: str) -> tuple[str, str | None]:
        """The parameter that the tensor belongs to, and what converts it, None: nothing."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(
            key, self._renamings, self._converters, self._model.base_model_prefix, self._meta
        )
        if target not in self._parameters:
            self.dense_keys.append(key)
            return target, pattern
        number = _EXPERT_NUMBER.search(key)
        expert = int(number.group(1)) if number else None
        self._parts.setdefault(target, []).append((pattern, expert, key))
        return target, pattern

    def _refuse_quantised(self) -> None:
        for key in self.dense_keys:
            if key.endswith(("_blocks", "_scales", "weight_scale_inv", "qweight")):
                raise InputError(
                    f"{self._files.directory}: {key} is quantised; experts are served in float: "
                    "dequantise the checkpoint and save it again"
                )

    def require_complete(self, experts: int) -> None:
        """Raise InputError naming the first expert tensor that the files do not hold, or hold
        beyond these."""
        for parameter in self._parameters:
            parts = self._parts.get(parameter, [])
            for _, number, key in parts:
                held = self._files.shape(key)[0] if number is None else number + 1
                if held > experts or (number is None and held < experts):
                    raise self._files.misfit(
                        key, f"tensor {key} is of {held} experts or more, by config.json there are "
                        f"{experts}"
                    )
            stacked = any(expert is None for _, expert, _ in parts)
            present = {(pattern, expert) for pattern, expert, _ in parts}
            patterns = {pattern for pattern, _, _ in parts}
            wanted = patterns if stacked else self._source_patterns(parameter, patterns)
            for pattern in sorted(wanted, key=str):
                for expert in [None] if stacked else range(experts):
                    if (pattern, expert) not in present:
                        where = parameter if expert is None else f"expert {expert} of {parameter}"
                        raise InputError(
                            f"{self._files.directory}: {where} is missing from the checkpoint "
                            f"({pattern or parameter}): download or save it again"
                        )
            if not parts:
                raise InputError(
                    f"{self._files.directory}: {parameter} is missing from the checkpoint: "
                    "download or save it again"
                )

    def _source_patterns(self, parameter: str, found: set[str | None]) -> set[str | None]:
        for converter in self._converters:
            if found & set(converter.source_patterns):
                return set(converter.source_patterns)
        return found

    def read(self, parameter: str, expert: int) -> Tensor:
        """One expert's row of a stacked parameter, as the model's code expects it."""
        by_pattern: dict[str | None, Tensor] = {}
        for pattern, number, key in self._parts.get(parameter, []):
            if number is None:
                by_pattern[pattern] = self._files.read_row(key, expert)
            elif number == expert:
                by_pattern[pattern] = self._files.read(key)
        if not by_pattern:
            raise InputError(
                f"{self._files.directory}: expert {expert} of {parameter} is missing from the "
                "checkpoint: download or save it again"
            )
        if None in by_pattern:
            return by_pattern[None][0]
        keys = [key for _, number, key in self._parts[parameter] if number in (None, expert)]
        wanted = tuple(self._meta[parameter].shape[1:])
        try:
            made = self._convert(parameter, by_pattern)
        except (RuntimeError, IndexError) as error:
            raise self._unlike(keys, wanted) from error
        if tuple(made.shape) != wanted:
            raise self._unlike(keys, wanted)
        return made

    def _unlike(self, keys: list[str], wanted: tuple[int, ...]) -> InputError:
        """What to say of tensors that together do not become what the config makes of them."""
        held = ", ".join(f"{key} {list(self._files.shape(key))}" for key in keys)
        return self._files.misfit(
            keys[0], f"tensors {held} do not make the {list(wanted)} of config.json"
        )

    def _convert(self, parameter: str, by_pattern: dict[str | None, Tensor]) -> Tensor:
        """Run the converter that claims these patterns on a stack of this one expert."""
        converter = next(
            c for c in self._converters if set(by_pattern) <= set(c.source_patterns)
        )
        collected: Any = {
            pattern: [by_pattern[pattern]]
            for pattern in converter.source_patterns
            if pattern in by_pattern
        }
        for operation in converter.operations:
            collected = operation.convert(
                collected,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=parameter,
                model=self._model,
                config=self._model.config,
                missing_keys=None,
            )
        (tensor,) = collected.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        return tensor[0]  # type: ignore[no-any-return]

    def read_dense(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is no expert's, under its name in the files."""
        for key in self.dense_keys:
            yield key, self._files.read(key)


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory, copied only from a GPU."""
    return tensor.contiguous().view(torch.uint8).cpu().numpy().data


def contiguous(tensor: Tensor, dtype: torch.dtype, *, transposed: bool) -> Tensor:
    """The tensor as a fresh contiguous one of `dtype`, its two last axes swapped if asked."""
    tensor = tensor.transpose(-1, -2) if transposed else tensor
    return tensor.to(dtype).contiguous()
