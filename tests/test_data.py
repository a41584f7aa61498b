"""The data: split, augmentation, unusual images, where the dataset is found, drawn faces."""

import io
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import EMOTIONS, flat, make_dataset, script
from PIL import Image


def test_split_follows_the_file_names(tmp_path, capsys):
    """Each image is told by its shade: none changes sides, loses its label or gets lost."""
    shades = iter(range(7 * 9))
    known = {}

    def draw(emotion, kind, number):
        shade = next(shades)
        known[shade] = (kind, EMOTIONS.index(emotion))
        return flat(shade)

    make_dataset(tmp_path, 5, 3, 1, draw)
    data = script.load_data(tmp_path, batch_size=8, seed=0)
    assert data.emotions == EMOTIONS
    assert len(data.training) == 5  # 35 images, the last batch is smaller
    batches = [data.training[index] for index in range(len(data.training))]
    images, labels = map(np.concatenate, zip(*batches))
    training = script.LabelledImages(images, labels, clean=None)
    for kind, part in (("Training", training), ("PublicTest", data.validation),
                       ("PrivateTest", data.test)):
        seen = zip(part.images[:, 0, 0, 0].astype(int).tolist(), part.labels.tolist())
        expected = [(shade, label) for shade, (of, label) in known.items() if of == kind]
        assert sorted(seen) == sorted(expected)
    assert "35 training, 21 validation and 7 test images" in capsys.readouterr().out


def test_only_training_images_are_augmented(small_dataset):
    data = script.load_data(small_dataset, batch_size=42, seed=0)
    for kind, part in ("PublicTest", data.validation), ("PrivateTest", data.test):
        files = [small_dataset / "test" / emotion / f"{kind}_{number}.png"
                 for emotion in EMOTIONS for number in range(2)]
        assert np.array_equal(part.images[..., 0],
                              [np.asarray(Image.open(file)) for file in files])
        assert part.labels.tolist() == [EMOTIONS.index(file.parent.name) for file in files]
    originals = {np.asarray(Image.open(file), "float32").tobytes()
                 for file in small_dataset.glob("train/*/*.png")}
    first = data.training[0][0]
    assert first.dtype == "float32" and first.shape == (42, 48, 48, 1)
    assert not {image.tobytes() for image in first} & originals
    data.training.start_epoch(1)
    second = data.training[0][0]
    assert not {image.tobytes() for image in first} & {image.tobytes() for image in second}


def test_what_else_the_generator_is_told_to_do_is_done(small_dataset, monkeypatch):
    monkeypatch.setattr(script, "AUGMENTATION", {
        "rescale": 1 / 255, "preprocessing_function": lambda image: 255 - image})
    training = script.load_data(small_dataset, batch_size=42).training
    images, _ = training[0]
    expected = (255 - training.images[training.order].astype("float32")) / 255
    assert np.allclose(images, expected)


def test_an_epoch_leaves_the_random_numbers_of_others_alone(small_dataset):
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    script.load_data(small_dataset).training.start_epoch(1)
    assert np.array_equal(np.random.random(3), expected)


def test_batches_are_the_same_in_whatever_order_and_thread_they_are_made(small_dataset):
    training = script.load_data(small_dataset, batch_size=4, seed=3).training
    one_by_one = [training[i] for i in range(len(training))]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(training.__getitem__, reversed(range(len(training)))))[::-1]
    for (images, labels), (same_images, same_labels) in zip(one_by_one, at_once):
        assert np.array_equal(images, same_images) and np.array_equal(labels, same_labels)
    training.start_epoch(1)
    assert not np.array_equal(training[0][1], one_by_one[0][1])  # a new order


def test_without_kaggle_names_a_stratified_tenth_is_held_out(tmp_path, capsys):
    shades = iter(range(7 * 22))
    make_dataset(tmp_path, 20, 1, 1, lambda *_: flat(next(shades)))
    for number, file in enumerate(sorted(tmp_path.glob("*/*/*.png"))):
        file.rename(file.with_name(f"{number}.png"))
    held_out = []
    for seed in (3, 3, 4):
        data = script.load_data(tmp_path, batch_size=200, seed=seed)
        assert np.bincount(data.validation.labels).tolist() == [2] * 7
        assert len(data.training.labels) == 7 * 18 and len(data.test.images) == 14
        held_out.append(data.validation.images[:, 0, 0, 0].tolist())
        assert not set(held_out[-1]) & set(data.training[0][0][:, 0, 0, 0].tolist())
    assert held_out[0] == held_out[1] != held_out[2]
    output = capsys.readouterr().out
    assert output.count("a tenth of train/ is held out for validation") == 3


def test_an_emotion_with_one_image_is_trained_on_and_not_held_out(tmp_path):
    make_dataset(tmp_path, 3, 1, 0)
    for file in tmp_path.glob("test/*/*"):
        file.rename(file.with_name("x.png"))
    for number in 1, 2:
        (tmp_path / f"train/disgust/Training_{number}.png").unlink()
    data = script.load_data(tmp_path, batch_size=8, seed=0)
    disgust = EMOTIONS.index("disgust")
    assert np.bincount(data.validation.labels, minlength=7).tolist() == [1, 0, 1, 1, 1, 1, 1]
    assert np.bincount(data.training.labels).tolist() == [2, 1, 2, 2, 2, 2, 2] and disgust == 1


