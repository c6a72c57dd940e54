"""The model that comes with the package: a small byte-level mixture of experts.

Knows where its checkpoint lies. Imports nothing heavy: see `prompts`, `bytes_tokenizer`, and, for
whoever trains it again, `train` and `measure`. The README beside this file says how it was made.
"""

from pathlib import Path


def reference_model_dir() -> Path:
    """The directory of the packaged checkpoint: config.json, model.safetensors, card.json.

    Good for `transformers.AutoModelForCausalLM.from_pretrained`. Tokens are bytes (0 to 255).
    """
    return Path(__file__).resolve().parent / "model"
