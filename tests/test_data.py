"""Finding and loading the dataset: split, unusual files and images, augmentation, download."""

import io
import json
import os
import shutil
import sys

import keras
import numpy as np
import pytest
import skimage.data
from conftest import EMOTIONS, changed_script, flat, make_dataset, script
from PIL import Image
from tensorflow.keras.preprocessing.image import ImageDataGenerator


def in_one(batches):
    """Return the images and labels of all batches of an epoch."""
    return tuple(map(np.concatenate, zip(*batches.as_numpy_iterator())))


def test_split_follows_the_file_names(tmp_path, capsys):
    """Each image has its own shade, so that the test finds it again with its label and split."""
    shades = iter(range(7 * 9))
    known = {}

    def draw(emotion, kind, number):
        shade = next(shades)
        known[shade] = (kind, EMOTIONS.index(emotion))
        return flat(shade)

    make_dataset(tmp_path, 5, 3, 1, draw)
    data = script.load_data(tmp_path)
    assert data.emotions == EMOTIONS
    batches = script.augmented_batches(data, 8, 0)
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 8, 3]
    augmented = script.LabelledImages(*in_one(batches), clean=None)
    for kind, part in (("Training", data.training), ("Training", augmented),
                       ("PublicTest", data.validation), ("PrivateTest", data.test)):
        seen = zip(part.images[:, 0, 0, 0].round().astype(int).tolist(), part.labels.tolist())
        expected = [(shade, label) for shade, (of, label) in known.items() if of == kind]
        assert sorted(seen) == sorted(expected)
    output = capsys.readouterr().out
    assert f"7 emotions: {', '.join(EMOTIONS)}\n" in output
    assert "35 training, 21 validation and 7 test images" in output


def test_without_kaggle_names_a_stratified_tenth_is_held_out(tmp_path, capsys):
    shades = iter(range(7 * 22))
    make_dataset(tmp_path, 20, 1, 1, lambda *_: flat(next(shades)))
    for number, file in enumerate(sorted(tmp_path.glob("*/*/*.png"))):
        file.rename(file.with_name(f"{number:03}.png"))
    data, again = script.load_data(tmp_path), script.load_data(tmp_path)
    assert np.bincount(data.validation.labels).tolist() == [2] * 7
    assert np.bincount(data.training.labels).tolist() == [18] * 7
    assert len(data.test.images) == 14
    held_out, trained_on = (set(part.images[:, 0, 0, 0].tolist())
                            for part in (data.validation, data.training))
    assert len(held_out) == 14 and not held_out & trained_on
    assert np.array_equal(data.validation.images, again.validation.images)
    output = capsys.readouterr().out
    assert output.count("a tenth of train/ is held out for validation") == 2


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_folder_for_validation_is_the_validation_set(tmp_path, capsys, name):
    """In this case, nothing in train/ is held out, and all of test/ is the test set."""
    shades = {"Training": 20, "PublicTest": 90, "PrivateTest": 160}
    make_dataset(tmp_path, 10, 3, 2, lambda emotion, kind, number: flat(shades[kind] + number))
    for file in tmp_path.glob("test/*/PublicTest_*"):
        folder = tmp_path / name / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / file.name.removeprefix("PublicTest_"))
    data = script.load_data(tmp_path)
    for part, first, count in (data.training, 20, 10), (data.validation, 90, 3), (
            data.test, 160, 2):
        assert np.unique(part.images).tolist() == list(range(first, first + count))
        assert np.bincount(part.labels).tolist() == [count] * 7
    output = capsys.readouterr().out
    assert f"train, {name}, test" in output and "held out" not in output


def test_two_folders_for_validation_or_one_without_an_emotion_are_errors(tmp_path):
    make_dataset(tmp_path)
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    shutil.rmtree(tmp_path / "val/sad")
    with pytest.raises(script.InputError, match="val/sad is missing. train/, val/, "
                       "test/ must all contain"):
        script.load_data(tmp_path)
    (tmp_path / "valid").mkdir()
    with pytest.raises(script.InputError, match="/val and .*/valid both exist"):
        script.load_data(tmp_path)


def test_a_stray_file_in_test_is_an_error(tmp_path):
    make_dataset(tmp_path, 2, 2, 2)
    shutil.copy(tmp_path / "test/sad/PublicTest_0.png", tmp_path / "test/sad/copy.png")
    with pytest.raises(script.InputError, match=f"^{tmp_path}/test/sad/copy.png: its name is "
                       "neither .*, unlike 28 others. Rename or remove it"):
        script.load_data(tmp_path)


