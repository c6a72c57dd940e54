"""What an importer hands back: routing or loads, and what the format cannot tell."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import InputError
from ..profile import Profile
from ..trace import RoutingTrace


@dataclass(frozen=True)
class ImportResult:
    """A foreign file as a trace, or, where it holds loads only, as a profile."""

    format: str
    trace: RoutingTrace | None = None
    profile: Profile | None = None
    cannot_tell: tuple[str, ...] = ()   # what the format does not hold, for people
    notes: tuple[str, ...] = ()         # what was done to this file's content

    def as_profile(self) -> Profile:
        """A profile in any case: of the trace, or the loads as they are."""
        if self.trace is not None:
            return Profile.from_trace(self.trace)
        if self.profile is None:
            raise InputError(f"{self.format}: holds neither routing nor loads")
        return self.profile


LOADS_ONLY = (
    "which experts a token chose together: planning is for load only, without affinity",
    "how load varies from step to step: steps are average loads",
    "requests, so the noise of the loads is not known",
)
NO_STEPS = "which tokens ran in one step: steps are made by interleaving requests"
NO_REQUESTS = "requests: blocks of 256 tokens stand for them"
NO_HOMES = "home ranks: request index modulo ranks stands for them"
NO_PHASE = "prefill or decode"
