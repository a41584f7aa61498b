"""Evaluation, plots and the files of a finished run."""

import csv
import itertools
import json
import math
import sys

import keras
import matplotlib
import numpy as np
import pytest
import tensorflow as tf
from conftest import EMOTIONS, expected_files, script, small_network
from PIL import Image
from scipy import ndimage


class Oracle:
    """Replaces a network and returns given probabilities.

    It may return others for mirrored images, in which the right half is bright.
    """

    def __init__(self, probabilities, mirrored=None):
        self.probabilities = np.array(probabilities)
        self.mirrored = self.probabilities if mirrored is None else np.array(mirrored)
        self.images = np.zeros((len(self.probabilities), 48, 48, 1), "uint8")
        self.images[:, :, :24] = 255

    def predict_on_batch(self, images):
        images = np.asarray(images)
        for image in np.delete(images, np.s_[20:28], axis=2):  # zooming blurs the middle
            assert np.allclose(image.min(axis=0), image.max(axis=0), atol=0.01)
            assert image[0, :, 0].round().tolist() in ([255] * 20 + [0] * 20, [0] * 20 + [255] * 20)
        is_mirrored = images[:, 0, 0, 0] < 1
        views = len(images) // len(self.images)
        return np.where(is_mirrored[:, np.newaxis], np.repeat(self.mirrored, views, axis=0),
                        np.repeat(self.probabilities, views, axis=0))

    def predict(self, images, **_):
        return self.predict_on_batch(images)


def data_with(images, labels, clean=None, emotions=EMOTIONS):
    """Return Data that only has test images, as evaluation and plots use no others."""
    test = script.LabelledImages(images, np.array(labels), clean)
    return script.Data(emotions, augmentation=None, training=None, validation=None, test=test)


def evaluate(oracle, labels, clean):
    """Evaluate an oracle on its images and return the scores and probabilities."""
    return script.evaluate_model(oracle, data_with(oracle.images, labels, clean))


