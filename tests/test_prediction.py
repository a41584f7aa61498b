"""Finding, cropping, classifying and drawing faces in photos."""

import csv
import json
import os
import re
import shutil
import signal
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pillow_heif
import pytest
import skimage.data
import tensorflow as tf
from conftest import EMOTIONS, ROOT, foreign_model, run, script, small_network, start
from PIL import Image

INCLUDED = ROOT / "docs/runs/88-0" / script.NETWORK_FILE


@pytest.fixture(scope="module")
def astronaut():
    """Return a photo (PIL image, 512x512) of a woman with her face at about (182, 64, 265, 171)."""
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture(scope="module")
def network():
    """Return the included network and its emotions."""
    return script.load_network(INCLUDED)


@pytest.fixture
def trained(tmp_path_factory):
    """Return an output folder that only contains the included network."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(INCLUDED, folder)
    return folder


@pytest.fixture
def untrained(tmp_path_factory):
    """Return an output folder with a small network, for tests that work with any network."""
    folder = tmp_path_factory.mktemp("untrained")
    script.save_network(small_network(), EMOTIONS, folder / script.NETWORK_FILE)
    return folder


class Detector:
    """Replaces MTCNN and finds faces in given boxes, in any photo."""

    def __init__(self, *boxes):
        self.boxes = boxes

    def detect_faces(self, pixels, **_):
        self.shape = pixels.shape
        return [{"box": box, "confidence": 1.0} for box in self.boxes]


@pytest.fixture
def detector(monkeypatch):
    """Return `detector(*boxes)`, which makes the script find faces in these boxes."""
    def detector(*boxes):
        stand_in = Detector(*boxes)
        monkeypatch.setattr(script, "face_detector", lambda: stand_in)
        return stand_in

    return detector


def sad_face(path):
    """Save a drawn face."""
    script.draw_face("sad", np.random.default_rng(0)).save(path)
    return path


def predict(paths, output_dir, capsys, detect=True):
    """Classify photos; return whether all could be read, a dict per face, and stderr."""
    capsys.readouterr()
    all_read = script.predict_emotions(paths, output_dir, detect, as_json=True)
    printed = capsys.readouterr()
    return all_read, [json.loads(line) for line in printed.out.splitlines()], printed.err


# --- From the command line ------------------------------------------------------------------------
def test_predictions_match_the_evaluation(
        whole_run, small_dataset, tmp_path, monkeypatch, run_here):
    """The test images, predicted from the command line, give the accuracy of metrics.json."""
    monkeypatch.setitem(sys.modules, "mtcnn", None)  # makes its import fail: not needed
    paths = sorted(small_dataset.glob("test/*/PrivateTest_*"))
    process = run_here("--predict", *paths, "--no-detect", "--json",
                       "--output-dir", whole_run / "output", cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    faces = [json.loads(line) for line in process.stdout.splitlines()]
    assert [face["file"] for face in faces] == list(map(str, paths))
    correct = [face["emotion"] == path.parent.name for face, path in zip(faces, paths)]
    metrics = json.loads((whole_run / "output/metrics.json").read_text())["test"]
    assert np.mean(correct) == metrics["accuracy"]

    model, emotions = script.load_network(whole_run / "output" / script.NETWORK_FILE)
    assert emotions == EMOTIONS
    probabilities = script.classify_faces(model, script.load_data(small_dataset).test.images)
    predicted = np.array([list(face["probabilities"].values()) for face in faces])
    assert np.abs(predicted - probabilities).max() <= 1e-5
    assert [EMOTIONS[i] for i in probabilities.argmax(1)] == [face["emotion"] for face in faces]
    assert np.allclose(predicted.max(1), [face["confidence"] for face in faces])
    assert list(faces[0]["probabilities"]) == EMOTIONS and faces[0]["face"] == 1


def test_photos_from_the_command_line(trained, astronaut, tmp_path):
    """Prints a line per face and saves a picture per photo, even if other photos are unreadable."""
    shutil.copytree(trained, tmp_path / "output")
    (tmp_path / "album/deep").mkdir(parents=True)
    pair = Image.new("RGB", (700, 300), "grey")
    pair.paste(astronaut.crop((100, 0, 350, 250)), (50, 25))
    pair.paste(astronaut.crop((100, 0, 350, 250)).rotate(5), (400, 25))
    pair.save(tmp_path / "album/pair.png")
    for no_photo in "list.txt", "._pair.png":
        (tmp_path / "album" / no_photo).write_text("no photo")
    sad_face(tmp_path / "album/deep/pair.jpg")
    Image.fromarray(skimage.data.brick()).save(tmp_path / "wall.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "album/pair.png").read_bytes()[:9000])
    process = run("--predict", "cut.png", "album", "wall.png", "gone.png", cwd=tmp_path)
    assert process.returncode == 2, process.stderr
    lines = process.stdout.splitlines()
    drawn = [line.removeprefix("  picture: ") for line in lines if "face" not in line]
    assert len(set(drawn)) == 2  # although both photos are called "pair"
    rows = [line for line in lines if "face" in line]
    for row, face in zip(rows, ["2/5 album/deep/pair.jpg, face 1: ", "3/5 album/pair.png, face 1: ",
                                "3/5 album/pair.png, face 2: "], strict=True):
        assert row.startswith(face)
        shares = {emotion: float(re.search(rf"[(,] ?{emotion} ([0-9.]+)%", row)[1])
                  for emotion in EMOTIONS}
        assert sum(shares.values()) == pytest.approx(100, abs=0.5)
        surest = max(shares, key=shares.get)
        assert row.startswith(f"{face}{surest} {shares[surest]}%  (")
    passed_over, cut, wall, gone = process.stderr.splitlines()  # nothing from TensorFlow
    assert passed_over.startswith("album: skipped 1 of 3 files") and passed_over.endswith("(.txt)")
    assert cut.startswith("error: cut.png cannot be read as an image: ")
    assert wall.startswith("wall.png: no face") and "--no-detect" in wall
    assert gone.startswith("error: gone.png ") and "No such file" in gone
    assert sorted(drawn) == sorted(str(file.relative_to(tmp_path)) for file in (
        tmp_path / "output/predictions").glob("pair-????????.emotions.jpg"))
    assert all(min(Image.open(tmp_path / file).size) >= 480 for file in drawn)


def test_ctrl_c_keeps_the_photos_that_are_done(untrained, tmp_path, monkeypatch, run_here):
    found = []

    def find_two_and_stop(*_, **__):
        if len(found) == 2:
            signal.raise_signal(signal.SIGINT)
        found.append({"box": (40, 50, 60, 70), "confidence": 1.0})
        return found[-1:]

    (tmp_path / "album").mkdir()
    for number in range(5):
        Image.new("RGB", (500, 500), "grey").save(tmp_path / f"album/{number}.png")
    monkeypatch.setattr("mtcnn.MTCNN.detect_faces", find_two_and_stop)
    process = run_here("--predict", "album", "--output-dir", untrained, cwd=tmp_path)
    assert process.returncode == 130 and process.stderr == "interrupted\n"
    rows = [row for row in process.stdout.splitlines() if ", face " in row]
    assert [row.partition(",")[0] for row in rows] == ["1/5 album/0.png", "2/5 album/1.png"]
    pictures = sorted((untrained / "predictions").iterdir())
    assert [file.name.partition("-")[0] for file in pictures] == ["0", "1"]
    assert all(Image.open(file).load() for file in pictures)


def test_json_saves_no_pictures(untrained, tmp_path, capsys):
    _, (face,), _ = predict([sad_face(tmp_path / "face.png")], untrained, capsys)
    assert list(face) == ["file", "face", "box", "emotion", "confidence", "probabilities"]
    assert not (untrained / "predictions").exists()


# --- From Python ----------------------------------------------------------------------------------
def test_a_photo_from_python_gives_what_json_prints(network, trained, astronaut, tmp_path, capsys):
    """For a path, a string, a PIL image and an array, with and without detection."""
    path = tmp_path / "photo.png"
    astronaut.save(path)
    for detect in True, False:
        _, printed, _ = predict([path], trained, capsys, detect)
        for photo in path, str(path), astronaut, np.asarray(astronaut):
            faces = script.classify_photo(photo, *network, detect=detect)
            faces = json.loads(json.dumps([{"file": str(path), **face} for face in faces]))
            assert len(faces) == 1 and faces == printed
    assert script.classify_photo(np.full((300, 300), 90, "uint8"), *network) == []
    pillow_heif.from_pillow(astronaut).save(tmp_path / "photo.heic")
    for name in "photo.png", "photo.heic":
        with open(tmp_path / name, "rb") as file:
            assert len(script.classify_photo(file, *network)) == 1


def test_arrays_from_keras_numpy_and_load_data(network, astronaut):
    grey, colours = np.asarray(astronaut.convert("L")), keras.utils.img_to_array(astronaut)
    assert colours.dtype == "float32" and colours.max() == 255
    expected, = script.classify_photo(astronaut, *network)
    assert script.classify_photo(colours, *network) == [expected]
    assert script.classify_photo(colours.astype("float64") + 0.3 * (colours < 255),
                                 *network) == [expected]  # rounded
    expected, = script.classify_photo(grey, *network)
    for array in grey[..., np.newaxis], grey.astype("float16"), grey[..., np.newaxis] * 1.0:
        assert script.classify_photo(array, *network) == [expected]
    of_load_data = np.zeros((48, 48, 1), "uint8")
    assert len(script.classify_photo(of_load_data, *network)) == 1
    assert len(script.classify_photo(of_load_data.astype("float32"), *network)) == 1


def test_an_input_that_is_not_a_photo_is_an_error(network, tmp_path):
    (tmp_path / "x.png").write_text("no photo")
    for photo in tmp_path / "gone.png", tmp_path / "x.png":
        with pytest.raises(script.InputError, match=f"^{photo} cannot be read"):
            script.classify_photo(photo, *network)
    for photo in None, 3, [[1, 2]], b"JPEG":
        with pytest.raises(script.InputError, match=f"^this {type(photo).__name__} cannot be read "
                           ".*: it must be a path, an open file, a PIL image or an array"):
            script.classify_photo(photo, *network)


@pytest.mark.parametrize("array", [
    np.full((60, 60, 3), 0.5), np.full((60, 60), 256.0), np.full((60, 60), -3.0),
    np.full((60, 60), np.nan), np.zeros((60, 60), "int64"), np.zeros((60, 60, 4), "uint8"),
    np.zeros((1, 60, 60, 1), "uint8"), np.zeros(60, "uint8"), np.zeros((60, 60, 2), "uint8"),
    np.zeros((0, 60, 3), "uint8"), np.zeros((60, 0), "uint8")],
    ids=lambda array: f"{array.dtype} {array.shape} {array.max(initial=0)}")
def test_the_error_for_other_arrays_describes_them(network, array):
    with pytest.raises(script.InputError, match="^this ndarray cannot be read as an image: an "
                       f"array must be .*; this one is {array.dtype}, {array.shape[0]}"):
        script.classify_photo(array, *network)


def test_two_threads_load_one_detector_and_do_not_change_stderr(
        network, astronaut, monkeypatch):
    """Like a web service that receives a second photo while it loads the detector."""
    import mtcnn
    detectors, MTCNN, both_wait = [], mtcnn.MTCNN, threading.Barrier(2)

    def load():
        assert sys.stderr is stderr
        detectors.append(MTCNN())
        return detectors[-1]

    def classify(photo):
        both_wait.wait()
        return script.classify_photo(photo, *network)

    stderr, hook = sys.stderr, sys.unraisablehook
    monkeypatch.setattr(mtcnn, "MTCNN", load)
    script.face_detector.cache_clear()
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(classify, [astronaut] * 2)
    script.face_detector.cache_clear()
    assert one == other and len(one) == 1 and len(detectors) == 1
    assert sys.stderr is stderr and sys.unraisablehook is hook


def test_packages_that_a_photo_does_not_need_may_be_missing(
        untrained, astronaut, tmp_path, monkeypatch):
    """For other photos, one line says which package is missing and how to install it."""
    (tmp_path / "missing").mkdir()
    for package in "mtcnn", "pi_heif", "scipy", "kagglehub":
        (tmp_path / f"missing/{package}.py").write_text("raise ImportError('not installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "missing"))
    pillow_heif.from_pillow(astronaut).save(tmp_path / "1.heic")
    sad_face(tmp_path / "2.png")
    astronaut.save(tmp_path / "3.jpg")
    photos = "--predict", "1.heic", "2.png", "3.jpg", "--json", "--output-dir", untrained
    process = run(*photos, "--no-detect", cwd=tmp_path)
    files = [json.loads(line)["file"] for line in process.stdout.splitlines()]
    assert process.returncode == 2 and files == ["2.png", "3.jpg"]
    assert process.stderr.startswith("error: 1.heic cannot be read as an image: this format needs")
    assert "pip install pi_heif" in process.stderr and process.stderr.count("\n") == 1

    process = run(*photos[:1], *photos[2:], cwd=tmp_path)
    assert process.returncode == 2
    assert json.loads(process.stdout)["file"] == "2.png"  # needs no detection
    assert process.stderr == ("error: finding faces needs the package mtcnn (not installed). "
                              "Install it with pip install mtcnn\n")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_prediction_computes_in_float32_with_any_policy(
        policy, trained, astronaut, tmp_path, capsys):
    """The detector is not loaded yet.  The policy must not change."""
    astronaut.save(tmp_path / "photo.png")
    _, (expected,), _ = predict([tmp_path], trained, capsys)
    script.face_detector.cache_clear()
    keras.config.set_dtype_policy(policy)
    try:
        all_well, (face,), errors = predict([tmp_path], trained, capsys)
        assert script.predict_emotions([tmp_path], trained)  # the picture as well
        assert keras.config.dtype_policy().name == policy
    finally:
        keras.config.set_dtype_policy("float32")
        script.face_detector.cache_clear()
    assert all_well and errors == "" and face["box"] == expected["box"]
    assert face["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)


# --- Reading photos -------------------------------------------------------------------------------
def test_photos_are_read_upright_in_all_formats(trained, astronaut, tmp_path, capsys):
    """Copies of a photo, also as HEIC or rotated by Exif data, give nearly the same prediction."""
    photo = astronaut.crop((100, 0, 350, 250))
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    sideways = Image.Exif()
    sideways[274] = 6  # viewers rotate it by 90 degrees clockwise
    for name, image, options in [
            ("upright.png", photo, {}), ("grey.png", photo.convert("L"), {}),
            ("sideways.png", turned, {"exif": sideways}),
            ("CMYK.jpg", photo.convert("CMYK"), {"quality": 100}),
            ("palette.gif", photo.convert("P", palette=Image.Palette.ADAPTIVE), {})]:
        image.save(tmp_path / name, **options)
    pillow_heif.from_pillow(photo).save(tmp_path / "iPhone.HEIC", quality=90)
    pillow_heif.from_pillow(turned).save(tmp_path / "iPhone sideways.heic", quality=90,
                                         exif=sideways.tobytes())
    all_read, faces, errors = predict([tmp_path], trained, capsys)
    assert all_read and errors == "" and len(faces) == 7
    upright = faces[-1]
    assert upright["file"].endswith("upright.png")
    for face in faces:
        # The square around the face is 1.25 times as wide as MTCNN's box (83 pixels).
        assert np.abs(np.subtract(face["box"], (72, 66, 176, 170))).max() <= 12, face
        assert np.abs(np.subtract(list(face["probabilities"].values()),
                                  list(upright["probabilities"].values()))).max() < 0.2, face


def test_narrow_photos_do_not_stop_the_others(untrained, tmp_path, capsys):
    sad_face(tmp_path / "z.png")
    for number, size in enumerate([(1, 5000), (5000, 1), (19, 100), (30, 3000), (20, 65)]):
        Image.new("L", size, 90).save(tmp_path / f"{number}.png")
    for detect in True, False:
        capsys.readouterr()
        assert script.predict_emotions([tmp_path], untrained, detect)
        rows, errors = capsys.readouterr()
        assert rows.count(".png") == (1 if detect else 6) and str(tmp_path / "z.png") in rows
        assert errors.count("no face found") == (5 if detect else 0)


def test_a_folder_is_searched_for_all_formats_that_pillow_opens(untrained, tmp_path, capsys):
    """Hidden files are ignored.  One line counts the files whose extension is not an image's."""
    album = tmp_path / "album"
    (album / "deep/deeper").mkdir(parents=True)
    photos = "b.JPEG", "c.jfif", "d.ppm", "deep/a.jpg", "deep/deeper/e.png", "f.tga", "g.webp"
    for name in photos:
        sad_face(album / name)
    pillow_heif.from_pillow(Image.new("RGB", (64, 64), "grey")).save(album / "h.heic")
    for no_photo in "clip.mp4", "notes.txt", "deep/more.txt":
        (album / no_photo).write_text("no photo")
    (album / "deep/back").symlink_to(album)  # a cycle
    (album / ".hidden").mkdir()
    for hidden in ".hidden/face.png", "._b.jpg":
        sad_face(album / hidden)
    for paths in album, str(album), [album]:
        all_well, faces, errors = predict(paths, untrained, capsys, detect=False)
        assert all_well
        assert [face["file"] for face in faces] == [str(album / name)
                                                    for name in (*photos, "h.heic")]
        assert errors.startswith(f"{album}: skipped 3 of 11 ")
        assert errors.endswith("(.mp4, .txt)\n") and errors.count("\n") == 1


