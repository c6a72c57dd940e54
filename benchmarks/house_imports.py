"""Who imports whom, read from the source: nothing is imported to find out.

Every import counts, also inside a function and under TYPE_CHECKING. `from x import y` is an import
of the module `x.y` where there is one, else of `x`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "loadmaster"
# Folders of a checkout that are no part of the package.
APART = ("tests", "benchmarks", "build")


def package_files(tree: Path) -> list[Path]:
    """The package's own *.py, sorted, without tests and benchmarks."""
    return [path for path in python_files(tree) if path.relative_to(tree).parts[0] not in APART]


def python_files(tree: Path, under: str = "") -> list[Path]:
    """All *.py below a folder of the tree, sorted, without what installs and tools leave there."""
    found = []
    for path in sorted((tree / under).rglob("*.py")):
        parts = path.relative_to(tree).parts
        if not any(p.startswith(".") or p.endswith("-info") or p == "__pycache__" for p in parts):
            found.append(path)
    return found


def module_name(tree: Path, path: Path) -> str:
    """The dotted name of a file; a folder's __init__ has the folder's."""
    parts = path.relative_to(tree).with_suffix("").parts
    return ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports(tree: Path) -> dict[str, set[str]]:
    """Module of the package -> modules of the package it imports."""
    files = {module_name(tree, path): path for path in package_files(tree)}
    return {
        name: set(imported_by(path, name, files)) - {name} for name, path in files.items()
    }


def imported_by(path: Path, name: str, files: Mapping[str, Path]) -> Iterator[str]:
    """Modules among `files` that one file imports; `name` is its own, for relative imports."""
    inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = inside.split(".")
                base = base[: len(base) - node.level + 1]
                source = ".".join([*base, source]) if source else ".".join(base)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in files:
                    yield inner
                elif source in files:
                    yield source


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach each other, each sorted (Tarjan, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    open_: list[str] = []
    found: list[list[str]] = []
    for root in sorted(graph):
        if root in index:
            continue
        walk = [(root, iter(sorted(graph[root])))]
        index[root] = low[root] = len(index)
        open_.append(root)
        while walk:
            node, rest = walk[-1]
            for target in rest:
                if target not in index:
                    index[target] = low[target] = len(index)
                    open_.append(target)
                    walk.append((target, iter(sorted(graph.get(target, ())))))
                    break
                if target in open_:
                    low[node] = min(low[node], index[target])
            else:
                walk.pop()
                if walk:
                    low[walk[-1][0]] = min(low[walk[-1][0]], low[node])
                if low[node] == index[node]:
                    circle = []
                    while not circle or circle[-1] != node:
                        circle.append(open_.pop())
                    if len(circle) > 1:
                        found.append(sorted(circle))
    return found


def distances(graph: Mapping[str, set[str]], start: set[str]) -> dict[str, int]:
    """Steps from modules imported directly (1) to everything they reach."""
    found: dict[str, int] = {}
    edge, step = sorted(start), 1
    while edge:
        found |= {name: step for name in edge}
        step += 1
        edge = sorted({t for name in edge for t in graph.get(name, ())} - set(found))
    return found
