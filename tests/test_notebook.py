"""The notebook: what is committed, and that it runs."""

import json
import re

import nbformat
import pytest
from conftest import ROOT
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

PATH = ROOT / "assets" / "islands.ipynb"


def notebook():
    return nbformat.read(PATH, as_version=nbformat.NO_CONVERT)


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def python(cell) -> str:
    """A cell's source, its magics as the calls that they stand for."""
    return TransformerManager().transform_cell(cell.source)


def outputs(cells) -> tuple[str, list[int]]:
    """All that was printed, and how many figures each code cell shows."""
    found = [cell.outputs for cell in code(cells)]
    assert {output.output_type for one in found for output in one} <= {"stream", "display_data"}
    printed = [output for one in found for output in one if output.output_type == "stream"]
    assert {output.name for output in printed} == {"stdout"}
    figures = [sum("image/png" in output.get("data", {}) for output in one) for one in found]
    return "".join(output.text for output in printed), figures


def test_it_is_whole_and_small_and_names_no_machine():
    book = notebook()
    assert book.nbformat == 4
    nbformat.validate(book)
    for cell in code(book.cells):
        compile(python(cell), PATH.name, "exec")
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)  # its letters may say anything
    assert not re.search(r"/(home|root|tmp|usr|Users|work)\b|[A-Z]:\\\\", json.dumps(book))
    assert PATH.stat().st_size < 1_000_000


def test_it_is_committed_as_it_ran():
    cells = notebook().cells
    assert [cell.execution_count for cell in code(cells)] == [*range(1, len(code(cells)) + 1)]
    printed, figures = outputs(cells)
    assert "student: cat" in printed and figures == [0, 0, 1, 1, 1, 1, 1, 1]


def test_where_apm_is_at_hand_nothing_is_installed():
    install = code(notebook().cells)[0]
    assert "%pip install" in install.source
    exec(python(install), {})  # a magic would need get_ipython


@pytest.mark.slow
@pytest.mark.parametrize("folder", [ROOT, PATH.parent], ids=["root", "assets"])
def test_it_runs(folder, tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    committed, book = notebook(), notebook()
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    printed, figures = outputs(book.cells)
    assert figures == outputs(committed.cells)[1]
    assert "teacher: cat" in printed and "student: cat" in printed
    differences = [float(number) for number in re.findall(r"differs by (\S+)", printed)]
    assert len(differences) == 5 and max(differences) < 1e-3
