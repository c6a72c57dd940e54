"""How many small mistakes the tests notice, before the house and after: the same mistakes in both.

`python house_mutants.py [--side before|after] [--count 60] [--seed 0] [--list]`

A mistake is one change in one function of placement/ or workers/: a comparison, `and`/`or` or sign
swapped, a number off by one, a condition turned round, None returned, a statement left out. Sites
are drawn by a seed from functions that both trees hold, wherever they live and whatever their names
are by now: a function's key is the shape of its syntax, without names, texts and docstrings. So
each mistake is made twice, once in each tree, and the two shares that survive are of one draw.

Tests: those files whose imports reach the mutated module, nearest first; the first, and as many
more as end within CLEAN_S seconds of processor time when nothing is wrong, at most MOST_FILES of
them; the same rule on both sides. Tests marked slow and tests that need a Ray are left out, and
modules that import ray with them. So are compiled functions: numba's caches do not notice a changed
callee, and compiling every caller anew would take minutes a mistake; oracles and properties guard
those.

A mistake is noticed when a test fails, or when the tests run three times as long as they should
(counted apart as `timed_out`). Every test file runs once on the unchanged tree first; what fails
there is left out. All of it happens in a copy of the tree; a mutated file keeps its size and time,
so that compiled neighbours in it stay cached. Results are kept beside the tree of before, and read
again where tree, site and rules are the same.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from house_before import CHECKOUT, before
from house_imports import (
    PACKAGE,
    distances,
    imported_by,
    imports,
    module_name,
    package_files,
    python_files,
)

COUNT, SEED = 60, 0
FOLDERS = ("placement", "workers")
MOST_FILES, CLEAN_S = 4, 12.0     # test files of one mistake, and their time when all is well
ONE_FILE_S = 60.0                 # a test file that takes longer is not asked
STUCK_S = 90.0                    # nothing computes for so long: a deadlock
NEEDS_RAY = re.compile(r"^\s*(import ray\b|from ray\b)|ray_cluster|Group\.start\(", re.MULTILINE)
RULES = "1"      # raised when mutations or rules change: results of before then do not count

Section = dict[str, Any]


# ---- mutations -----------------------------------------------------------------------------------

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
}


@dataclass(frozen=True)
class Mutation:
    """One change: the statement or expression at these places, and what stands there instead."""

    kind: str
    line: int
    column: int
    end_line: int
    end_column: int
    text: str


def mutations(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[Mutation]:
    """Every mutation of a function's body, in the order of its syntax."""
    found: list[Mutation] = []
    for statement in function.body:
        if not _is_text(statement):
            _collect(statement, found)
    return found


def _collect(node: ast.AST, found: list[Mutation]) -> None:
    """Depth first; leaves out annotations, messages of errors, texts and nested definitions."""
    if isinstance(node, ast.Raise):
        found.append(_changed(node, "statement removed", "pass"))
        return
    if isinstance(node, ast.JoinedStr | ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.Assert
                  | ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal):
        return
    if isinstance(node, ast.AugAssign | ast.Continue | ast.Break) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await)
    ):
        found.append(_changed(node, "statement removed", "pass"))
    if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        found.append(_changed(node, "None returned", "return None"))
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Constant):
        found.append(_changed(node.test, "condition turned", f"(not ({ast.unparse(node.test)}))"))
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            other = copy.deepcopy(node)
            other.ops[place] = SWAPS[type(operator)]()  # type: ignore[call-overload]
            found.append(_changed(node, "comparison swapped", f"({ast.unparse(other)})"))
    if isinstance(node, ast.BoolOp):
        swapped = ast.BoolOp(SWAPS[type(node.op)](), node.values)  # type: ignore[arg-type]
        found.append(_changed(node, "and/or swapped", f"({ast.unparse(swapped)})"))
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS and not _of_text(node):
        other_op = SWAPS[type(node.op)]()
        opposite = ast.BinOp(node.left, other_op, node.right)  # type: ignore[arg-type]
        found.append(_changed(node, "arithmetic swapped", f"({ast.unparse(opposite)})"))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        text = repr(not value) if isinstance(value, bool) else repr(value + 1)
        found.append(_changed(node, "number off by one", f"({text})"))
    for name, child in ast.iter_fields(node):
        if name == "annotation":
            continue
        for part in child if isinstance(child, list) else [child]:
            if isinstance(part, ast.AST):
                _collect(part, found)


