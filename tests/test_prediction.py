"""Faces in photos: finding, framing, classifying and drawing them."""

import csv
import json
import re
import shutil
import signal
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import skimage.data
from conftest import EMOTIONS, ROOT, foreign_model, run, script, start
from PIL import Image


@pytest.fixture(scope="module")
def astronaut():
    """Return a photo (PIL image, 512x512) of a woman whose face is about (182, 64, 265, 171)."""
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture
def trained(demo, tmp_path_factory):
    """Return an output folder with nothing but a trained network."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(demo[0] / "output" / script.NETWORK, folder)
    return folder


class Detector:
    """Stands in for MTCNN: finds faces in the boxes it was made with, whatever the photo."""

    def __init__(self, *boxes):
        self.boxes = boxes

    def detect_faces(self, pixels, **_):
        self.shape = pixels.shape
        return [{"box": box, "confidence": 1.0} for box in self.boxes]


def predict(paths, output_dir, capsys, detect=True):
    """Classify photos; return whether all could be read, the faces as dicts, and stderr."""
    capsys.readouterr()
    all_read = script.predict_emotions(paths, output_dir, detect, as_json=True)
    printed = capsys.readouterr()
    return all_read, [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_predictions_are_those_of_the_evaluation(whole_run, small_dataset, tmp_path):
    """The test images, predicted from the command line, give the accuracy of metrics.json."""
    # A package that cannot be imported stands in the way of MTCNN's: --no-detect needs none.
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/mtcnn.py").write_text("raise SystemExit('imported')")
    paths = sorted(small_dataset.glob("test/*/PrivateTest_*"))
    process = run("--predict", *paths, "--no-detect", "--json",
                  "--output-dir", whole_run / "output", cwd=tmp_path,
                  PYTHONPATH=str(tmp_path / "packages"))
    assert process.returncode == 0 and process.stderr == "", process.stderr
    faces = [json.loads(line) for line in process.stdout.splitlines()]
    assert [face["file"] for face in faces] == list(map(str, paths))
    correct = [face["emotion"] == path.parent.name for face, path in zip(faces, paths)]
    metrics = json.loads((whole_run / "output/metrics.json").read_text())["test"]
    assert np.mean(correct) == metrics["accuracy"]

    model, emotions = script.load_network(whole_run / "output" / script.NETWORK)
    assert emotions == EMOTIONS
    probabilities = script.classify_faces(model, script.load_data(small_dataset).test.images)
    predicted = np.array([list(face["probabilities"].values()) for face in faces])
    assert np.abs(predicted - probabilities).max() <= 1e-5
    assert [EMOTIONS[i] for i in probabilities.argmax(1)] == [face["emotion"] for face in faces]
    assert np.allclose(predicted.max(1), [face["confidence"] for face in faces])
    assert list(faces[0]["probabilities"]) == EMOTIONS and faces[0]["face"] == 1


def test_photos_from_the_command_line(trained, astronaut, tmp_path, run_here):
    """A line per face, a picture per photo; a bad photo does not stop the others."""
    shutil.copytree(trained, tmp_path / "output")
    (tmp_path / "album/deep").mkdir(parents=True)
    pair = Image.new("RGB", (700, 300), "grey")
    pair.paste(astronaut.crop((100, 0, 350, 250)), (50, 25))
    pair.paste(astronaut.crop((100, 0, 350, 250)).rotate(5), (400, 25))
    pair.save(tmp_path / "album/pair.png")
    for no_photo in "list.txt", "._pair.png":
        (tmp_path / "album" / no_photo).write_text("no photo")
    script.draw_face("happy", np.random.default_rng(0)).save(tmp_path / "album/deep/pair.jpg")
    Image.fromarray(skimage.data.brick()).save(tmp_path / "wall.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "album/pair.png").read_bytes()[:9000])
    process = run_here("--predict", "cut.png", "album", "wall.png", "gone.png", cwd=tmp_path)
    assert process.returncode == 2, process.stderr
    *rows, last = [line for line in process.stdout.splitlines() if line]
    for row, face in zip(rows, ["2/5 album/deep/pair.jpg, face 1: ", "3/5 album/pair.png, face 1: ",
                                "3/5 album/pair.png, face 2: "], strict=True):
        assert row.startswith(face)
        shares = {emotion: float(re.search(rf"[(,] ?{emotion} ([0-9.]+)%", row)[1])
                  for emotion in EMOTIONS}
        assert sum(shares.values()) == pytest.approx(100, abs=0.5)
        surest = max(shares, key=shares.get)
        assert row.startswith(f"{face}{surest} {shares[surest]}%  (")
    assert last == "Pictures saved in output/predictions"
    errors = process.stderr.splitlines()
    assert errors[0] == "passed over, no photos by their endings: album/list.txt"
    assert errors[1].startswith("error: cut.png is empty, damaged or no image")
    assert errors[2].startswith("wall.png: no face") and "--no-detect" in errors[2]
    assert errors[3:] == ["error: gone.png is missing"]
    pictures = sorted((tmp_path / "output/predictions").iterdir())
    assert [file.name for file in pictures] == ["2_pair.emotions.jpg", "3_pair.emotions.jpg"]
    assert all(min(Image.open(file).size) >= 480 for file in pictures)


def test_ctrl_c_keeps_the_photos_that_are_done(trained, astronaut, tmp_path):
    for number in range(40):
        astronaut.save(tmp_path / f"{number}.png")
    process = start("--predict", tmp_path, "--output-dir", trained, cwd=tmp_path)
    rows = [process.stdout.readline()]
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130
    rows += output.splitlines()
    done = len(rows)
    assert 1 <= done < 40 and rows[-1].startswith(f"{done}/40 ")
    assert errors == f"interrupted; photos done: {done} of 40\n"
    pictures = [Image.open(file) for file in (trained / "predictions").iterdir()]
    assert len(pictures) == done and all(picture.load() for picture in pictures)


def test_a_photo_is_read_as_a_person_sees_it(trained, astronaut, tmp_path, capsys):
    photo = astronaut.crop((100, 0, 350, 250))
    sideways = Image.Exif()
    sideways[274] = 6  # turn by 90 degrees clockwise to look at it
    grey = np.asarray(photo.convert("L")).astype("uint16") * 256
    for name, image, options in [
            ("upright.png", photo, {}), ("grey.png", photo.convert("L"), {}),
            ("sideways.png", photo.transpose(Image.Transpose.ROTATE_90), {"exif": sideways}),
            ("16 bits.png", Image.fromarray(grey), {}),
            ("CMYK.jpg", photo.convert("CMYK"), {"quality": 100}),
            ("palette.gif", photo.convert("P", palette=Image.Palette.ADAPTIVE), {})]:
        image.save(tmp_path / name, **options)
    all_read, faces, errors = predict([tmp_path], trained, capsys)
    assert all_read and errors == "" and len(faces) == 6
    upright = faces[-1]
    assert upright["file"].endswith("upright.png")
    for face in faces:
        # The square around the face is 1.25 times as wide as MTCNN's box, 83 pixels.
        assert np.abs(np.subtract(face["box"], (72, 66, 176, 170))).max() <= 12, face
        assert np.abs(np.subtract(list(face["probabilities"].values()),
                                  list(upright["probabilities"].values()))).max() < 0.2, face


def test_what_already_is_a_face_is_classified_as_it_is(trained, astronaut, tmp_path, capsys):
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


def test_faces_are_framed_as_those_of_the_dataset():
    """A square around the middle of MTCNN's box, 1.25 times as wide; in a photo of any size."""
    detector = Detector([60, 20, 40, 52], [10, 20, 40, 52])
    boxes = script.find_faces(Image.new("L", (600, 100)), detector)
    assert boxes == [(5, 21, 55, 71), (55, 21, 105, 71)]  # from left to right
    assert detector.shape == (100, 600, 3)
    boxes = script.find_faces(Image.new("RGB", (6400, 1000)), Detector([10, 20, 40, 52]))
    assert boxes == [(25, 105, 275, 355)]  # the detector saw a fifth of it
    filled = Detector([25, 10, 60, 80])
    assert script.find_faces(Image.new("L", (100, 100)), filled) == [(0, 0, 100, 100)]
    assert script.find_faces(Image.new("L", (130, 100)), filled) != [(0, 0, 130, 100)]
    assert script.find_faces(Image.new("L", (100, 100)), Detector()) == []


