"""Who may import whom: lessons → course_utils → adapter_checks, and the rest from outside."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"adapter_checks", "classroom", "course_utils", "experiments", "pretraining", "tools"}
MAY_IMPORT = {
    "adapter_checks": set(),
    "course_utils": {"adapter_checks"},
    "lessons": {"adapter_checks", "course_utils"},
    "experiments": {"adapter_checks", "course_utils"},
    "pretraining": {"adapter_checks", "course_utils"},
    "tools": {"adapter_checks", "course_utils"},
    "classroom": {"adapter_checks", "course_utils", "tools"},
}
FOLDERS = {part: ROOT / part for part in MAY_IMPORT} | {
    "adapter_checks": ROOT / "adapter_checks" / "src" / "adapter_checks"
}


def modules(part):
    """{module's name: its file}"""
    found = {}
    for path in sorted(FOLDERS[part].rglob("*.py")):
        if "staging" not in path.parts and "template" not in path.parts:
            dotted = ".".join((part, *path.relative_to(FOLDERS[part]).with_suffix("").parts))
            found[dotted.removesuffix(".__init__")] = path
    return found


def imported(path):
    """Names of the modules that a file imports, a member as if it were one; claim cells are the build's, not the lesson's."""
    source = re.sub(r'^# %%[^\n]*"claim".*?(?=^# %%|\Z)', "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_the_arrows_hold(part):
    files = modules(part)
    assert files
    for name, path in files.items():
        parts = {module.partition(".")[0] for module in imported(path)}
        assert parts & OWN <= {part} | MAY_IMPORT[part], f"{name} imports {parts & OWN - {part} - MAY_IMPORT[part]}"


@pytest.mark.parametrize("part", sorted(OWN))
def test_imports_form_no_circle(part):
    """Those inside functions count, too: they are for what is heavy, not for what would go in a circle."""
    files, graph = modules(part), {}
    for name, path in files.items():
        wanted = {module if module in files else module.rpartition(".")[0] for module in imported(path)}
        graph[name] = {module for module in wanted & set(files) if module != name}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