def test_faces_are_cropped_as_by_predict(tmp_path, monkeypatch, run_here, capfd):
    """The largest face in each image is used.  --resume crops the images in the same way."""
    astronaut = Image.fromarray(skimage.data.astronaut())
    face = astronaut.crop((70, 0, 370, 300))
    pair = Image.new("RGB", (500, 300), "grey")
    pair.paste(face.resize((130, 130)), (0, 100))
    pair.paste(face.resize((260, 260)), (200, 20))
    for part, count in ("train", 2), ("val", 1), ("test", 1):
        for emotion in "happy", "sad":
            folder = tmp_path / "data" / part / emotion
            folder.mkdir(parents=True)
            for number in range(count):
                face.rotate(5 * number).save(folder / f"{number}.png")
            pair.save(folder / "pair.png")
        Image.new("RGB", (300, 300), "grey").save(tmp_path / "data" / part / "sad/wall.png")
    data = script.load_data(tmp_path / "data", crop_faces=True)
    output = capfd.readouterr().out
    assert output.count("skipped 1 of ") == 3 and "larger than" not in output
    assert data.training.labels.tolist() == [0, 0, 0, 1, 1, 1]
    box = max(script.find_faces(pair), key=lambda box: box[2] - box[0])
    assert box[0] > 200
    for part in data.training, data.validation, data.test:
        assert np.array_equal(part.images[-1, :, :, 0], script.cut_out(np.asarray(pair), box))
    faces = script.find_faces(face)
    assert np.array_equal(data.test.images[0, :, :, 0], script.cut_out(np.asarray(face), *faces))

    with monkeypatch.context() as patch:
        patch.setattr(keras.Sequential, "fit", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here("--crop-faces", "--epochs", 1, "--batch-size", 4, cwd=tmp_path)
    process = run_here("--resume", cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert "6 training, 4 validation and 4 test images" in process.stdout
    metrics = json.loads((tmp_path / "output/metrics.json").read_text())
    assert metrics["settings"]["crop_faces"]


def test_an_emotion_without_a_face_is_an_error(tmp_path):
    make_dataset(tmp_path, 1, 1, 1)
    Image.new("L", (100, 100), 90).save(tmp_path / "train/fear/Training_0.png")
    with pytest.raises(script.InputError, match="train/fear: no face was found in any image"):
        script.load_data(tmp_path, crop_faces=True)


def test_an_emotion_with_one_image_is_trained_on_and_not_held_out(tmp_path):
    make_dataset(tmp_path, 3, 1, 0)
    for file in tmp_path.glob("test/*/*"):
        file.rename(file.with_name("x.png"))
    for number in 1, 2:
        (tmp_path / f"train/disgust/Training_{number}.png").unlink()
    data = script.load_data(tmp_path)
    assert EMOTIONS[1] == "disgust"
    assert np.bincount(data.validation.labels, minlength=7).tolist() == [1, 0, 1, 1, 1, 1, 1]
    assert np.bincount(data.training.labels).tolist() == [2, 1, 2, 2, 2, 2, 2]


def test_clean_excludes_the_test_images_that_are_also_in_train(tmp_path, capsys):
    make_dataset(tmp_path)
    shutil.copy(tmp_path / "train/sad/Training_0.png", tmp_path / "test/happy/PrivateTest_1.png")
    test = script.load_data(tmp_path).test
    assert np.flatnonzero(~test.clean).tolist() == [2 * EMOTIONS.index("happy") + 1]
    assert "1 of the test images are also in train/" in capsys.readouterr().out


def test_other_sizes_and_colours_become_48x48_grey_and_other_files_are_counted(tmp_path, capfd):
    make_dataset(tmp_path, 1, 1, 1, lambda *_: flat(90))
    Image.new("RGB", (100, 60), (90, 90, 90)).save(tmp_path / "train/fear/Training_0.png")
    Image.new("L", (96, 96), 90).save(tmp_path / "train/sad/Training_0.png")
    Image.new("P", (20, 20), 0).save(tmp_path / "train/angry/photo.GIF")
    for name in ".DS_Store", "Thumbs.db", "._Training_0.png", "notes.txt", "more.txt":
        (tmp_path / "train/happy" / name).write_text("no image")
    shutil.copy(tmp_path / "train/sad/Training_0.png", tmp_path / "train/loose.png")
    for hidden in ".ipynb_checkpoints", "sad/.thumbnails":
        (tmp_path / "train" / hidden).mkdir()
        (tmp_path / "train" / hidden / "hidden.png").write_text("no image")
    assert script.find_emotions([tmp_path / "train", tmp_path / "test"]) == EMOTIONS
    paths, images, labels = script.read_images(tmp_path / "train", EMOTIONS, crop_faces=False)
    assert images.shape == (8, 48, 48, 1) and images.dtype == "uint8"
    assert [path.name for path in paths] == ["Training_0.png", "photo.GIF"] + ["Training_0.png"] * 6
    assert labels.tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert (np.delete(images, 1, axis=0) == 90).all()
    output, errors = capfd.readouterr()
    assert output == (f"{tmp_path / 'train'}: 2 of 8 images are larger than 64 "
                      "pixels. If they show more than the face, use --crop-faces\n")
    assert errors == (
        f"{tmp_path / 'train'}: skipped 3 of 11 files that are not images (.db, "
        ".txt)\n")


def test_images_in_nested_folders_are_read(tmp_path, capfd):
    """Like Keras's flow_from_directory.  A dataset may have a folder per person, for example."""
    make_dataset(tmp_path, 3, 1, 1, lambda *_: flat(90))
    person = tmp_path / "train/sad/people/person.jpg"  # a folder, despite its name
    person.mkdir(parents=True)
    (tmp_path / "train/sad/Training_0.png").rename(person / "0.png")
    (tmp_path / "train/fear").rename(tmp_path / "fear")
    (tmp_path / "train/fear").symlink_to(tmp_path / "fear")
    training = script.load_data(tmp_path).training
    assert np.bincount(training.labels).tolist() == [3] * 7
    assert capfd.readouterr().err == ""


def test_image_extensions_are_those_that_can_be_read():
    assert script.IMAGE_EXTENSIONS >= {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif",
                                    ".heic"}
    assert not script.IMAGE_EXTENSIONS & {".mpg", ".h5", ".grib", ".pdf", ".txt", ".mp4"}


def test_emotions_are_the_folders_of_the_dataset(tmp_path, run_here):
    """Trains and evaluates a network with three emotions; its predictions use their names."""
    emotions = ["bored", "contempt", "tired & sleepy"]
    make_dataset(tmp_path / "data", 4, 2, 2)
    for part in "train", "test":
        for old, new in zip(EMOTIONS, emotions):
            (tmp_path / "data" / part / old).rename(tmp_path / "data" / part / new)
        for emotion in EMOTIONS[3:]:
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


def test_an_eighth_emotion_is_one_more_folder(tmp_path):
    make_dataset(tmp_path, 2, 1, 1)
    for part in "train", "test":
        shutil.copytree(tmp_path / part / "sad", tmp_path / part / "contempt")
    data = script.load_data(tmp_path)
    assert data.emotions == sorted([*EMOTIONS, "contempt"])
    assert np.bincount(data.training.labels).tolist() == [2] * 8
    assert script.create_CNN(len(data.emotions)).output_shape == (None, 8)


def encode(image, kind, **options):
    """Return the contents of a file of the given kind that shows `image`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_unusual_images_are_read_correctly(tmp_path, capfd):
    grey = Image.new("L", (48, 48), 90)
    animation = {"save_all": True, "append_images": [Image.new("L", (48, 48), 200)]}
    make_dataset(tmp_path, 1, 1, 1)
    for name, contents in {
            "CMYK.jpg": encode(grey.convert("CMYK"), "JPEG", quality=100),
            "nothing is transparent.png": encode(grey.convert("LA"), "PNG"),
            **{f"malformed Exif.{kind}": encode(grey, kind, exif=b"Exif\0\0no TIFF header")
               for kind in ("JPEG", "PNG", "WebP")},
            "the first frame of an animation.gif": encode(grey, "GIF", **animation)}.items():
        (tmp_path / "train/sad" / name).write_bytes(contents)
        image = script.open_image(tmp_path / "train/sad" / name)
        pixels = script.face_pixels(script.open_image(image))  # as in classify_photo
        assert pixels.shape == (48, 48) and pixels.dtype == "uint8", name
        assert np.abs(pixels.astype(int) - 90).max() <= 2, name
    assert len(script.load_data(tmp_path).training.labels) == 13
    output, errors = capfd.readouterr()
    assert "13 training, 7 validation and 7 test images" in output and errors == ""


@pytest.mark.parametrize("damage", [
    lambda contents: b"", lambda contents: b"no image", lambda contents: contents[:-200]])
def test_an_image_that_cannot_be_read_is_named(tmp_path, damage):
    face = script.draw_face("sad", np.random.default_rng(0))
    (tmp_path / "face.png").write_bytes(damage(encode(face, "PNG")))
    with pytest.raises(script.InputError, match=f"^{tmp_path}/face.png cannot be read as an image"):
        script.open_image(tmp_path / "face.png")


def test_more_than_8_bits_are_refused(tmp_path):
    deep = np.full((60, 60), 30000, "uint16")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for photo, words in (tmp_path / "deep.png", f"^{tmp_path}/deep.png .* 8 bits per channel"), (
            deep, "^this ndarray .* uint16, 60 x 60$"):
        with pytest.raises(script.InputError, match=words):
            script.open_image(photo)


# For each Exif orientation: how a rotated camera stores the pixels of an upright image.
TURNED = {
    1: lambda pixels: pixels, 2: np.fliplr, 3: lambda pixels: np.rot90(pixels, 2), 4: np.flipud,
    5: np.transpose, 6: np.rot90, 7: lambda pixels: np.rot90(pixels, 2).T,
    8: lambda pixels: np.rot90(pixels, -1)}


@pytest.mark.parametrize("orientation", TURNED)
def test_images_are_rotated_upright(tmp_path, orientation):
    upright = np.random.default_rng(0).integers(0, 256, (30, 50), "uint8")
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(TURNED[orientation](upright)).save(tmp_path / "photo.png", exif=exif)
    photo = script.open_image(tmp_path / "photo.png")
    assert photo.mode == "RGB" and np.array_equal(np.asarray(photo)[..., 0], upright)


@pytest.mark.filterwarnings("ignore:Image size")  # from Pillow; on the command line, it is hidden
def test_photos_of_200_megapixels_are_read_and_larger_ones_named(tmp_path):
    Image.new("1", (16384, 12288), 1).save(tmp_path / "large.png")
    assert script.open_image(tmp_path / "large.png").size == (16384, 12288)
    Image.new("1", (20000, 20000)).save(tmp_path / "larger.png")
    with pytest.raises(script.InputError, match="larger.png cannot be read as an image: .* pixels"):
        script.open_image(tmp_path / "larger.png")


def test_names_that_are_not_utf_8(small_dataset, tmp_path, run_here):
    data = tmp_path / os.fsdecode(b"da\xffta")
    try:
        shutil.copytree(small_dataset, data)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    image = data / os.fsdecode(b"train/sad/Training_\xff.png")
    (data / "train/sad/Training_0.png").rename(image)
    assert len(script.read_images(data / "train", EMOTIONS, crop_faces=False)[1]) == 42
    image.write_bytes(b"")
    process = run_here("--data-dir", data, cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "Training_" in process.stderr


def test_only_training_images_are_augmented(small_dataset):
    data = script.load_data(small_dataset)
    originals = {np.asarray(Image.open(file), "float32").tobytes()
                 for file in small_dataset.glob("train/*/*.png")}
    first, second = (in_one(script.augmented_batches(data, 16, [0, epoch]))[0] for epoch in (0, 1))
    assert first.dtype == "float32" and first.shape == (42, 48, 48, 1)
    assert not {image.tobytes() for image in first} & originals
    assert not {image.tobytes() for image in first} & {image.tobytes() for image in second}
    for kind, part in ("PublicTest", data.validation), ("PrivateTest", data.test):
        files = [small_dataset / "test" / emotion / f"{kind}_{number}.png"
                 for emotion in EMOTIONS for number in range(2)]
        assert np.array_equal(part.images[..., 0],
                              [np.asarray(Image.open(file)) for file in files])
        assert part.labels.tolist() == [EMOTIONS.index(file.parent.name) for file in files]


# Each kind of affine transform, and a combination, with ImageDataGenerator's parameter names.
TRANSFORMS = {
    "none": {}, "rotation": {"theta": 33}, "shift sideways": {"tx": 5.3}, "shift up": {"ty": -7.8},
    "shear": {"shear": 21}, "zoom": {"zx": 0.8, "zy": 0.8}, "asymmetrical zoom": {"zx": 1.3},
    "other asymmetrical zoom": {"zx": 0.9, "zy": 1.2}, "flip": {"flip_horizontal": True},
    "upside down": {"flip_vertical": True}, "both flips": {"flip_horizontal": True,
                                                           "flip_vertical": True},
    "all": {"theta": -14, "tx": 3.1, "ty": 6.7, "shear": -9, "zx": 1.15, "zy": 0.85,
            "flip_horizontal": True, "flip_vertical": True}}


def assert_transforms_agree(images, transforms):
    """Assert that the script transforms float images as ImageDataGenerator does."""
    generator = ImageDataGenerator(dtype="float32")
    expected = [generator.apply_transform(image, transform)
                for image, transform in zip(images, transforms)]
    matrices = np.concatenate([script.affine_matrices(**transform) for transform in transforms])
    assert np.abs(script.transform_images(images, matrices) - expected).max() < 0.01


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_each_transform_matches_the_generator(kind):
    images = np.random.default_rng(0).uniform(0, 255, (2, 48, 48, 1)).astype("float32")
    assert_transforms_agree(images, [TRANSFORMS[kind]] * 2)


def test_random_transforms_match_the_generator():
    generator = ImageDataGenerator(
        horizontal_flip=True, vertical_flip=True, rotation_range=180, width_shift_range=0.5,
        height_shift_range=0.2, shear_range=40, zoom_range=(0.6, 1.7))
    images = np.random.default_rng(1).uniform(0, 255, (60, 48, 48, 1)).astype("float32")
    drawn = script.random_transforms(generator, 60, np.random.RandomState(3))
    assert_transforms_agree(images, [dict(zip(drawn, row)) for row in zip(*drawn.values())])


@pytest.mark.parametrize("augmentation", [
    script.AUGMENTATION, {}, {"vertical_flip": True}, {"zoom_range": (1, 1.2)},
    {"rotation_range": 40, "height_shift_range": 0.3, "shear_range": 20, "horizontal_flip": True}])
def test_transforms_drawn_at_once_equal_those_that_the_generator_draws_one_by_one(augmentation):
    """They are identical to the last digit, so that runs with a seed remain reproducible."""
    generator = ImageDataGenerator(**augmentation)
    drawn = script.random_transforms(generator, 50, np.random.RandomState([3, 7]))
    np.random.seed([3, 7])
    one_by_one = [generator.get_random_transform((48, 48, 1)) for _ in range(50)]
    nothing = {"theta": 0, "tx": 0, "ty": 0, "shear": 0, "zx": 1, "zy": 1}
    for number, expected in enumerate(one_by_one):
        transform = nothing | {name: values[number] for name, values in drawn.items()}
        assert {name: expected[name] for name in transform} == transform


def test_order_and_transforms_depend_only_on_seed_and_epoch(small_dataset):
    data = script.load_data(small_dataset)
    images, labels = in_one(script.augmented_batches(data, 8, [3, 0]))
    np.random.seed(99)
    for batch_size in 8, 42:
        again = script.augmented_batches(data, batch_size, [3, 0])
        np.random.random(1000)  # other code draws random numbers during training
        same_images, same_labels = in_one(again)
        assert np.array_equal(same_labels, labels) and np.array_equal(same_images, images)
    for seed in [3, 1], [4, 0]:
        assert not np.array_equal(in_one(script.augmented_batches(data, 8, seed))[1], labels)


def test_an_epoch_does_not_change_numpys_global_random_state(small_dataset):
    data = script.load_data(small_dataset)
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    in_one(script.augmented_batches(data, 8, [0, 1]))
    assert np.array_equal(np.random.random(3), expected)


@pytest.mark.parametrize("augmentation", [
    {"brightness_range": (0.5, 1)}, {"rescale": 1 / 255}, {"channel_shift_range": 20}])
def test_augmentation_that_is_not_affine_is_an_error(small_dataset, monkeypatch, augmentation):
    monkeypatch.setattr(script, "AUGMENTATION", {"zoom_range": 0.1, **augmentation})
    with pytest.raises(script.InputError, match=f"AUGMENTATION: {[*augmentation][0]} is not aff"):
        script.load_data(small_dataset)


def test_augmentation_that_is_not_affine_ends_the_script(small_dataset, tmp_path, run_here):
    changed = changed_script(tmp_path, (
        '"zoom_range": 0.1}', '"zoom_range": 0.1,\n                "brightness_range": (0.5, 1)}'))
    process = run_here("--data-dir", small_dataset, cwd=tmp_path, program=changed)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: AUGMENTATION: brightness_range is not affine")
    assert not (tmp_path / "output").exists()


@pytest.fixture
def kagglehub(tmp_path, monkeypatch):
    """Replace kagglehub by a module that records each call and returns a folder."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/kagglehub.py").write_text(
        f"def dataset_download(handle):\n"
        f"    open({str(tmp_path / 'calls')!r}, 'a').write(handle)\n"
        f"    return {str(tmp_path / 'cache')!r}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "kagglehub", raising=False)
    yield
    sys.modules.pop("kagglehub", None)  # other tests import the real one


def test_the_dataset_is_downloaded_if_there_is_none(kagglehub, tmp_path, run_here):
    """The version is given: without it, kagglehub needs the Internet even if the data is cached."""
    make_dataset(tmp_path / "cache", 1, 1, 1)
    (tmp_path / "cache/test/happy/x.jpg").write_text("no image, which ends the run early")
    process = run_here("--epochs", 1, cwd=tmp_path)
    assert (tmp_path / "calls").read_text() == "msambare/fer2013/versions/1"
    assert f"Reading {tmp_path / 'cache'}: train, test\n7 emotions: angry, " in process.stdout
    assert process.returncode == 2 and str(tmp_path / "cache/test/happy/x.jpg") in process.stderr


def test_a_failed_download_is_reported_with_its_reason_and_alternatives(
        kagglehub, tmp_path, monkeypatch):
    (tmp_path / "site/kagglehub.py").write_text("raise OSError('no HOME\\nfor you')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(script.InputError) as error:
        script.find_dataset()
    message = str(error.value)
    assert "(OSError: no HOME for you)" in message and "\n" not in message
    assert all(way in message for way in ("data/", "--data-dir", "--demo", "https://www.kaggle.c"))


def test_without_kagglehub_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(script.InputError, match="pip install kagglehub.*--data-dir"):
        script.find_dataset()


def test_an_existing_data_folder_is_used_and_nothing_downloaded(
        kagglehub, tmp_path, monkeypatch, capsys):
    make_dataset(tmp_path / "data", 1, 1, 1)
    monkeypatch.chdir(tmp_path)
    assert script.find_dataset() == "data"
    script.load_data("data")
    assert "7 training, 7 validation and 7 test images" in capsys.readouterr().out
    assert not (tmp_path / "calls").exists()


def test_a_mistyped_data_dir_is_an_error_and_starts_no_download_or_demo(
        kagglehub, tmp_path, run_here):
    process = run_here("--data-dir", "dta", cwd=tmp_path)
    assert process.returncode == 2 and "dta" in process.stderr
    assert not (tmp_path / "calls").exists() and "Drawing" not in process.stdout


def test_an_existing_data_folder_is_used_even_if_it_contains_bad_input(
        kagglehub, tmp_path, run_here):
    make_dataset(tmp_path / "data", 1, 1, 1)
    (tmp_path / "data/test/happy/x.jpg").write_text("no image")
    process = run_here(cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "data/test/happy/x.jpg" in process.stderr
    assert not (tmp_path / "calls").exists()  # nothing downloaded
    assert not (tmp_path / "output").exists()


def test_drawn_faces_have_the_layout_of_the_dataset(tmp_path):
    script.draw_faces(tmp_path, seed=0)
    for part, prefix, count in (("train", "Training", 300), ("test", "PublicTest", 50),
                                ("test", "PrivateTest", 50)):
        assert sorted(folder.name for folder in (tmp_path / part).iterdir()) == EMOTIONS
        for folder in (tmp_path / part).iterdir():
            assert {file.name for file in folder.glob(f"{prefix}_*")} == {
                f"{prefix}_{number}.jpg" for number in range(count)}
    assert len(list(tmp_path.glob("*/*/*"))) == 7 * 400


def test_drawn_faces_differ_and_depend_on_the_seed():
    rng = np.random.default_rng(0)
    faces = {np.asarray(script.draw_face(emotion, rng)).tobytes()
             for emotion in EMOTIONS for _ in range(20)}
    assert len(faces) == 140
    face = script.draw_face("fear", np.random.default_rng(1))
    assert face.size == (48, 48) and face.mode == "L"
    assert face == script.draw_face("fear", np.random.default_rng(1))