def test_a_face_beyond_the_edge_of_the_photo_repeats_the_edge():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48), "uint8")
    photo = Image.fromarray(pixels)
    assert np.array_equal(script.face_pixels(photo), pixels)
    assert np.array_equal(script.cut_out(photo, (0, 0, 48, 48)), pixels)
    shifted = np.asarray(script.cut_out(photo, (-2, 1, 46, 49)))
    assert np.array_equal(shifted[:-1, 2:], pixels[1:, :-2])
    assert (shifted[:-1, :2] == pixels[1:, :1]).all() and (shifted[-1, 2:] == pixels[-1, :-2]).all()


def test_picture_frames_the_faces_and_shows_what_they_were_taken_for(tmp_path):
    shares = np.array([[0.5, 0, 0.3, 0, 0.2, 0, 0], [0, 0, 0, 1.0, 0, 0, 0]])
    boxes = [(0, 0, 80, 80), (280, 40, 340, 100)]  # one in the corner, one beyond the edge
    faces = [script.Face(box, EMOTIONS[row.argmax()], row.max(), dict(zip(EMOTIONS, row)))
             for box, row in zip(boxes, shares)]
    crops = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 1), "uint8")
    heat_maps = np.zeros((2, 48, 48))
    heat_maps[0, 30:40, 10:20] = 0.2
    photo = script.Photo(Path("x"), (300, 400), Image.new("L", (150, 200), "white"), boxes, crops)
    figure = script.draw_photo(photo, faces, heat_maps, tmp_path / "x.jpg")
    scene, seen_1, marked_1, seen_2, marked_2, table = figure.axes
    for frame, (left, top, right, bottom) in zip(scene.lines, boxes, strict=True):
        assert set(map(tuple, frame.get_xydata())) == {
            (left, top), (right, top), (right, bottom), (left, bottom)}
    assert [text.get_text() for text in scene.texts] == ["1 angry", "2 happy"]
    assert scene.get_xlim() == (0, 300) and scene.get_ylim() == (400, 0)
    texts = {text.get_position(): text.get_text() for text in table.texts}  # (column, row)
    assert [texts[column, 0] for column in (0, 1, 2, 4)] == ["50%", "0%", "30%", "20%"]
    assert texts[3, 1] == "100%" and len(texts) == 14
    assert [tick.get_text() for tick in table.get_xticklabels()] == EMOTIONS
    assert [axes.get_ylabel() for axes in (seen_1, seen_2)] == ["1 angry", "2 happy"]
    for crop, axes in zip(crops[[0, 0, 1, 1]], (seen_1, marked_1, seen_2, marked_2)):
        assert np.array_equal(axes.images[0].get_array(), crop[:, :, 0])
    figure.draw_without_rendering()  # what makes colours of the numbers
    for axes, heat_map in (marked_1, heat_maps[0]), (marked_2, heat_maps[1]):
        opacity = axes.images[1].to_rgba(axes.images[1].get_array())[:, :, 3]
        assert np.array_equal(opacity > 0, heat_map > 0)


