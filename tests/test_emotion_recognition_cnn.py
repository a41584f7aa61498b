"""Tests of the script: its functions on small images made here, and whole runs of it."""

import contextlib
import csv
import io
import json
import math
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import skimage.data
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "emotion_recognition_cnn.py"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ablation  # noqa: E402
import emotion_recognition_cnn as script  # noqa: E402

EMOTIONS = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
OUTPUTS = {"accuracy.png", "loss.png", "confusion_matrix.png", "history.csv", "metrics.json",
           "emotion_recognition_cnn.keras"}
# Keras's ImageDataGenerator calls SciPy by a name that goes with SciPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:Please import `affine_transform`")


def run(*arguments, cwd, **environment):
    """Run the script as a user would; return the finished process."""
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], cwd=cwd, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=280,
                          env={**os.environ, **environment})


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Return `run` for what ends before it trains: in this process, which has TensorFlow."""
    def run_here(*arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        script.fastest_precision()  # TensorFlow looks for GPUs once in a process, and talks of it
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            keras.config.set_dtype_policy("float32")
        return subprocess.CompletedProcess(sys.argv, end.value.code, *capfd.readouterr())

    return run_here


def read_history(output_dir):
    """Return history.csv without its seconds."""
    with open(Path(output_dir, "history.csv"), newline="") as file:
        return [{name: float(value) for name, value in row.items() if name != "seconds"}
                for row in csv.DictReader(file)]


def make_dataset(folder, train=6, public=2, private=2, draw=None):
    """Write a small dataset in Kaggle's layout and return its folder.

    Each image is drawn by `draw(emotion, kind, number)`; by default it is a drawn face.
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
    """Return an image of one shade, which no flip, shift, rotation or zoom can change."""
    return Image.new("L", (48, 48), shade)


@pytest.fixture(scope="module")
def small_dataset(tmp_path_factory):
    """Return the folder of a dataset of 70 drawn faces; tests copy it before they change it."""
    return make_dataset(tmp_path_factory.mktemp("small") / "faces")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Return the folder and the process of a run with --demo, into its default output folder."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run("--demo", cwd=folder)


# --- Data -------------------------------------------------------------------------


def test_split_follows_the_file_names(tmp_path, capsys):
    """Each image is told by its shade: none changes sides, loses its label or gets lost."""
    shades = iter(range(7 * 9))
    known = {}

    def draw(emotion, kind, number):
        shade = next(shades)
        known[shade] = (kind, EMOTIONS.index(emotion))
        return flat(shade)

    make_dataset(tmp_path, 5, 3, 1, draw)
    training, validation, test = script.load_data(tmp_path, batch_size=8, seed=0)
    assert len(training) == 5  # 35 images, the last batch is smaller
    batches = [training[index] for index in range(len(training))]
    seen = {"Training": [(x, y) for xs, ys in batches for x, y in zip(xs, ys)],
            "PublicTest": list(zip(*validation)), "PrivateTest": list(zip(*test[:2]))}
    for kind, pairs in seen.items():
        assert sorted((int(image[0, 0, 0]), int(label)) for image, label in pairs) == sorted(
            (shade, label) for shade, (of, label) in known.items() if of == kind)
    assert "35 training, 21 validation and 7 test images" in capsys.readouterr().out


def test_only_training_images_are_augmented(small_dataset):
    training, validation, test = script.load_data(small_dataset, batch_size=42, seed=0)
    for kind, (images, labels) in ("PublicTest", validation), ("PrivateTest", test[:2]):
        files = [small_dataset / "test" / emotion / f"{kind}_{number}.png"
                 for emotion in EMOTIONS for number in range(2)]
        assert np.array_equal(images[..., 0], [np.asarray(Image.open(file)) for file in files])
        assert labels.tolist() == [EMOTIONS.index(file.parent.name) for file in files]
    originals = [np.asarray(Image.open(file)) for file in small_dataset.glob("train/*/*.png")]
    first = training[0][0]
    training.start_epoch(1)
    second = training[0][0]
    assert first.dtype == "uint8" and first.shape == (42, 48, 48, 1)
    for image in first[..., 0]:
        assert not any(np.array_equal(image, original) for original in originals)
    training.start_epoch(2)
    third = training[0][0]
    for images in first, second[:, :, ::-1]:  # two epochs share variations, others see others
        assert not {image.tobytes() for image in images} & {image.tobytes() for image in third}


def test_every_second_epoch_mirrors_the_images_of_the_one_before(small_dataset):
    training, _, _ = script.load_data(small_dataset, batch_size=10, seed=0)

    def of_epoch(epoch):
        training.start_epoch(epoch)
        return np.concatenate([images for images, _ in training])

    first, second = of_epoch(0), of_epoch(1)[:, :, ::-1]
    assert not np.array_equal(first, second)  # in another order
    assert sorted(map(bytes, first)) == sorted(map(bytes, second))


def test_batches_are_the_same_in_whatever_order_and_thread_they_are_made(small_dataset):
    training, _, _ = script.load_data(small_dataset, batch_size=4, seed=3)
    one_by_one = [training[i] for i in range(len(training))]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(training.__getitem__, reversed(range(len(training)))))[::-1]
    for (images, labels), (same_images, same_labels) in zip(one_by_one, at_once):
        assert np.array_equal(images, same_images) and np.array_equal(labels, same_labels)
    training.start_epoch(1)
    assert not np.array_equal(training[0][1], one_by_one[0][1])  # a new order


def test_images_of_rare_emotions_weigh_more(tmp_path, monkeypatch):
    labels = np.repeat(range(7), [8, 1, 8, 27, 8, 8, 8])
    images = np.zeros((len(labels), 48, 48, 1), "uint8")

    class Fitted(Exception):
        pass

    def fit(model, *data, class_weight, **settings):
        raise Fitted(class_weight)

    monkeypatch.setattr(keras.Sequential, "fit", fit)
    with pytest.raises(Fitted) as fitted:
        script.train_model(script.create_CNN(), script.AugmentedBatches(images, labels, 16, 0),
                           (images, labels), 1, 0.001, tmp_path)
    weight = np.array([fitted.value.args[0][label] for label in range(7)])
    assert weight / weight[0] == pytest.approx([1, 2, 1, 2 / 3, 1, 1, 1])  # cube roots of rarity
    assert weight[labels].mean() == pytest.approx(1)


def test_one_and_two_workers_give_the_same_history(small_dataset, tmp_path, capfd):
    histories = []
    for workers in (1, 2):
        training, validation, _ = script.load_data(small_dataset, batch_size=8, seed=3)
        training.workers = workers
        keras.utils.set_random_seed(3)
        model = script.create_CNN()
        histories.append(script.train_model(model, training, validation, 3, 0.001, tmp_path))
    assert histories[0] == histories[1] and len(histories[0]["loss"]) == 3


