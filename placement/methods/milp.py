"""Integer programs through PuLP and HiGHS: one thread, warm start, live gap, no trust in status.

The solver's word is never taken: gap and bound are read from HiGHS itself, and every answer is
validated by the caller's own arithmetic. Work is limited by nodes, so the same program gives the
same answer; a limit on seconds is a time limit beside that. One program at a time runs in a
process. Knows solvers. What the programs mean, their functions say.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
import numpy.typing as npt
import pulp

from ...errors import LoadmasterError
from ...foundation.arrays import IntArray
from ..cost.lower_bounds import checked_gap

OnGap = Callable[[float, float], None]     # incumbent, bound
_one_at_a_time = threading.Lock()          # layers may be planned in threads

TOLERANCE = 1e-6     # HiGHS's own, on feasibility: by so much, relative, its bound may be off


class SolverError(LoadmasterError):
    """HiGHS found nothing: a limit fired before it took the start, or there was none."""


class NoAnswerError(SolverError):
    """HiGHS proved that the program has no answer. With a feasible start always a defect."""


@dataclass(frozen=True)
class Solved:
    """What HiGHS reached. `proved`: the gap is closed; otherwise a better answer may exist."""

    objective: float
    bound: float
    gap: float
    proved: bool


class WarmHiGHS(pulp.HiGHS):  # type: ignore[misc]
    """HiGHS that starts from the variables' current values and reports its gap as it closes.

    PuLP's own `warmStart` does nothing for HiGHS, so the start is handed over here.
    """

    def __init__(
        self, *, nodes: int, gap: float, seconds: float | None = None, on_gap: OnGap | None = None
    ) -> None:
        super().__init__(
            msg=False, threads=1, gapRel=gap, mip_max_nodes=nodes, timeLimit=seconds
        )
        self.on_gap = on_gap

    def createAndConfigureSolver(self, lp: pulp.LpProblem) -> None:
        """The first HiGHS object of a process prints a banner on descriptor 1: nobody wants it."""
        with _stdout_to_nowhere():
            super().createAndConfigureSolver(lp)

    def callSolver(self, lp: pulp.LpProblem) -> None:
        """Solve, from the start if every variable has a value."""
        values = [v.varValue for v in lp.variables()]
        if all(value is not None for value in values):
            start = highspy.HighsSolution()
            start.col_value = values
            start.value_valid = True
            lp.solverModel.setSolution(start)
        if self.on_gap is not None:
            lp.solverModel.setCallback(self._report, None)
            lp.solverModel.startCallback(highspy.cb.HighsCallbackType.kCallbackMipImprovingSolution)
        lp.solverModel.run()

    def findSolutionValues(self, lp: pulp.LpProblem) -> tuple[int, int]:
        """As PuLP's, which fails on a spent node limit after it has read the values."""
        try:
            status: tuple[int, int] = super().findSolutionValues(lp)
        except KeyError as error:
            if error.args != (highspy.HighsModelStatus.kSolutionLimit,):
                raise
            return pulp.LpStatusNotSolved, pulp.LpSolutionIntegerFeasible
        return status

    def _report(self, _kind: Any, _text: str, out: Any, _in: Any, _data: Any) -> None:
        assert self.on_gap is not None
        self.on_gap(float(out.mip_primal_bound), float(out.mip_dual_bound))


def solve(
    problem: pulp.LpProblem,
    *,
    nodes: int,
    gap: float = 1e-6,
    seconds: float | None = None,
    on_gap: OnGap | None = None,
) -> Solved:
    """Minimise; returns what was reached and proved. Variables then hold the answer.

    gap: relative, at which to stop. nodes: of the search tree, the budget. seconds: a time limit;
    when it fires the answer depends on the machine. on_gap: called with incumbent and bound as they
    improve. Raises SolverError where HiGHS holds no feasible answer (NoAnswerError: where it says
    that there is none), BoundError where its bound is above its own answer.
    """
    if problem.sense != pulp.LpMinimize:
        raise SolverError("only minimisation: PuLP hands HiGHS the negated objective otherwise")
    with _one_at_a_time:
        problem.solve(WarmHiGHS(nodes=nodes, gap=gap, seconds=seconds, on_gap=on_gap))
    info = problem.solverModel.getInfo()
    if problem.solverModel.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        raise NoAnswerError(f"{problem.name!r} has no answer")
    if info.primal_solution_status != 2:      # kSolutionStatusFeasible
        raise SolverError(f"HiGHS found no answer to {problem.name!r}; raise the node limit")
    constant = float(problem.objective.constant or 0.0)
    objective = float(info.objective_function_value) + constant
    is_mip = any(v.cat == pulp.LpInteger for v in problem.variables())
    if not is_mip:
        return Solved(objective, objective, 0.0, True)
    bound = float(info.mip_dual_bound) + constant
    reached = float(info.mip_gap)
    if np.isfinite(bound):                    # minus infinity: stopped before there was any
        rounding = TOLERANCE * max(abs(objective), 1.0)
        checked_gap(objective, bound - rounding, f"the program {problem.name!r}")
    return Solved(objective, min(bound, objective), reached, reached <= gap)


def binary_grid(name: str, rows: int, columns: int) -> list[list[pulp.LpVariable]]:
    """rows × columns of 0/1 variables. PuLP's variables are made by hand here and below only."""
    grid = pulp.LpVariable.dicts(name, (range(rows), range(columns)), cat=pulp.LpBinary)
    return [[grid[i][j] for j in range(columns)] for i in range(rows)]


def whole_grid(name: str, most: IntArray) -> list[list[pulp.LpVariable]]:
    """Variables for whole numbers from 0 to most[i, j]."""
    return [
        [
            pulp.LpVariable(f"{name}_{i}_{j}", 0, int(most[i, j]), cat=pulp.LpInteger)
            for j in range(most.shape[1])
        ]
        for i in range(most.shape[0])
    ]


def continuous(name: str, count: int) -> list[pulp.LpVariable]:
    """`count` variables >= 0."""
    row = pulp.LpVariable.dicts(name, range(count), lowBound=0)
    return [row[i] for i in range(count)]


def largest_in_rows(grid: list[list[pulp.LpVariable]]) -> IntArray:
    """Column of the largest value in each row: solver floats are never tested for an exact 1."""
    return np.array([int(np.argmax([v.varValue or 0.0 for v in row])) for row in grid], np.int64)


def set_start(grid: list[list[pulp.LpVariable]], chosen: npt.NDArray[np.integer[Any]]) -> None:
    """Give every row's variables the values of an assignment (the warm start)."""
    for row, column in zip(grid, chosen, strict=True):
        for j, variable in enumerate(row):
            variable.setInitialValue(1.0 if j == column else 0.0, check=False)


class _stdout_to_nowhere:  # noqa: N801  (reads as a verb at its one place of use)
    """Descriptor 1 leads nowhere inside; Python's own redirection does not reach C code."""

    def __enter__(self) -> None:
        sys.stdout.flush()
        self._saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._saved, 1)
        os.close(self._saved)