def test_a_folder_without_photos_is_an_error(untrained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    paths = tmp_path / "empty", sad_face(tmp_path / "face.png")
    all_well, faces, errors = predict(paths, untrained, capsys, detect=False)
    assert not all_well and len(faces) == 1
    assert errors.startswith(f"error: {tmp_path}/empty ") and errors.count("\n") == 1
    assert script.predict_emotions([tmp_path / "empty"], untrained, detect=False) is False
    assert capsys.readouterr().out == ""


def test_the_scripts_pictures_are_not_treated_as_photos(
        untrained, tmp_path, monkeypatch, capsys):
    """Repeated predictions for a folder that contains the pictures give the same faces."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(untrained, "output")
    sad_face("loss.png")
    for _ in range(3):
        assert script.predict_emotions(["."], detect=False)
        rows, errors = capsys.readouterr()
        assert rows.startswith("1/1 loss.png, face 1: ")
        picture, = Path("output/predictions").iterdir()
        assert picture.match("loss-????????.emotions.jpg")


def test_pictures_never_overwrite_a_photo(untrained, capsys):
    """Photos may be in the folder of the pictures, and may have very long names."""
    (untrained / "predictions").mkdir()
    photos = [sad_face(untrained / "predictions" / name)
              for name in ("face.jpg", "n" * 240 + ".png")]
    before = [photo.read_bytes() for photo in photos]
    assert script.predict_emotions(photos, untrained)
    assert [photo.read_bytes() for photo in photos] == before
    pictures = sorted((untrained / "predictions").glob("*.emotions.jpg"))
    assert [file.name.partition("-")[0] for file in pictures] == ["face", "n" * 50]
    assert f"picture: {pictures[0]}\n" in capsys.readouterr().out


def test_pictures_are_named_after_their_photos(untrained, tmp_path, monkeypatch, capsys):
    """Two calls that share some photos save one picture per photo, in any order."""
    for folder in "a", "b":
        (tmp_path / folder).mkdir()
        sad_face(tmp_path / folder / "face.png")
    sad_face(tmp_path / "a/face.jpg")
    monkeypatch.chdir(tmp_path)
    assert script.predict_emotions(["a/face.png", "b/face.png"], untrained)
    assert script.predict_emotions([tmp_path / "b/face.png", "a"], untrained)
    pictures = list((untrained / "predictions").iterdir())
    assert len(pictures) == 3 and all(file.name.startswith("face-") for file in pictures)


def test_a_picture_that_cannot_be_written_loses_no_photo(untrained, tmp_path, capsys):
    (untrained / "predictions").write_text("no folder")
    photos = [sad_face(tmp_path / name) for name in ("1.png", "2.png")]
    assert not script.predict_emotions(photos, untrained)
    rows, errors = capsys.readouterr()
    assert [row.partition(",")[0] for row in rows.splitlines()] == [
        f"1/2 {photos[0]}", f"2/2 {photos[1]}"]
    assert errors.count("\n") == 2 and "  picture: " not in rows
    for line in errors.splitlines():
        assert line.startswith(f"error: {untrained}/predictions/") and "cannot be written" in line


def test_a_pattern_that_names_no_file_is_expanded(untrained, tmp_path, monkeypatch, capsys):
    """On Windows, the shell does not expand patterns."""
    monkeypatch.chdir(tmp_path)
    for name in "a.png", "b.png", "[c].png":
        sad_face(name)
    all_well, faces, errors = predict(["?.png", "[c].png"], untrained, capsys)
    assert all_well and errors == ""
    assert [face["file"] for face in faces] == ["a.png", "b.png", "[c].png"]
    all_well, faces, errors = predict(["*.gif"], untrained, capsys)
    assert not all_well and errors.startswith("error: *.gif cannot be read as an image")


# --- Finding and framing faces --------------------------------------------------------------------
def test_a_cropped_face_is_classified_as_it_is(trained, astronaut, tmp_path, capsys):
    crop = astronaut.crop((170, 64, 274, 168))
    for size in 48, 64, 200:
        crop.resize((size, size), Image.Resampling.LANCZOS).save(tmp_path / f"{size:03}.png")
    _, faces, _ = predict([tmp_path], trained, capsys)
    assert [face["box"] for face in faces] == [[0, 0, size, size] for size in (48, 64, 200)]
    astronaut.save(tmp_path / "whole.png")
    _, (face,), _ = predict([tmp_path / "whole.png"], trained, capsys)
    assert 90 < face["box"][2] - face["box"][0] < 125
    _, (face,), _ = predict([tmp_path / "whole.png"], trained, capsys, detect=False)
    assert face["box"] == [0, 0, 512, 512]


def test_faces_are_framed_as_in_the_dataset(detector):
    """The crop is a square around the centre of MTCNN's box, 1.25 times as wide."""
    asked = detector([60, 20, 40, 52], [10, 20, 40, 52])
    boxes = script.find_faces(Image.new("RGB", (600, 100)))
    assert boxes == [(5, 21, 55, 71), (55, 21, 105, 71)]  # from left to right
    assert asked.shape == (100, 600, 3)
    for size, searched in ((6400, 4800), (960, 1280, 3)), ((12800, 2400), (480, 2560, 3)):
        asked = detector([10, 20, 40, 52])
        assert script.find_faces(Image.new("RGB", size)) == [(25, 105, 275, 355)]
        assert asked.shape == searched  # a fifth of the size; the same area
    detector([25, 10, 60, 80])
    assert script.find_faces(Image.new("RGB", (100, 100))) == [(0, 0, 100, 100)]
    assert script.find_faces(Image.new("RGB", (130, 100))) == [(18, 12, 92, 88)]
    assert script.find_faces(Image.new("RGB", (500, 100))) == [(18, 12, 92, 88)]
    detector()
    assert script.find_faces(Image.new("RGB", (100, 100))) == []
    assert script.find_faces(Image.new("RGB", (64, 65))) == []
    assert script.find_faces(Image.new("RGB", (64, 64))) == [(0, 0, 64, 64)]  # too small to detect


def test_a_small_face_in_a_panorama_is_found(astronaut):
    """MTCNN's box is 50 pixels wide.  Scaled down to a width of 1280 pixels, the face is lost."""
    panorama = Image.new("RGB", (8000, 1500), "grey")
    panorama.paste(astronaut.crop((70, 0, 370, 300)).resize((180, 180)), (5000, 600))
    (left, top, right, bottom), = script.find_faces(panorama)
    assert 5040 < left < right < 5140 and 620 < top < bottom < 730


def test_a_face_beyond_the_edge_of_the_photo_repeats_the_edge():
    grey = np.random.default_rng(0).integers(0, 256, (48, 48), "uint8")
    photo = np.stack([grey] * 3, axis=-1)
    assert np.array_equal(script.face_pixels(Image.fromarray(grey)), grey)
    assert np.array_equal(script.cut_out(photo, (0, 0, 48, 48)), grey)
    shifted = script.cut_out(photo, (-2, 1, 46, 49))
    assert np.array_equal(shifted[:-1, 2:], grey[1:, :-2])
    assert (shifted[:-1, :2] == grey[1:, :1]).all() and (shifted[-1, 2:] == grey[-1, :-2]).all()


# --- The picture of a prediction ------------------------------------------------------------------
def faces_in(boxes, shares=None):
    """Return faces in given boxes, like `classify_photo`; without `shares`, all are surprised."""
    shares = np.eye(7)[[6] * len(boxes)] if shares is None else shares
    return [{"face": number, "box": box, "emotion": EMOTIONS[row.argmax()],
             "confidence": row.max(), "probabilities": dict(zip(EMOTIONS, row.tolist()))}
            for number, (box, row) in enumerate(zip(boxes, shares), 1)]


def frames_in(scene):
    """Return the boxes (left, top, right, bottom) that are drawn in a photo."""
    return [(*frame.get_xy(), frame.get_x() + frame.get_width(),
             frame.get_y() + frame.get_height()) for frame in scene.patches]


def test_picture_frames_the_faces_and_shows_their_predictions(
        tmp_path, monkeypatch, figures):
    shares = np.array([[0.5, 0, 0.3, 0, 0.2, 0, 0], [0, 0, 0, 1.0, 0, 0, 0]])
    boxes = [(0, 0, 80, 80), (280, 40, 340, 100)]  # in a corner; beyond the edge
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 300, 3), "uint8"))
    heat_maps, asked = [np.full((48, 48), -0.1), np.full((48, 48), 0.001)], []
    heat_maps[0][30:40, 10:20] = 0.2

    def occlusion_map(model, face, label):
        asked.append((face, label))
        return heat_maps[len(asked) - 1]

    monkeypatch.setattr(script, "occlusion_map", occlusion_map)
    script.draw_photo(photo, faces_in(boxes, shares), None, tmp_path / "made/x.jpg")
    figure, = figures
    scene, seen_1, marked_1, seen_2, marked_2, table = figure.axes
    assert frames_in(scene) == boxes and not scene.get_title()
    assert [text.get_text() for text in scene.texts] == ["1 angry", "2 happy"]
    assert scene.get_xlim() == (0, 300) and scene.get_ylim() == (400, 0)
    assert np.array_equal(scene.images[0].get_array(), np.asarray(photo))
    texts = {text.get_position(): text.get_text() for text in table.texts}  # (column, row)
    assert [texts[column, 0] for column in (0, 1, 2, 4)] == ["50%", "0%", "30%", "20%"]
    assert texts[3, 1] == "100%" and len(texts) == 14
    assert [tick.get_text() for tick in table.get_xticklabels()] == EMOTIONS
    assert [axes.get_ylabel() for axes in (seen_1, seen_2)] == ["1 angry", "2 happy"]
    crops = [script.cut_out(np.asarray(photo), box) for box in boxes]
    for crop, axes in zip((crops[0], crops[0], crops[1], crops[1]),
                          (seen_1, marked_1, seen_2, marked_2)):
        assert np.array_equal(axes.images[0].get_array(), crop)
    for (face, label), crop, expected in zip(asked, crops, (0, 3), strict=True):
        assert np.array_equal(face, crop) and label == expected
    figure.draw_without_rendering()  # converts the numbers to colours
    strong, weak = (axes.images[1].to_rgba(axes.images[1].get_array())[:, :, 3]
                    for axes in (marked_1, marked_2))
    assert np.array_equal(strong > 0, heat_maps[0] > 0) and strong.max() > 0.7
    assert weak.max() < 0.1  # drops of less than a percentage point are faint
    with Image.open(tmp_path / "made/x.jpg") as picture:
        assert min(picture.size) >= 480