def draw_photo(image, faces, folder):
    """Draw a photo whose faces are black and have no heat maps; return the figure."""
    crops = np.zeros((len(faces), 48, 48, 1), "uint8")
    photo = script.Photo(Path("x"), image.size, image, [face.box for face in faces], crops)
    return script.draw_photo(photo, faces, np.zeros((len(faces), 48, 48)), folder / "x.jpg")


def test_twelve_faces_are_drawn_as_rows_that_can_be_read(tmp_path):
    faces = [script.Face((left, 50, left + 40, 90), "surprise", 1.0,
                         dict(zip(EMOTIONS, np.eye(7)[6]))) for left in range(0, 600, 50)]
    figure = draw_photo(Image.new("L", (900, 400)), faces, tmp_path)
    for axes in figure.axes[1:-1]:
        assert axes.get_window_extent().height >= 48  # no crop smaller than it is
    tops = [axes.get_window_extent().y1 for axes in figure.axes[1:-1:2]]
    assert len(tops) == 12 and tops == sorted(tops, reverse=True)
    middles = [axes.get_window_extent().y0 + axes.get_window_extent().height / 2
               for axes in figure.axes[1:-1:2]]
    table = figure.axes[-1]
    of_rows = [table.transData.transform((0, row))[1] for row in range(12)]
    assert np.abs(np.subtract(middles, of_rows)).max() < 10  # beside their probabilities


