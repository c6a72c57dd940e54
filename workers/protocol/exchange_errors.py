"""How an exchange between ranks can fail. Apart from `exchange`, so that no torch is needed."""

from __future__ import annotations

from ...errors import LoadmasterError


class ExchangeError(LoadmasterError):
    """A collective failed: a peer died, hangs, or left the group."""


class EpochMismatchError(LoadmasterError):
    """Ranks met in one exchange with different plans in force; nothing was computed."""