def test_clean_leaves_out_the_test_images_that_stand_in_train(tmp_path, capsys):
    make_dataset(tmp_path)
    shutil.copy(tmp_path / "train/sad/Training_0.png", tmp_path / "test/happy/PrivateTest_1.png")
    test = script.load_data(tmp_path, batch_size=8, seed=0).test
    assert np.flatnonzero(~test.clean).tolist() == [2 * EMOTIONS.index("happy") + 1]
    assert "1 of the test images also stand in train/" in capsys.readouterr().out


def test_other_sizes_and_colours_become_48x48_grey_and_other_files_are_passed_over(
        tmp_path, capsys):
    make_dataset(tmp_path, 1, 1, 1, lambda *_: flat(90))
    Image.new("RGB", (100, 60), (90, 90, 90)).save(tmp_path / "train/fear/Training_0.png")
    Image.new("L", (96, 96), 90).save(tmp_path / "train/sad/Training_0.png")
    Image.new("P", (20, 20), 0).save(tmp_path / "train/angry/photo.GIF")
    for name in ".DS_Store", "Thumbs.db", "._Training_0.png", "notes.txt":
        (tmp_path / "train/happy" / name).write_text("no image")
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    flat(90).save(tmp_path / "train/loose.png")
    paths, images, labels = script.read_images(tmp_path / "train", EMOTIONS)
    assert images.shape == (8, 48, 48, 1) and images.dtype == "uint8"
    assert [path.name for path in paths] == ["Training_0.png", "photo.GIF"] + ["Training_0.png"] * 6
    assert labels.tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert (np.delete(images, 1, axis=0) == 90).all()
    happy = tmp_path / "train/happy"
    assert capsys.readouterr().err == (
        "passed over, no images by their endings, or in no emotion's folder: "
        f"{tmp_path}/train/loose.png, {happy}/Thumbs.db, {happy}/notes.txt\n")


