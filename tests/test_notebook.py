"""The notebook for Kaggle and Colab, executed in a kernel."""

import json
import os
import sys
from pathlib import Path

import nbformat
import numpy as np
from conftest import ROOT, SCRIPT, script
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs/kaggle_and_colab.ipynb"


def code_cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell):
    """Return the text that a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    """Return the types of the pictures that a cell showed."""
    return [kind for output in cell.outputs if output.output_type == "display_data"
            for kind in output.data if kind.startswith("image/")]


def test_the_notebook_is_valid_and_stored_without_outputs():
    """The title is followed by pairs of a text cell and a code cell."""
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4 and notebook.metadata.kernelspec.name == "python3"
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds == ["markdown"] + ["markdown", "code"] * (len(kinds) // 2)
    for cell in code_cells(notebook).values():
        assert (cell.outputs, cell.execution_count) == ([], None)


def test_the_notebook_trains_shows_its_results_and_classifies_a_photo(
        small_dataset, tmp_path, monkeypatch):
    """Uses drawn faces and no Internet: all packages are already installed."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = code_cells(notebook)
    for old, new in (('script = "emotion_recognition_cnn.py"', f"script = {str(SCRIPT)!r}"),
                     ('\noptions = ""', "\noptions = '--data-dir "
                      f'"{small_dataset}" --epochs 2 --batch-size 16\''),
                     ('photo = "photo.jpg"', 'photo = "a photo.jpg"')):
        assert cells["settings"].source.count(old) == 1, old
        cells["settings"].source = cells["settings"].source.replace(old, new)
    script.draw_face("happy", np.random.default_rng(0)).save(tmp_path / "a photo.jpg")
    earlier = tmp_path / "output/predictions/earlier.emotions.jpg"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"not to be shown")
    os.utime(earlier, (1, 1))
    folder = str(Path(sys.executable).parent)  # contains `python`
    for name, value in {"PATH": os.pathsep.join([folder, os.environ["PATH"]]), "PIP_NO_INDEX": "1",
                        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                        "IPYTHONDIR": str(tmp_path / "ipython")}.items():
        monkeypatch.setenv(name, value)

    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": tmp_path}}).execute()

    assert [cell.execution_count for cell in cells.values()] == [*range(1, len(cells) + 1)]
    assert "ERROR" not in printed(cells["install"])
    assert "Epoch 2/2" in printed(cells["train"])
    assert "\b" not in printed(cells["train"])  # a progress bar would print it
    assert pictures(cells["plots"]) == ["image/png"] * 4
    metrics = json.loads((tmp_path / "output/metrics.json").read_text())
    assert printed(cells["scores"]).splitlines() == [
        "On the test set:",
        *(f"{name}: {metrics['test'][name]:.2%}"
          for name in ("accuracy", "clean_accuracy", "balanced_accuracy")),
        f"best epoch: {metrics['best_epoch']}"]
    assert "a photo.jpg, face 1: " in printed(cells["photo"])
    assert pictures(cells["photo"]) == ["image/jpeg"]
    assert len([*earlier.parent.glob("a photo-????????.emotions.jpg")]) == 1