def _changed(node: ast.expr | ast.stmt, kind: str, text: str) -> Mutation:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return Mutation(kind, node.lineno, node.col_offset, node.end_lineno, node.end_col_offset, text)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _of_text(node: ast.BinOp) -> bool:
    """Whether a side is a text: its sum or format is no arithmetic."""
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def mutated(source: bytes, change: Mutation) -> bytes:
    """The file with the change: as many lines, and as many bytes where its docstring can give."""
    lines = source.splitlines(keepends=True)
    start = sum(map(len, lines[: change.line - 1])) + change.column
    end = sum(map(len, lines[: change.end_line - 1])) + change.end_column
    gone = source[start:end].count(b"\n")
    text = change.text.encode()
    if text.endswith(b")"):       # an expression: line ends may stand inside its brackets
        text = text[:-1] + b"\n" * gone + b")"
    else:
        text += b"\n" * gone
    return _of_size(source[:start] + text + source[end:], len(source))


def _of_size(source: bytes, size: int) -> bytes:
    """Padded by a comment at the end, or shortened inside the module's docstring."""
    missing = size - len(source)
    if missing >= 0:
        return source + b"#" * (missing - 1) + b"\n" * (missing > 0)
    first = ast.parse(source).body[0]
    if not _is_text(first) or first.end_lineno is None:
        return source
    lines = source.splitlines(keepends=True)
    stop = sum(map(len, lines[: first.end_lineno])) - 4
    head, rest = bytearray(), source
    for place, letter in enumerate(source):
        if place > 3 and place < stop and missing < 0 and chr(letter).isascii() and chr(
            letter
        ).isalpha():
            missing += 1
        else:
            head.append(letter)
        if missing == 0:
            rest = source[place + 1 :]
            return bytes(head) + rest
    return source


# ---- sites ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """A function of a tree: its key is equal where its shape is."""

    key: str
    path: Path           # relative to the tree
    name: str            # qualified by its class
    node: ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Site:
    """One mutation of one function, under a name that both trees share."""

    id: str
    function: Function
    change: Mutation

    def told(self) -> str:
        return f"{self.function.path}:{self.change.line} {self.function.name}: {self.change.kind}"


def functions(tree: Path) -> dict[str, Function]:
    """Key -> function, of every module of the package that does not import ray."""
    found: dict[str, list[Function]] = {}
    for path in package_files(tree):
        text = path.read_text()
        if NEEDS_RAY.search(text):
            continue
        for name, node in _definitions(ast.parse(text)):
            if not _is_compiled(node):
                made = Function(shape(node), path.relative_to(tree), name, node)
                found.setdefault(made.key, []).append(made)
    keyed: dict[str, Function] = {}
    for key, alike in found.items():
        for place, function in enumerate(sorted(alike, key=lambda f: (f.name, str(f.path)))):
            own = f"{key}-{place}"
            keyed[own] = Function(own, function.path, function.name, function.node)
    return keyed


