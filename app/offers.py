"""What to offer beside a verdict that knew no sizes: the models whose shape the routing has.

Knows the catalogue. Knows nothing of options' spelling beyond `--model`, HTTP or printing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..traces.model_spec import ModelSpec
    from ..traces.profile import Profile
    from ..traces.trace import RoutingTrace


def with_offer(verdict: str, source: RoutingTrace | Profile, model: ModelSpec | None) -> str:
    """A verdict that sizes were not known for, with the option that would tell time."""
    from ..traces.catalogue import models_of_shape

    if model is not None:
        return verdict
    names = models_of_shape(source.num_layers, source.num_experts, source.top_k)
    if not names:
        return verdict
    others = f" (or {', '.join(names[1:3])})" if len(names) > 1 else ""
    return (
        f"{verdict}; to see time, and plan for it: --model {names[0]}{others}, whose shape this "
        "routing has"
    )
