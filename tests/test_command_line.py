"""The script on the command line: bad input, output on a terminal, documentation."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ablation
import pytest
from conftest import ROOT, RUN, SCRIPT, expected_files, script
from PIL import Image

NETWORK = f"output/{script.NETWORK_FILE}"

# Each case: arguments, a change to a copy of the dataset in data/, words in the error line.
BAD_INPUTS = {
    "data folder missing": (["--data-dir", "nowhere"], None, ["nowhere", "--data-dir"]),
    "data folder is a file": (["--data-dir", "data/readme.txt"],
                              lambda data: (data / "readme.txt").write_text("x"), ["readme.txt"]),
    "data folder is an archive": (["--data-dir", "data/archive.zip"],
                                  lambda data: (data / "archive.zip").write_text("x"),
                                  ["data/archive.zip", "unpacked"]),
    "archive in the folder": ([], lambda data: [
        shutil.rmtree(data / "train"), (data / "archive.zip").write_text("x")],
        ["data/train is missing", "unpacked", "data contains", "archive.zip"]),
    "dataset in a subfolder": ([], lambda data: [
        (data / "fer2013").mkdir(),
        *[(data / part).rename(data / "fer2013" / part) for part in ("train", "test")]],
        ["data/train is missing", "--data-dir", "data contains", "fer2013"]),
    "data folder is train/": (["--data-dir", "data/train"], None,
                              ["data/train/train is missing", "data/train contains", "angry"]),
    "test folder renamed": ([], lambda data: (data / "test").rename(data / "validation"),
                            ["data/test is missing", "data contains", "train", "validation"]),
    "no train": ([], lambda data: shutil.rmtree(data / "train"), ["data/train", "--data-dir"]),
    "no test": ([], lambda data: shutil.rmtree(data / "test"), ["data/test", "--data-dir"]),
    "emotion missing": ([], lambda data: shutil.rmtree(data / "test/fear"),
                        ["data/test/fear", "missing", "the same subfolders"]),
    "emotion empty": ([], lambda data: [file.unlink() for file in data.glob("train/sad/*")],
                      ["data/train/sad", "contains no images", ".jpg"]),
    "additional emotion in train": ([], lambda data: (data / "train/contempt").mkdir(),
                                    ["data/test/contempt", "missing", "the same subfolders"]),
    "emotion name not printable": ([], lambda data: [
        (data / part / "sad").rename(data / part / os.fsdecode(b"tr\xfcb"))
        for part in ("train", "test")], ["data/train", "cannot be printed", r"tr\udcfcb"]),
    "one emotion": ([], lambda data: [shutil.rmtree(folder) for folder in data.glob("*/[!a]*")],
                    ["data/train", "at least two subfolders"]),
    "too few images to hold out": ([], lambda data: [
        file.rename(file.with_name("x.png")) if "_0" in file.name else file.unlink()
        for file in data.glob("*/*/*.png")], ["train/", "too few"]),
    "image file empty": ([], lambda data: (data / "train/happy/Training_3.png").write_bytes(b""),
                         ["data/train/happy/Training_3.png", "cannot be read"]),
    "text file as an image": ([], lambda data: (data / "test/happy/x.jpg").write_text("no image"),
                              ["data/test/happy/x.jpg", "cannot be read"]),
    "image file truncated": ([], lambda data: (data / "test/sad/PublicTest_0.png").write_bytes(
        (data / "test/sad/PublicTest_0.png").read_bytes()[:700]),
        ["data/test/sad/PublicTest_0.png", "cannot be read"]),
    "decompression bomb": ([], lambda data: Image.new("1", (20000, 20000)).save(
        data / "train/fear/bomb.png"), ["data/train/fear/bomb.png", "cannot be read"]),
    "no data and no Internet": ([], shutil.rmtree, [
        "https://www.kaggle.com/datasets/msambare/fer2013", "data/", "--data-dir", "--demo"]),
    "nothing to resume": (["--resume"], None, ["output/unfinished/checkpoint.npz",
                                               "without --resume"]),
    "output is a file": (["--output-dir", "data/readme.txt"],
                         lambda data: (data / "readme.txt").write_text("x"), ["readme.txt"]),
    "output folder inside a file": (
        ["--output-dir", "data/readme.txt/output"],
        lambda data: (data / "readme.txt").write_text("x"), ["readme.txt"]),
    "pictures inside a file": (
        ["--predict", "data/train/sad/Training_0.png", "--output-dir", "data/readme.txt"],
        lambda data: (data / "readme.txt").write_text("x"), ["data/readme.txt/predictions"]),
    "photo missing": (["--predict", "gone.jpg", "--output-dir", "made"], None, ["gone.jpg"]),
    "network damaged": (["--predict", "x.png"], lambda data: (data.parent / NETWORK).write_text(
        "no network"), [NETWORK, "Train a network", "--output-dir"]),
}

# Each case: arguments, words in the error after the usage.
BAD_OPTIONS = {
    "zero epochs": (["--epochs", 0], ["--epochs", "0", "1"]),
    "epochs not a number": (["--epochs", "many"], ["--epochs", "many"]),
    "negative batch size": (["--batch-size", -4], ["--batch-size", "-4", "2"]),
    "batch size of one": (["--batch-size", 1], ["--batch-size", "2"]),
    "fractional batch size": (["--batch-size", "1.5"], ["--batch-size", "1.5"]),
    "learning rate of zero": (["--learning-rate", 0], ["--learning-rate", "1e-09"]),
    "negative learning rate": (["--learning-rate", "-0.1"], ["--learning-rate", "-0.1"]),
    "learning rate nan": (["--learning-rate", "nan"], ["--learning-rate", "nan"]),
    "learning rate infinite": (["--learning-rate", "inf"], ["--learning-rate", "inf"]),
    "learning rate not a number": (["--learning-rate", "fast"], ["--learning-rate", "fast"]),
    "unknown precision": (["--precision", "int8"], ["--precision", "int8", "float32"]),
    "negative seed": (["--seed", -1], ["--seed", "-1"]),
    "seed too large for NumPy": (["--seed", 2**32], ["--seed", str(2**32)]),
    "seed not a number": (["--seed", "x"], ["--seed", "x"]),
    "unknown option": (["--epoch", 3], ["--epoch"]),
    "demo and data": (["--demo", "--data-dir", "data"], ["--demo", "--data-dir"]),
    "predict without a path": (["--predict"], ["--predict"]),
    "predict an empty path": (["--predict", ""], ["empty"]),
    "predict and train": (["--predict", "x.png", "--epochs", 3, "--seed=0"],
                          ["--epochs, --seed"]),
    "predict and resume": (["--predict", "x.png", "--resume"], ["--resume"]),
    "resume and other settings": (["--resume", "--precision", "float32"],
                                  ["--precision"]),
    "JSON without predict": (["--json"], ["--json"]),
    "no-detect without predict": (["--no-detect", "--demo"], ["--no-detect"]),
}


@pytest.fixture
def earlier_run(tmp_path):
    """Return a file in output/ from an earlier run."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output/history.csv").write_text("of an earlier run")
    return tmp_path / "output/history.csv"


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_gets_one_line_and_status_2(
        name, small_dataset, tmp_path, monkeypatch, run_here, earlier_run):
    arguments, change, words = BAD_INPUTS[name]
    shutil.copytree(small_dataset, tmp_path / "data")
    if change:
        change(tmp_path / "data")
    for proxy in "HTTPS_PROXY", "https_proxy":  # nothing answers there: no Internet
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))  # an empty cache
    process = run_here(*arguments, cwd=tmp_path)
    assert process.returncode == 2, process.stderr
    *notes, error = process.stderr.splitlines()
    assert error.startswith("error: ") and all(note.startswith("no network in") for note in notes)
    for word in words:
        assert word in error
    assert "Epoch" not in process.stdout
    assert earlier_run.read_text() == "of an earlier run"
    assert not (tmp_path / "output/unfinished").exists()


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_get_the_usage_and_one_line_and_status_2(
        name, tmp_path, run_here, earlier_run):
    arguments, words = BAD_OPTIONS[name]
    process = run_here(*arguments, cwd=tmp_path)
    assert process.returncode == 2 and process.stdout == ""
    *usage, error = process.stderr.splitlines()
    assert usage[0].startswith("usage: ") and all(line.startswith(" ") for line in usage[1:])
    assert " error: " in error
    for word in words:
        assert word in error
    assert [path.name for path in tmp_path.rglob("*")] == ["output", "history.csv"]