def assert_rows_can_be_read(figure, number):
    """Assert that a figure has `number` rows: a readable face next to its probabilities."""
    crops, table = figure.axes[1:-1], figure.axes[-1]
    assert len(crops) == 2 * number
    inches = [axes.get_window_extent().height / figure.dpi for axes in crops]
    assert min(inches) * 100 >= 48  # at 100 dpi, no crop is scaled down
    middles = [axes.get_window_extent().y0 + axes.get_window_extent().height / 2
               for axes in crops[::2]]
    assert middles == sorted(middles, reverse=True)
    of_rows = [table.transData.transform((0, row))[1] for row in range(number)]
    assert np.abs(np.subtract(middles, of_rows)).max() < 10


def test_twelve_faces_are_drawn_in_readable_rows(tmp_path, figures):
    boxes = [(left, 50, left + 40, 90) for left in range(0, 600, 50)]
    photo = Image.new("RGB", (900, 400))
    script.draw_photo(photo, faces_in(boxes), small_network(), tmp_path / "x.jpg")
    assert_rows_can_be_read(figures[0], 12)


def test_in_a_crowd_all_faces_are_framed_and_printed_and_twenty_have_rows(
        untrained, detector, tmp_path, figures, capsys):
    detector(*[(left + 5, top + 5, 40, 40) for left in range(0, 500, 100)
               for top in range(0, 500, 100)])
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), "uint8")
    Image.fromarray(noise).save(tmp_path / "crowd.png")
    assert script.predict_emotions([tmp_path / "crowd.png"], untrained)
    rows = [line for line in capsys.readouterr().out.splitlines() if ", face " in line]
    assert [int(re.search(", face ([0-9]+): ", row)[1]) for row in rows] == list(range(1, 26))
    figure, = figures
    scene = figure.axes[0]
    assert frames_in(scene) == [(left, top, left + 50, top + 50) for left in range(0, 500, 100)
                                for top in range(0, 500, 100)]
    assert [text.get_text().split()[0] for text in scene.texts] == [
        str(number) for number in range(1, 26)]
    assert "25 faces" in scene.get_title() and "20" in scene.get_title()
    assert_rows_can_be_read(figure, 20)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="memory is measured by Unix")
