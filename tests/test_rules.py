"""Rules of the house that a reader cannot check by eye: who imports whom, who reads the environment, what is documented."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("parallel", "megatron_llama")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of imported modules, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def test_the_files_are_found():
    assert "parallel/launch.py" in NAMES and "megatron_llama/train.py" in NAMES


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_package_imports_from_above_itself_only(path):
    """parallel/ knows no model; neither package knows the tools, the examples or the tests."""
    package = path.relative_to(ROOT).parts[0]
    forbidden = {"tools", "tests", "examples"} | ({"megatron_llama"} if package == "parallel" else set())
    assert [name for name in imported(tree_of(path)) if name.split(".")[0] in forbidden] == []


def reads_environment(tree: ast.AST) -> Iterator[int]:
    """Lines that name the environment: os.environ, os.getenv, or these imported from os."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {f"os.{name}" for name in names}:
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}:
            yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_only_launch_reads_the_environment(path):
    lines = list(reads_environment(tree_of(path)))
    assert lines == [] or path == ROOT / "parallel/launch.py"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_bare_except(path):
    handlers = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ExceptHandler)]
    assert [handler.lineno for handler in handlers if handler.type is None] == []


def is_public(name: str) -> bool:
    return not name.startswith("_")


SAYS_ENOUGH_LINES = 3


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public modules, classes and functions without a docstring.

    Exempt are methods that repeat what is said elsewhere: overrides of `forward` (the class says what it computes), and
    methods of at most three statements, whose body is shorter than its description.
    """
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            if not ast.get_docstring(node):
                yield node.name
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and is_public(method.name) and not ast.get_docstring(method):
                    if method.name != "forward" and len(method.body) > SAYS_ENOUGH_LINES:
                        yield f"{node.name}.{method.name}"
        if isinstance(node, ast.FunctionDef) and is_public(node.name) and not ast.get_docstring(node):
            yield node.name


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "parallel")], ids=str)
def test_what_is_public_in_parallel_says_what_it_does(path):
    assert list(undocumented(tree_of(path))) == []


def test_setup_lists_every_directory_that_holds_python_files():
    listed = None
    for node in tree_of(ROOT / "setup.py").body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "PACKAGES":
            listed = ast.literal_eval(node.value)
    assert listed is not None and listed == sorted(listed)
    found = {str(path.parent.relative_to(ROOT)).replace(os.sep, ".") for path in FILES}
    assert set(listed) == found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_directory_is_a_package(package):
    """Without `__init__.py` a directory would import here and be missing where it is installed."""
    folders = {path.parent for path in FILES if path.is_relative_to(ROOT / package)}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