def test_a_folder_that_cannot_be_removed_is_reported_and_blocks_no_run(
        small_dataset, tmp_path, run_here):
    """The folder contains a file of the user, which is kept and bars no run."""
    own = tmp_path / "output/unfinished/history.csv"
    own.parent.mkdir(parents=True)
    own.write_text("Chapter one")
    refused = run_here("--resume", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    process = run_here("--data-dir", small_dataset, *RUN, "--epochs", 1, cwd=tmp_path)
    assert process.returncode == 0
    assert process.stdout.splitlines()[-1].startswith("Saved in output: ")
    assert process.stderr.startswith("output/unfinished could not be removed (")
    assert process.stderr.count("\n") == 1
    assert {path.name for path in (tmp_path / "output").iterdir()} == {
        *expected_files(tmp_path / "output"), "unfinished"}
    assert list(own.parent.iterdir()) == [own] and own.read_text() == "Chapter one"


def test_output_folder_that_cannot_be_written(small_dataset, tmp_path, run_here):
    folder = Path("/proc/self")  # nobody can write here, not even root
    if not folder.exists():
        folder = tmp_path / "read-only"
        folder.mkdir(mode=0o555)
    process = run_here("--data-dir", small_dataset, "--output-dir", folder, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and str(folder) in process.stderr


def test_only_the_script_and_keras_print_to_the_terminal(demo):
    """Each line comes from the script or is Keras's line for an epoch."""
    folder, process = demo
    assert process.stderr == ""
    metrics = json.loads((folder / "demo/metrics.json").read_text())
    left = [line for line in process.stdout.splitlines()
            if re.fullmatch(r"about \d+ min of training left", line)]
    assert len(left) >= 3
    beginnings = (metrics["processor"], "Drawing faces", "Reading", "7 emotions: ",
                  "2,100 training", "Epoch ", "Test: ", "Predictions are", "  ", "Saved in")
    for line in process.stdout.splitlines():
        assert (not line or line.startswith(beginnings) or line in left
                or " - val_accuracy: " in line), line


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_the_progress_bar_of_keras(small_dataset, tmp_path):
    import pty

    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--data-dir", small_dataset, "--epochs", "2"], cwd=tmp_path,
        stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"})
    os.close(slave)
    output = b""
    with contextlib.suppress(OSError):  # on Linux, the end of the output raises an error
        while chunk := os.read(master, 4096):
            output += chunk
    os.close(master)
    output = output.decode()
    assert process.wait() == 0, output
    assert "Epoch 2/2" in output and "━" in output
    assert "42/42" in output and "28/28" in output  # while images are read
    assert "Warning" not in output and "absl" not in output


@pytest.mark.documents
def test_documented_figures_match_the_runs():
    """Checks the tables by measure/budgets.py and the figures of one run in detail."""
    readme = (ROOT / "README.md").read_text()
    table = subprocess.run(
        [sys.executable, ROOT / "tests/measure/budgets.py", *(ROOT / "docs/runs").iterdir()],
        capture_output=True, text=True, check=True).stdout
    results = (ROOT / "docs/RESULTS.md").read_text()
    assert table in results
    rows = [row.split(" | ")[:-2] for row in table.splitlines()]  # README omits some columns
    shown = [row for row in readme.splitlines() if row.startswith("| ") and " ± " in row]
    assert len(shown) == 3
    for row in shown:
        assert any(row.split(" | ")[:-1] == cells[:3] + cells[4:7] and cells[3] == "0 1 2"
                   and row.endswith(f" | {cells[7]} |") for cells in rows), row
    metrics = json.loads((ROOT / "docs/runs/44-0-bfloat16/metrics.json").read_text())
    test = metrics["test"]
    for figure in (test["accuracy"], test["clean_accuracy"], test["balanced_accuracy"],
                   *(emotion["recall"] for emotion in test["emotions"].values())):
        assert f"{figure:.1%}".replace("%", " %") in results
    assert f"{metrics['seconds'] / 60:.0f} minutes" in results
    assert f"{metrics['settings']['epochs']} epochs" in results
    assert metrics["images"] == {"training": 28709, "validation": 3589, "test": 3589}


@pytest.mark.documents
def test_table_of_layers_matches_the_network():
    results = (ROOT / "docs/RESULTS.md").read_text()
    model = script.create_CNN(7)
    for layer in model.layers:
        shape = " x ".join(map(str, layer.output.shape[1:]))
        assert f"| {type(layer).__name__} | {shape} | {layer.count_params():,} |" in results
    assert f"| total | | {model.count_params():,} |" in results
    assert f"{model.count_params():,} parameters" in (ROOT / "README.md").read_text()


@pytest.mark.documents
@pytest.mark.parametrize("name", ["README.md", "docs/RESULTS.md"])
def test_every_link_and_picture_exists(name):
    text = (ROOT / name).read_text()
    links = [link for link in re.findall(r"\]\((.*?)\)", text) if not link.startswith("https://")]
    assert len(links) >= 5
    for link in links:
        path, _, heading = link.partition("#")
        assert ((ROOT / name).parent / path).exists(), link
        title = heading.replace("-", " ").capitalize()
        assert not heading or f"# {title}" in (ROOT / path).read_text(), link
    for path in re.findall(r"python (tests/\S+\.py)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.documents
@pytest.mark.parametrize("change", ablation.CHANGES)
def test_every_change_of_the_ablation_fits_the_script(change):
    changed = ablation.changed_script(change)  # exits if the script lacks the code to replace
    compile(changed, change, "exec")
    assert (changed == SCRIPT.read_text()) == (change == ablation.RECIPE)


@pytest.mark.documents
def test_documented_ablation_matches_its_runs():
    results = (ROOT / "docs/RESULTS.md").read_text()
    runs = ablation.read_runs(ablation.RUNS, epochs=44)
    assert runs and {run["change"] for run in runs} <= set(ablation.CHANGES)
    assert ablation.table(runs, ablation.INGREDIENTS, "removed") in results
    ideas = ablation.table(runs, ablation.IDEAS, "idea")
    assert ideas in results or ideas.count("\n") == 1  # no row yet


@pytest.mark.documents
def test_readme_names_every_option(run_here):
    readme = (ROOT / "README.md").read_text()
    help_text = run_here("--help", cwd=ROOT).stdout
    options = {word.strip("[],()") for word in help_text.split() if word.startswith("--")}
    assert len(options) >= 8
    for option in options - {"--help"}:
        assert f"`{option}" in readme or f" {option}" in readme, option


def test_runs_are_summarised_by_epochs_processor_and_precision(tmp_path):
    """In measure/budgets.py, three runs with different seeds share a row; other runs do not."""
    for name, epochs, accuracy in (
            ("a", 2, 0.5), ("b", 2, 0.6), ("c", 2, 0.7), ("d", 9, 0.8), ("e", 9, 0.9), ("f", 9, 1)):
        precision = "mixed_bfloat16" if name == "e" else "float32"
        processor = "AMD EPYC" if name == "f" else "Intel(R) Xeon(R) Processor"
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({
            "settings": {"epochs": epochs, "precision": precision, "seed": ord(name) - ord("a")},
            "seconds": 60 * epochs + 36 * accuracy,
            "processor": processor,
            "validation": {"accuracy": accuracy},
            "test": dict.fromkeys(["accuracy", "single_image_accuracy", "clean_accuracy",
                                   "balanced_accuracy"], accuracy)}))
    process = subprocess.run([sys.executable, ROOT / "tests/measure/budgets.py", *"fedcba",
                              "--picture", "picture.png"], cwd=tmp_path, capture_output=True,
                             text=True)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    rows = process.stdout.splitlines()
    assert rows[2] == "| 2 | Intel Xeon | float32 | 0 1 2 | 2.3 |" + " 60.0 ± 10.0 % |" * 5
    assert rows[3] == "| 9 | AMD EPYC | float32 | 5 | 9.6 |" + " 100.0 % |" * 5
    assert rows[4] == "| 9 | Intel Xeon | float32 | 3 | 9.5 |" + " 80.0 % |" * 5
    assert rows[5] == "| 9 | Intel Xeon | mixed_bfloat16 | 4 | 9.5 |" + " 90.0 % |" * 5
    assert Image.open(tmp_path / "picture.png").width >= 1000
