"""Waiting for ranks without waiting for the dead: what is late makes us ask for signs of life.

Knows a fleet. Knows nothing of what the ranks were asked for. A busy rank answers at once, because
the thread that answers is not the one that works; so only a dead or stopped process is ever called
silent.
"""

from __future__ import annotations

from typing import Any

from .fleet import Fleet, OverdueError, RankLostError

# Where the pace is not known: this late is worth a question, and this long an answer may take on a
# machine with more processes than cores.
PATIENCE_S = 5.0
ANSWER_S = 5.0

# A rank that reads its libraries holds its interpreter, for long where cores are short. One that
# died meanwhile is seen at once; only one that was stopped is noticed this late.
LOADING_ANSWER_S = 60.0

# The pace is known, and a hang must be noticed a second after the step is overdue.
QUICK_ANSWER_S = 0.8


def gather_watched(
    fleet: Fleet,
    answers: list[Any],
    hard_s: float,
    *,
    patience_s: float = PATIENCE_S,
    answer_s: float = ANSWER_S,
) -> list[Any]:
    """All answers; the first failure is raised at once, as `Fleet.gather` does.

    Whenever `patience_s` have passed the ranks are asked for signs of life. RankLostError names
    those that give none within `answer_s`; busy ones are waited for, up to `hard_s`, and nobody is
    named then.
    """
    waited_s = 0.0
    while True:
        once_s = max(0.0, min(patience_s, hard_s - waited_s))
        try:
            return fleet.gather(answers, once_s)
        except OverdueError as error:
            waited_s += once_s
            silent = fleet.silent(answer_s)
            if silent or waited_s >= hard_s:
                raise RankLostError(
                    tuple(silent), f"a rank hangs: no answer within {waited_s:.1f} s"
                ) from error


def silent_for_certain(fleet: Fleet) -> dict[int, str]:
    """Ranks that give no sign of life, asked twice where nothing else is known to be wrong."""
    return fleet.silent(ANSWER_S) if fleet.silent(QUICK_ANSWER_S) else {}
