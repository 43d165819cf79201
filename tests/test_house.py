"""Rules of the house that a linter does not know."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["lizard_ops"]  # whose functions keep to the rule
MOST_PARAMETERS = 12
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
    """Whether a decorator says that the parameters are not the author's choice."""
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