def test_face_that_is_shown_is_the_one_that_was_classified(
        trained, astronaut, tmp_path, monkeypatch):
    astronaut.save(tmp_path / "photo.png")
    classified, shown = [], []
    classify_faces, show_photo = script.classify_faces, script.draw_photo

    def classify_and_note(model, images):
        classified.append(images)
        return classify_faces(model, images)

    def draw_and_note(*arguments):
        shown.append(show_photo(*arguments))

    monkeypatch.setattr(script, "classify_faces", classify_and_note)
    monkeypatch.setattr(script, "draw_photo", draw_and_note)
    assert script.predict_emotions(tmp_path / "photo.png", trained)
    (images,), (figure,) = classified, shown
    assert images.shape == (1, 48, 48, 1) and images.dtype == "uint8"
    for axes in figure.axes[1:3]:
        assert np.array_equal(axes.images[0].get_array(), images[0, :, :, 0])


def test_heat_map_is_zero_where_nothing_can_matter(trained):
    model, _ = script.load_network(trained / script.NETWORK)
    flat_face = np.full((48, 48, 1), 90, "uint8")
    assert np.abs(script.occlusion_map(model, flat_face, 0)).max() < 1e-5


def test_heat_map_lies_on_the_face_and_moves_with_it():
    """A small drawn face on its own mean grey: covering the grey changes nothing."""
    model, _ = script.load_network(ROOT / "docs/runs/88-0" / script.NETWORK)
    face = script.draw_face("happy", np.random.default_rng(0)).resize((24, 24))
    pixels = np.asarray(face).astype("float32")
    middles = []
    for top, left in (4, 4), (4, 20), (20, 4):
        image = np.full((48, 48, 1), pixels.mean(), "float32")
        image[top:top + 24, left:left + 24, 0] = pixels
        label = model.predict(image[np.newaxis], verbose=0).argmax()
        heat_map = script.occlusion_map(model, image, label)
        assert heat_map.shape == (48, 48) and heat_map.max() > 0.01
        reached = np.zeros((48, 48), bool)  # by a square that touches the face, 8 pixels wide
        reached[max(top - 7, 0):top + 31, max(left - 7, 0):left + 31] = True
        assert np.abs(heat_map[~reached]).max() < 1e-4
        strong = np.clip(heat_map, 0, None)
        row, column = np.array([(strong.sum(axis=1) * range(48)).sum(),
                                (strong.sum(axis=0) * range(48)).sum()]) / strong.sum()
        assert top < row < top + 24 and left < column < left + 24
        middles.append((row, column))
    first, to_the_right, down = middles  # each by 16 pixels
    assert to_the_right[1] - first[1] > 8 and down[0] - first[0] > 8


