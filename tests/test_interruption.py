"""Runs of the script that are interrupted, killed, short of room, resumed."""

import errno
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import (
    OUTPUTS, RUN, assert_same_run, flat, foreign_model, kept_history, read_history, run, start,
    wait_for_epoch)
from PIL import Image


def test_same_seed_same_history(small_dataset, whole_run, tmp_path, run_here):
    process = run_here("--data-dir", small_dataset, *RUN, "--seed", 0, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert len(read_history(tmp_path / "output")) == 3
    assert_same_run(tmp_path, whole_run)


def test_run_that_is_killed_again_and_again_ends_as_if_it_never_was(
        small_dataset, whole_run, tmp_path, run_here):
    for kill in range(2):
        resume = ["--resume", "--output-dir", "output"] if kill else [
            "--data-dir", small_dataset, *RUN]
        process = start(*resume, cwd=tmp_path)
        wait_for_epoch(process, tmp_path)
        seconds = kept_history(tmp_path / "output")["seconds"][-1]
        time.sleep(random.uniform(0, seconds / 2))  # into the saving, or into the next epoch
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = run_here("--resume", "--output-dir", "output", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_run(tmp_path, whole_run)
    assert {path.name for path in (tmp_path / "output").iterdir()} == OUTPUTS


def test_ctrl_c_keeps_what_was_trained_and_resume_goes_on(
        small_dataset, whole_run, tmp_path, run_here):
    process = start("--data-dir", small_dataset, *RUN, cwd=tmp_path)
    unfinished = tmp_path / "output/unfinished"
    wait_for_epoch(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    epochs = len(kept_history(tmp_path / "output")["epoch"])
    assert errors.strip().count("\n") == 0 and "--resume" in errors
    assert f"epochs kept in output/unfinished: {epochs}" in errors

    # Neither a run that forgets about it nor one with other settings touches it.
    kept = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    for arguments, word in ((RUN, "--resume"), (("--resume", "--epochs", "9"), "--epochs"),
                            (("--resume", "--seed", "1"), "--seed"),
                            (("--resume", "--data-dir", "elsewhere"), "--data-dir")):
        refused = run_here(*arguments, cwd=tmp_path)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1 and word in refused.stderr
    assert kept == {path.name: path.read_bytes() for path in unfinished.iterdir()}
    for name in "accuracy.png", "loss.png":
        assert Image.open(unfinished / name).size[0] >= 800

    process = run_here("--resume", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_run(tmp_path, whole_run)


def test_ctrl_c_before_the_first_epoch_leaves_nothing(small_dataset, tmp_path):
    process = start("--data-dir", small_dataset, "--epochs", "3", cwd=tmp_path)
    assert process.stdout.readline()  # the processor: what follows is reading and training
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted; no epoch is kept"
    assert not (tmp_path / "output/unfinished").exists()


def test_earlier_results_stay_whole_until_the_next_run_has_its_own(
        small_dataset, whole_run, tmp_path, run_here):
    shutil.copytree(whole_run / "output", tmp_path / "output")
    (tmp_path / "output/predictions").mkdir()
    for name in "1_face.emotions.jpg", "face.jpg":  # a picture of the earlier network, a photo
        flat(90).save(tmp_path / "output/predictions" / name)
    before = {name: (tmp_path / "output" / name).read_bytes() for name in OUTPUTS}
    of_run = "--data-dir", small_dataset, *RUN, "--seed", 1
    process = start(*of_run, cwd=tmp_path)
    wait_for_epoch(process, tmp_path)
    process.kill()
    process.communicate()
    assert before == {name: (tmp_path / "output" / name).read_bytes() for name in OUTPUTS}
    shutil.rmtree(tmp_path / "output/unfinished")
    assert run_here(*of_run, cwd=tmp_path).returncode == 0
    after = {name: (tmp_path / "output" / name).read_bytes() for name in OUTPUTS}
    assert [path.name for path in (tmp_path / "output/predictions").iterdir()] == ["face.jpg"]
    assert all(before[name] != after[name] for name in OUTPUTS)
    one, other = read_history(whole_run / "output"), read_history(tmp_path / "output")
    assert len(one) == len(other) and one != other  # of another seed


def test_a_run_has_its_folder_for_itself_until_it_ends_or_is_killed(
        small_dataset, whole_run, tmp_path, run_here):
    of_run = "--data-dir", small_dataset, *RUN

    def assert_refused(*arguments):
        refused = run_here(*arguments, cwd=tmp_path)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
        assert "output/unfinished is in use by another run" in refused.stderr
        assert "--output-dir" in refused.stderr and "Epoch" not in refused.stdout

    process = start(*of_run, cwd=tmp_path)
    assert process.stdout.readline()  # in its first epoch, or reading
    assert_refused(*of_run)
    assert_refused("--demo")
    process.kill()
    process.communicate()
    assert (tmp_path / "output/unfinished").exists()
    process = start(*of_run, cwd=tmp_path)
    wait_for_epoch(process, tmp_path)
    assert_refused(*of_run)
    assert_refused("--resume")
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    assert_same_run(tmp_path, whole_run)


def test_full_disk_gives_one_line_and_the_run_can_go_on(
        small_dataset, whole_run, tmp_path, run_here, monkeypatch):
    """The second checkpoint finds no room: simulated, for where a small disk cannot be mounted."""
    replace, checkpoints = os.replace, []

    def full(source, target):
        if str(target).endswith("checkpoint.npz"):
            checkpoints.append(target)
            if len(checkpoints) == 2:
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    process = run_here("--data-dir", small_dataset, *RUN, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1, process.stderr
    for words in ("checkpoint.npz", "No space left on device", "epochs kept", "1, --resume"):
        assert words in process.stderr
    process = run_here("--resume", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_run(tmp_path, whole_run)


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a disk of so many megabytes, and gives its folder."""
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
        pytest.skip("there is no mount here")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(("megabytes", "epochs"), [(40, 0), (120, 1)])
def test_really_full_disk(
        small_dataset, small_disk, whole_run, tmp_path, run_here, megabytes, epochs):
    """A checkpoint is of 78 MB, and the one before stays until it is whole."""
    disk = small_disk(megabytes)
    process = run("--data-dir", small_dataset, *RUN[:-1], disk / "output", cwd=tmp_path)
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("\n") == 1 and "No space left on device" in process.stderr
    assert (f"unfinished: {epochs}, --resume" if epochs else "no epoch is kept") in process.stderr
    assert str(disk) in process.stderr
    assert (disk / "output/unfinished").exists() == bool(epochs)
    if epochs:  # with more room, it goes on
        shutil.copytree(disk / "output", tmp_path / "output")
        process = run_here("--resume", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        assert_same_run(tmp_path, whole_run)


def test_output_folder_that_vanishes_during_training(small_dataset, whole_run, tmp_path):
    """The next epoch makes the folder again and keeps them all; where it cannot, it says so."""
    processes = {}
    for name in "free", "blocked":
        (tmp_path / name).mkdir()
        processes[name] = start("--data-dir", small_dataset, *RUN, cwd=tmp_path / name)
    for name, process in processes.items():
        wait_for_epoch(process, tmp_path / name)
        (tmp_path / name / "output").rename(tmp_path / name / "elsewhere")
        if name == "blocked":
            (tmp_path / "blocked/output").write_text("in the way")
    _, errors = processes["free"].communicate(timeout=120)
    assert processes["free"].returncode == 0 and errors == "", errors
    assert_same_run(tmp_path / "free", whole_run)
    _, errors = processes["blocked"].communicate(timeout=120)
    assert processes["blocked"].returncode == 2 and errors.count("\n") == 1, errors
    assert "output/unfinished" in errors and "no epoch is kept" in errors
    assert (tmp_path / "blocked/output").read_text() == "in the way"
    assert kept_history(tmp_path / "blocked/elsewhere")["epoch"]


def test_loss_that_is_not_finite_ends_the_run(small_dataset, whole_run, tmp_path, run_here):
    shutil.copytree(whole_run / "output", tmp_path / "output")
    process = run_here("--data-dir", small_dataset, *RUN, "--learning-rate", "1e30", cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert "the loss is NaN or infinite: start anew" in process.stderr
    assert "--learning-rate below 1e+30" in process.stderr
    assert {path.name for path in (tmp_path / "output").iterdir()} == OUTPUTS
    assert read_history(tmp_path / "output") == read_history(whole_run / "output")


@pytest.fixture(scope="module")
def unfinished_run(small_dataset, tmp_path_factory):
    """Return the folder of a run, on the dataset in data/ there, that was killed after an epoch."""
    folder = tmp_path_factory.mktemp("unfinished")
    shutil.copytree(small_dataset, folder / "data")
    process = start("--data-dir", "data", *RUN, cwd=folder)
    wait_for_epoch(process, folder)
    process.kill()
    process.communicate()
    assert kept_history(folder / "output")
    return folder


@pytest.mark.parametrize("change", [
    lambda data: shutil.copy(data / "train/sad/Training_0.png", data / "train/sad/Training_1.png"),
    lambda data: shutil.copy(data / "train/sad/Training_0.png", data / "test/sad/PublicTest_1.png"),
    lambda data: (data / "test/sad/PrivateTest_1.png").rename(data / "test/fear/PrivateTest_9.png"),
    lambda data: (data / "train/sad/Training_0.png").rename(data / "train/happy/Training_9.png")])
def test_resume_notices_that_the_data_changed(
        small_dataset, unfinished_run, tmp_path, run_here, change):
    shutil.copytree(small_dataset, tmp_path / "data")
    shutil.copytree(unfinished_run / "output", tmp_path / "output")
    change(tmp_path / "data")
    kept = kept_history(tmp_path / "output")
    process = run_here("--resume", cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert "images changed since" in process.stderr and "delete" in process.stderr
    assert "output/unfinished" in process.stderr and kept_history(tmp_path / "output") == kept


def state_of_nothing(path):
    """Write a checkpoint that is whole and says nothing."""
    np.savez(path, state="[]")


def of_another_network(path):
    """Write the checkpoint of a network with other layers, on the same data."""
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"variable 0": arrays["variable 0"][:-1]})


@pytest.mark.parametrize(("damage", "words"), [
    (lambda path: path.write_text("no archive"), ["checkpoint.npz is damaged", "delete"]),
    (lambda path: path.write_bytes(path.read_bytes()[:-9000]), ["checkpoint.npz is damaged"]),
    (lambda path: path.write_bytes(b""), ["checkpoint.npz is damaged"]),
    (foreign_model, ["checkpoint.npz is damaged"]),
    (state_of_nothing, ["checkpoint.npz is damaged"]),
    (of_another_network, ["the layers changed since", "output/unfinished", "delete"])])
def test_damaged_or_foreign_state_gives_one_line(unfinished_run, tmp_path, damage, words, run_here):
    shutil.copytree(unfinished_run, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "output/unfinished/checkpoint.npz")
    process = run_here("--resume", cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1, process.stderr
    assert all(word in process.stderr for word in words), process.stderr