def test_a_crowd_needs_little_memory(astronaut, tmp_path):
    """256 faces: comparing all pairs of candidate boxes took 2.2 GB."""
    face = astronaut.crop((150, 30, 300, 180)).resize((80, 80))
    crowd = Image.new("RGB", (1280, 1280))
    for number in range(256):
        crowd.paste(face, (number % 16 * 80, number // 16 * 80))
    crowd.save(tmp_path / "crowd.png")
    process = start("--predict", "crowd.png", "--json", cwd=tmp_path)
    rows = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0 and len(rows) > 230
    assert usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) < 1.5e9


def test_of_overlapping_boxes_the_strongest_is_kept():
    """Like MTCNN's own function, but a box that was removed does not remove others."""
    boxes = np.array([[0, 40, 0, 60, 20, 0.7], [0, 0, 0, 20, 20, 0.9], [0, 3, 0, 23, 20, 0.8],
                      [0, 6, 0, 26, 20, 0.6], [0, 100, 0, 120, 20, 0.95]])
    kept = script.strongest_boxes(boxes, 0.6, method="union")
    assert kept.tolist() == boxes[[4, 1, 0, 3]].tolist()
    assert script.strongest_boxes(boxes[:0], 0.6).shape == (0, 6)


@pytest.mark.parametrize("count", [0, 1, 64, 65, 200])
def test_processing_in_chunks_gives_the_same_results(count):
    sizes = []

    def network(images):
        sizes.append(len(images))
        return tf.constant(images) * 2, tf.reduce_sum(images, axis=1)

    images = np.arange(2.0 * count).reshape(count, 2)
    twice, sums = script.in_chunks(network, images)
    assert np.array_equal(twice, images * 2) and np.array_equal(sums, images.sum(axis=1))
    assert max(sizes) <= 64


def test_picture_of_a_photo_that_is_a_single_face_has_no_frame(tmp_path, figures):
    photo = Image.new("RGB", (100, 100))
    script.draw_photo(photo, faces_in([(0, 0, 100, 100)]), small_network(), tmp_path / "x.jpg")
    scene = figures[0].axes[0]
    assert not scene.patches and not scene.lines and not scene.texts


def test_the_classified_face_is_shown(
        trained, astronaut, tmp_path, monkeypatch, figures):
    astronaut.save(tmp_path / "photo.png")
    classified, classify_faces = [], script.classify_faces

    def classify_and_note(model, images):
        classified.append(images)
        return classify_faces(model, images)

    monkeypatch.setattr(script, "classify_faces", classify_and_note)
    assert script.predict_emotions(tmp_path / "photo.png", trained)
    images, = classified
    assert images.shape == (1, 48, 48, 1) and images.dtype == "uint8"
    for axes in figures[0].axes[1:3]:
        assert np.array_equal(axes.images[0].get_array(), images[0, :, :, 0])


def test_heat_map_of_a_uniform_image_is_zero(network):
    flat_face = np.full((48, 48), 90, "uint8")
    assert np.abs(script.occlusion_map(network[0], flat_face, 0)).max() < 1e-5


def test_heat_map_marks_the_face_and_moves_with_it(network):
    """A small drawn face on a background of its mean grey, where covering changes nothing."""
    model, _ = network
    face = script.draw_face("happy", np.random.default_rng(0)).resize((24, 24))
    pixels = np.asarray(face).astype("float32")
    middles = []
    for top, left in (4, 4), (4, 20), (20, 4):
        image = np.full((48, 48), pixels.mean(), "float32")
        image[top:top + 24, left:left + 24] = pixels
        label = model.predict(image[np.newaxis, :, :, np.newaxis], verbose=0).argmax()
        heat_map = script.occlusion_map(model, image, label)
        assert heat_map.shape == (48, 48) and heat_map.max() > 0.01
        reached = np.zeros((48, 48), bool)  # where a square of 8 pixels can touch the face
        reached[max(top - 7, 0):top + 31, max(left - 7, 0):left + 31] = True
        assert np.abs(heat_map[~reached]).max() < 1e-4
        strong = np.clip(heat_map, 0, None)
        row, column = np.array([(strong.sum(axis=1) * range(48)).sum(),
                                (strong.sum(axis=0) * range(48)).sum()]) / strong.sum()
        assert top < row < top + 24 and left < column < left + 24
        middles.append((row, column))
    first, to_the_right, down = middles  # by 16 pixels each
    assert to_the_right[1] - first[1] > 8 and down[0] - first[0] > 8


# --- The network ----------------------------------------------------------------------------------
def test_without_a_trained_network_the_included_one_predicts(
        untrained, tmp_path, monkeypatch, capsys):
    """Pictures are saved in the output folder.  The user's network there takes precedence."""
    face = sad_face(tmp_path / "face.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "project/script.py"))
    with pytest.raises(script.InputError, match="88-0/.* is missing or .*Train a network"):
        script.predict_emotions([face])

    shipped = tmp_path / "project/docs/runs/88-0" / script.NETWORK_FILE
    shipped.parent.mkdir(parents=True)
    shutil.copy(untrained / script.NETWORK_FILE, shipped)
    all_read, (found,), errors = predict([face], "output", capsys, detect=False)
    assert all_read and errors == f"no network in output yet: using {shipped}\n"
    for output_dir in "output", "elsewhere":
        assert script.predict_emotions([face], output_dir, detect=False)
        assert len(list(Path(output_dir, "predictions").glob("face-*.emotions.jpg"))) == 1

    shipped.write_bytes(b"not a network")
    with pytest.raises(script.InputError, match=f"^{shipped} is .*network of this script"):
        script.predict_emotions([face])
    shutil.copy(untrained / script.NETWORK_FILE, "output")
    assert predict([face], "output", capsys, detect=False) == (True, [found], "")


def test_included_network_recognises_a_happy_face_and_matches_its_metrics(
        network, astronaut, tmp_path, run_here):
    """Without FER-2013, checks that its files in docs/runs are consistent."""
    model, _ = network
    astronaut.save(tmp_path / "astronaut.png")
    assert list(ROOT.glob(f"docs/runs/*/{script.NETWORK_FILE}")) == [INCLUDED]
    process = run_here("--predict", "astronaut.png", "--json", cwd=tmp_path)
    assert process.returncode == 0
    assert process.stderr == f"no network in output yet: using {INCLUDED}\n"
    assert json.loads(process.stdout)["emotion"] == "happy"
    assert [file.name for file in tmp_path.iterdir()] == ["astronaut.png"]  # nothing was trained

    metrics = json.loads((INCLUDED.parent / "metrics.json").read_text())
    assert metrics["network"] == {"parameters": model.count_params(),
                                  "megabytes": round(INCLUDED.stat().st_size / 1e6, 1)}
    confusion = np.array(metrics["test"]["confusion_matrix"])
    assert confusion.sum() == metrics["images"]["test"] == 3589
    assert metrics["test"]["accuracy"] == pytest.approx(np.trace(confusion) / 3589)
    with open(INCLUDED.parent / "history.csv", newline="") as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == metrics["settings"]["epochs"]
    accuracies = [float(epoch["val_accuracy"]) for epoch in epochs]
    assert metrics["best_epoch"] == 1 + np.argmax(accuracies)
    assert metrics["validation"]["accuracy"] == max(accuracies)
    same_length = INCLUDED.parents[1].glob(f"{len(epochs)}-*/metrics.json")
    rivals = [json.loads(path.read_text())["validation"]["accuracy"] for path in same_length]
    assert len(rivals) == 3 and max(rivals) == max(accuracies)


@pytest.mark.documents
def test_included_network_has_the_architecture_of_the_script(network):
    model, emotions = network
    assert emotions == EMOTIONS
    assert [(type(layer), layer.output.shape) for layer in model.layers] == [
        (type(layer), layer.output.shape) for layer in script.create_CNN(7).layers], (
        "create_CNN has changed: train the network in docs/runs/88-0 again, with 88 epochs and the "
        "seeds 0, 1 and 2, and write its figures into README and RESULTS")


def test_network_gives_the_same_probabilities_in_every_format(network, tmp_path):
    """Keras's two formats and TensorFlow Lite."""
    model, _ = network
    rng = np.random.default_rng(0)
    faces = np.stack([np.asarray(script.draw_face(emotion, rng), "float32")
                      for emotion in EMOTIONS])[..., np.newaxis]
    expected = model.predict_on_batch(faces)
    assert expected.std(axis=0).max() > 0.1  # the predictions differ between the faces
    for ending in "keras", "h5":
        model.save(tmp_path / f"network.{ending}")
        loaded = keras.models.load_model(tmp_path / f"network.{ending}")
        assert np.abs(loaded.predict_on_batch(faces) - expected).max() <= 1e-6, ending

    converted = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    interpreter = tf.lite.Interpreter(model_content=converted)
    interpreter.resize_tensor_input(0, faces.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], faces)
    interpreter.invoke()
    probabilities = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    assert np.abs(probabilities - expected).max() <= 1e-5


def network_without_names(path):
    """Save a network without the names of its outputs."""
    small_network().save(path)


def network_of_other_emotions(path):
    """Save a network with a name missing for one of its outputs."""
    script.save_network(small_network(), EMOTIONS[1:], path)


def network_of_another_keras(path):
    """Save a network with a layer argument that this version of Keras does not have."""
    script.save_network(small_network(), EMOTIONS, path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    members["config.json"] = members["config.json"].replace(b'"pool_size"', b'"no_such_argument"')
    with zipfile.ZipFile(path, "w") as file:
        for name, contents in members.items():
            file.writestr(name, contents)


@pytest.mark.parametrize("damage, words", [
    (None, ["missing", "Train a network", "--output-dir"]),
    (lambda path: path.write_bytes(b"not a network"),
     ["damaged", "Train a network", "--output-dir"]),
    (network_of_another_keras, ["a Keras version other than " + keras.__version__, "argument"]),
    (foreign_model, ["network of this script"]),
    (network_without_names, ["network of this script", "emotions.json"]),
    (network_of_other_emotions, ["network of this script"])])
def test_an_unusable_network_gets_one_line(tmp_path, monkeypatch, damage, words):
    monkeypatch.setattr(script, "__file__", str(tmp_path / "script.py"))  # no included network
    if damage:
        damage(tmp_path / script.NETWORK_FILE)
    with pytest.raises(script.InputError) as raised:
        script.predict_emotions([tmp_path / "x.png"], tmp_path)
    assert all(word in str(raised.value) for word in [*words, script.NETWORK_FILE])
    assert "\n" not in str(raised.value)
    assert len(list(tmp_path.iterdir())) == bool(damage)