def test_images_are_read_however_deep_they_lie(tmp_path, capsys):
    """As Keras's flow_from_directory does: one folder for each person, say; linked ones too."""
    make_dataset(tmp_path, 3, 1, 1, lambda *_: flat(90))
    person = tmp_path / "train/sad/person.jpg"  # a folder, in spite of its name
    person.mkdir()
    (tmp_path / "train/sad/Training_0.png").rename(person / "0.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "train/sad/Training_1.png").rename(tmp_path / "elsewhere/1.png")
    (tmp_path / "train/sad/linked").symlink_to(tmp_path / "elsewhere")
    training = script.load_data(tmp_path).training
    assert np.bincount(training.labels).tolist() == [3] * 7


def test_emotions_are_the_folders_of_the_dataset(tmp_path, run_here):
    """Three emotions, trained and evaluated; the network tells them by their own names."""
    emotions = ["bored", "contempt", "tired & sleepy"]
    make_dataset(tmp_path / "data", 4, 2, 2)
    for old, new in zip(EMOTIONS, emotions):
        for part in "train", "test":
            (tmp_path / "data" / part / old).rename(tmp_path / "data" / part / new)
    for emotion in EMOTIONS[3:]:
        for part in "train", "test":
            shutil.rmtree(tmp_path / "data" / part / emotion)
    process = run_here("--epochs", 1, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "\n3 emotions: bored, contempt, tired & sleepy\n" in process.stdout
    test = json.loads((tmp_path / "output/metrics.json").read_text())["test"]
    assert list(test["emotions"]) == emotions and np.shape(test["confusion_matrix"]) == (3, 3)
    for emotion in emotions:
        assert f"\n  {emotion} " in process.stdout  # a row of the table
    flat(90).save(tmp_path / "face.png")
    process = run_here("--predict", "face.png", "--json", cwd=tmp_path)
    assert list(json.loads(process.stdout)["probabilities"]) == emotions


def test_of_fer2013_no_line_names_the_emotions(small_dataset, capsys):
    script.load_data(small_dataset)
    assert "emotions" not in capsys.readouterr().out


def encode(image, kind, **options):
    """Return the bytes of `image` as a file of the given kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_unusual_images_are_read_as_a_person_sees_them(tmp_path, capfd):
    grey = Image.new("L", (48, 48), 90)
    deep = Image.fromarray(np.full((48, 48), 90 * 256, "uint16"))
    big_endian = Image.new("I;16B", (48, 48), 90 * 256)
    hidden = Image.new("LA", (48, 48))  # black, and nothing of it to be seen
    hidden.paste((90, 255), (0, 0, 24, 48))
    hidden.save(tmp_path / "hidden.png")
    half = script.face_pixels(script.open_image(tmp_path / "hidden.png"))
    assert (half[:, :24] == 90).all() and (half[:, 24:] == 255).all()
    malformed = {"exif": b"Exif\0\0no TIFF header"}
    animation = {"save_all": True, "append_images": [Image.new("L", (48, 48), 200)]}
    for name, contents in {
            "CMYK.jpg": encode(grey.convert("CMYK"), "JPEG", quality=100),
            "16 bits.png": encode(deep, "PNG"), "16 bits.tif": encode(deep, "TIFF"),
            "16 bits of a scanner.tif": encode(big_endian, "TIFF"),
            "from 0 to 1.tif": encode(Image.new("F", (48, 48), 90 / 255), "TIFF"),
            "32 bits, up to 255.tif": encode(Image.new("I", (48, 48), 90), "TIFF"),
            "transparency.png": encode(grey.convert("LA"), "PNG"),
            "malformed Exif.png": encode(grey, "PNG", **malformed),
            "the first frame of an animation.gif": encode(grey, "GIF", **animation)}.items():
        (tmp_path / name).write_bytes(contents)
        pixels = script.face_pixels(script.open_image(tmp_path / name))
        assert pixels.shape == (48, 48) and pixels.dtype == "uint8", name
        assert np.abs(pixels.astype(int) - 90).max() <= 2, name
        make_dataset(tmp_path, 1, 1, 1)
        (tmp_path / "train/sad" / name).write_bytes(contents)
    training = script.load_data(tmp_path, 2, 0).training
    output, errors = capfd.readouterr()
    assert "16 training, 7 validation and 7 test images" in output and errors == ""
    assert len(training.labels) == 16


def test_photos_of_200_megapixels_are_read_and_larger_ones_named(tmp_path):
    Image.new("L", (16384, 12288), 90).save(tmp_path / "large.png")
    assert script.open_image(tmp_path / "large.png").size == (16384, 12288)
    Image.new("1", (20000, 20000)).save(tmp_path / "larger.png")
    with pytest.raises(script.InputError, match="larger.png is too large: .* 250 megapixels"):
        script.open_image(tmp_path / "larger.png")


def test_names_that_are_not_utf_8(small_dataset, tmp_path, run_here):
    data = tmp_path / os.fsdecode(b"da\xffta")
    try:
        shutil.copytree(small_dataset, data)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    image = data / os.fsdecode(b"train/sad/Training_\xff.png")
    (data / "train/sad/Training_0.png").rename(image)
    assert len(script.read_images(data / "train", EMOTIONS)[1]) == 42
    image.write_bytes(b"")
    process = run_here("--data-dir", data, cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "Training_" in process.stderr


@pytest.fixture
def kagglehub(small_dataset, tmp_path, monkeypatch):
    """Put a stand-in for kagglehub first on the path; it notes each call and gives the dataset."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/kagglehub.py").write_text(
        f"def dataset_download(handle):\n"
        f"    open({str(tmp_path / 'calls')!r}, 'a').write(handle)\n"
        f"    return {str(small_dataset)!r}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "kagglehub", raising=False)


def test_the_dataset_is_downloaded_where_there_is_none(kagglehub, tmp_path, run_here):
    process = run_here("--epochs", 1, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "calls").read_text() == "msambare/fer2013"
    assert "42 training, 14 validation and 14 test images" in process.stdout


def test_data_folder_that_is_there_is_used_however_small_and_nothing_downloaded(
        kagglehub, tmp_path, monkeypatch, capsys):
    make_dataset(tmp_path / "data", 1, 1, 1)
    monkeypatch.chdir(tmp_path)
    settings = script.complete(script.Settings())
    assert settings.data_dir == "data" and settings.precision == script.fastest_precision()
    script.load_data(settings.data_dir)
    assert "7 training, 7 validation and 7 test images" in capsys.readouterr().out
    assert not (tmp_path / "calls").exists()


def test_a_mistyped_data_dir_is_an_error_and_never_a_download_or_drawings(
        kagglehub, tmp_path, run_here):
    process = run_here("--data-dir", "dta", cwd=tmp_path)
    assert process.returncode == 2 and "dta" in process.stderr
    assert not (tmp_path / "calls").exists() and "drawn" not in process.stdout


def test_data_folder_that_is_there_is_used_even_where_it_holds_bad_input(
        kagglehub, tmp_path, run_here):
    make_dataset(tmp_path / "data", 1, 1, 1)
    (tmp_path / "data/test/happy/x.jpg").write_text("no image")
    process = run_here(cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "data/test/happy/x.jpg" in process.stderr
    assert not (tmp_path / "calls").exists()  # nothing downloaded
    assert not (tmp_path / "output/unfinished").exists()


def test_drawn_faces_have_the_layout_of_the_dataset_and_differ(tmp_path):
    rng = np.random.default_rng(0)
    faces = {np.asarray(script.draw_face(emotion, rng)).tobytes()
             for emotion in EMOTIONS for _ in range(20)}
    assert len(faces) == 140
    face = script.draw_face("fear", np.random.default_rng(1))
    assert face.size == (48, 48) and face.mode == "L"
    assert face == script.draw_face("fear", np.random.default_rng(1))
