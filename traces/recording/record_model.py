"""Record the routing of a Hugging Face MoE checkpoint, in one process, on text.

Loads the model with transformers, registers an experts implementation that notes every layer's
choice and then computes as usual, and feeds it the texts. Knows transformers' experts interface.
Knows nothing of devices, plans or the live workers. torch and transformers are imported inside:
the rest of traces/ works without them.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError, LoadmasterError, UsageError
from ...foundation.quiet import quiet_transformers
from ..model_config.checkpoint import vocabulary_size
from ..model_spec import ModelSpec
from ..storage.manifest import require_unused
from .recorder import Recorder, RecordingSummary

if TYPE_CHECKING:
    import torch

MOST_DECODED = 1_000_000         # of a request: longer than any context
IMPLEMENTATION = "loadmaster_record"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Text:
    """A text to run through the model, and the domain it counts to."""

    text: str
    domain: str = "text"


def record_model(
    model_dir: Path | str,
    texts: Sequence[Text | str],
    out_dir: Path | str,
    *,
    request_tokens: int = 512,
    step_tokens: int = 4096,
    decode_tokens: int = 0,
    max_tokens: int | None = None,
    gates: bool = False,
    requests: bool = True,
    dtype: str = "auto",
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> RecordingSummary:
    """Run the texts through a checkpoint and store the trace in a new folder.

    A text is cut into requests of `request_tokens`; requests of equal length run together, without
    padding, in prefill steps of at most `step_tokens`; each then generates `decode_tokens`
    greedily, one step per token. max_tokens: stop after about so many. progress(done, of) is
    called after every step with prompt tokens.
    Raises InputError on a checkpoint that is not MoE, is unknown, or has no tokenizer and no byte
    vocabulary; LoadmasterError where the trace could not be written.
    """
    if request_tokens < 1 or step_tokens < request_tokens or decode_tokens < 0:
        raise UsageError(
            f"need 1 <= request_tokens <= step_tokens and decode_tokens >= 0; got "
            f"{request_tokens}, {step_tokens} and {decode_tokens}"
        )
    if decode_tokens > MOST_DECODED:
        raise UsageError(f"decode_tokens {decode_tokens} must be at most {MOST_DECODED}")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens {max_tokens} must be at least 1, or left out")
    require_unused(Path(out_dir))
    folder = Path(model_dir)
    spec = ModelSpec.from_pretrained(folder)
    labelled = [Text(t) if isinstance(t, str) else t for t in texts]
    names = tuple(dict.fromkeys(t.domain for t in labelled))
    prompts = _requests(labelled, names, tokenizer_of(folder), request_tokens, max_tokens)
    if not prompts:
        raise InputError("the texts hold no tokens: give at least one that is not empty")
    model = _load(folder, dtype, device)
    layers_by_module(model, spec)  # before a folder is made: it may refuse
    stood = Path(out_dir).exists()
    recorder = Recorder(
        out_dir, spec, gates=gates, requests=requests, home_ranks=False, domain_names=names
    )
    run = _Run(model, recorder, decode_tokens)
    try:
        with recording(model, spec, recorder):
            done, total = 0, sum(len(p.tokens) for p in prompts)
            for batch in _batches(prompts, step_tokens):
                run.serve(batch)
                if recorder.failure is not None:
                    break
                done += sum(len(p.tokens) for p in batch)
                if progress is not None:
                    progress(done, total)
    finally:
        summary = recorder.close()
        if not summary.tokens and not stood:  # stopped before anything was recorded
            shutil.rmtree(out_dir, ignore_errors=True)
    if summary.failure is not None:
        raise LoadmasterError(f"{summary.failure}; {summary.lost_tokens} tokens were not written")
    return summary


def tokenizer_of(folder: Path) -> Callable[[str], list[int]]:
    """The checkpoint's tokenizer; bytes where it has none and its vocabulary is the 256 bytes."""
    if any((folder / name).exists() for name in _TOKENIZER_FILES):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers raises whatever the files provoke
            raise InputError(f"{folder}: its tokenizer cannot be loaded ({error})") from error
        return lambda text: list(tokenizer.encode(text))
    size = vocabulary_size(folder)
    if size != 256:
        raise InputError(
            f"{folder}: has no tokenizer ({', '.join(_TOKENIZER_FILES)}), and a vocabulary of "
            f"{size} is not the 256 bytes; copy the model's tokenizer files into it"
        )
    return lambda text: list(text.encode())


@dataclass(frozen=True)
class _Request:
    number: int
    domain: int
    tokens: list[int]