@pytest.mark.parametrize("within, comes_out, epochs", [
    ("train_step", "on_train_batch_end", 0), ("test_step", "on_train_end", 1)])
def test_ctrl_c_within_tensorflow_comes_out_after_it(
        small_dataset, tmp_path, monkeypatch, capfd, within, comes_out, epochs):
    step, presses = getattr(keras.Sequential, within), iter([signal.SIGINT])

    def press_and_step(*arguments):  # it may be traced twice
        for press in presses:
            signal.raise_signal(press)
        return step(*arguments)

    monkeypatch.setattr(keras.Sequential, within, press_and_step)
    training, validation, _ = script.load_data(small_dataset, batch_size=8, seed=3)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        script.train_model(script.create_CNN(), training, validation, 1, 0.001, tmp_path)
    assert interrupt.traceback[-1].name == comes_out
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "checkpoint.keras").exists() == bool(epochs)
    assert len(read_history(tmp_path)) == epochs


def test_without_kaggle_names_a_stratified_tenth_is_held_out(tmp_path, capsys):
    shades = iter(range(7 * 22))
    make_dataset(tmp_path, 20, 1, 1, lambda *_: flat(next(shades)))
    for number, file in enumerate(sorted(tmp_path.glob("*/*/*.png"))):
        file.rename(file.with_name(f"{number}.png"))
    held_out = []
    for seed in (3, 3, 4):
        training, (images, labels), test = script.load_data(tmp_path, batch_size=200, seed=seed)
        assert np.bincount(labels).tolist() == [2] * 7
        assert len(training.labels) == 7 * 18 and len(test[0]) == 14
        held_out.append(images[:, 0, 0, 0].tolist())
        assert not set(held_out[-1]) & set(training[0][0][:, 0, 0, 0].tolist())
    assert held_out[0] == held_out[1] != held_out[2]
    output = capsys.readouterr().out
    assert output.count("a tenth of train/ is held out for validation") == 3


def test_an_emotion_with_one_image_is_trained_on_and_not_held_out(tmp_path):
    make_dataset(tmp_path, 3, 1, 0)
    for file in tmp_path.glob("test/*/*"):
        file.rename(file.with_name("x.png"))
    for number in 1, 2:
        (tmp_path / f"train/disgust/Training_{number}.png").unlink()
    training, (_, labels), _ = script.load_data(tmp_path, batch_size=8, seed=0)
    disgust = EMOTIONS.index("disgust")
    assert np.bincount(labels, minlength=7).tolist() == [1, 0, 1, 1, 1, 1, 1]
    assert np.bincount(training.labels).tolist() == [2, 1, 2, 2, 2, 2, 2] and disgust == 1


def test_clean_leaves_out_the_test_images_that_stand_in_train(tmp_path, capsys):
    make_dataset(tmp_path)
    shutil.copy(tmp_path / "train/sad/Training_0.png", tmp_path / "test/happy/PrivateTest_1.png")
    _, _, (images, labels, clean) = script.load_data(tmp_path, batch_size=8, seed=0)
    assert np.flatnonzero(~clean).tolist() == [2 * EMOTIONS.index("happy") + 1]
    assert "1 of the test images also stand in train/" in capsys.readouterr().out


def test_other_sizes_and_colours_become_48x48_grey_and_other_files_are_passed_over(tmp_path):
    make_dataset(tmp_path, 1, 1, 1, lambda *_: flat(90))
    Image.new("RGB", (100, 60), (90, 90, 90)).save(tmp_path / "train/fear/Training_0.png")
    Image.new("L", (96, 96), 90).save(tmp_path / "train/sad/Training_0.png")
    Image.new("P", (20, 20), 0).save(tmp_path / "train/angry/photo.GIF")
    for name in ".DS_Store", "Thumbs.db", "._Training_0.png", "notes.txt":
        (tmp_path / "train/happy" / name).write_text("no image")
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    names, _, images, labels = script.read_images(tmp_path / "train")
    assert images.shape == (8, 48, 48, 1) and images.dtype == "uint8"
    assert names.tolist() == ["Training_0.png", "photo.GIF"] + ["Training_0.png"] * 6
    assert labels.tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert (np.delete(images, 1, axis=0) == 90).all()


# --- Network ----------------------------------------------------------------------


def test_network_is_two_convolution_blocks_flatten_and_two_dense_layers():
    model = script.create_CNN()
    kinds = [type(layer).__name__ for layer in model.layers]
    free = {"LayerNormalization", "BatchNormalization", "ReLU", "Dropout"}
    assert [kind for kind in kinds if kind not in free] == [
        "Conv2D", "MaxPooling2D", "Conv2D", "MaxPooling2D", "Flatten", "Dense", "Dense"]
    assert model.input_shape == (None, 48, 48, 1) and model.output_shape == (None, 7)
    assert model.layers[-1].activation is keras.activations.softmax


def test_light_and_contrast_do_not_change_the_prediction():
    rng = np.random.default_rng(0)
    images = rng.uniform(60, 120, (4, 48, 48, 1))
    model = script.create_CNN()
    assert np.allclose(model(images), model(2 * images - 60), atol=1e-3)
    assert np.allclose(np.sum(model(images), axis=1), 1, atol=1e-5)


# --- Precision --------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "expected"), [
    ("sse2 avx2 avx512f", "float32"), ("avx512f avx512_bf16", "mixed_bfloat16"),
    ("amx_tile amx_bf16", "mixed_bfloat16"), ("", "float32")])
def test_bfloat16_only_where_the_processor_has_it(monkeypatch, flags, expected):
    monkeypatch.setattr(script.tf.config, "list_physical_devices", lambda kind: [])
    monkeypatch.setattr(script, "CPUINFO", f"model name\t: Tester 1\nflags\t\t: {flags}\n")
    assert script.fastest_precision() == expected
    assert script.processor_name() == "Tester 1"


@pytest.mark.parametrize(("details", "expected"), [
    ({"compute_capability": (8, 0)}, "mixed_float16"), ({"compute_capability": (6, 1)}, "float32"),
    ({}, "float32")])
def test_float16_only_on_gpus_that_have_tensor_cores(monkeypatch, details, expected):
    monkeypatch.setattr(script.tf.config, "list_physical_devices", lambda kind: ["a GPU"])
    monkeypatch.setattr(script.tf.config.experimental, "get_device_details", lambda gpu: details)
    assert script.fastest_precision() == expected


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_saved_model_predicts_in_float32(small_dataset, tmp_path, capfd, precision):
    training, validation, test = script.load_data(small_dataset, batch_size=8, seed=3)
    keras.config.set_dtype_policy(precision)
    try:
        model = script.create_CNN()
        assert {layer.compute_dtype for layer in model.layers[:-1]} == {precision.split("_")[-1]}
        script.train_model(model, training, validation, 1, 0.001, tmp_path)
    finally:
        keras.config.set_dtype_policy("float32")
    saved = keras.models.load_model(tmp_path / "emotion_recognition_cnn.keras")
    assert {layer.compute_dtype for layer in saved.layers} == {"float32"}
    predictions = saved.predict(test[0], verbose=0)
    assert predictions.dtype == "float32"
    assert np.array_equal(predictions, model.predict(test[0], verbose=0))