def test_labels_of_neighbouring_faces_are_their_numbers(tmp_path):
    """Those of faces far apart tell the emotions too; in both pictures no two overlap."""
    for step, expected in (45, [str(number) for number in range(1, 6)]), (170, [
            f"{number} surprise" for number in range(1, 6)]):
        faces = [script.Face((left, 50, left + 40, 90), "surprise", 1.0,
                             dict(zip(EMOTIONS, np.eye(7)[6])))
                 for left in range(0, 5 * step, step)]
        figure = draw_photo(Image.new("L", (900, 400)), faces, tmp_path)
        labels = figure.axes[0].texts
        assert [label.get_text() for label in labels] == expected
        places = [label.get_bbox_patch().get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in zip(places, places[1:]))


def test_picture_of_a_photo_that_is_all_face_has_no_frame(tmp_path):
    face = script.Face((0, 0, 100, 100), "angry", 1.0, dict(zip(EMOTIONS, np.eye(7)[0])))
    figure = draw_photo(Image.new("L", (100, 100)), [face], tmp_path)
    assert not figure.axes[0].lines and not figure.axes[0].texts


def test_narrow_photos_do_not_stop_the_others(trained, tmp_path, capsys):
    script.draw_face("happy", np.random.default_rng(0)).save(tmp_path / "z.png")
    for number, size in enumerate([(1, 2000), (2000, 1), (19, 100), (30, 3000), (20, 65)]):
        Image.new("L", size, 90).save(tmp_path / f"{number}.png")
    for detect in True, False:
        capsys.readouterr()
        assert script.predict_emotions([tmp_path], trained, detect)
        rows, errors = capsys.readouterr()
        assert rows.count(".png") == (1 if detect else 6) and str(tmp_path / "z.png") in rows
        assert errors.count("no face found") == (5 if detect else 0)


def test_pictures_never_overwrite_a_photo(trained, capsys):
    photo = trained / "predictions/face.jpg"
    photo.parent.mkdir()
    script.draw_face("sad", np.random.default_rng(0)).save(photo)
    before = photo.read_bytes()
    assert script.predict_emotions([photo], trained) and photo.read_bytes() == before
    assert (photo.parent / "1_face.emotions.jpg").exists()
    assert str(photo.parent) in capsys.readouterr().out.splitlines()[-1]