def _requests(
    texts: Sequence[Text], names: tuple[str, ...], encode: Callable[[str], list[int]],
    request_tokens: int, max_tokens: int | None,
) -> list[_Request]:
    """The texts cut into requests, in turn over the texts, so that a limit keeps all domains."""
    cut = []
    for text in texts:
        tokens = encode(text.text)
        pieces = [tokens[i : i + request_tokens] for i in range(0, len(tokens), request_tokens)]
        cut.append([(names.index(text.domain), piece) for piece in pieces])
    found: list[_Request] = []
    used = 0
    for turn in range(max((len(c) for c in cut), default=0)):
        for pieces_of_text in cut:
            if turn < len(pieces_of_text) and (max_tokens is None or used < max_tokens):
                domain, piece = pieces_of_text[turn]
                found.append(_Request(len(found), domain, piece))
                used += len(piece)
    return found


def _batches(prompts: Sequence[_Request], step_tokens: int) -> Iterator[list[_Request]]:
    """Requests of equal length together, up to `step_tokens`; longer ones first, then by number."""
    by_length: dict[int, list[_Request]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt.tokens), []).append(prompt)
    for length in sorted(by_length, reverse=True):
        together = max(1, step_tokens // length)
        same = by_length[length]
        for start in range(0, len(same), together):
            yield same[start : start + together]


class _Run:
    """Forward passes of the model, each announced to the recorder."""

    def __init__(self, model: Any, recorder: Recorder, decode_tokens: int) -> None:
        self.model, self.recorder, self.decode_tokens = model, recorder, decode_tokens
        self.step = 0

    def serve(self, batch: Sequence[_Request]) -> None:
        """One prefill step of the batch, then its decode steps."""
        import torch

        tokens = torch.tensor([p.tokens for p in batch], device=self.model.device)
        past = None
        with torch.inference_mode(), warnings.catch_warnings():
            # Some versions want `cache`, the others know `past_key_values` alone.
            warnings.filterwarnings("ignore", "`past_key_values`", FutureWarning)
            for turn in range(1 + self.decode_tokens):
                self._announce(batch, tokens.shape[1], "prefill" if turn == 0 else "decode")
                use_cache = self.decode_tokens > 0
                out = self.model(
                    input_ids=tokens, past_key_values=past, use_cache=use_cache, logits_to_keep=1
                )
                self.recorder.end_step()
                if use_cache:
                    past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def _announce(self, batch: Sequence[_Request], each: int, phase: Any) -> None:
        requests = np.repeat([p.number for p in batch], each)
        domains = np.repeat([p.domain for p in batch], each)
        self.recorder.begin_step(self.step, requests, phase, domain_T=domains)
        self.step += 1


def _load(folder: Path, dtype: str, device: str) -> Any:
    import torch
    import transformers

    try:
        with quiet_transformers():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # transformers raises whatever the files provoke
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder}: transformers cannot load it: {text}") from error
    model, info = loaded
    _require_all_read(folder, info)
    return model.eval().to(torch.device(device))


def _require_all_read(folder: Path, info: dict[str, Any]) -> None:
    """Raises InputError where transformers would compute with noise in place of a tensor."""
    for key, held, wanted in sorted(info["mismatched_keys"], key=lambda found: str(found[0])):
        raise InputError(
            f"{folder}: tensor {key} has shape {list(held)}, by config.json it is {list(wanted)}: "
            "the two are not of one model, put its own config.json beside the weights"
        )
    for key in sorted(info["missing_keys"]):
        raise InputError(
            f"{folder}: tensor {key} is missing from the checkpoint: download or save it again"
        )


@contextlib.contextmanager
def recording(model: Any, spec: ModelSpec, recorder: Recorder) -> Iterator[None]:
    """While this lasts, every experts call of the model goes to the recorder first.

    The caller announces each forward pass with `begin_step` and `end_step`.
    Raises InputError where the model does not route all its MoE layers through the interface.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    layer_of = layers_by_module(model, spec)
    before = model.get_experts_implementation()

    def record_then_compute(
        experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        recorder.layer(layer_of[experts], top_k_index, top_k_weights)
        out: torch.Tensor = grouped_mm_experts_forward(
            experts, hidden_states, top_k_index, top_k_weights
        )
        return out

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, record_then_compute)
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def layers_by_module(model: Any, spec: ModelSpec) -> dict[Any, int]:
    """The MoE layer, counted from 0, of every experts module. Raises InputError on a mismatch."""
    found: dict[Any, int] = {}
    for name, module in model.named_modules():
        number = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if hasattr(module, "_is_expert_parallel") and number:  # set by the experts interface
            found[module] = int(number[1])
    own = spec.own_layer_indices()
    if sorted(found.values()) != sorted(own):
        raise InputError(
            f"{type(model).__name__}: routes {len(found)} layers through transformers' experts "
            f"interface, its configuration names {len(own)}: this architecture cannot be recorded "
            "here; record it in the engine that serves it"
        )
    return {module: own.index(index) for module, index in found.items()}
