"""Runs of the script that are interrupted, killed or out of disk space, and then resumed."""

import shutil
import signal
import subprocess
import time

import keras
import numpy as np
import pytest
from conftest import (
    RUN, assert_same_run, changed_script, expected_files, flat, foreign_model, kept_history,
    read_history, script, start, wait_for_checkpoint)


def names(folder):
    """Return the names of all files and folders in a folder."""
    return {path.name for path in folder.iterdir()}


def contents(folder):
    """Return a dict from the names of the complete files in a folder to their contents."""
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.is_file() and not path.name.startswith(".")}  # incomplete files are hidden


def assert_refused(process, *words):
    """Assert that a run ended before training with a one-line error that contains `words`."""
    assert process.returncode == 2 and "Epoch" not in process.stdout
    line = process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr and " error: " in f" {line}", process.stderr
    assert process.stderr.count("\n") == 1 or process.stderr.startswith("usage: ")  # from argparse
    assert all(word in line for word in words), line


def test_a_run_that_is_killed_twice_has_the_same_results_as_an_uninterrupted_one(
        killed_run, whole_run, tmp_path, run_here):
    """It is resumed in another working directory: the checkpoint has the absolute path of data/."""
    shutil.copytree(killed_run / "output", tmp_path / "output")
    process = run_here("--resume", "--output-dir", "output", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_run(tmp_path, whole_run)
    # Without hidden files and unfinished/.
    assert names(tmp_path / "output") == expected_files(tmp_path / "output")


def test_ctrl_c_keeps_the_finished_epochs_and_resume_continues(
        small_dataset, whole_run, tmp_path, run_here):
    """The data folder is renamed in between; the script recognises the images."""
    shutil.copytree(small_dataset, tmp_path / "data")
    process = start("--data-dir", "data", *RUN, cwd=tmp_path)
    wait_for_checkpoint(process, tmp_path, 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (
        130, "interrupted; continue with --resume --output-dir output\n")
    unfinished = tmp_path / "output/unfinished"
    assert names(tmp_path / "output") == {"unfinished"}

    # A run without --resume or with other settings or images must not change the checkpoint.
    kept = contents(unfinished)
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    flat(90).save(tmp_path / "other/train/sad/Training_0.png")
    assert_refused(run_here(*RUN, cwd=tmp_path), "output/unfinished", "--resume", "delete")
    for option in ("--epochs=9", "--seed=1", "--batch-size=4", "--precision=float32",
                   "--learning-rate=1", "--crop-faces"):
        assert_refused(run_here("--resume", option, cwd=tmp_path), option.split("=")[0])
    assert_refused(run_here("--resume", "--data-dir", "other", cwd=tmp_path),
                   "the images changed", "output/unfinished")
    (tmp_path / "data").rename(tmp_path / "moved")
    assert_refused(run_here("--resume", cwd=tmp_path), f"{tmp_path}/data/train", "--data-dir")
    assert contents(unfinished) == kept

    process = run_here("--resume", "--data-dir", "moved", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_run(tmp_path, whole_run)


def test_ctrl_c_before_training_leaves_nothing(small_dataset, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(keras.utils, "Progbar", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    process = run_here("--data-dir", small_dataset, cwd=tmp_path)  # while it reads the images
    assert (process.returncode, process.stderr) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_the_first_checkpoint_is_written_leaves_nothing(
        small_dataset, tmp_path, run_here, monkeypatch):
    def stop_halfway(file, *_, **__):
        file.write(b"half of it")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(np, "savez", stop_halfway)
    process = run_here("--data-dir", small_dataset, cwd=tmp_path)
    assert (process.returncode, process.stderr) == (130, "interrupted\n")
    assert not list((tmp_path / "output").iterdir())  # the next run is not refused


def test_a_run_that_was_killed_before_its_first_checkpoint_blocks_no_other(
        small_dataset, tmp_path, run_here, monkeypatch):
    checkpoint = tmp_path / "output/unfinished/checkpoint.npz"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    monkeypatch.setattr(keras.Sequential, "fit", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here("--data-dir", small_dataset, cwd=tmp_path)
    assert kept_history(tmp_path / "output") == {"epoch": []}


def test_a_run_that_was_killed_while_it_saved_its_first_checkpoint_blocks_no_other(
        small_dataset, tmp_path, run_here):
    """A run that finishes deletes what the killed one left: an incomplete temporary file."""
    unfinished = tmp_path / "output/unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / ".1.checkpoint.npz").write_bytes(b"half of it")
    process = run_here("--data-dir", small_dataset, *RUN, cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == ""
    assert names(tmp_path / "output") == expected_files(tmp_path / "output")


def test_of_two_simultaneous_runs_in_a_folder_one_continues(small_dataset, whole_run, tmp_path):
    """The other ends with a one-line error.  The results are the same as without it."""
    of_run = "--data-dir", small_dataset, *RUN
    processes = [start(*of_run, cwd=tmp_path) for _ in range(2)]
    ends = [process.communicate(timeout=280) for process in processes]
    (status, errors), (other_status, other_errors) = sorted(
        (process.returncode, errors) for process, (_, errors) in zip(processes, ends))
    assert (status, errors, other_status) == (0, "", 2), other_errors
    assert other_errors.startswith("error: ") and other_errors.count("\n") == 1
    assert "output/unfinished" in other_errors and "another --output-dir" in other_errors
    assert_same_run(tmp_path, whole_run)
    assert names(tmp_path / "output") == expected_files(tmp_path / "output")


def test_results_are_replaced_at_the_end_and_a_failing_plot_loses_nothing(
        small_dataset, whole_run, tmp_path, run_here, monkeypatch):
    """The results of an earlier run in the folder stay until the new ones are complete."""
    shutil.copytree(whole_run / "output", tmp_path / "output")
    before = contents(tmp_path / "output")
    assert set(before) == expected_files(tmp_path / "output")
    fit, seen = keras.Sequential.fit, []

    def look_and_fit(model, *arguments, **settings):
        seen.append(contents(tmp_path / "output") == before)
        return fit(model, *arguments, **settings)

    def fail(*_, **__):
        raise ArithmeticError("a picture")

    with monkeypatch.context() as patch, pytest.raises(ArithmeticError, match="a picture"):
        patch.setattr(keras.Sequential, "fit", look_and_fit)
        patch.setattr(keras.layers, "GlobalMaxPooling2D", fail)  # only used for filters.png
        run_here("--data-dir", small_dataset, *RUN, "--seed", 1, "--epochs", 1, cwd=tmp_path)
    assert seen == [True]
    after = contents(tmp_path / "output")
    assert after["emotion_recognition_cnn.keras"] != before["emotion_recognition_cnn.keras"]
    assert after["filters.png"] == before["filters.png"] and set(after) == set(before)

    process = run_here("--resume", cwd=tmp_path)  # without training again
    assert process.returncode == 0 and "Epoch" not in process.stdout, process.stderr
    after = contents(tmp_path / "output")
    assert all(after[name] != before[name] for name in before)
    assert names(tmp_path / "output") == expected_files(tmp_path / "output")
    epochs = read_history(tmp_path / "output")
    assert len(epochs) == 1 and epochs[0] != read_history(whole_run / "output")[0]  # another seed


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a disk of a given size in megabytes and returns its folder."""
    mounted = []

    def mount(megabytes):
        folder = tmp_path / f"disk of {megabytes} MB"
        folder.mkdir()
        mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs",
                                   folder], capture_output=True, text=True)
        if mounting.returncode:
            pytest.skip(f"mounting a small disk needs root: {mounting.stderr.strip()}")
        mounted.append(folder)
        return folder

    if not shutil.which("mount"):
        pytest.skip("mount is not available")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(("networks", "epochs"), [(2, None), (6, 0)])
def test_full_disk(
        small_dataset, small_disk, whole_run, tmp_path, run_here, networks, epochs):
    """A checkpoint takes as much as four networks; the previous one stays until it is complete."""
    network = (whole_run / "output" / script.NETWORK_FILE).stat().st_size / 1e6
    disk = small_disk(round(networks * network))
    output = disk / "output"
    shutil.copytree(whole_run / "output", output)  # earlier results: 1 MB more than a network
    before = contents(output)
    process = run_here("--data-dir", small_dataset, *RUN[:-1], output, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "No space left on device" in process.stderr
    assert contents(output) == before
    if epochs is None:  # a new run is not blocked
        assert names(output) == expected_files(output)
        return
    assert names(output / "unfinished") == {"checkpoint.npz"}
    assert len(kept_history(output)["epoch"]) == epochs
    more = f"remount,size={round(20 * network)}m"
    subprocess.run(["mount", "-o", more, disk], check=True)
    process = run_here("--resume", "--output-dir", output, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_run(disk, whole_run)
    assert names(output) == expected_files(output)


@pytest.mark.parametrize("change", [
    lambda data: shutil.copy(data / "train/sad/Training_0.png", data / "train/sad/Training_1.png"),
    lambda data: shutil.copy(data / "train/sad/Training_0.png", data / "test/sad/PublicTest_1.png"),
    lambda data: (data / "test/sad/PrivateTest_1.png").rename(data / "test/fear/PrivateTest_9.png"),
    lambda data: (data / "train/sad/Training_0.png").rename(data / "train/happy/Training_9.png")])
def test_resume_notices_that_the_data_changed(killed_run, tmp_path, run_here, change):
    shutil.copytree(killed_run, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "data")
    kept = contents(tmp_path / "output/unfinished")
    process = run_here("--resume", "--data-dir", "data", cwd=tmp_path)
    assert_refused(process, "the images changed", "delete", "output/unfinished")
    assert contents(tmp_path / "output/unfinished") == kept


@pytest.mark.parametrize("damage", [
    lambda path: path.write_text("no archive"),
    lambda path: path.write_bytes(path.read_bytes()[:-9000]),
    lambda path: path.write_bytes(b""), foreign_model])
def test_damaged_or_foreign_checkpoint_gives_one_line(killed_run, tmp_path, damage, run_here):
    shutil.copytree(killed_run / "output", tmp_path / "output")
    damage(tmp_path / "output/unfinished/checkpoint.npz")
    process = run_here("--resume", cwd=tmp_path)
    assert_refused(process, "output/unfinished/checkpoint.npz is not a usable checkpoint",
                   "Delete")


def test_checkpoint_of_another_network_gives_one_line(killed_run, tmp_path, run_here):
    shutil.copytree(killed_run / "output", tmp_path / "output")
    changed = changed_script(tmp_path, ("layers.Dense(512,", "layers.Dense(256,"))
    process = run_here("--resume", cwd=tmp_path, program=changed)
    assert_refused(process, "the number of parameters changed", "output/unfinished", "delete")


def test_a_demo_resumes_with_the_same_faces(tmp_path, run_here, monkeypatch):
    """They are drawn again, with the same seed."""
    def fit(*_, **__):
        raise OSError("enough of it")

    monkeypatch.setattr(keras.Sequential, "fit", fit)
    few_faces = changed_script(tmp_path, ('"Training", 300)', '"Training", 6)'),
                               ('"PublicTest", 50)', '"PublicTest", 2)'))
    for arguments in ("--demo", "--seed", 4), ("--resume", "--demo"):
        process = run_here(*arguments, cwd=tmp_path, program=few_faces)
        assert process.returncode == 2
        assert process.stderr == (
            "error: demo: enough of it; continue with --resume --output-dir demo\n")
        assert "Drawing faces" in process.stdout and "42 training, 14 valid" in process.stdout
        assert names(tmp_path / "demo/unfinished") == {"checkpoint.npz"}


def test_a_demo_that_is_stopped_early_leaves_no_faces(tmp_path, monkeypatch):
    """It is stopped while it draws or reads them; they are in a temporary folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for line, folders in ("Drawing", 1), ("Reading", 2):
        process = start("--demo", cwd=tmp_path)
        while not process.stdout.readline().startswith(line):
            pass
        while len(list(tmp_path.glob("temporary/*/t*"))) < folders:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "interrupted\n")
        assert not list(tmp_path.glob("temporary/*")) and names(tmp_path) == {"temporary"}


def test_resume_notices_that_a_metric_was_added(killed_run, tmp_path, run_here):
    shutil.copytree(killed_run / "output", tmp_path / "output")
    changed = changed_script(tmp_path, (
        '                  "sparse_categorical_crossentropy", metrics=["accuracy"])',
        '                  "sparse_categorical_crossentropy", metrics=["accuracy", "mae"])'))
    assert_refused(run_here("--resume", cwd=tmp_path, program=changed), "the metrics changed")


def test_nothing_to_resume_gives_one_line(tmp_path, run_here):
    assert_refused(run_here("--resume", cwd=tmp_path), "output/unfinished", "without --resume")
    assert not list(tmp_path.iterdir())
