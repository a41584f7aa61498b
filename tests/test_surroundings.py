"""The script in different environments: user settings, a pipe, a notebook, a thread."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from conftest import (
    EMOTIONS, ROOT, RUN, SCRIPT, assert_same_run, expected_files, kept_history, make_dataset,
    read_history, script, start, wait_for_checkpoint)


@pytest.fixture
def odd_settings(tmp_path, monkeypatch):
    """Configure Keras and Matplotlib with settings that would break training or plots."""
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras/keras.json").write_text(json.dumps({
        "image_data_format": "channels_first", "floatx": "float16", "epsilon": 0.1,
        "backend": "jax"}))
    (tmp_path / "matplotlibrc").write_text(
        "backend: no such thing\nfigure.facecolor: black\nsavefig.transparent: True\n"
        "text.usetex: True\nfont.size: 40\n")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("KERAS_MAX_EPOCHS", "1")
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")  # changes the last digits
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "matplotlibrc"))
    # Jupyter sets such a backend; another Python installation may not have its package.
    monkeypatch.setenv("MPLBACKEND", "module://no_such_package.backend_inline")


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and signals")
def test_a_run_is_the_same_through_a_link_in_the_background_and_with_user_settings(
        odd_settings, small_dataset, whole_run, tmp_path):
    """Like `nohup ./link.py &` in a terminal where the user then presses Ctrl-C."""
    (tmp_path / "link.py").symlink_to(SCRIPT)
    process = start("--data-dir", small_dataset, *RUN, cwd=tmp_path, program="link.py",
                    at_ctrl_c=signal.SIG_IGN)
    wait_for_checkpoint(process, tmp_path, 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=280)
    assert (process.returncode, errors) == (0, "")
    assert_same_run(tmp_path, whole_run)
    for name in sorted(expected_files(whole_run / "output")):
        if name.endswith(".png"):
            assert (tmp_path / "output" / name).read_bytes() == (
                whole_run / "output" / name).read_bytes(), name


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_closed_pipe_ends_the_script_without_a_message(odd_settings, tmp_path):
    """`link.py --predict ... | head -1`: the script finds the included network through a link."""
    (tmp_path / "link.py").symlink_to(SCRIPT)
    for number in range(3):
        script.draw_face("happy", np.random.default_rng(0)).save(tmp_path / f"{number}.png")
    command = (f"{{ '{sys.executable}' link.py --predict 0.png --no-detect --predict 1.png 2.png; "
               "echo $? > status; } | head -1")
    process = subprocess.run(["sh", "-c", command], cwd=tmp_path, text=True, capture_output=True,
                             stdin=subprocess.DEVNULL, timeout=280)
    assert process.stdout.startswith("1/3 0.png, face 1: ") and process.stdout.count("\n") == 1
    assert process.stderr.startswith("no network in output yet") and (
        process.stderr.count("\n") == 1)
    assert (tmp_path / "status").read_text() == "141\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a signal")
def test_a_closed_pipe_ends_the_training_and_keeps_the_finished_epochs(small_dataset, tmp_path):
    """`script | tee log`, where tee is stopped."""
    process = start("--data-dir", small_dataset, *RUN, "--epochs", 50, cwd=tmp_path)
    wait_for_checkpoint(process, tmp_path, 1)
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (141, "")
    assert 1 <= len(kept_history(tmp_path / "output")["epoch"]) < 50


@pytest.mark.skipif(sys.platform == "win32", reason="needs a signal")
def test_ctrl_c_while_tensorflow_is_imported_prints_no_traceback(tmp_path, monkeypatch):
    (tmp_path / "keras.py").write_text("print('importing', flush=True)\nwhile True: pass")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start("--demo", cwd=tmp_path, at_ctrl_c=signal.SIG_DFL)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGINT, "")


def test_a_failed_import_is_reported(tmp_path, monkeypatch):
    """The script discards stderr while it imports TensorFlow, but not the traceback."""
    (tmp_path / "keras.py").write_text("raise ImportError('no such processor')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start("--demo", cwd=tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.endswith("ImportError: no such processor\n")


def test_run_in_a_notebook_keeps_its_settings(tmp_path, monkeypatch, capfd):
    """With `%run`, the script is `__main__` in the process of the notebook."""
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # cannot be reconfigured, as in a notebook
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--resume", "--output-dir", str(tmp_path)])
    handler, filters = signal.getsignal(signal.SIGINT), list(warnings.filters)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2 and "start a new run without --resume" in capfd.readouterr().err
    assert os.environ["MPLBACKEND"] == "module://matplotlib_inline.backend_inline"
    assert signal.getsignal(signal.SIGINT) is handler and warnings.filters == filters


def test_a_gpu_is_shared_with_other_programs():
    """For example, with the kernel of a notebook that runs the script."""
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"


def code_of_readme(word):
    """Return the first block of Python code in the README that contains `word`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if word in block)


