"""Names in docstrings and in docs/architecture.md exist: a name that was changed in the code is changed there, too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_FOLDERS = ("bnlayer/bnlayer", "worker/bnworker", "server/bnserver", "proto/bnproto", "benchmarks", "tests/support")
_FILES = [
    file for folder in _FOLDERS for file in sorted((_ROOT / folder).rglob("*.py")) if not file.stem.endswith("_grpc")
]
_SECTION = r"\n{}:\n(.*?)(?=\n\w[\w ]*:\n|\Z)"
_NAMES = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", re.MULTILINE)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _described(docstring: str, section: str) -> set[str]:
    match = re.search(_SECTION.format(section), docstring, re.DOTALL)
    listed = _NAMES.findall("" if match is None else match[1])
    return {name.strip().lstrip("*") for names in listed for name in names.split(",")}


def _arguments(function: Function) -> set[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {each.arg for each in every if each is not None}


def _attributes(body: ast.ClassDef) -> set[str]:
    """Whatever the class defines, or sets on itself, or takes from a tuple's fields."""
    names = {node.attr for node in ast.walk(body) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(body) if isinstance(node, ast.Name)}
    names |= {node.name for node in ast.walk(body) if isinstance(node, Function)}
    return names | {str(node.value) for node in ast.walk(body) if isinstance(node, ast.Constant) and node.value}


def _wrong(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, Function | ast.ClassDef) or not (docstring := ast.get_docstring(node)):
            continue
        makers = [each for each in node.body if isinstance(each, Function) and each.name == "__init__"]
        function = node if isinstance(node, Function) else next(iter(makers), None)
        if function is not None:
            yield from (
                f"{node.name}: argument {name}" for name in _described(docstring, "Args") - _arguments(function)
            )
        if isinstance(node, ast.ClassDef) and not node.bases:
            missing = _described(docstring, "Attributes") - _attributes(node)
            yield from (f"{node.name}: attribute {name}" for name in missing)


@pytest.mark.parametrize("folder", _FOLDERS)
def test_what_is_described_is_there(folder: str) -> None:
    """In every function and class of the project."""
    files = [file for file in _FILES if file.is_relative_to(_ROOT / folder)]
    assert files
    wrong = {
        str(file.relative_to(_ROOT)): names
        for file in files
        if (names := sorted(_wrong(ast.parse(file.read_text(encoding="utf-8")))))
    }
    assert wrong == {}


def _members(source: str) -> set[str]:
    """Class.name of the methods and the annotated or assigned names in the bodies of a module's classes."""
    members: set[str] = set()
    for body in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        members |= {f"{body.name}.{each.name}" for each in body.body if isinstance(each, Function)}
        assigned = (each for each in body.body if isinstance(each, ast.Assign | ast.AnnAssign))
        targets = (each.targets if isinstance(each, ast.Assign) else [each.target] for each in assigned)
        members |= {f"{body.name}.{name.id}" for names in targets for name in names if isinstance(name, ast.Name)}
    return members


def test_the_architecture_names_what_is_there() -> None:
    """Whoever looks for where something is done finds it by the name that docs/architecture.md gives."""
    page = (_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Z]\w*\.\w+)`", page))
    files = {path.rpartition("/")[2] for path in re.findall(r"`([\w/]+\.py)`", page)}
    there = {file.name for file in [*_FILES, *(_ROOT / "tests").rglob("*.py")]}
    members = {name for file in _FILES for name in _members(file.read_text(encoding="utf-8"))}
    assert len(named) > 50
    assert sorted(named - members) == []
    assert sorted(files - there) == []
