"""What the user's machine brings along: settings, closed streams, links, Ctrl-C at any time."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import RUN, SCRIPT, assert_same_run, script, start, wait_for_epoch


@pytest.fixture
def odd_settings(tmp_path, monkeypatch):
    """Make settings of Keras and Matplotlib that nobody would train a network with."""
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras/keras.json").write_text(json.dumps({
        "image_data_format": "channels_first", "floatx": "float16", "epsilon": 0.1,
        "backend": "jax"}))
    (tmp_path / "matplotlibrc").write_text(
        "backend: no such thing\nfigure.facecolor: black\nsavefig.transparent: True\n"
        "text.usetex: True\nfont.size: 40\n")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("KERAS_MAX_EPOCHS", "1")
    monkeypatch.setenv("KERAS_MAX_STEPS_PER_EPOCH", "1")
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "matplotlibrc"))
    # Jupyter's, whose package the Python of this process may have and this one has not.
    monkeypatch.setenv("MPLBACKEND", "module://no_such_package.backend_inline")


@pytest.mark.skipif(sys.platform == "win32", reason="closes streams with a shell")
def test_a_run_is_the_same_with_settings_of_the_users_own_and_without_streams(
        odd_settings, small_dataset, whole_run, tmp_path):
    command = [sys.executable, SCRIPT, "--data-dir", small_dataset, *RUN]
    process = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command], cwd=tmp_path,
                             stdin=subprocess.DEVNULL, capture_output=True, timeout=280)
    assert (process.returncode, process.stdout, process.stderr) == (0, b"", b"")
    assert_same_run(tmp_path, whole_run)
    for name in "accuracy.png", "confusion_matrix.png", "examples.png":
        assert (tmp_path / "output" / name).read_bytes() == (
            whole_run / "output" / name).read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_the_output_may_be_cut_short_and_the_script_be_a_link(
        odd_settings, tmp_path):
    """`script --predict ... | head -1` through a link: the included network is found."""
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


def test_a_run_whose_output_nobody_reads_any_more_says_what_is_kept(small_dataset, tmp_path):
    process = start("--data-dir", small_dataset, *RUN[2:], "--epochs", "50", cwd=tmp_path)
    wait_for_epoch(process, tmp_path)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 141
    assert errors.startswith("error: nobody reads the output any more; epochs kept in ")
    assert errors.count("\n") == 1 and "--resume goes on" in errors


def test_ctrl_c_while_tensorflow_is_imported_gives_one_line(tmp_path):
    (tmp_path / "keras.py").write_text(
        "import os, signal\nos.write(2, b'of the import')\nos.kill(os.getpid(), signal.SIGINT)\n")
    process = subprocess.run(
        [sys.executable, SCRIPT, "--demo"], cwd=tmp_path, text=True, capture_output=True,
        timeout=60, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("variable, value, word", [
    ("MPLBACKEND", "nonsense", "nonsense"), ("KERAS_MAX_EPOCHS", "many", "many")])
def test_a_setting_that_is_wrong_gives_one_line(tmp_path, variable, value, word):
    process = subprocess.run([sys.executable, SCRIPT, "--demo"], cwd=tmp_path, text=True,
                             capture_output=True, timeout=60, env={**os.environ, variable: value})
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: Keras, Matplotlib or what they need cannot be")
    assert word in process.stderr


def test_in_a_thread_there_is_no_signal_to_wait_for(demo, tmp_path, capsys):
    from concurrent.futures import ThreadPoolExecutor
    script.draw_face("sad", np.random.default_rng(0)).save(tmp_path / "face.png")
    shutil.copy(demo[0] / "output" / script.NETWORK, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(script.predict_emotions, tmp_path / "face.png", tmp_path, True, True)
        assert future.result()
    assert json.loads(capsys.readouterr().out)["face"] == 1