# --- Evaluation -----------------------------------------------------------------------------------
def test_evaluate_model_against_figures_worked_out_by_hand(capsys):
    labels = np.array([0, 0, 0, 0, 3, 3])  # four angry, two happy
    predictions = [0, 0, 0, 3, 3, 5]
    probabilities = np.full((6, 7), 0.05)
    probabilities[range(6), predictions] = 0.7
    clean = np.array([True, True, True, False, False, True])
    oracle = Oracle(probabilities)
    scores, averaged = evaluate(oracle, labels, clean)
    assert np.allclose(averaged, probabilities) and scores["milliseconds_per_face"] > 0
    assert scores["accuracy"] == scores["single_image_accuracy"] == pytest.approx(4 / 6)
    assert scores["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert scores["clean_accuracy"] == pytest.approx(3 / 4) and scores["clean_images"] == 4
    # All have a confidence of 70 %, so they share a bin, in which 4 of 6 are correct.
    assert scores["calibration_error"] == pytest.approx(0.7 - 4 / 6)
    assert scores["loss"] == pytest.approx(-(4 * np.log(0.7) + 2 * np.log(0.05)) / 6)
    assert scores["emotions"]["angry"] == pytest.approx(
        {"precision": 1, "recall": 3 / 4, "f1": 6 / 7, "count": 4})
    assert scores["emotions"]["happy"] == pytest.approx(
        {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "count": 2})
    assert scores["emotions"]["sad"] == {"precision": 0, "recall": 0, "f1": 0, "count": 0}
    expected = np.zeros((7, 7))
    expected[0, [0, 3]], expected[3, [3, 5]] = (3, 1), (1, 1)
    assert np.array_equal(scores["confusion_matrix"], expected)
    json.dumps(scores)  # as in metrics.json
    output = capsys.readouterr().out
    for words in ("Test: 6 images, 4 of them clean", "  accuracy               0.6667\n",
                  "balanced accuracy      0.6250\n", "clean accuracy         0.7500\n",
                  "single image accuracy  0.6667\n", "calibration error      0.0333\n",
                  "loss                   1.2364\n",
                  "angry         100.0%    75.0%    85.7%        4\n"):
        assert words in output


def test_calibration_error_against_a_value_worked_out_by_hand():
    """In three of 15 bins: 1.79, 0.94 and 0.74 correct predictions are expected; each has one."""
    confidence = np.array([0.87, 0.92, 0.94, 0.39, 0.35])
    probabilities = np.repeat((1 - confidence[:, np.newaxis]) / 6, 7, axis=1)
    probabilities[:, 0] = confidence
    oracle = Oracle(probabilities)
    scores, _ = evaluate(oracle, np.array([0, 1, 0, 0, 1]), np.ones(5, bool))
    assert scores["calibration_error"] == pytest.approx((0.79 + 0.06 + 0.26) / 5)


def test_views_are_the_image_in_three_sizes_and_at_three_heights_and_mirrored():
    """Uses 90 images, which need more than one call of the network."""
    images = np.random.default_rng(0).integers(0, 256, (90, 48, 48, 1), "uint8")
    views = []
    for size, down in itertools.product((44, 48, 52), (-2, 0, 2)):  # zoom, shift
        columns = 23.5 + (np.arange(48) - 23.5) * size / 48
        places = np.meshgrid(columns + down, columns, indexing="ij")
        views.append(np.stack([
            ndimage.map_coordinates(image[..., 0].astype("float32"), places, order=1,
                                    mode="nearest") for image in images]))
    views += [view[:, :, ::-1] for view in views]
    calls = []

    class Network:
        def predict_on_batch(self, seen):  # the output does not matter
            calls.append(np.asarray(seen))
            return np.tile(np.eye(18)[:, :7], (len(seen) // 18, 1))

    probabilities = script.classify_faces(Network(), images)
    seen = np.concatenate(calls).reshape(90, 18, 48, 48)
    for number, expected in enumerate(views):
        assert np.allclose(seen[:, number], expected, atol=0.02)
    assert len(calls) > 1 and np.allclose(probabilities, 1 / 18)


def test_classify_faces_averages_a_real_network_over_the_views():
    images = np.random.default_rng(1).integers(0, 256, (40, 48, 48, 1), "uint8")
    model = small_network()
    probabilities = script.classify_faces(model, images)
    for image, row in zip(images, probabilities, strict=True):
        views = script.transform_images(np.repeat(image[np.newaxis], 18, axis=0), script.VIEWS)
        expected = model.predict_on_batch(np.asarray(views)).mean(axis=0)
        assert np.allclose(row, expected, atol=1e-6)


def test_evaluate_model_averages_over_the_views():
    """The first image is classified as disgust, but as angry together with its mirror image."""
    single = np.array([[0.4, 0.6, 0, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0, 0, 0]])
    mirrored = np.array([[0.7, 0.3, 0, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0, 0, 0]])
    oracle = Oracle(single, mirrored)
    scores, _ = evaluate(oracle, np.zeros(2, int), np.ones(2, bool))
    assert scores["single_image_accuracy"] == 0.5
    assert scores["accuracy"] == scores["clean_accuracy"] == scores["balanced_accuracy"] == 1
    assert scores["loss"] == pytest.approx(-(np.log(0.55) + np.log(0.9)) / 2, rel=1e-5)


def test_evaluate_model_if_every_test_image_is_also_in_train(capsys):
    oracle = Oracle(np.eye(7))
    scores, _ = evaluate(oracle, np.arange(7), np.zeros(7, bool))
    assert scores["accuracy"] == 1 and scores["loss"] == pytest.approx(0, abs=1e-5)
    assert scores["clean_accuracy"] is None and scores["clean_images"] == 0
    assert "clean accuracy" not in capsys.readouterr().out


# --- Plots ----------------------------------------------------------------------------------------
def is_picture(path, shades=50):
    """Return whether a file is a picture that is large enough and not blank."""
    with Image.open(path) as picture:
        return min(picture.size) >= 800 and len(set(picture.convert("L").tobytes())) > shades


def scores_with(confusion):
    """Return the scores that `plot_performance` uses."""
    return {"emotions": dict.fromkeys(EMOTIONS), "confusion_matrix": confusion.tolist()}


def test_plots_show_the_history_and_the_confusion_matrix(tmp_path, figures):
    history = {"epoch": [1, 2, 3], "accuracy": [0.3, 0.5, 0.6], "loss": [1.9, 1.4, 1.2],
               "val_accuracy": [0.4, 0.55, 0.5], "val_loss": [1.7, 1.3, 1.35],
               "learning_rate": [0.006, 0.005, 0.002], "seconds": [9, 8, 8]}
    confusion = np.eye(7, dtype=int) * 3
    confusion[1, 0] = 1  # one of four disgusted faces is classified as angry
    confusion[6] = 0  # there are no surprised faces
    script.plot_performance(history, scores_with(confusion), str(tmp_path / "plots"))
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
        figure.draw_without_rendering()
        assert all(tick == int(tick) for tick in axes.get_xticks())
    axes = figures[2].axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}  # (column, row)
    assert texts[0, 0] == "100%" and texts[0, 1] == "25%" and texts[1, 1] == "75%"
    assert texts[6, 6] == "0%" and len(texts) == 49
    assert [tick.get_text() for tick in axes.get_yticklabels()] == EMOTIONS
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "accuracy.png", "loss.png", "confusion_matrix.png"}
    assert all(is_picture(path) for path in (tmp_path / "plots").iterdir())


@pytest.mark.parametrize("key", ["font.family", "font.sans-serif"])
def test_the_users_fonts_are_used_for_letters_that_matplotlibs_font_lacks(
        tmp_path, key, recwarn, caplog):
    """For example, Chinese fonts in matplotlibrc.  STIX is included in Matplotlib."""
    letter = "\u1d81"  # a letter d with a hook, which DejaVu Sans lacks
    history = {"epoch": [1], letter: [0.3], "val_" + letter: [0.4], "val_accuracy": [0.4]}
    with matplotlib.rc_context({key: ["STIXGeneral"]}):
        script.plot_history(history, tmp_path)
    assert not [str(warning.message) for warning in recwarn]
    with matplotlib.rc_context({key: ["No Such Font"]}), caplog.at_level("INFO"):
        script.plot_history(history, tmp_path)
    assert "missing from font" in str(recwarn.pop().message)
    assert not caplog.records  # Matplotlib would log a line for each text


@pytest.mark.parametrize("number", [7, 20])
def test_percentages_of_many_emotions_fit_their_cells(tmp_path, figures, number):
    emotions = [f"emotion {i}" for i in range(number)]
    scores = {"emotions": dict.fromkeys(emotions), "confusion_matrix": np.eye(number, dtype=int)}
    history = {"epoch": [1], "val_accuracy": [0.4]}
    script.plot_performance(history, scores, tmp_path)
    faces = [{"face": 1, "box": (0, 0, 48, 48), "emotion": emotions[0], "confidence": 1.0,
              "probabilities": dict.fromkeys(emotions, 1.0)}]
    model = keras.Sequential([keras.Input((48, 48, 1)), keras.layers.Flatten(),
                              keras.layers.Dense(number, activation="softmax")])
    script.draw_photo(Image.new("RGB", (48, 48)), faces, model, tmp_path / "x.jpg")
    for figure in figures:
        table = figure.axes[-1]
        left, right = (table.transData.transform((column, 0))[0] for column in (0, 1))
        widest = max(text.get_window_extent().width for text in table.texts)
        assert widest < right - left and widest > (right - left) / 3


def test_every_metric_with_validation_values_gets_its_own_plot(tmp_path, figures):
    history = {"epoch": [1, 2], "accuracy": [0.3, 0.5], "loss": [1.9, 1.4], "top_2": [0.6, 0.7],
               "val_accuracy": [0.4, 0.3], "val_loss": [1.7, 1.3], "val_top_2": [0.65, 0.8]}
    script.plot_history(history, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "loss.png",
                                                               "top_2.png"]
    axes = figures[2].axes[0]
    training, validation, best = axes.lines
    assert training.get_ydata().tolist() == history["top_2"] and "top_2" in axes.get_title()
    assert validation.get_ydata().tolist() == history["val_top_2"]
    assert best.get_xydata().tolist() == [[1, 0.65]]  # the epoch with the best accuracy


def test_plot_of_a_single_epoch_has_integer_ticks(tmp_path, figures):
    history = {"epoch": [1], "accuracy": [0.3], "val_accuracy": [0.4], "loss": [1.9],
               "val_loss": [1.7]}
    script.plot_history(history, tmp_path)
    figures[0].draw_without_rendering()
    assert all(tick == int(tick) for tick in figures[0].axes[0].get_xticks())


def test_examples_are_the_most_confident_correct_and_incorrect_predictions(tmp_path, figures):
    """Angry: 5 correct, 2 incorrect.  Disgust: correct.  Fear: no images.  Others: incorrect."""
    labels = np.repeat([0, 1, 3, 4, 5, 6], [7, 1, 1, 1, 1, 1])
    predicted = np.array([0, 0, 0, 0, 0, 3, 6, 1, 0, 0, 0, 0])
    confidence = np.array([0.5, 0.9, 0.7, 0.6, 0.8, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5])
    probabilities = np.repeat((1 - confidence[:, np.newaxis]) / 6, 7, axis=1)
    probabilities[range(12), predicted] = confidence
    images = np.broadcast_to(np.arange(12, dtype="uint8")[:, None, None, None], (12, 48, 48, 1))
    script.plot_examples(data_with(images, labels), probabilities, tmp_path)
    shown = [[[(image.get_array().max(), axes.get_title()) for image in axes.images]
              for axes in half.axes] for half in figures[0].subfigs]
    right, wrong = ([sum(half[first:first + 3], []) for first in range(0, 21, 3)]
                    for half in shown)
    assert right == [[(1, "angry 90%"), (4, "angry 80%"), (2, "angry 70%")],
                     [(7, "disgust 50%")], [], [], [], [], []]
    assert wrong == [[(6, "surprise 40%"), (5, "happy 30%")], [], [], [(8, "angry 50%")],
                     [(9, "angry 50%")], [(10, "angry 50%")], [(11, "angry 50%")]]
    assert [axes.get_ylabel() for axes in figures[0].subfigs[0].axes[::3]] == EMOTIONS
    assert [half.get_suptitle() for half in figures[0].subfigs] == [
        "Most confident: correct", "Most confident: incorrect"]
    assert is_picture(tmp_path / "examples.png", shades=10)


def two_convolutions(*between, second=(3, "valid")):
    """Return a network with the given layers, followed by a convolution."""
    size, padding = second
    return keras.Sequential([keras.Input((48, 48, 1)), *between,
                             keras.layers.Conv2D(2, size, padding=padding, use_bias=False)])


RECEPTIVE_FIELDS = {  # network; size, step and start of the field, by hand
    "as in create_CNN": (lambda: two_convolutions(
        keras.layers.Conv2D(2, 5, padding="same", use_bias=False),
        keras.layers.MaxPooling2D(4, strides=3, padding="same")), (14, 3, -2)),
    "kernels of 3 and plain pooling": (lambda: two_convolutions(
        keras.layers.Conv2D(2, 3, padding="same", use_bias=False),
        keras.layers.MaxPooling2D(2)), (8, 2, -1)),
    "everything padded": (lambda: two_convolutions(
        keras.layers.Conv2D(2, 3, padding="same", use_bias=False),
        keras.layers.MaxPooling2D(3, strides=2, padding="same"), second=(5, "same")), (13, 2, -5)),
    "strides in place of pooling": (lambda: two_convolutions(
        keras.layers.Conv2D(2, 7, strides=3, use_bias=False)), (13, 3, 0)),
    "nothing between": (lambda: two_convolutions(
        keras.layers.Conv2D(2, 4, padding="same", use_bias=False), second=(1, "valid")),
        (4, 1, -1)),
}


@pytest.mark.parametrize("name", RECEPTIVE_FIELDS)
def test_receptive_field_is_what_a_position_sees(name):
    """With positive weights, a bright pixel activates exactly the positions that see it."""
    make, (size, step, start) = RECEPTIVE_FIELDS[name]
    model = make()
    model.set_weights([np.full(weight.shape, 0.1) for weight in model.get_weights()])
    assert script.receptive_field(model, model.layers[-1]) == (size, step, start)
    rows = [0, 1, 7, 23, 30, 46, 47]
    images = np.zeros((len(rows), 48, 48, 1))
    for image, row in zip(images, rows):
        image[row, 47 - row] = 1
    places = step * np.arange(model.output_shape[1])
    for reaction, row in zip(model.predict_on_batch(images)[..., 0] > 0, rows):
        sees_row, sees_column = [(start + places <= pixel) & (pixel < start + places + size)
                                 for pixel in (row, 47 - row)]
        assert np.array_equal(reaction, np.outer(sees_row, sees_column))


def test_first_filters_are_scaled_by_their_largest_weight(tmp_path, figures):
    model = script.create_CNN(2)
    before = [weights.copy() for weights in model.get_weights()]
    images = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 1), "uint8")
    script.plot_filters(model, data_with(images, [0, 1, 0, 1], emotions=["a", "b"]), tmp_path)
    kernels = next(weights for weights in before if weights.ndim == 4)[:, :, 0]
    *axes, scale = figures[0].subfigs[0].axes
    drawn = [np.asarray(image.get_array()) for each in axes for image in each.images]
    expected = [kernel / np.abs(kernel).max() for kernel in kernels.transpose(2, 0, 1)]
    assert len(drawn) == len(expected) and np.allclose(drawn, expected)
    assert scale.get_ylim() == (-1, 1)
    for now, then in zip(model.get_weights(), before):  # plotting does not change the network
        assert np.array_equal(now, then)


