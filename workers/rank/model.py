"""An MoE model without its experts: dense parts loaded, experts left to whoever holds their slots.

Knows transformers' architectures and what their experts modules look like. Knows nothing of
ranks, plans or networks. The full set of experts is never in memory: the model is built on the
meta device, and experts are read one by one (`MoeCheckpoint.read_expert`).
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...foundation.quiet import quiet_transformers
from ...kernels.activation import ExpertActivation
from ...kernels.backend import expert_shapes
from ...kernels.grouped import ExpertWeights
from ...traces.model_spec import ModelSpec
from ..protocol.settings import DTYPE_BYTES
from . import attention, expert_layer
from .attention import ATTENTION_IMPLEMENTATION, EXPERTS_IMPLEMENTATION
from .weight_files import ExpertIndex, ExpertTensors, TensorFiles, bytes_of, contiguous

DTYPES = {name: getattr(torch, name) for name in DTYPE_BYTES}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class ExpertShape:
    """What all experts of a model have in common."""

    experts: int
    hidden: int
    intermediate: int
    activation: ExpertActivation
    bias: bool
    transposed: bool      # stored [in, out], as gpt-oss does

    def allocate(
        self, slots: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> ExpertWeights:
        """Memory for `slots` experts, not filled yet."""
        return ExpertWeights.allocate(
            slots,
            self.hidden,
            self.intermediate,
            dtype=dtype,
            device=device,
            activation=self.activation,
            bias=self.bias,
        )

    def empty_expert(self, dtype: torch.dtype) -> ExpertTensors:
        """One expert's tensors by name, with any values: what an arriving expert looks like."""
        shapes = expert_shapes(self.hidden, self.intermediate, self.bias)
        return {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}


class MoeCheckpoint:
    """A checkpoint directory that holds an MoE model we can serve.

    Raises InputError in one line: no config, an architecture transformers does not know, no MoE
    layers, experts of a form the kernels do not compute, quantised or missing tensors.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = _read_config(self.directory)
        skeleton = _skeleton(self.directory, self.config)
        self.expert_modules = _expert_modules(self.directory, skeleton, self.config)
        first = skeleton.get_submodule(self.expert_modules[0])
        self.shape = _expert_shape(self.directory, first, self.config)
        self._skeleton_class = type(skeleton)
        self._index = ExpertIndex(TensorFiles(self.directory), skeleton, self.expert_modules)
        self._index.require_complete(self.shape.experts)

    def require_shape(self, spec: ModelSpec) -> None:
        """Raise InputError unless layers, experts and sizes are those of `spec`."""
        found = (
            len(self.expert_modules), self.shape.experts, self.shape.hidden,
            self.shape.intermediate,
        )
        stated = (spec.num_layers, spec.num_experts, spec.hidden, spec.intermediate)
        if found != stated:
            raise InputError(
                f"{self.directory}: config.json says (layers, experts, hidden, intermediate) = "
                f"{stated}, the model's code builds {found}: the config is not this model's"
            )

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def context_tokens(self) -> int:
        """Longest sequence the model's positions allow."""
        return int(self.config.get_text_config().max_position_embeddings)

    def read_expert(self, layer: int, expert: int, dtype: torch.dtype) -> ExpertTensors:
        """One expert's tensors, as `ExpertWeights.load_slot` takes them. layer: counted from 0."""
        module = self.expert_modules[layer]
        swap = self.shape.transposed

        def part(name: str, transposed: bool) -> Tensor:
            return contiguous(
                self._index.read(f"{module}.{name}", expert), dtype, transposed=transposed
            )

        tensors = {"gate_up": part("gate_up_proj", swap), "down": part("down_proj", swap)}
        if self.shape.bias:
            tensors["gate_up_bias"] = part("gate_up_proj_bias", False)
            tensors["down_bias"] = part("down_proj_bias", False)
        return tensors

    def load_dense(self, dtype: torch.dtype) -> Any:
        """The model in evaluation mode, every experts module without parameters."""
        modules = self.expert_modules

        def build(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            self._skeleton_class.__init__(model, config, *args, **kwargs)
            for name in modules:
                _drop_parameters(model.get_submodule(name))

        # The class keeps its name: transformers looks conversions up by it.
        without_experts: Any = type(
            self._skeleton_class.__name__, (self._skeleton_class,), {"__init__": build}
        )
        without_experts.__module__ = self._skeleton_class.__module__
        with quiet_transformers():
            model, info = without_experts.from_pretrained(
                None,
                config=self.config,
                state_dict=dict(self._index.read_dense()),
                dtype=dtype,
                experts_implementation=EXPERTS_IMPLEMENTATION,
                attn_implementation=ATTENTION_IMPLEMENTATION,
                output_loading_info=True,
            )
        if info["missing_keys"]:
            raise InputError(
                f"{self.directory}: tensor {sorted(info['missing_keys'])[0]} is missing from the "
                "checkpoint: download or save it again"
            )
        return model.eval()


def fingerprint(tensors: ExpertTensors) -> str:
    """sha256 of an expert's tensors: names, shapes, types and every byte."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _drop_parameters(module: nn.Module) -> None:
    for name, _ in list(module.named_parameters()):
        delattr(module, name)
    # Nothing is left to initialise, and the model's own initialiser would look for it.
    module._is_hf_initialized = True  # type: ignore[assignment]


def _read_config(directory: Path) -> Any:
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: no config.json; give a Hugging Face checkpoint directory")
    try:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{directory / 'config.json'}: an architecture this transformers does not know, or a "
            f"damaged config ({reason}): upgrade transformers, or check the file"
        ) from error
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"{directory}: the checkpoint is quantised; experts are served in float: dequantise "
            "it and save it again"
        )
    return config


def _skeleton(directory: Path, config: Any) -> Any:
    """The whole model with no memory behind its tensors."""
    auto: Any = importlib.import_module("transformers").AutoModelForCausalLM
    expert_layer.register()
    attention.register()
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{directory}: {config.model_type!r} is not a causal language model this transformers "
            f"can build ({str(error).splitlines()[0]})"
        ) from error


def _expert_modules(directory: Path, model: Any, config: Any) -> list[str]:
    """Names of the modules that follow transformers' experts interface, in layer order."""
    modules = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "_is_expert_parallel")
    ]
    if not modules:
        raise InputError(
            f"{directory}: {config.model_type!r} has no mixture-of-experts layers that follow "
            "transformers' experts interface: nothing to place"
        )
    types = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _LAYER_TYPES
    if types:
        raise InputError(
            f"{directory}: layers of type {', '.join(sorted(types))} are not served live; "
            "record its routing elsewhere and plan from the trace"
        )
    return modules


