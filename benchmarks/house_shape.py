"""The house as a drawing: circles, arrows that point up, lines, files in a folder, the surface.

All of it is read from the source but the surface, which two child processes print, one for the
commit before the house and one for the checkout (`house_surface.py`).
"""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from house_before import CHECKOUT, NotRunError, before, named, python_in
from house_imports import PACKAGE, circles, imports, package_files

Section = dict[str, Any]

# A folder imports only folders on lower floors; those of one floor do not import each other.
FLOORS = {
    "errors": 0, "foundation": 1, "traces": 2, "kernels": 2, "placement": 3, "simulator": 4,
    "workers": 5, "app": 6, "service": 7, "cli": 8, "__init__": 9, "__main__": 9,
}
MOST_LINES = 40_500
HOUSE_DONE = "d2ffc35"         # the commit by which all had moved in
MOST_FILES = 16
ANY_NUMBER = ("cli",)          # one file a verb

# Files that keep a row's bits, and their lines before: not counted against MOST_LINES.
BITS = {
    "kernels/self_check.py": 0, "kernels/cpu/row_blocks.py": 0, "workers/rank/company_check.py": 0,
    "kernels/cpu/dense.py": 59,
}
# What a user could name and no longer can, each with the reason.
MAY_GO: dict[str, str] = {
    "Comparison(copies_name)": "now transfers_name: copies meant replicas and transfers",
    "Comparison.copies_name": "now transfers_name",
    "Comparison.sure": "now significant",
    "Plan.copies_LGE": "now replicas_LGE",
    "Plan.copies_LGE(self)": "now replicas_LGE",
    "Profile.loads_only": "`sample is None` says the same",
    "simulate(happenings)": "now interventions",
}


def circles_section() -> Section:
    """Modules that import each other in a circle; every import counts, the lazy ones too."""
    graph = imports(CHECKOUT)
    found = circles(graph)
    rooms: dict[str, set[str]] = {}
    for name, targets in graph.items():
        own = _room(name)
        rooms.setdefault(own, set()).update({_room(target) for target in targets} - {own})
    return {
        "holds": not found, "circles": len(found), "of": found, "modules": len(graph),
        "arrows": sum(map(len, graph.values())), "circles_of_rooms": circles(rooms),
        "rooms": len(rooms), "arrows_of_rooms": sum(map(len, rooms.values())),
    }


def _room(module: str) -> str:
    """A folder inside a floor; a module at a floor's top is a room of its own."""
    return ".".join(module.split(".")[:3])


def upward() -> Section:
    """Imports from a lower floor to a higher one, or between two folders of one floor."""
    found = []
    for name, targets in imports(CHECKOUT).items():
        for target in sorted(targets):
            here, there = _floor_name(name), _floor_name(target)
            if here != there and FLOORS[here] <= FLOORS[there]:
                found.append(f"{name} -> {target}")
    return {"holds": not found, "upward": len(found), "of": found}


def _floor_name(module: str) -> str:
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    if name not in FLOORS:
        raise NotRunError(f"{module} stands on no floor: {', '.join(FLOORS)}")
    return name


def package_lines() -> Section:
    """Lines of the package's *.py when the house was done, by floor, and what features have added
    since; what keeping bits by construction took is apart."""
    then, now = _lines_of(HOUSE_DONE), _lines_of("HEAD")
    bits = sum(_lines_of(HOUSE_DONE, name).total() - had for name, had in BITS.items())
    return {"holds": then.total() - bits <= MOST_LINES, "lines": then.total(), "of_bits": bits,
            "counted": then.total() - bits, "at_most": MOST_LINES, "at_commit": HOUSE_DONE,
            "by_floor": dict(then.most_common()), "lines_now": now.total(),
            "by_floor_now": dict(now.most_common())}


def _lines_of(commit: str, only: str = "") -> Counter[str]:
    """Lines of a commit's package by floor, or of one of its files."""
    command = ["git", "grep", "-c", "", commit, "--", only or "*.py"]
    found = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if found.returncode:
        raise NotRunError(f"this checkout's history lacks {commit} {only}")
    lines: Counter[str] = Counter()
    for line in found.stdout.splitlines():
        path, _, count = line.removeprefix(f"{commit}:").rpartition(":")
        floor = path.split("/")[0] if "/" in path else "."
        if floor not in ("tests", "benchmarks"):
            lines[floor] += int(count)
    return lines


def files_per_folder() -> Section:
    """Python files of each folder of the package."""
    count = Counter(str(p.relative_to(CHECKOUT).parent) for p in package_files(CHECKOUT))
    over = {f: n for f, n in count.items() if n > MOST_FILES and f not in ANY_NUMBER}
    return {"holds": not over, "at_most": MOST_FILES, "over": over,
            "most": dict(count.most_common(8)), "folders": len(count)}


def surface() -> Section:
    """Verbs, options, public names and their parameters: what came, what went, what changed."""
    sides = [_surface_of(before())]
    with named(CHECKOUT) as checkout:
        sides.append(_surface_of(checkout))
    was, now = (_flat(side) for side in sides)
    gone = sorted(set(was) - set(now))
    return {
        "holds": not [g for g in gone if g not in MAY_GO], "before": len(was), "after": len(now),
        "gone": {name: MAY_GO.get(name, "not explained") for name in gone},
        "new": sorted(set(now) - set(was)),
        "changed": {n: f"{was[n]} -> {now[n]}" for n in was if n in now and was[n] != now[n]},
    }


def _surface_of(tree: Path) -> dict[str, Any]:
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    module = project["scripts"][PACKAGE].partition(":")[0]
    child = python_in(tree, Path(__file__).with_name("house_surface.py"), module)
    text, _ = child.communicate()
    if child.returncode:
        raise NotRunError(f"{tree}: the surface could not be read")
    found: dict[str, Any] = json.loads(text)
    return found


def _flat(side: dict[str, Any]) -> dict[str, str]:
    """One line for each verb, option, public name, its attributes and their parameters."""
    found: dict[str, str] = {}
    for verb, options in side["verbs"].items():
        found[verb] = ""
        found |= {f"{verb} {option}": takes for option, takes in options.items()}
    for name, parts in side["names"].items():
        found[name] = ""
        for part, parameters in parts.items():
            at = name if part == "parameters" else f"{name}.{part}"
            found[at] = ""
            for parameter in parameters:
                word, _, default = parameter.partition("=")
                found[f"{at}({word})"] = default
    return found


SECTIONS = {
    "circles": circles_section, "upward": upward, "package_lines": package_lines,
    "files_per_folder": files_per_folder, "surface": surface,
}