def _definitions(
    module: ast.Module
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def _is_compiled(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {part.id for d in node.decorator_list for part in ast.walk(d)
             if isinstance(part, ast.Name)}
    return any(n.startswith("compiled") or n in ("intrinsic", "njit", "numba", "vectorize")
               for n in names)


class _Shape(ast.NodeTransformer):
    """Names by the order in which they first come; no texts, no annotations, no imports."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Import | ast.ImportFrom):
            return ast.Pass()
        if isinstance(node, ast.Raise):
            return ast.Raise()
        if isinstance(node, ast.JoinedStr):
            return ast.Constant("")
        for name in ("id", "attr", "arg", "name"):
            value = getattr(node, name, None)
            if isinstance(value, str):
                setattr(node, name, self.seen.setdefault(value, f"n{len(self.seen)}"))
        for name in ("annotation", "returns"):
            if hasattr(node, name):
                setattr(node, name, None)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant("")
        return self.generic_visit(node)


def shape(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Fingerprint of a function that new names, texts and annotations leave as it is."""
    own = copy.deepcopy(node)
    own.decorator_list = []
    own.body = [s for s in own.body if not _is_text(s)] or [ast.Pass()]
    plain = _Shape().visit(own)
    return hashlib.sha256(ast.dump(plain).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Draw:
    """The same sites in both trees, and how many there were to draw from."""

    before: list[Site]
    after: list[Site]
    sites_before: int       # of placement/ and workers/, before
    sites_shared: int       # of them, in functions that the tree of after holds too
    functions_before: int
    functions_shared: int


def draw(old: Path, new: Path, count: int = COUNT, seed: int = SEED) -> Draw:
    """`count` sites in the order of a seeded hash: more of them never changes the first."""
    was = {k: f for k, f in functions(old).items() if f.path.parts[0] in FOLDERS}
    now = functions(new)
    sites = {k: mutations(f.node) for k, f in was.items()}
    shared = [k for k in was if k in now and len(mutations(now[k].node)) == len(sites[k])]
    ranked = sorted(
        (hashlib.sha256(f"{seed} {key} {place}".encode()).hexdigest(), key, place)
        for key in shared for place in range(len(sites[key]))
    )[:count]
    sides = [
        [Site(f"{key}-{place}", known[key], mutations(known[key].node)[place])
         for _, key, place in ranked]
        for known in (was, now)
    ]
    return Draw(
        sides[0], sides[1], sum(map(len, sites.values())), sum(len(sites[k]) for k in shared),
        len(was), len(shared),
    )


# ---- tests ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run of tests came to."""

    kind: str                    # passed, failed, timed out, stuck, broken
    cpu_s: float
    failed: tuple[str, ...] = ()


class Tests:
    """The tests of one tree, run in a copy of it."""

    def __init__(self, tree: Path, home: Path, kept: Path) -> None:
        self.kept = kept
        self.copy = home / PACKAGE
        shutil.copytree(tree, self.copy, symlinks=True, ignore=shutil.ignore_patterns(
            ".git", ".venv", ".*_cache", ".hypothesis", "build", "*.egg-info", "loadmaster-runs",
        ))
        self.graph = imports(self.copy)
        files = {module_name(self.copy, p): p for p in package_files(self.copy)}
        self.reached: dict[Path, dict[str, int]] = {}
        for path in python_files(self.copy, "tests"):
            if path.name.startswith("test_") and not NEEDS_RAY.search(path.read_text()):
                direct = set(imported_by(path, module_name(self.copy, path), files))
                self.reached[path] = distances(self.graph, direct - {PACKAGE})
        self.clean: dict[Path, Outcome] = {}
        state = tree_digest(tree)
        self.state = state
        for record in _records(kept):
            if record["state"] == state:
                self.clean[self.copy / record["path"]] = Outcome(
                    record["kind"], record["cpu_s"], tuple(record["failed"])
                )

    def of(self, module: str) -> list[Path]:
        """Test files that reach a module, nearest first; then those called like it, then short."""
        word = module.rpartition(".")[2]
        known = [(steps[module], word not in path.stem, path.stat().st_size, path)
                 for path, steps in self.reached.items() if module in steps]
        return [path for *_, path in sorted(known)]

    def chosen(self, module: str) -> tuple[list[Path], float]:
        """The files to run for a mistake in the module, and their time when all is well."""
        files: list[Path] = []
        seconds = 0.0
        for path in self.of(module)[: 2 * MOST_FILES]:
            if len(files) == MOST_FILES or seconds >= CLEAN_S:
                break
            clean = self.unchanged(path)
            if clean.kind not in ("passed", "failed") or clean.cpu_s > ONE_FILE_S:
                continue
            if not files or seconds + clean.cpu_s <= CLEAN_S:
                files.append(path)
                seconds += clean.cpu_s
        return files, seconds

    def unchanged(self, path: Path) -> Outcome:
        """The file on the unchanged tree, once; twice where compiling made the first long."""
        if path not in self.clean:
            found = self.run([path], ONE_FILE_S * 3, stop=False)
            if found.cpu_s > CLEAN_S and found.kind in ("passed", "failed"):
                found = self.run([path], ONE_FILE_S * 2, stop=False)
            self.clean[path] = found
            name = str(path.relative_to(self.copy))
            if found.kind in ("passed", "failed", "timed out"):
                with self.kept.open("a") as file:
                    file.write(json.dumps({
                        "state": self.state, "path": name, "kind": found.kind,
                        "cpu_s": found.cpu_s, "failed": found.failed,
                    }) + "\n")
            _say(f"  {name}: {found.kind} in {found.cpu_s:.1f} s {' '.join(found.failed)}")
        return self.clean[path]

    def try_site(self, site: Site) -> dict[str, Any]:
        """Make the mistake, run the tests, take it back."""
        module = module_name(self.copy, self.copy / site.function.path)
        files, seconds = self.chosen(module)
        known = {test for path in files for test in self.clean[path].failed}
        path = self.copy / site.function.path
        source, times = path.read_bytes(), path.stat()
        try:
            self._write(path, mutated(source, site.change), times)
            found = Outcome("passed", 0.0) if not files else self._noticed(
                files, 3 * seconds + 20, known
            )
        finally:
            self._write(path, source, times)
        return {
            "id": site.id, "site": site.told(), "becomes": site.change.text[:80],
            "outcome": "survived" if found.kind == "passed" else found.kind,
            "cpu_s": round(found.cpu_s, 1), "by": list(found.failed[:1]),
            "tests": [str(p.relative_to(self.copy / "tests")) for p in files],
        }

    def _noticed(self, files: list[Path], limit_s: float, without: set[str]) -> Outcome:
        """A run of the tests; one that fails must fail again: a busy machine is no mistake."""
        found = self.run(files, limit_s, stop=True, without=without)
        if found.kind != "failed" or not found.failed:
            return found
        again = self.run([self.copy / found.failed[0]], limit_s, stop=True, without=without)
        if again.kind != "passed":
            return found
        return self.run(files, limit_s, stop=True, without={*without, found.failed[0]})

    @staticmethod
    def _write(path: Path, source: bytes, times: os.stat_result) -> None:
        path.write_bytes(source)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        for stale in (path.parent / "__pycache__").glob(f"{path.stem}.cpython-*.pyc"):
            stale.unlink()

    def run(
        self, files: list[Path], limit_s: float, *, stop: bool, without: set[str] | None = None
    ) -> Outcome:
        """pytest over the files in a child that this process forks, libraries loaded already."""
        shutil.rmtree(self.copy / ".hypothesis", ignore_errors=True)
        with tempfile.NamedTemporaryFile("r") as report, tempfile.TemporaryDirectory() as folder:
            child = os.fork()
            if child == 0:
                _child(self.copy, files, int(limit_s), Path(report.name), Path(folder), stop,
                       without or set())
            status, cpu_s, stuck = _wait(child)
            failed = tuple(json.loads(report.read() or "[]"))
        if stuck:
            return Outcome("stuck", cpu_s)
        if os.WIFSIGNALED(status):
            slow = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
            return Outcome("timed out" if slow else "failed", cpu_s, failed)
        code = os.WEXITSTATUS(status)
        kinds = {0: "passed", 1: "failed", 2: "failed", 5: "passed"}
        return Outcome(kinds.get(code, "failed" if stop else "broken"), cpu_s, failed)


class _Plugin:
    """Leaves out what needs a Ray, is slow or fails anyway; notes what failed."""

    def __init__(self, without: set[str], report: Path) -> None:
        self.without, self.report = without, report
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [
            item for item in items
            if item.nodeid not in self.without and not item.get_closest_marker("slow")
            and not any("ray" in name.split("_") for name in item.fixturenames)
        ]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
            self.report.write_text(json.dumps(self.failed))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
            self.report.write_text(json.dumps(self.failed))


def _child(
    tree: Path, files: list[Path], limit_s: int, report: Path, folder: Path, stop: bool,
    without: set[str],
) -> None:
    """Become a run of pytest; never returns."""
    code = 3
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 5))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        os.chdir(tree)
        own = str(Path(__file__).parent)
        sys.path[:] = [str(tree), str(tree.parent), *(p for p in sys.path if p != own)]
        os.environ["PYTHONPATH"] = str(tree.parent)
        import pytest

        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder}/t",
                   "--hypothesis-seed=0", *(["-x"] if stop else [])]
        code = int(pytest.main(
            [*options, *(str(f.relative_to(tree)) for f in files)],
            plugins=[_Plugin(without, report)],
        ))
    finally:
        os._exit(code)


