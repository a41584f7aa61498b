"""Fixtures and functions for all tests: small datasets and complete runs of the script."""

import csv
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "emotion_recognition_cnn.py"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "measure")]

import emotion_recognition_cnn as script  # noqa: E402  before Keras, to configure it
import keras  # noqa: E402

EMOTIONS = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
RUN = "--epochs", "2", "--batch-size", "16", "--output-dir", "output"


def pytest_configure(config):
    """Register a marker, and ignore two deprecation warnings that Keras causes."""
    config.addinivalue_line("markers", "documents: compares the script with README, docs or "
                            "tests/measure; skip with -m 'not documents' while changing the script")
    config.addinivalue_line("filterwarnings", "ignore:Please import `affine_transform`")
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation")


def pytest_collection_modifyitems(items):
    """Put tests that need a complete run last, so that no worker waits for another one's run."""
    items.sort(key=lambda item: [name in item.fixturenames
                                 for name in ("killed_run", "whole_run", "demo")])


def run(*arguments, cwd, **environment):
    """Run the script as a user would and return the finished process."""
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], cwd=cwd, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=280,
                          env={**os.environ, **environment})


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Return a version of `run` that runs the script in this process.

    This is faster, because TensorFlow is already imported.  Afterwards, the fixture restores what
    the script changes in its process.
    """
    def run_here(*arguments, cwd, program=SCRIPT):
        script.hardware_name()  # TensorFlow looks for GPUs once per process, and logs it
        capfd.readouterr()
        handler, status = signal.getsignal(signal.SIGINT), 0
        with monkeypatch.context() as patch, warnings.catch_warnings():
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [str(program), *map(str, arguments)])
            patch.setenv("MPLBACKEND", "agg")
            patch.delitem(sys.modules, "IPython", raising=False)
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                runpy.run_path(str(program), run_name="__main__")
            except SystemExit as end:
                status = end.code or 0
            finally:
                signal.signal(signal.SIGINT, handler)
                keras.config.set_dtype_policy("float32")
        return subprocess.CompletedProcess(sys.argv, status, *capfd.readouterr())

    return run_here


def start(*arguments, cwd, program=SCRIPT, at_ctrl_c=signal.SIG_DFL):
    """Start the script and return the running process.

    Ctrl-C works in it even if the tests run in the background, where it is normally ignored.
    """
    return subprocess.Popen(
        [sys.executable, program, *map(str, arguments)], cwd=cwd, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, at_ctrl_c))


def read_history(output_dir):
    """Return history.csv without the column of seconds."""
    with open(Path(output_dir, "history.csv"), newline="") as file:
        return [{name: float(value) for name, value in row.items() if name != "seconds"}
                for row in csv.DictReader(file)]


def expected_files(output_dir):
    """Return the names of the files of a finished run, with a plot of each metric."""
    with open(Path(output_dir, "history.csv"), newline="") as file:
        columns = next(csv.reader(file))
    metrics = {name for name in columns if f"val_{name}" in columns}
    assert metrics >= {"accuracy", "loss"}
    return {f"{name}.png" for name in metrics} | {
        "confusion_matrix.png", "examples.png", "filters.png", "history.csv", "metrics.json",
        script.NETWORK_FILE}


def kept_history(output_dir):
    """Return the history in the checkpoint of an unfinished run, or {} if there is none yet."""
    checkpoint = Path(output_dir, "unfinished", script.CHECKPOINT_FILE)
    if not checkpoint.exists() or not checkpoint.stat().st_size:  # not yet written
        return {}
    with np.load(checkpoint) as file:
        return json.loads(str(file["state"]))["history"]


def wait_for_checkpoint(process, folder, epochs):
    """Wait until `process` has saved a checkpoint after at least `epochs` epochs, or has ended."""
    while process.poll() is None:
        history = kept_history(folder / "output")
        if history and len(history["epoch"]) >= epochs:
            break
        time.sleep(0.05)


def assert_same_run(one, other):
    """Assert that two runs have the same history and metrics, except for durations."""
    assert read_history(one / "output") == read_history(other / "output")
    one, other = (json.loads((folder / "output/metrics.json").read_text())
                  for folder in (one, other))
    for metrics in one, other:
        del metrics["seconds"], metrics["test"]["milliseconds_per_face"]
    assert one == other


def changed_script(folder, *changes):
    """Write a copy of the script with changes, given as pairs (old text, new text)."""
    text = SCRIPT.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = Path(folder, "changed.py")
    path.write_text(text)
    return path


def make_dataset(folder, train=6, public=2, private=2, draw=None):
    """Write a small dataset in Kaggle's layout and return its folder.

    `draw(emotion, kind, number)` returns an image; the default draws a face.
    """
    rng = np.random.default_rng(7)
    draw = draw or (lambda emotion, kind, number: script.draw_face(emotion, rng))
    for kind, count in ("Training", train), ("PublicTest", public), ("PrivateTest", private):
        for emotion in EMOTIONS:
            path = Path(folder, "train" if kind == "Training" else "test", emotion)
            path.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw(emotion, kind, number).save(path / f"{kind}_{number}.png")
    return Path(folder)


def flat(shade):
    """Return an image of a single shade, which no flip, shift, rotation or zoom changes."""
    return Image.new("L", (48, 48), shade)


def small_network():
    """Return a small network, with all kinds of variables, for tests that work with any network."""
    return keras.Sequential([
        keras.Input((48, 48, 1)), keras.layers.MaxPooling2D(8), keras.layers.Flatten(),
        keras.layers.Dense(16), keras.layers.BatchNormalization(), keras.layers.Dropout(0.3),
        keras.layers.Dense(7, activation="softmax", dtype="float32")])


def foreign_model(path):
    """Save a network that does not come from the script."""
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save(path.with_suffix(".keras"))
    os.replace(path.with_suffix(".keras"), path)


@pytest.fixture
def figures(monkeypatch):
    """Return a list that collects all figures saved during the test."""
    saved, savefig = [], script.Figure.savefig

    def save(figure, *arguments, **settings):
        saved.append(figure)
        return savefig(figure, *arguments, **settings)

    monkeypatch.setattr(script.Figure, "savefig", save)
    return saved


@pytest.fixture(scope="session")
def shared(tmp_path_factory, testrun_uid):
    """Return `shared(name, make)`: it returns a folder that `make` fills once for all workers."""
    def shared(name, make):
        folder = tmp_path_factory.getbasetemp().parent / f"{name}-{testrun_uid}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                make(folder)
        return folder

    return shared


def run_and_note(*arguments, cwd):
    """Run the script and save its exit status and output."""
    process = run(*arguments, cwd=cwd)
    noted = {"returncode": process.returncode, "stdout": process.stdout, "stderr": process.stderr}
    (cwd / "process.json").write_text(json.dumps({"args": arguments, **noted}, default=str))


@pytest.fixture(scope="session")
def small_dataset(shared):
    """Return the folder of a dataset of 70 drawn faces.  Tests must copy it before changing it."""
    return shared("small", make_dataset)


@pytest.fixture(scope="session")
def demo(shared):
    """Return the folder and the process of a run with --demo and the default output folder."""
    folder = shared("demo", lambda folder: run_and_note("--demo", cwd=folder))
    process = json.loads((folder / "process.json").read_text())
    return folder, subprocess.CompletedProcess(**process)


@pytest.fixture(scope="session")
def whole_run(shared, small_dataset):
    """Return the folder of an uninterrupted run, with its results in output/."""
    arguments = "--data-dir", small_dataset, *RUN
    folder = shared("whole_run", lambda folder: run_and_note(*arguments, cwd=folder))
    process = json.loads((folder / "process.json").read_text())
    assert process["returncode"] == 0, process["stderr"]
    return folder


@pytest.fixture(scope="session")
def killed_run(shared, small_dataset):
    """Return the folder of a run that was killed, resumed, and killed again.

    It trains on data/ in this folder.  The first kill comes before or after the end of the first
    epoch, the second one after at least one epoch.
    """
    moments = random.Random(0)

    def kill_twice(folder):
        shutil.copytree(small_dataset, folder / "data")
        for epochs, arguments in (0, ("--data-dir", "data", *RUN)), (1, ("--resume",)):
            process = start(*arguments, cwd=folder)
            wait_for_checkpoint(process, folder, epochs)
            seconds = kept_history(folder / "output").get("seconds", [1])[-1]
            time.sleep(moments.uniform(0, seconds / 2))  # kill it in an epoch or while saving
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL

    return shared("killed", kill_twice)
