"""Every choice of found routing looked at once: what cannot be is refused, the rest counted.

Knows ids. Knows nothing of files, or of which rows are layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....errors import InputError
from .found_routes import PADDING, FoundRoutes, Ids, routed_T, zeros_T


@dataclass
class Survey:
    """What the rows that are layers hold. Tokens that are padding are counted apart."""

    experts: int
    beyond: int              # ids beyond the experts that stand for experts computing nothing
    tells_k: bool
    tokens: int = 0
    kept: int = 0            # tokens
    zero_tokens: int = 0     # zeros in every layer
    empty_tokens: int = 0
    top_k: int = 0
    least_k: int = 65_536
    most_there: int = 0      # choices of a token in a layer, of any kind
    cells: int = 0           # of kept tokens and layers
    choices: int = 0
    zero_choices: int = 0    # of experts that compute nothing

    @property
    def padded(self) -> int:
        """Choices that tokens lack, where others have them."""
        return self.cells * self.most_there - self.choices

    def notes(self, *, told_zero: bool) -> tuple[str, ...]:
        """What is left out or counted apart. told_zero: the person said how many compute nothing.
        """
        lines = []
        for count, what in (
            (self.empty_tokens, "no choice in any layer: padding"),
            (self.zero_tokens, "zeros in every layer, which no router says: padding"),
        ):
            if count:
                lines.append(f"{count:,} of {self.tokens:,} tokens hold {what}, left out")
        if self.padded and not self.tells_k:
            lines.append(f"{self.padded:,} choices of other tokens are -1: not counted")
        if self.zero_choices:
            last = self.experts + self.beyond - 1
            doubt = "" if told_zero else (
                "; were they slots of replicas, map them to experts first (--zero-experts 0 "
                "refuses them)"
            )
            lines.append(
                f"{self.zero_choices / self.choices:.1%} of the choices are ids {self.experts} to "
                f"{last}, beyond the {self.experts} experts: taken for zero-computation experts, "
                f"which never leave the rank, and counted apart{doubt}"
            )
        return tuple(lines)


def survey_routes(
    found: FoundRoutes, rows: tuple[int, ...], layers: tuple[int, ...], experts: int, zero: int
) -> Survey:
    """Raises InputError on the first choice that cannot be, naming token and layer."""
    out = Survey(experts, zero, found.tells_k)
    for tokens, ids in found.blocks(rows):
        if ids.min() >= 0 and ids.max() < experts:      # as most files are: every choice counts
            real_TL = there_TL = np.full(ids.shape[:2], ids.shape[2])
        else:
            there = ids >= 0
            real_TL, there_TL = (there & (ids < experts)).sum(axis=2), there.sum(axis=2)
        _refuse_more(there_TL, experts, zero)
        _refuse_strange(ids, found, experts, zero, tokens.start, layers)
        kept_T = routed_T(ids)
        _refuse_twice(ids, kept_T, tokens.start, layers)
        out.tokens += len(ids)
        out.kept += int(kept_T.sum())
        out.zero_tokens += int(zeros_T(ids).sum())
        out.empty_tokens += int((~there_TL.any(axis=1)).sum())
        k_TL, there_TL = real_TL[kept_T], there_TL[kept_T]
        out.top_k = max(out.top_k, int(k_TL.max(initial=0)))
        out.least_k = min(out.least_k, int(k_TL.min(initial=out.least_k)))
        out.most_there = max(out.most_there, int(there_TL.max(initial=0)))
        out.cells += k_TL.size
        out.choices += int(there_TL.sum())
        out.zero_choices += int(there_TL.sum() - k_TL.sum())
    if not out.kept:
        raise InputError("no token is routed in any layer: save it again, while traffic runs")
    if not out.top_k:
        raise InputError(f"no choice is one of the {experts} experts: check --num-experts")
    return out


def _refuse_more(there_TL: Ids, experts: int, zero: int) -> None:
    most = int(there_TL.max(initial=0))
    if most > experts + zero:
        raise InputError(
            f"each token chooses K={most} experts but a layer has only E={experts}: check "
            "--num-experts, or the axes (--axes WLE for loads)"
        )


def _refuse_strange(
    ids: Ids, found: FoundRoutes, experts: int, zero: int, start: int, layers: tuple[int, ...]
) -> None:
    if ids.min() >= PADDING and ids.max() < experts + zero:
        return
    strange = (ids < PADDING) | (ids >= experts + zero)
    t, layer, _ = np.argwhere(strange)[0]
    top = int(found.ids_TRK.max())
    raise InputError(
        f"token {start + t}, layer {layers[layer]}: expert ids {ids[t, layer].tolist()} are not "
        f"all in [0, {experts}): wrong --num-experts, or physical slots recorded as experts, or "
        f"loads (--axes WLE), or zero-computation experts (--zero-experts {top - experts + 1})"
    )


def _refuse_twice(ids: Ids, kept_T: Ids, start: int, layers: tuple[int, ...]) -> None:
    """An expert twice in a token's choice cannot be."""
    for a in range(ids.shape[2]):
        for b in range(a + 1, ids.shape[2]):
            same = ids[:, :, a] == ids[:, :, b]
            if not same.any():
                continue
            same &= (ids[:, :, a] >= 0) & kept_T[:, None]
            if same.any():
                t, layer = np.argwhere(same)[0]
                raise InputError(
                    f"token {start + t}, layer {layers[layer]}: expert {ids[t, layer, a]} twice in "
                    f"one choice {ids[t, layer].tolist()}, which no router makes: record it again, "
                    "or check the axes (--axes) and the rows (--layers)"
                )