def test_second_filters_are_shown_with_the_images_that_activate_them_most(tmp_path, figures):
    """One filter responds to a bright spot, which only happy images have.  None is surprised."""
    model = script.create_CNN(7)
    first, second = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    middle = np.full(first.kernel.shape, 1e-9, "float32")
    middle[middle.shape[0] // 2, middle.shape[1] // 2, 0, 0] = 1
    first.set_weights([middle])
    looks_for_spots = np.zeros(second.kernel.shape, "float32")
    looks_for_spots[1, 1, 0, 9] = 1
    second.set_weights([looks_for_spots])
    size, step, start = script.receptive_field(model, second)
    rng = np.random.default_rng(0)
    images = rng.integers(90, 110, (60, 48, 48, 1)).astype("uint8")
    labels = np.arange(60) % 6
    spots = {}
    for i in np.flatnonzero(labels == 3):
        spots[i] = rng.integers(3, 45, 2)
        images[i, spots[i][0], spots[i][1]] = 255 - i
    script.plot_filters(model, data_with(images, labels), tmp_path)
    below = figures[0].subfigs[1]
    rows = [below.axes[first:first + 7] for first in range(0, len(below.axes), 7)]
    assert [row[0].get_ylabel().split("\n")[0] for row in rows] == EMOTIONS[:6]
    happy = rows[3]
    assert happy[0].get_ylabel() == "happy\nfilter 9"
    assert [axes.get_title() for axes in happy] == ["happy"] * 7
    strongest = sorted(spots)[:7]  # the brightest ones
    for axes, i in zip(happy, strongest, strict=True):
        assert np.array_equal(axes.images[0].get_array().squeeze(), images[i, :, :, 0])
        frame, = axes.patches
        lowest = np.array([frame.get_y(), frame.get_x()]) + 0.5  # the first pixel inside
        beyond = lowest + (frame.get_height(), frame.get_width())
        assert (lowest <= spots[i]).all() and (spots[i] < beyond).all()
        assert (lowest >= 0).all() and (beyond <= 48).all()
        # Receptive fields are clipped to the image.
        starts = np.where(lowest == 0, beyond - size, lowest)
        assert ((starts - start) % step == 0).all()
        assert (np.minimum(starts + size, 48) == beyond).all()
    assert is_picture(tmp_path / "filters.png")


def test_the_choice_of_filters_does_not_depend_on_the_precision(tmp_path, figures):
    """The trained network computes in float32, but Keras's dtype policy may be another one."""
    model = script.create_CNN(7)
    images = np.random.default_rng(0).integers(0, 256, (140, 48, 48, 1), "uint8")
    data = data_with(images, np.arange(140) % 7)
    try:
        for policy in "float32", "mixed_bfloat16":
            keras.config.set_dtype_policy(policy)
            script.plot_filters(model, data, tmp_path)
    finally:
        keras.config.set_dtype_policy("float32")
    shown, shown_in_16_bits = ([axes.get_ylabel() for axes in figure.subfigs[1].axes[::7]]
                               for figure in figures)
    assert shown == shown_in_16_bits and len(shown) == 7


@pytest.mark.parametrize(("filters", "size", "pool", "second_filters", "second_size"), [
    (1, 5, 3, 384, 3), (48, 3, 2, 64, 3), (3, 8, 3, 16, 5)])
def test_filters_are_drawn_for_every_network_and_few_images(
        tmp_path, filters, size, pool, second_filters, second_size):
    """There are two emotions, one without images."""
    model = keras.Sequential([
        keras.Input((48, 48, 1)), keras.layers.Conv2D(filters, size, padding="same"),
        keras.layers.MaxPooling2D(pool), keras.layers.Conv2D(second_filters, second_size),
        keras.layers.Flatten(), keras.layers.Dense(2, activation="softmax")])
    data = data_with(np.zeros((1, 48, 48, 1), "uint8"), [1], emotions=["a", "b"])
    script.plot_filters(model, data, str(tmp_path))
    with Image.open(tmp_path / "filters.png") as picture:
        assert min(picture.size) >= 500 and len(set(picture.convert("L").tobytes())) > 50


# --- Files of a finished run ----------------------------------------------------------------------
def test_demo_learns_and_says_that_its_accuracy_is_not_about_real_faces(demo):
    folder, process = demo
    assert process.returncode == 0, process.stderr
    assert "says nothing about real faces" in process.stdout
    metrics = json.loads((folder / "demo/metrics.json").read_text())
    assert metrics["test"]["accuracy"] >= 0.9
    assert metrics["images"] == {"training": 2100, "validation": 350, "test": 350}
    assert metrics["settings"]["demo"]
    assert {path.name for path in folder.iterdir()} == {"demo", "process.json"}


def test_run_saves_all_files_and_lists_them(demo):
    folder, process = demo
    expected = expected_files(folder / "demo")
    assert {path.name for path in (folder / "demo").iterdir()} == expected
    start, _, listed = process.stdout.splitlines()[-1].partition(": ")
    assert start == "Saved in demo" and sorted(listed.split(", ")) == sorted(expected)


def test_history_has_a_row_per_epoch(demo):
    folder, _ = demo
    with open(folder / "demo/history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= {"epoch", "accuracy", "loss", "val_accuracy", "val_loss",
                            "learning_rate", "seconds"}
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    metrics = json.loads((folder / "demo/metrics.json").read_text())
    assert len(rows) == metrics["settings"]["epochs"] == 4
    rates = [float(row["learning_rate"]) for row in rows]  # at the start of each epoch
    highest = metrics["settings"]["learning_rate"]
    cosine = [highest * (1 + math.cos(math.pi * done / len(rows))) / 2 for done in range(len(rows))]
    assert rates == pytest.approx(cosine, rel=1e-3)
    best = max(rows, key=lambda row: float(row["val_accuracy"]))
    assert metrics["best_epoch"] == int(best["epoch"])
    assert metrics["validation"] == {"accuracy": float(best["val_accuracy"]),
                                     "loss": float(best["val_loss"])}


def test_metrics_contain_all_settings_to_repeat_the_run(demo):
    folder, process = demo
    metrics = json.loads((folder / "demo/metrics.json").read_text())
    precision = metrics["settings"].pop("precision")
    assert metrics["settings"] == {  # without paths, which are private
        "demo": True, "crop_faces": False, "epochs": 4, "batch_size": 128, "learning_rate": 0.006,
        "seed": 0, "weight_decay": 0.004}
    assert metrics["processor"] == script.hardware_name()
    assert precision == script.fastest_precision()
    assert process.stdout.startswith(f"{metrics['processor']}, {precision}\n")
    assert metrics["seconds"] > sum(float(row["seconds"]) for row in csv.DictReader(
        (folder / "demo/history.csv").read_text().splitlines()))
    assert metrics["versions"] == {"python": ".".join(map(str, sys.version_info[:3])),
                                   "keras": keras.__version__, "tensorflow": tf.__version__}
    network = folder / "demo/emotion_recognition_cnn.keras"
    parameters = keras.models.load_model(network).count_params()
    megabytes = round(network.stat().st_size / 1e6, 1)
    assert metrics["network"] == {"parameters": parameters, "megabytes": megabytes}
    confusion = np.array(metrics["test"]["confusion_matrix"])
    assert confusion.sum() == 350
    assert metrics["test"]["accuracy"] == pytest.approx(np.trace(confusion) / 350)


def test_saved_model_has_the_accuracy_of_the_best_epoch(demo, tmp_path):
    """The file contains the network of the best epoch.  Its input is unscaled pixels."""
    folder, _ = demo
    model = keras.models.load_model(folder / "demo/emotion_recognition_cnn.keras")
    metrics = json.loads((folder / "demo/metrics.json").read_text())
    script.draw_faces(tmp_path, seed=0)
    data = script.load_data(tmp_path)
    keras.config.set_dtype_policy(metrics["settings"]["precision"])
    while_training = script.create_CNN(7)  # the saved network computes in float32
    keras.config.set_dtype_policy("float32")
    while_training.set_weights(model.get_weights())
    for network, part, accuracy in (
            (while_training, data.validation, metrics["validation"]["accuracy"]),
            (model, data.test, metrics["test"]["single_image_accuracy"])):
        predictions = network.predict(part.images, batch_size=256, verbose=0).argmax(axis=1)
        assert np.mean(predictions == part.labels) == pytest.approx(accuracy)