def _expert_shape(directory: Path, module: nn.Module, config: Any) -> ExpertShape:
    problem = _unsupported(module)
    if problem:
        raise InputError(
            f"{directory}: the experts of {config.model_type!r} {problem}, which the kernels do "
            "not compute"
        )
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    down = parameters["down_proj"]
    transposed = bool(module.is_transposed)
    hidden, intermediate = (down.shape[2], down.shape[1]) if transposed else down.shape[1:]
    return ExpertShape(
        experts=down.shape[0],
        hidden=hidden,
        intermediate=intermediate,
        activation=_activation(directory, module, config),
        bias=bool(module.has_bias),
        transposed=transposed,
    )


def _unsupported(module: Any) -> str:
    names = {name for name, _ in module.named_parameters()}
    wanted = {"gate_up_proj", "down_proj"}
    if module.has_bias:
        wanted |= {"gate_up_proj_bias", "down_proj_bias"}
    if not module.has_gate:
        return "have no gate"
    if module.has_post_expert_norm:
        return "end in a norm of their own"
    if names != wanted:
        return f"hold {', '.join(sorted(names))}"
    return ""


def _activation(directory: Path, module: Any, config: Any) -> ExpertActivation:
    from transformers.integrations.moe import _default_apply_gate

    interleaved = not module.is_concatenated
    if type(module)._apply_gate is _default_apply_gate:
        name = getattr(config.get_text_config(), "hidden_act", None)
        if name in _ACTIVATIONS:
            return ExpertActivation(_ACTIVATIONS[name], interleaved=interleaved)  # type: ignore[arg-type]
        raise InputError(f"{directory}: expert activation {name!r} is not computed by the kernels")
    if config.model_type == "gpt_oss":
        return ExpertActivation(
            "gptoss_clamped",
            limit=float(module.limit),
            alpha=float(module.alpha),
            interleaved=interleaved,
        )
    raise InputError(
        f"{directory}: the experts of {config.model_type!r} have a gate of their own, which the "
        "kernels do not compute"
    )
