"""The arrows between the rooms: scripts -> the paper -> layers; runtime knows no paper."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

FILES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
    if not {"tests", ".venv", ".venv-oldest", "build"} & set(path.relative_to(ROOT).parts)
}
SCRIPTS = {
    path.stem
    for path, tree in FILES.items()
    if "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
}
LIBRARY = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
    if path.relative_to(ROOT).parts[0] == "apm"
}
FACE = "apm"
# What reads as the paper, and what it stands on.
PAPER = {f"apm.{name}" for name in ("config", "model", "layers", "losses", "islands")}
PAPER |= {"apm.positional_encoding", "apm.preprocessing", "apm.choices"}
COMMAND_LINE = {"apm.flags", "apm.runtime.cli"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, here or there; ``from a import b`` may be ``a.b``."""
    found = set()
    for node in ast.walk(FILES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & LIBRARY.keys()) or {str(node.module)}
    return found


def test_the_library_has_no_circle():
    graph = {name: imports(path) & LIBRARY.keys() for name, path in LIBRARY.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(LIBRARY) > 20


def test_runtime_knows_nothing_outside_itself():
    for name, path in LIBRARY.items():
        if name.startswith("apm.runtime"):
            ours = {module for module in imports(path) if module.split(".")[0] == "apm"}
            assert all(module.startswith("apm.runtime") for module in ours), name


def test_the_paper_knows_no_runtime():
    for name in PAPER:
        ours = {module for module in imports(LIBRARY[name]) if module.split(".")[0] == "apm"}
        assert ours <= PAPER, name


def test_the_library_knows_no_command_line_and_no_script():
    for name in LIBRARY.keys() - COMMAND_LINE:
        assert not imports(LIBRARY[name]) & {"argparse", *COMMAND_LINE, *SCRIPTS}, name


def test_data_knows_no_model():
    for name, path in LIBRARY.items():
        if name.startswith("apm.data"):
            assert not imports(path) & {"apm.model", "apm.predictor", "apm.distill", "apm.tta"}, (
                name
            )


def test_nothing_imports_a_script():
    for path in FILES:
        # The ablation is many runs of the training script.
        allowed = {"train"} if path.stem == "ablation" else set()
        assert not imports(path) & (SCRIPTS - allowed), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_too_long_to_be_read(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (200 if path.stem in SCRIPTS else 300)
