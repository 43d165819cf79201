"""Rules of the house that a linter does not know."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [
    "lizard_ops",
    "lizard_layers",
    "lizard_models",
    "lizard_vllm",
    "benchmarks",
]  # whose functions keep to the rule
MOST_PARAMETERS, MOST_LINES = 12, 400
FREE = ("jit", "custom_op", "register_fake", "command")  # decorators: kernels, registered operators, commands


def exported(package: Path) -> set[str]:
    """The names that a package's ``__init__`` imports or defines."""
    names = set()
    for node in ast.walk(ast.parse((package / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def is_free(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a decorator, or the name of a command's file, says that the parameters are not the author's choice."""
    if function.name == "command":
        return True
    names = [
        node.attr if isinstance(node, ast.Attribute) else node.id
        for decorator in function.decorator_list
        for node in ast.walk(decorator)
        if isinstance(node, (ast.Attribute, ast.Name))
    ]
    return any(name in FREE for name in names)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)


@pytest.mark.parametrize("name", PACKAGES)
def test_few_parameters_but_for_public_functions_kernels_and_commands(name):
    package = ROOT / name
    public = exported(package)
    long = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {parameters(function)}"
        for path in sorted(package.rglob("*.py"))
        for function in functions(path)
        if parameters(function) > MOST_PARAMETERS and function.name not in public and not is_free(function)
    ]
    assert not long


def kernels(path: Path) -> bool:
    return "triton" in path.parts or "tiles" in path.parts


def test_no_file_is_long_but_kernels():
    files = [path for name in (*PACKAGES, "tests") for path in (ROOT / name).rglob("*.py") if not kernels(path)]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {path: lines for path, lines in long.items() if lines > MOST_LINES and not path.startswith("tests")}


def test_no_two_files_of_tests_share_a_name():
    """pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_nothing_stands_in_the_hall():
    found = {path.name for path in (ROOT / "lizard_models").iterdir() if path.is_file()}
    assert found == {"__init__.py", "__main__.py", "config.py", "recipes.py", "presets.py", "py.typed"}


def test_presets_import_nothing():
    tree = ast.parse((ROOT / "lizard_models" / "presets.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(isinstance(node, ast.ImportFrom) and node.module in ("__future__", "typing") for node in imported)


def test_the_wheel_holds_the_four_packages_alone():
    include = 'include = ["lizard_ops*", "lizard_layers*", "lizard_models*", "lizard_vllm*"]'
    assert include in (ROOT / "pyproject.toml").read_text()
    roots = [ROOT / name for name in ("lizard_ops", "lizard_layers", "lizard_models", "lizard_vllm")]
    folders = {path.parent for root in roots for path in root.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]  # it would stay behind
    assert not [folder for folder in folders if {"quality", "bench"} & {*folder.parts[len(ROOT.parts) :]}]