def _wait(child: int) -> tuple[int, float, bool]:
    """(status, processor seconds, whether it had to be ended because nothing computed)."""
    idle = 0.0
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.25)
        idle = 0.0 if _computes(child) else idle + 0.25
        if idle >= STUCK_S:
            _end(child)
            _, status, usage = os.wait4(child, 0)
            return status, usage.ru_utime + usage.ru_stime, True
    _end(child)
    return status, usage.ru_utime + usage.ru_stime, False


def _end(group: int) -> None:
    """End the child and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _computes(process: int) -> bool:
    """Whether a thread of it runs or waits for a core or a disk."""
    try:
        for stat in Path(f"/proc/{process}/task").glob("*/stat"):
            if stat.read_text().rpartition(")")[2].split()[0] in "RD":
                return True
    except OSError:
        return True
    return False


# ---- both sides ----------------------------------------------------------------------------------


def run_side(side: str, tree: Path, sites: list[Site], kept: Path) -> list[dict[str, Any]]:
    """Every site's result; those that `kept` holds for this very tree are not run again."""
    state = f"{RULES} {tree_digest(tree)}"
    known = {r["id"]: r for r in _records(kept) if r.pop("state") == state}
    missing = [site for site in sites if site.id not in known]
    if missing:
        _load_libraries()
        with tempfile.TemporaryDirectory(prefix="loadmaster-mutants-") as home:
            tests = Tests(tree, Path(home), kept.with_name(f"tests-{side}.jsonl"))
            for place, site in enumerate(missing):
                result = tests.try_site(site)
                known[site.id] = result
                with kept.open("a") as file:
                    file.write(json.dumps(result | {"state": state}) + "\n")
                _say(f"{side} {place + 1}/{len(missing)} {result['outcome']} "
                     f"({result['cpu_s']} s): {result['site']}")
    return [known[site.id] for site in sites]


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _load_libraries() -> None:
    """What every child needs and no mistake touches, loaded once. Never the package itself."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "NUMBA_NUM_THREADS": "1",
                   "PYTHONHASHSEED": "0"}
    import hypothesis  # noqa: F401
    import numba  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import scipy.optimize  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    import typer  # noqa: F401
    import yaml  # noqa: F401

    if PACKAGE in sys.modules:
        raise RuntimeError("the package must not be loaded before the copy is made")


@functools.cache
def tree_digest(tree: Path) -> str:
    """Fingerprint of the package's and the tests' source."""
    found = hashlib.sha256()
    for path in [*package_files(tree), *python_files(tree, "tests")]:
        found.update(str(path.relative_to(tree)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def mutants(count: int = COUNT, seed: int = SEED) -> Section:
    """Both sides: the share that survives is no higher than before."""
    old = before()
    drawn = draw(old, CHECKOUT, count, seed)
    sides = {
        "before": run_side("before", old, drawn.before, old.parent / "mutants-before.jsonl"),
        "after": run_side("after", CHECKOUT, drawn.after, old.parent / "mutants-after.jsonl"),
    }
    report = {side: tally(results) for side, results in sides.items()}
    return {
        "holds": report["after"]["share_surviving"] <= report["before"]["share_surviving"],
        "drawn": count, "seed": seed, **shares(drawn), **report,
        "noticed_before_only": [
            b["site"] for b, a in zip(sides["before"], sides["after"], strict=True)
            if a["outcome"] == "survived" != b["outcome"]
        ],
        "noticed_after_only": [
            a["site"] for b, a in zip(sides["before"], sides["after"], strict=True)
            if b["outcome"] == "survived" != a["outcome"]
        ],
    }


def shares(drawn: Draw) -> Section:
    """How much of the tree before could be drawn from."""
    return {
        "sites_before": drawn.sites_before, "sites_in_both": drawn.sites_shared,
        "functions_before": drawn.functions_before, "functions_in_both": drawn.functions_shared,
    }


def tally(results: list[dict[str, Any]]) -> Section:
    """Counts of outcomes, and who survived."""
    outcomes = Counter(r["outcome"] for r in results)
    alive = [r for r in results if r["outcome"] == "survived"]
    return {
        "mutants": len(results), "survived": len(alive),
        "share_surviving": round(len(alive) / max(1, len(results)), 4),
        "timed_out": outcomes["timed out"] + outcomes["stuck"], "outcomes": dict(outcomes),
        "survivors": [f"{r['site']} ({r['becomes']})" for r in alive],
        "cpu_s": round(sum(r["cpu_s"] for r in results), 1),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """One side alone, or a list of what is drawn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--side", choices=("before", "after", "both"), default="both")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--list", action="store_true", help="what is drawn, nothing run")
    options = parser.parse_args()
    old = before()
    if options.side == "both" and not options.list:
        print(json.dumps(mutants(options.count, options.seed), indent=1))
        return
    drawn = draw(old, CHECKOUT, options.count, options.seed)
    if options.list:
        for was, now in zip(drawn.before, drawn.after, strict=True):
            print(f"{was.told()} -> {was.change.text[:60]!r} | {now.told()}")
        print(json.dumps(shares(drawn)))
        return
    side = options.side
    tree, sites = (old, drawn.before) if side == "before" else (CHECKOUT, drawn.after)
    kept = old.parent / f"mutants-{side}.jsonl"
    print(json.dumps(shares(drawn) | tally(run_side(side, tree, sites, kept)), indent=1))


if __name__ == "__main__":
    main()
