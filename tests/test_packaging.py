"""What the wheel holds and what the package costs to import."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import loadmaster

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FLOOR_OF = {
    "foundation": 0, "traces": 1, "kernels": 1, "placement": 2, "simulator": 3, "workers": 4,
    "app": 5, "cli": 6,
}
FLOORS = tuple(FLOOR_OF)


def test_the_version_is_said_alike_in_the_wheel_and_in_the_code() -> None:
    assert loadmaster.__version__ == PROJECT["project"]["version"]


def test_kernels_is_a_namespace_folder() -> None:
    """A regular package of that name would shadow Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_folder_with_code_or_data_is_listed_as_a_package() -> None:
    """setuptools takes a folder of data for a package, and complains where it is not listed."""
    folders = {"loadmaster"}
    for floor in FLOORS:
        for folder in (ROOT / floor, *(ROOT / floor).rglob("*")):
            if folder.is_dir() and folder.name != "__pycache__" and any(
                path.is_file() for path in folder.iterdir()
            ):
                folders.add("loadmaster." + ".".join(folder.relative_to(ROOT).parts))
    assert sorted(folders) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_data_files_of_the_package_are_listed() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    listed = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    present = {
        path
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.is_file() and path.suffix in (".yaml", ".json", ".safetensors", ".html", ".md")
    }
    assert present <= listed


@pytest.mark.parametrize("name", sorted(loadmaster.__all__))
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(loadmaster, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'plane'"):
        loadmaster.plane  # noqa: B018


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; sys.argv = ['loadmaster', '--help']\n"
        "from loadmaster.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'numba', 'scipy', 'pyarrow', 'transformers'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize("floor", FLOORS)
def test_no_floor_imports_a_higher_one(floor: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in sorted((ROOT / floor).rglob("*.py"))
        for target in _floors_imported(path)
        if target != floor and FLOOR_OF[target] >= FLOOR_OF[floor]
    ]
    assert wrong == []


def _floors_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.relative_to(ROOT).parts[: -node.level]
            names = [node.module] if node.module else [a.name for a in node.names]
            found |= {(*package, *n.split("."))[0] for n in names}
    return found & set(FLOORS)