def test_the_readmes_python_code_gives_the_same_results_as_the_command_line(
        small_dataset, whole_run, tmp_path, monkeypatch, capfd):
    """A second training in a thread with other images is independent of the first."""
    create_CNN, train_model = script.create_CNN, script.train_model
    monkeypatch.setattr(script, "create_CNN", lambda classes: create_CNN(classes, epochs=2))
    monkeypatch.setattr(script, "train_model", lambda model, data: train_model(
        model, data, epochs=2, batch_size=16))  # as in whole_run
    code = code_of_readme("train_model(")

    def run_code(folder):
        monkeypatch.chdir(folder)
        names = {}
        exec(code, names)
        face = script.draw_face("sad", np.random.default_rng(0))
        names["faces"] = script.classify_photo(face, names["model"], EMOTIONS)
        return names

    data_dirs = small_dataset, make_dataset(tmp_path / "other", 3, 1, 4)
    for images, data_dir in zip([(42, 14, 14), (21, 7, 28)], data_dirs):
        folder = tmp_path / f"with {images[0]} images"
        folder.mkdir()
        shutil.copytree(data_dir, folder / "data")
        try:
            with ThreadPoolExecutor(1) as pool:
                names = run_code(folder) if images[0] == 42 else pool.submit(
                    run_code, folder).result()
        finally:
            keras.config.set_dtype_policy("float32")
        data, scores, probabilities = names["data"], names["scores"], names["probabilities"]
        assert data.emotions == EMOTIONS
        parts = data.training, data.validation, data.test
        assert tuple(len(part.images) for part in parts) == images
        history = names["history"]
        assert history["epoch"] == [1, 2] and probabilities.shape == (images[2], 7)
        if images[0] == 42:
            del history["seconds"]
            assert [dict(zip(history, row)) for row in zip(*history.values())] == read_history(
                whole_run / "output")
            metrics = json.loads((whole_run / "output/metrics.json").read_text())["test"]
            assert scores["loss"] == metrics["loss"]
        assert scores["accuracy"] == np.mean(probabilities.argmax(axis=1) == data.test.labels)
        assert [face["face"] for face in names["faces"]] == [1]
        assert {path.name for path in (folder / "output").iterdir()} >= {
            "accuracy.png", "loss.png", "confusion_matrix.png"}


def test_keras_alone_predicts_what_the_script_predicts_in_one_view(tmp_path, monkeypatch, capsys):
    """The input is the pixels of the image, without preprocessing."""
    rng = np.random.default_rng(0)
    face = script.Image.fromarray(rng.integers(0, 256, (90, 70, 3), "uint8"))
    face.save(tmp_path / "face.jpg")
    views = []

    def classify_and_tell(model, images):
        views.append(images)
        return model.predict(images, verbose=0)  # a single view

    monkeypatch.setattr(script, "classify_faces", classify_and_tell)
    script.predict_emotions([tmp_path / "face.jpg"], tmp_path, detect=False, as_json=True)
    predicted = json.loads(capsys.readouterr().out)["probabilities"]
    network, = ROOT.glob(f"docs/runs/*/{script.NETWORK_FILE}")
    model = keras.models.load_model(network)
    image = keras.utils.load_img(tmp_path / "face.jpg", "grayscale", (48, 48), "bilinear")
    probabilities = model.predict(keras.utils.img_to_array(image)[None])[0]
    assert np.allclose(probabilities, list(predicted.values()), atol=1e-6)
    assert views[0].shape == (1, 48, 48, 1)