def test_a_folder_is_searched_for_all_that_pillow_opens_and_nothing_is_dropped_silently(
        trained, tmp_path, capsys):
    face = script.draw_face("sad", np.random.default_rng(0))
    album = tmp_path / "album"
    album.mkdir()
    for ending in "jpg", "JPEG", "jfif", "ppm", "tga", "ico", "webp":
        face.save(album / f"face.{ending}")
    for no_photo in "clip.mp4", "face.heic", "notes.txt":
        (album / no_photo).write_text("no photo")
    (album / ".hidden").mkdir()
    face.save(album / ".hidden/face.png")
    (tmp_path / "elsewhere").mkdir()
    face.save(tmp_path / "elsewhere/linked.png")
    (album / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(album)  # in a circle
    all_well, faces, errors = predict(str(album), trained, capsys, detect=False)
    assert all_well and len(faces) == 8
    assert {Path(face["file"]).name for face in faces} == {
        "face.jpg", "face.JPEG", "face.jfif", "face.ppm", "face.tga", "face.ico", "face.webp",
        "linked.png"}
    assert errors == ("passed over, no photos by their endings: "
                      f"{album}/clip.mp4, {album}/face.heic, {album}/notes.txt\n")
    locked = tmp_path / ("n" * 300 + ".png")
    all_well, faces, errors = predict([locked, album / "face.jpg"], trained, capsys, detect=False)
    assert not all_well and len(faces) == 1
    assert errors == f"error: {locked} cannot be read: File name too long\n"
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("no photo")
    _, _, errors = predict([tmp_path], trained, capsys, detect=False)
    assert errors.count(".txt") == 10 and errors.endswith(" and 13 more\n")


def test_a_folder_without_photos_is_told_so(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    script.draw_face("sad", np.random.default_rng(0)).save(tmp_path / "face.png")
    paths = tmp_path / "empty", tmp_path / "face.png"
    all_well, faces, errors = predict(paths, trained, capsys, detect=False)
    assert not all_well and len(faces) == 1
    assert errors == (f"error: {tmp_path}/empty holds no images that Pillow opens, such as .jpg "
                      "or .png\n")
    assert script.predict_emotions([tmp_path / "empty"], trained, detect=False) is False
    assert "Pictures saved" not in capsys.readouterr().out


def test_whatever_is_wrong_with_one_photo_the_others_come_next(
        trained, tmp_path, monkeypatch, capsys):
    """A picture that cannot be saved, a name as long as can be, a fault that nobody foresaw."""
    face = script.draw_face("sad", np.random.default_rng(0))
    for name in "1.png", "2.png", "n" * 240 + ".png":
        face.save(tmp_path / name)
    (trained / "file").write_text("no folder")
    with pytest.raises(script.InputError, match="file/predictions cannot be made.*--output-dir"):
        script.predict_emotions(tmp_path / "1.png", trained / "file", detect=False)
    capsys.readouterr()
    (trained / "predictions/1_1.emotions.jpg").mkdir(parents=True)  # in the way of the picture
    assert not script.predict_emotions([tmp_path], trained, detect=False)
    rows, errors = capsys.readouterr()
    assert rows.count("face 1:") == 3 and errors.count("\n") == 1
    assert errors.startswith(f"error: {tmp_path}/1.png: IsADirectoryError")
    pictures = sorted(path.name for path in (trained / "predictions").glob("[23]*"))
    assert pictures == ["2_2.emotions.jpg", "3_" + "n" * 50 + ".emotions.jpg"]

    def fail_at_first(path, detector):
        monkeypatch.undo()
        raise ZeroDivisionError("nobody knows why")

    monkeypatch.setattr(script, "read_photo", fail_at_first)
    all_well, faces, errors = predict([tmp_path], trained, capsys, detect=False)
    assert not all_well and [face["file"][-5:] for face in faces] == ["2.png", "n.png"]
    assert errors == f"error: {tmp_path}/1.png: ZeroDivisionError: nobody knows why\n"


def test_pictures_of_the_script_are_not_taken_for_photos(demo, tmp_path, monkeypatch, capsys):
    """Predicting a folder again and again, with the output in it, gives the same faces."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo[0] / "output", "output")
    script.draw_face("sad", np.random.default_rng(0)).save("loss.png")  # a photo of that name
    for _ in range(3):
        assert script.predict_emotions(["."], detect=False)
        rows, errors = capsys.readouterr()
        assert rows.startswith("1/1 loss.png, face 1: ")
    assert errors.startswith("passed over, drawn by this script: output/accuracy.png, ")
    assert "output/predictions/1_loss.emotions.jpg" in errors


def test_json_draws_nothing(trained, tmp_path, capsys):
    script.draw_face("sad", np.random.default_rng(0)).save(tmp_path / "face.png")
    _, (face,), _ = predict([tmp_path / "face.png"], trained, capsys)
    assert set(face) == {"file", "face", "box", "emotion", "confidence", "probabilities"}
    assert not (trained / "predictions").exists()


def test_where_nothing_was_trained_yet_the_network_of_docs_predicts(
        trained, tmp_path, monkeypatch, capsys):
    """Pictures go to the output folder; a network of one's own in it comes first."""
    face = tmp_path / "face.png"
    script.draw_face("sad", np.random.default_rng(0)).save(face)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "project/script.py"))
    with pytest.raises(script.InputError, match="^output/.*is missing.*docs/runs/88-0/.*train"):
        script.predict_emotions([face])

    shipped = tmp_path / "project/docs/runs/88-0" / script.NETWORK
    shipped.parent.mkdir(parents=True)
    shutil.copy(trained / script.NETWORK, shipped)
    all_read, (found,), errors = predict([face], "output", capsys, detect=False)
    assert all_read and errors == f"no network in output yet: predicting with {shipped}\n"
    for output_dir in "output", "elsewhere":
        assert script.predict_emotions([face], output_dir, detect=False)
        assert [file.name for file in Path(output_dir, "predictions").iterdir()] == [
            "1_face.emotions.jpg"]

    shipped.write_bytes(b"not a network")
    with pytest.raises(script.InputError) as raised:
        script.predict_emotions([face])
    assert str(raised.value).startswith(f"{shipped} is damaged or of another version of Keras")
    shutil.copy(trained / script.NETWORK, "output")
    assert predict([face], "output", capsys, detect=False) == (True, [found], "")