# --- Evaluation -------------------------------------------------------------------


class Oracle:
    """Stands in for a network: gives the probabilities it was made with.

    For images that are mirrored, so that the bright side is the right one, it gives others.
    """

    def __init__(self, probabilities, mirrored=None):
        self.probabilities = np.array(probabilities)
        self.mirrored = self.probabilities if mirrored is None else np.array(mirrored)
        self.images = np.zeros((len(self.probabilities), 48, 48, 1), "uint8")
        self.images[:, :, :24] = 255

    def __call__(self, images):
        for image in np.delete(images, np.s_[20:28], axis=2):  # a larger view blurs the middle
            assert image.min(axis=0).tolist() == image.max(axis=0).tolist()
            assert image[0, :, 0].tolist() in ([255] * 20 + [0] * 20, [0] * 20 + [255] * 20)
        is_mirrored, times = images[:, 0, 0, 0] == 0, (len(images) // len(self.images), 1)
        return np.where(is_mirrored[:, np.newaxis], np.tile(self.mirrored, times),
                        np.tile(self.probabilities, times))

    def predict(self, images, **_):
        return self(images)


def test_evaluate_model_against_figures_worked_out_by_hand(capsys):
    labels = np.array([0, 0, 0, 0, 3, 3])  # four angry, two happy
    predictions = [0, 0, 0, 3, 3, 5]
    probabilities = np.full((6, 7), 0.05)
    probabilities[range(6), predictions] = 0.7
    clean = np.array([True, True, True, False, False, True])
    oracle = Oracle(probabilities)
    figures = script.evaluate_model(oracle, oracle.images, labels, clean)
    assert figures["accuracy"] == figures["single_image_accuracy"] == pytest.approx(4 / 6)
    assert figures["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert figures["clean_accuracy"] == pytest.approx(3 / 4) and figures["clean_images"] == 4
    assert figures["loss"] == pytest.approx(-(4 * np.log(0.7) + 2 * np.log(0.05)) / 6)
    assert figures["emotions"]["angry"] == pytest.approx(
        {"precision": 1, "recall": 3 / 4, "f1": 6 / 7, "count": 4})
    assert figures["emotions"]["happy"] == pytest.approx(
        {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "count": 2})
    assert figures["emotions"]["sad"] == {"precision": 0, "recall": 0, "f1": 0, "count": 0}
    expected = np.zeros((7, 7))
    expected[0, [0, 3]], expected[3, [3, 5]] = (3, 1), (1, 1)
    assert np.array_equal(figures["confusion_matrix"], expected)
    output = capsys.readouterr().out
    for words in ("accuracy               66.67%", "balanced accuracy      62.50%",
                  "clean accuracy         75.00%", "single-image accuracy  66.67%",
                  "angry         100.0%    75.0%    85.7%        4"):
        assert words in output


def test_views_are_the_image_higher_and_lower_and_larger_and_mirrored():
    """90 images, which take more than one call of the network."""
    images = np.random.default_rng(0).integers(0, 256, (90, 48, 48, 1), "uint8")
    higher = images[:, np.arange(2, 50).clip(0, 47)]
    larger = np.stack([  # Pillow's bilinear filter is TensorFlow's, where it enlarges
        np.asarray(Image.fromarray(image[:44, 2:46, 0].astype("float32")).resize(
            (48, 48), Image.Resampling.BILINEAR))
        for image in images])[..., np.newaxis]
    calls = []

    def network(views):  # tells the views apart: the sum of its probabilities is of no matter
        calls.append(views)
        return np.repeat(np.eye(7)[:4], len(views) // 4, axis=0)

    probabilities = script.classify_faces(network, images)
    for number, expected in enumerate((higher, larger, higher[:, :, ::-1], larger[:, :, ::-1])):
        seen = np.concatenate([np.split(views, 4)[number] for views in calls])
        assert np.allclose(seen, expected, atol=0.01)
    assert len(calls) > 1 and np.allclose(probabilities, [[1 / 4] * 4 + [0] * 3] * 90)


def test_evaluate_model_averages_over_the_views():
    """The first image alone is taken for disgust; with its mirror image, for angry."""
    single = np.array([[0.4, 0.6, 0, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0, 0, 0]])
    mirrored = np.array([[0.7, 0.3, 0, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0, 0, 0]])
    oracle = Oracle(single, mirrored)
    figures = script.evaluate_model(oracle, oracle.images, np.zeros(2, int), np.ones(2, bool))
    assert figures["single_image_accuracy"] == 0.5
    assert figures["accuracy"] == figures["clean_accuracy"] == figures["balanced_accuracy"] == 1
    assert figures["loss"] == pytest.approx(-(np.log(0.55) + np.log(0.9)) / 2, rel=1e-5)


def test_evaluate_model_where_every_test_image_stands_in_train():
    oracle = Oracle(np.eye(7))
    figures = script.evaluate_model(oracle, oracle.images, np.arange(7), np.zeros(7, bool))
    assert figures["accuracy"] == 1 and figures["loss"] == pytest.approx(0, abs=1e-5)
    assert figures["clean_accuracy"] is None and figures["clean_images"] == 0


# --- Plots ------------------------------------------------------------------------


def test_plots_show_the_history_and_the_confusion_matrix(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(script.plt, "close", figures.append)
    history = {"accuracy": [0.3, 0.5, 0.6], "val_accuracy": [0.4, 0.55, 0.5],
               "loss": [1.9, 1.4, 1.2], "val_loss": [1.7, 1.3, 1.35]}
    confusion = np.eye(7, dtype=int) * 3
    confusion[1, 0] = 1  # one of four disgusted faces taken for angry
    confusion[6] = 0  # nobody is surprised
    script.plot_performance(history, confusion.tolist(), tmp_path)
    for name, figure in zip(("accuracy", "loss"), figures):
        axes = figure.axes[0]
        training, validation, best = axes.lines
        assert training.get_xydata().tolist() == [[1, history[name][0]], [2, history[name][1]],
                                                  [3, history[name][2]]]
        assert validation.get_ydata().tolist() == history["val_" + name]
        assert best.get_xydata().tolist() == [[2, history["val_" + name][1]]]
        assert [text.get_text() for text in axes.get_legend().get_texts()][-1].startswith(
            "best epoch: 2")
        assert name in axes.get_title() and axes.get_xlabel() == "epoch" and axes.get_ylabel()
        figure.canvas.draw()
        assert all(tick == int(tick) for tick in axes.get_xticks())
    axes = figures[2].axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}  # (column, row)
    assert texts[0, 0] == "100%" and texts[0, 1] == "25%" and texts[1, 1] == "75%"
    assert texts[6, 6] == "0%" and len(texts) == 49
    assert [tick.get_text() for tick in axes.get_yticklabels()] == EMOTIONS
    for name in "accuracy", "loss", "confusion_matrix":
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) >= 800
            assert len(set(picture.convert("L").tobytes())) > 50  # not blank


def test_plot_of_a_single_epoch_has_whole_numbers_on_its_axis(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(script.plt, "close", figures.append)
    history = {"accuracy": [0.3], "val_accuracy": [0.4], "loss": [1.9], "val_loss": [1.7]}
    script.plot_performance(history, np.eye(7, dtype=int).tolist(), tmp_path)
    figures[0].canvas.draw()
    assert all(tick == int(tick) for tick in figures[0].axes[0].get_xticks())


# --- Drawn faces ------------------------------------------------------------------


def test_drawn_faces_have_the_layout_of_the_dataset_and_differ(tmp_path):
    rng = np.random.default_rng(0)
    faces = {np.asarray(script.draw_face(emotion, rng)).tobytes()
             for emotion in EMOTIONS for _ in range(20)}
    assert len(faces) == 140
    face = script.draw_face("fear", np.random.default_rng(1))
    assert face.size == (48, 48) and face.mode == "L"
    assert face == script.draw_face("fear", np.random.default_rng(1))


# --- Whole runs -------------------------------------------------------------------


def test_demo_learns_and_says_what_its_accuracy_is_worth(demo):
    folder, process = demo
    assert process.returncode == 0, process.stderr
    assert "means nothing for real faces" in process.stdout
    metrics = json.loads((folder / "output/metrics.json").read_text())
    assert metrics["test"]["accuracy"] >= 0.9
    assert metrics["images"] == {"training": 2100, "validation": 350, "test": 350}
    assert "drawn faces" in metrics["data"]
    assert {path.name for path in folder.iterdir()} == {"output"}


def test_run_leaves_all_files_and_lists_them(demo):
    folder, process = demo
    assert {path.name for path in (folder / "output").iterdir()} == OUTPUTS
    for name in OUTPUTS:
        assert name in process.stdout.splitlines()[-1]


def test_history_has_a_row_per_epoch(demo):
    folder, _ = demo
    with open(folder / "output/history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"epoch", "accuracy", "loss", "val_accuracy", "val_loss",
                            "learning_rate", "seconds"}
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    metrics = json.loads((folder / "output/metrics.json").read_text())
    assert len(rows) == metrics["hyper_parameters"]["epochs"]
    rates = [float(row["learning_rate"]) for row in rows]  # at the start of each epoch
    highest = metrics["hyper_parameters"]["learning_rate"]
    cosine = [highest * (1 + math.cos(math.pi * done / len(rows))) / 2 for done in range(len(rows))]
    assert rates == pytest.approx(cosine, rel=1e-3)
    best = max(rows, key=lambda row: float(row["val_accuracy"]))
    assert metrics["best_epoch"] == int(best["epoch"])
    assert metrics["validation"]["accuracy"] == pytest.approx(float(best["val_accuracy"]))


def test_metrics_say_what_it_takes_to_repeat_the_run(demo):
    folder, process = demo
    metrics = json.loads((folder / "output/metrics.json").read_text())
    assert metrics["seed"] == 0
    assert metrics["seconds"] > sum(float(row["seconds"]) for row in csv.DictReader(
        (folder / "output/history.csv").read_text().splitlines()))
    assert set(metrics["hyper_parameters"]) == {
        "epochs", "batch_size", "learning_rate", "precision"}
    assert metrics["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert metrics["versions"]["keras"] == keras.__version__ and metrics["versions"]["tensorflow"]
    assert process.stdout.startswith(
        f"{metrics['processor']}, {metrics['hyper_parameters']['precision']}\n")
    confusion = np.array(metrics["test"]["confusion_matrix"])
    assert confusion.sum() == 350
    assert metrics["test"]["accuracy"] == pytest.approx(np.trace(confusion) / 350)


def test_saved_model_alone_gives_the_accuracy_of_the_best_epoch(demo, tmp_path):
    """The file is the best epoch's network, and it takes pixels as they are."""
    folder, _ = demo
    model = keras.models.load_model(folder / "output/emotion_recognition_cnn.keras")
    metrics = json.loads((folder / "output/metrics.json").read_text())
    script.draw_faces(tmp_path, seed=0)
    _, validation, test = script.load_data(tmp_path, batch_size=64, seed=0)
    for (images, labels), accuracy in ((validation, metrics["validation"]["accuracy"]),
                                       (test[:2], metrics["test"]["single_image_accuracy"])):
        predictions = model.predict(images, verbose=0).argmax(axis=1)
        assert np.mean(predictions == labels) == pytest.approx(accuracy)


def test_nothing_but_the_script_and_keras_reaches_the_terminal(demo):
    """Every line is one of the script's own or of Keras's, a line per epoch."""
    folder, process = demo
    assert process.stderr == ""
    metrics = json.loads((folder / "output/metrics.json").read_text())
    beginnings = (metrics["processor"], "Demo", "The faces", "Reading", "2,100 training", "Epoch ",
                  "Test,", "averaged", "  ", "Saved in")
    for line in process.stdout.splitlines():
        assert not line or line.startswith(beginnings) or " - val_accuracy: " in line, line


def test_same_seed_same_history(small_dataset, tmp_path):
    options = "--data-dir", small_dataset, "--epochs", 3, "--batch-size", 16
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda name: run(*options, "--output-dir", name, "--seed", 5,
                                              cwd=tmp_path), "ab"))
    assert [process.returncode for process in runs] == [0, 0], runs
    a, b = (read_history(tmp_path / name) for name in "ab")
    assert len(a) == 3 and a == b
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    assert a["test"] == b["test"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_the_progress_bar_of_keras(small_dataset, tmp_path):
    import pty

    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--data-dir", small_dataset, "--epochs", "2"], cwd=tmp_path,
        stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"})
    os.close(slave)
    output = b""
    with contextlib.suppress(OSError):  # Linux: the end of the output is an error
        while chunk := os.read(master, 4096):
            output += chunk
    os.close(master)
    output = output.decode()
    assert process.wait() == 0, output
    assert "Epoch 2/2" in output and "━" in output
    assert "Warning" not in output and "absl" not in output


# --- Finding and downloading the dataset ------------------------------------------


@pytest.fixture
def kagglehub(small_dataset, tmp_path):
    """Put a stand-in for kagglehub first on the path; it notes each call and gives the dataset."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/kagglehub.py").write_text(
        f"def dataset_download(handle):\n"
        f"    open({str(tmp_path / 'calls')!r}, 'a').write(handle)\n"
        f"    return {str(small_dataset)!r}\n")
    return {"PYTHONPATH": str(tmp_path / "site")}


def test_the_dataset_is_downloaded_where_there_is_none(kagglehub, tmp_path):
    process = run("--epochs", 1, cwd=tmp_path, **kagglehub)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "calls").read_text() == "msambare/fer2013"
    assert "42 training, 14 validation and 14 test images" in process.stdout


def test_data_folder_that_is_there_is_used_however_small_and_nothing_downloaded(
        kagglehub, tmp_path):
    make_dataset(tmp_path / "data", 1, 1, 1)
    process = run("--epochs", 1, cwd=tmp_path, **kagglehub)
    assert process.returncode == 0, process.stderr
    assert "7 training, 7 validation and 7 test images" in process.stdout
    assert not (tmp_path / "calls").exists()


def test_a_mistyped_data_dir_is_an_error_and_never_a_download_or_drawings(
        kagglehub, tmp_path, monkeypatch, run_here):
    monkeypatch.syspath_prepend(kagglehub["PYTHONPATH"])
    monkeypatch.delitem(sys.modules, "kagglehub", raising=False)
    process = run_here("--data-dir", "dta", cwd=tmp_path)
    assert process.returncode == 2 and "dta" in process.stderr
    assert not (tmp_path / "calls").exists() and "drawn" not in process.stdout


# --- Bad input --------------------------------------------------------------------


# Each case: arguments, what is done to a copy of the dataset in data/, words of the error line.
BAD_INPUTS = {
    "data folder missing": (["--data-dir", "nowhere"], None, ["nowhere", "--data-dir"]),
    "data folder is a file": (["--data-dir", "data/readme.txt"],
                              lambda data: (data / "readme.txt").write_text("x"), ["readme.txt"]),
    "nothing to hold out": ([], lambda data: [
        file.rename(file.with_name("x.png")) if "_0" in file.name else file.unlink()
        for file in data.glob("*/*/*.png")], ["data/train", "too few"]),
    "no train": ([], lambda data: shutil.rmtree(data / "train"), ["data/train", "--data-dir"]),
    "no test": ([], lambda data: shutil.rmtree(data / "test"), ["data/test", "--data-dir"]),
    "emotion missing": ([], lambda data: shutil.rmtree(data / "test/fear"),
                        ["data/test/fear", "missing"]),
    "emotion empty": ([], lambda data: [file.unlink() for file in data.glob("train/sad/*")],
                      ["data/train/sad", "no images"]),
    "emotion too many": ([], lambda data: (data / "train/contempt").mkdir(),
                         ["data/train/contempt", "none of the seven emotion"]),
    "image of no bytes": ([], lambda data: (data / "train/happy/Training_3.png").write_bytes(b""),
                          ["data/train/happy/Training_3.png", "empty"]),
    "image of text": ([], lambda data: (data / "test/happy/x.jpg").write_text("no image"),
                      ["data/test/happy/x.jpg", "no image"]),
    "image cut short": ([], lambda data: (data / "test/sad/PublicTest_0.png").write_bytes(
        (data / "test/sad/PublicTest_0.png").read_bytes()[:700]), ["PublicTest_0.png", "damaged"]),
    "folder named as an image": ([], lambda data: (data / "test/sad/x.jpg").mkdir(),
                                 ["data/test/sad/x.jpg", "no image"]),
    "decompression bomb": ([], lambda data: Image.new("1", (20000, 20000)).save(
        data / "train/fear/bomb.png"), ["data/train/fear/bomb.png", "DecompressionBomb"]),
    "nothing to predict with": (["--predict", "data/x.png"], None, ["emotion_recognition_cnn.keras",
                                                                   "train", "--output-dir"]),
    "predict nothing": (["--predict"], None, ["--predict"]),
    "predict and train": (["--predict", "x.png", "--epochs", 3], None, ["--epochs", "--predict"]),
    "predict and resume": (["--predict", "x.png", "--resume"], None, ["--resume", "--predict"]),
    "JSON of nothing": (["--json"], None, ["--json", "--predict"]),
    "nothing not to detect": (["--no-detect"], None, ["--no-detect", "--predict"]),
    "nothing to resume": (["--resume"], None, ["--resume", "no interrupted run", "output"]),
    "output is a file": (["--output-dir", "data/readme.txt"],
                         lambda data: (data / "readme.txt").write_text("x"),
                         ["--output-dir", "readme.txt"]),
    "output below a file": (["--output-dir", "data/readme.txt/output"],
                            lambda data: (data / "readme.txt").write_text("x"),
                            ["--output-dir", "readme.txt"]),
    "no epoch": (["--epochs", 0], None, ["--epochs", "at least 1"]),
    "word for epochs": (["--epochs", "many"], None, ["--epochs", "many"]),
    "no batch": (["--batch-size", -4], None, ["--batch-size", "at least 1"]),
    "word for batch size": (["--batch-size", "1.5"], None, ["--batch-size", "1.5"]),
    "no learning rate": (["--learning-rate", 0], None, ["--learning-rate", "above 0"]),
    "negative learning rate": (["--learning-rate", "-0.1"], None, ["--learning-rate", "above 0"]),
    "learning rate nan": (["--learning-rate", "nan"], None, ["--learning-rate", "above 0"]),
    "word for learning rate": (["--learning-rate", "fast"], None, ["--learning-rate", "fast"]),
    "unknown precision": (["--precision", "int8"], None, ["--precision", "int8", "float32"]),
    "negative seed": (["--seed", -1], None, ["--seed", "between 0 and"]),
    "word for seed": (["--seed", "x"], None, ["--seed", "x"]),
    "unknown option": (["--epoch", 3], None, ["--epoch"]),
    "demo and data": (["--demo", "--data-dir", "data"], None, ["--demo", "--data-dir"]),
    "no network": ([], shutil.rmtree, ["https://www.kaggle.com/datasets/msambare/fer2013", "data/",
                                       "--data-dir", "--demo"]),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_gets_one_line_and_status_2(
        name, small_dataset, tmp_path, monkeypatch, run_here):
    arguments, change, words = BAD_INPUTS[name]
    shutil.copytree(small_dataset, tmp_path / "data")
    (tmp_path / "output").mkdir()
    (tmp_path / "output/history.csv").write_text("of an earlier run")
    if change:
        change(tmp_path / "data")
    for proxy in "HTTPS_PROXY", "https_proxy":  # nobody answers: no network, wherever this runs
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    process = run_here(*arguments, cwd=tmp_path)
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("\n") == 1 and process.stderr.startswith("error: ")
    for word in words:
        assert word in process.stderr
    assert "Epoch" not in process.stdout
    assert (tmp_path / "output/history.csv").read_text() == "of an earlier run"


def test_data_folder_that_is_there_is_used_even_where_it_holds_bad_input(kagglehub, tmp_path):
    make_dataset(tmp_path / "data", 1, 1, 1)
    (tmp_path / "data/test/happy/x.jpg").write_text("no image")
    process = run(cwd=tmp_path, **kagglehub)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "data/test/happy/x.jpg" in process.stderr
    assert not (tmp_path / "calls").exists()  # nothing downloaded
    assert not (tmp_path / "output/unfinished").exists()


def test_output_folder_that_cannot_be_written(small_dataset, tmp_path, run_here):
    folder = Path("/proc/self")  # nobody can write here, not even root
    if not folder.exists():
        folder = tmp_path / "read-only"
        folder.mkdir(mode=0o555)
    process = run_here("--data-dir", small_dataset, "--output-dir", folder, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and str(folder) in process.stderr


# --- Interruption and resuming ----------------------------------------------------

RUN = "--epochs", "6", "--batch-size", "8", "--output-dir", "output"


def start(*arguments, cwd):
    """Start the script and return the running process."""
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)], cwd=cwd, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Ctrl-C works in it also where the tests run in the background, which ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_for_epoch(process, folder):
    """Wait until `process` has logged one epoch more than it found, or has ended."""
    history = Path(folder, "output/unfinished/history.csv")
    before = history.read_bytes().count(b"\n") if history.exists() else 1
    while process.poll() is None:
        if history.exists() and history.read_bytes().count(b"\n") > max(before, 1):
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole_run(small_dataset, tmp_path_factory):
    """Return the folder of a run that nobody interrupted; its output is in output/."""
    folder = tmp_path_factory.mktemp("whole")
    process = run("--data-dir", small_dataset, *RUN, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder


def assert_same_run(one, other):
    """Assert that two runs gave the same history, figures and predictions, times aside."""
    assert read_history(one / "output") == read_history(other / "output")
    one, other = (json.loads((folder / "output/metrics.json").read_text())
                  for folder in (one, other))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_run_that_is_killed_again_and_again_ends_as_if_it_never_was(
        small_dataset, whole_run, tmp_path):
    unfinished = tmp_path / "output/unfinished"
    for _ in range(2):
        resume = ["--resume"] if (unfinished / "checkpoint.keras").exists() else []
        process = start("--data-dir", small_dataset, *RUN, *resume, cwd=tmp_path)
        wait_for_epoch(process, tmp_path)
        with open(unfinished / "history.csv", newline="") as file:
            seconds = float(list(csv.DictReader(file))[-1]["seconds"])
        time.sleep(random.uniform(0, seconds / 2))  # into the saving, or into the next epoch
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = run("--resume", "--output-dir", "output", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_run(tmp_path, whole_run)
    assert {path.name for path in (tmp_path / "output").iterdir()} == OUTPUTS


def test_ctrl_c_keeps_what_was_trained_and_resume_goes_on(
        small_dataset, whole_run, tmp_path, run_here):
    process = start("--data-dir", small_dataset, *RUN, cwd=tmp_path)
    unfinished = tmp_path / "output/unfinished"
    while not (unfinished / "checkpoint.keras").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    epochs = len(read_history(unfinished))
    assert errors.strip().count("\n") == 0 and "--resume" in errors
    assert f"the first {epochs} epochs" in errors
    for name in "accuracy.png", "loss.png":
        assert Image.open(unfinished / name).size[0] >= 800

    # Neither a run that forgets about it nor one with other settings touches it.
    kept = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    for arguments, word in ((RUN, "--resume"), (("--resume", "--epochs", "9"), "--epochs"),
                            (("--resume", "--seed", "1"), "--seed"),
                            (("--resume", "--data-dir", "elsewhere"), "--data-dir")):
        refused = run_here(*arguments, cwd=tmp_path)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1 and word in refused.stderr
    assert kept == {path.name: path.read_bytes() for path in unfinished.iterdir()}

    process = run("--resume", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_run(tmp_path, whole_run)


def test_ctrl_c_before_the_first_epoch_leaves_nothing(small_dataset, tmp_path):
    process = start("--data-dir", small_dataset, "--epochs", "3", cwd=tmp_path)
    assert process.stdout.readline()  # the processor: what follows is reading and training
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted; nothing was trained yet"
    assert not (tmp_path / "output/unfinished").exists()


def test_earlier_results_stay_whole_until_the_next_run_has_its_own(
        small_dataset, whole_run, tmp_path):
    shutil.copytree(whole_run / "output", tmp_path / "output")
    before = {name: (tmp_path / "output" / name).read_bytes() for name in OUTPUTS}
    options = "--data-dir", small_dataset, *RUN, "--seed", 1
    process = start(*options, cwd=tmp_path)
    wait_for_epoch(process, tmp_path)
    process.kill()
    process.communicate()
    assert before == {name: (tmp_path / "output" / name).read_bytes() for name in OUTPUTS}
    shutil.rmtree(tmp_path / "output/unfinished")
    assert run(*options, cwd=tmp_path).returncode == 0
    after = {name: (tmp_path / "output" / name).read_bytes() for name in OUTPUTS}
    assert all(before[name] != after[name] for name in OUTPUTS)
    one, other = read_history(whole_run / "output"), read_history(tmp_path / "output")
    assert len(one) == len(other) and one != other  # of another seed


# Runs the script with an os.replace that fails at the second checkpoint, as on a full disk.
FULL_DISK = """
import errno, os, runpy, sys
replace, checkpoints = os.replace, []
def full(source, target):
    if str(target).endswith("checkpoint.keras"):
        checkpoints.append(target)
        if len(checkpoints) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
    replace(source, target)
os.replace = full
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_full_disk_gives_one_line_and_the_run_can_go_on(small_dataset, whole_run, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, SCRIPT, "--data-dir", small_dataset, *RUN],
        cwd=tmp_path, text=True, capture_output=True, timeout=280)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1, process.stderr
    for words in ("checkpoint.keras", "No space left on device", "kept", "--resume"):
        assert words in process.stderr
    process = run("--resume", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_run(tmp_path, whole_run)


def test_output_folder_that_vanishes_during_training(small_dataset, tmp_path):
    process = start("--data-dir", small_dataset, *RUN, cwd=tmp_path)
    wait_for_epoch(process, tmp_path)
    (tmp_path / "output").rename(tmp_path / "elsewhere")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.count("\n") == 1 and "output/unfinished" in errors


def test_loss_that_is_not_finite_ends_the_run(small_dataset, whole_run, tmp_path):
    shutil.copytree(whole_run / "output", tmp_path / "output")
    process = run("--data-dir", small_dataset, *RUN, "--learning-rate", "1e30", cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert "NaN or Inf loss" in process.stderr and "--learning-rate" in process.stderr
    assert {path.name for path in (tmp_path / "output").iterdir()} == OUTPUTS
    assert read_history(tmp_path / "output") == read_history(whole_run / "output")


def test_history_whose_last_line_was_cut_by_a_full_disk(tmp_path):
    (tmp_path / "history.csv").write_text("epoch,loss\n1,2.5\n2,1.")
    assert script.read_history(tmp_path / "history.csv") == {"epoch": [1], "loss": [2.5]}


def foreign_model(path):
    """Save a network that is not the script's."""
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save(path)


@pytest.mark.parametrize(("name", "damage"), [
    ("checkpoint.keras", lambda path: path.write_text("no archive")),
    ("checkpoint.keras", foreign_model),
    ("settings.json", lambda path: path.write_text("{")),
    ("history.csv", lambda path: path.write_text("epoch,seconds\n")),
    ("history.csv", lambda path: path.write_bytes(bytes(500))),
    ("history.csv", lambda path: path.write_text("epoch,seconds\n1,2\n3\n"))])
def test_damaged_or_foreign_state_gives_one_line(small_dataset, tmp_path, name, damage, run_here):
    unfinished = tmp_path / "output/unfinished"
    unfinished.mkdir(parents=True)
    settings = {"data_dir": str(small_dataset), "demo": False, "epochs": 3, "batch_size": 8,
                "learning_rate": 0.001, "precision": "float32", "seed": 0}
    (unfinished / "settings.json").write_text(json.dumps(settings))
    (unfinished / "history.csv").write_text(
        "epoch,accuracy,learning_rate,loss,seconds,val_accuracy,val_loss\n1,0.2,0.1,2,1,0.2,2\n")
    (unfinished / "checkpoint.keras").write_text("no archive")
    damage(unfinished / name)
    process = run_here("--resume", cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1, process.stderr
    assert name in process.stderr and "damaged" in process.stderr


# --- Images that are not plain ----------------------------------------------------


def encode(image, kind, **options):
    """Return the bytes of `image` as a file of the given kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_unusual_images_are_read_as_a_person_sees_them(tmp_path, capfd):
    grey = Image.new("L", (48, 48), 90)
    deep = Image.fromarray(np.full((48, 48), 90 * 256, "uint16"))
    hidden = Image.new("LA", (48, 48))  # black, and nothing of it to be seen
    hidden.paste((90, 255), (0, 0, 24, 48))
    half = script.face_pixels(script.open_image(encode(hidden, "PNG")))
    assert (half[:, :24] == 90).all() and (half[:, 24:] == 255).all()
    animation = {"save_all": True, "append_images": [Image.new("L", (48, 48), 200)]}
    for name, contents in {
            "CMYK.jpg": encode(grey.convert("CMYK"), "JPEG", quality=100),
            "16 bits.png": encode(deep, "PNG"), "16 bits.tif": encode(deep, "TIFF"),
            "transparency.png": encode(grey.convert("LA"), "PNG"),
            "the first frame of an animation.gif": encode(grey, "GIF", **animation)}.items():
        pixels = script.face_pixels(script.open_image(contents))
        assert pixels.shape == (48, 48) and pixels.dtype == "uint8", name
        assert np.abs(pixels.astype(int) - 90).max() <= 2, name
        make_dataset(tmp_path, 1, 1, 1)
        (tmp_path / "train/sad" / name).write_bytes(contents)
    training, _, _ = script.load_data(tmp_path, 2, 0)
    output, errors = capfd.readouterr()
    assert "12 training, 7 validation and 7 test images" in output and errors == ""
    assert len(training.labels) == 12


def test_names_that_are_not_utf_8(small_dataset, tmp_path, run_here):
    data = tmp_path / os.fsdecode(b"da\xffta")
    try:
        shutil.copytree(small_dataset, data)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    (data / "train/sad/Training_0.png").rename(data / os.fsdecode(b"train/sad/Training_\xff.png"))
    options = "--data-dir", data, "--epochs", 1
    process = run(*options, cwd=tmp_path)
    assert process.returncode == 0 and "42 training" in process.stdout, process.stderr
    (data / os.fsdecode(b"train/sad/Training_\xff.png")).write_bytes(b"")
    process = run_here(*options, cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "Training_" in process.stderr


# --- Prediction -------------------------------------------------------------------


@pytest.fixture(scope="module")
def astronaut():
    """Return a photo (PIL image, 512x512) of a woman whose face is about (182, 64, 265, 171)."""
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture
def trained(demo, tmp_path_factory):
    """Return an output folder with nothing but a trained network."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(demo[0] / "output" / script.MODEL, folder)
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
    all_read = script.predict_emotions(paths, output_dir, detect, True)
    printed = capsys.readouterr()
    return all_read, [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_predictions_are_those_of_the_evaluation(demo, trained, tmp_path):
    """The test images, predicted from the command line, give the accuracy of metrics.json."""
    script.draw_faces(tmp_path / "data", 0)  # those that the demo drew
    # A package that cannot be imported stands in the way of MTCNN's: --no-detect needs none.
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/mtcnn.py").write_text("raise SystemExit('imported')")
    paths = sorted((tmp_path / "data/test").glob("*/PrivateTest_*"))
    process = run("--predict", *paths, "--no-detect", "--json", "--output-dir", trained,
                  cwd=tmp_path, PYTHONPATH=str(tmp_path / "packages"))
    assert process.returncode == 0 and process.stderr == "", process.stderr
    faces = [json.loads(line) for line in process.stdout.splitlines()]
    assert [face["file"] for face in faces] == list(map(str, paths))
    correct = [face["emotion"] == path.parent.name for face, path in zip(faces, paths)]
    metrics = json.loads((demo[0] / "output/metrics.json").read_text())["test"]
    assert np.mean(correct) == metrics["accuracy"]

    _, _, (images, labels, clean) = script.load_data(tmp_path / "data", 64, 0)
    model = keras.models.load_model(trained / script.MODEL)
    probabilities = script.classify_faces(model, images)
    predicted = np.array([list(face["probabilities"].values()) for face in faces])
    assert np.abs(predicted - probabilities).max() <= 1e-5
    assert [EMOTIONS[i] for i in probabilities.argmax(1)] == [face["emotion"] for face in faces]
    assert np.allclose(predicted.max(1), [face["confidence"] for face in faces])
    assert list(faces[0]["probabilities"]) == EMOTIONS and faces[0]["face"] == 1


def test_photos_from_the_command_line(trained, astronaut, tmp_path):
    """A table, a picture per photo and folder, and one bad photo that does not stop the others."""
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
    process = run("--predict", "cut.png", "album", "wall.png", "gone.png", cwd=tmp_path)
    assert process.returncode == 2, process.stderr
    rows = [line.split() for line in process.stdout.splitlines() if line]
    assert rows[0] == ["file", "face", "emotion", "confidence", *EMOTIONS]
    assert [row[:2] for row in rows[1:4]] == [
        ["album/deep/pair.jpg", "1"], ["album/pair.png", "1"], ["album/pair.png", "2"]]
    for row in rows[1:4]:
        shares = [float(share.strip("%")) for share in row[4:]]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        assert float(row[3].strip("%")) == max(shares)
        assert row[2] == EMOTIONS[np.argmax(shares)]
    assert rows[4:] == [["Pictures", "saved", "in", "output/predictions"]]
    errors = process.stderr.splitlines()
    assert len(errors) == 3
    assert errors[0].startswith("error: cut.png ") and errors[2].startswith("error: gone.png ")
    assert errors[1].startswith("wall.png: no face") and "--no-detect" in errors[1]
    pictures = {file.name: Image.open(file).size
                for file in (tmp_path / "output/predictions").iterdir()}
    assert pictures == {"pair.jpg": (180 + 260, 180), "pair_.jpg": (700 + 2 * 260, 300),
                        "wall.jpg": (512, 512)}


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


def test_a_crop_beyond_the_edge_repeats_the_edge():
    photo = Image.fromarray(np.arange(12, dtype="uint8").reshape(3, 4))
    assert np.array_equal(script.crop_face(photo, (1, 0, 3, 2)), [[1, 2], [5, 6]])
    assert np.array_equal(script.crop_face(photo, (-2, 1, 1, 5)), [[4, 4, 4], *[[8, 8, 8]] * 3])


def test_picture_shows_boxes_and_bars_as_long_as_the_probabilities():
    shares = np.array([[0.5, 0, 0.3, 0, 0.2, 0, 0], [0, 0, 0, 1.0, 0, 0, 0]])
    boxes = [(20, 40, 80, 100), (280, 40, 340, 100)]
    picture = script.draw_predictions(Image.new("L", (300, 400), "white"), boxes, shares)
    assert picture.size == (300 + 260, 400)
    pixels = np.asarray(picture).astype(int)

    def count(colour, left, top, right, bottom):
        rgb = tuple(bytes.fromhex(colour))
        return (pixels[top:bottom, left:right] == rgb).all(axis=2).sum(axis=1).max()

    assert count("56B4E9", 0, 90, 300, 101) == 61 + 20  # one box whole, one cut off by the edge
    assert count("56B4E9", 300, 0, 560, 400) == 0  # no label runs into the bars
    for top, longest, others in (0, 0.5, 0.3), (180, 1, 0):
        assert count("D55E00", 300, top, 560, top + 180) == pytest.approx(110 * longest, abs=2)
        assert count("0072B2", 300, top, 560, top + 180) == pytest.approx(110 * others, abs=2)


def test_pictures_never_overwrite_a_photo(trained, capsys):
    photo = trained / "predictions/face.jpg"
    photo.parent.mkdir()
    script.draw_face("sad", np.random.default_rng(0)).save(photo)
    before = photo.read_bytes()
    all_read, (face,), _ = predict([photo], trained, capsys)
    assert all_read and photo.read_bytes() == before
    assert Path(face["picture"]) == photo.parent / "face_.jpg" and Path(face["picture"]).exists()


@pytest.mark.parametrize("damage, words", [
    (None, ["there is no", "train"]),
    (lambda path: path.write_bytes(b"not a network"), ["damaged"]),
    (foreign_model, ["no network of this script"])])
def test_without_a_trained_network_there_is_one_line(tmp_path, damage, words):
    if damage:
        damage(tmp_path / script.MODEL)
    with pytest.raises(script.InputError) as raised:
        script.predict_emotions([tmp_path / "x.png"], tmp_path, True, False)
    assert all(word in str(raised.value) for word in [*words, script.MODEL])
    assert len(list(tmp_path.iterdir())) == bool(damage)


# --- README -----------------------------------------------------------------------


def test_readme_gives_the_figures_of_the_runs():
    """The table is what tests/budgets.py makes of docs/runs, and one run is told in full."""
    readme = (ROOT / "README.md").read_text()
    table = subprocess.run(
        [sys.executable, ROOT / "tests/budgets.py", *(ROOT / "docs/runs").iterdir()],
        capture_output=True, text=True, check=True).stdout
    assert table in readme
    metrics = json.loads((ROOT / "docs/runs/48-0/metrics.json").read_text())
    test = metrics["test"]
    results = readme[readme.index("## Results"):readme.index("## The network")]
    for figure in (test["accuracy"], test["clean_accuracy"], test["balanced_accuracy"],
                   *(emotion["recall"] for emotion in test["emotions"].values())):
        assert f"{figure:.1%}".replace("%", " %") in results
    assert f"{metrics['seconds'] / 60:.0f} minutes" in results
    assert f"{metrics['hyper_parameters']['epochs']} epochs" in results
    assert metrics["images"] == {"training": 28709, "validation": 3589, "test": 3589}


def test_readme_table_of_layers_is_the_network():
    readme = (ROOT / "README.md").read_text()
    model = script.create_CNN()
    for layer in model.layers:
        shape = " x ".join(map(str, layer.output.shape[1:]))
        assert f"| {type(layer).__name__} | {shape} | {layer.count_params():,} |" in readme
    assert f"{model.count_params():,}" in readme


@pytest.mark.parametrize("name", ablation.INGREDIENTS)
def test_ablation_leaves_out_what_the_script_holds(name):
    changed = ablation.without(name)  # ends the program where an ingredient is not found
    compile(changed, name, "exec")
    assert (changed == SCRIPT.read_text()) == (name == "the whole recipe")


def test_readme_names_every_option(run_here):
    readme = (ROOT / "README.md").read_text()
    help_text = run_here("--help", cwd=ROOT).stdout
    options = {word.strip("[],") for word in help_text.split() if word.startswith("--")}
    assert len(options) >= 8
    for option in options - {"--help"}:
        assert f"`{option}" in readme


def test_runs_are_summed_up_by_epochs(tmp_path):
    """tests/budgets.py: mean, standard deviation and least time of three seeds, one run beside."""
    for name, epochs, accuracy in ("a", 2, 0.5), ("b", 2, 0.6), ("c", 2, 0.7), ("d", 9, 0.8):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({
            "seed": ord(name) - ord("a"), "seconds": 60 * epochs + 36 * accuracy,
            "hyper_parameters": {"epochs": epochs}, "validation": {"accuracy": accuracy},
            "test": dict.fromkeys(["accuracy", "single_image_accuracy", "clean_accuracy",
                                   "balanced_accuracy"], accuracy)}))
    process = subprocess.run([sys.executable, ROOT / "tests/budgets.py", *"dcba", "--picture",
                              "picture.png"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    rows = process.stdout.splitlines()
    assert rows[2] == "| 2 | 0 1 2 | 2.3 |" + " 60.0 ± 10.0 % |" * 5
    assert rows[3] == "| 9 | 3 | 9.5 |" + " 80.0 % |" * 5
    assert Image.open(tmp_path / "picture.png").width >= 1000