def test_network_in_docs_knows_a_happy_face_and_is_the_one_of_its_figures(
        astronaut, tmp_path, run_here):
    """Without FER-2013: its figures agree with the file, its epochs and with one another."""
    astronaut.save(tmp_path / "astronaut.png")
    network, = ROOT.glob(f"docs/runs/*/{script.NETWORK}")
    process = run_here("--predict", "astronaut.png", "--json", cwd=tmp_path)
    assert process.returncode == 0
    assert process.stderr == f"no network in output yet: predicting with {network}\n"
    assert json.loads(process.stdout)["emotion"] == "happy"
    assert [file.name for file in tmp_path.iterdir()] == ["astronaut.png"]  # nothing was trained

    metrics = json.loads((network.parent / "metrics.json").read_text())
    assert metrics["network"] == {
        "parameters": keras.models.load_model(network).count_params(),
        "megabytes": round(network.stat().st_size / 1e6, 1)}
    confusion = np.array(metrics["test"]["confusion_matrix"])
    assert confusion.sum() == metrics["images"]["test"] == 3589
    assert metrics["test"]["accuracy"] == pytest.approx(np.trace(confusion) / 3589)
    with open(network.parent / "history.csv", newline="") as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == metrics["settings"]["epochs"]
    accuracies = [float(epoch["val_accuracy"]) for epoch in epochs]
    assert metrics["best_epoch"] == 1 + np.argmax(accuracies)
    assert metrics["validation"]["accuracy"] == max(accuracies)
    same_length = network.parents[1].glob(f"{len(epochs)}-*/metrics.json")
    rivals = [json.loads(path.read_text())["validation"]["accuracy"] for path in same_length]
    assert len(rivals) == 3 and max(rivals) == max(accuracies)


def network_without_names(path):
    """Save a network that does not say what its outputs mean."""
    script.create_CNN(7).save(path)


def network_of_other_emotions(path):
    """Save a network with the names of one emotion too few."""
    script.save_network(script.create_CNN(7), EMOTIONS[1:], path)


def network_of_another_keras(path):
    """Save a network whose layers take an argument that they have not here."""
    script.save_network(script.create_CNN(7), EMOTIONS, path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    members["metadata.json"] = b'{"keras_version": "9.9"}'
    members["config.json"] = members["config.json"].replace(b'"input_axes"', b'"no_such_argument"')
    with zipfile.ZipFile(path, "w") as file:
        for name, contents in members.items():
            file.writestr(name, contents)


@pytest.mark.parametrize("damage, words", [
    (None, ["missing", "train one", "--output-dir"]),
    (lambda path: path.write_bytes(b"not a network"), ["damaged", "not a zip file"]),
    (network_of_another_keras, ["by Keras 9.9", "than " + keras.__version__, "no_such_argument"]),
    (foreign_model, ["no network of this script"]),
    (network_without_names, ["no network of this script, or of an earlier version"]),
    (network_of_other_emotions, ["no network of this script"])])
def test_without_a_trained_network_there_is_one_line(tmp_path, monkeypatch, damage, words):
    monkeypatch.setattr(script, "__file__", str(tmp_path / "script.py"))  # none is included
    if damage:
        damage(tmp_path / script.NETWORK)
    with pytest.raises(script.InputError) as raised:
        script.predict_emotions([tmp_path / "x.png"], tmp_path)
    assert all(word in str(raised.value) for word in [*words, script.NETWORK])
    assert len(list(tmp_path.iterdir())) == bool(damage)
