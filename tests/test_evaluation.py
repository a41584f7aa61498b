"""The evaluation, the plots, and what a finished run leaves."""

import csv
import itertools
import json
import math
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import EMOTIONS, OUTPUTS, script
from PIL import Image
from scipy import ndimage


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
        images = np.asarray(images)
        for image in np.delete(images, np.s_[20:28], axis=2):  # other sizes blur the middle
            assert np.allclose(image.min(axis=0), image.max(axis=0), atol=0.01)
            assert image[0, :, 0].round().tolist() in ([255] * 20 + [0] * 20, [0] * 20 + [255] * 20)
        is_mirrored, times = images[:, 0, 0, 0] < 1, (len(images) // len(self.images), 1)
        return np.where(is_mirrored[:, np.newaxis], np.tile(self.mirrored, times),
                        np.tile(self.probabilities, times))

    def predict(self, images, **_):
        return self(images)


@pytest.fixture
def in_python():
    """Let what stands in for a network be called anew each time, and not traced by TensorFlow."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def evaluate(oracle, labels, clean):
    """Evaluate an oracle on its images; return scores and probabilities."""
    test = script.LabelledImages(oracle.images, labels, clean)
    return script.evaluate_model(oracle, test, EMOTIONS)


def test_evaluate_model_against_figures_worked_out_by_hand(in_python, capsys):
    labels = np.array([0, 0, 0, 0, 3, 3])  # four angry, two happy
    predictions = [0, 0, 0, 3, 3, 5]
    probabilities = np.full((6, 7), 0.05)
    probabilities[range(6), predictions] = 0.7
    clean = np.array([True, True, True, False, False, True])
    oracle = Oracle(probabilities)
    figures, averaged = evaluate(oracle, labels, clean)
    assert np.allclose(averaged, probabilities) and figures["milliseconds_per_face"] > 0
    assert figures["accuracy"] == figures["single_image_accuracy"] == pytest.approx(4 / 6)
    assert figures["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert figures["clean_accuracy"] == pytest.approx(3 / 4) and figures["clean_images"] == 4
    # All are 70 % sure, and so in one bin, in which 4 of 6 are right.
    assert figures["calibration_error"] == pytest.approx(0.7 - 4 / 6)
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
                  "clean accuracy         75.00%", "single image accuracy  66.67%",
                  "calibration error      3.33%", "loss                   1.2364",
                  "angry         100.0%    75.0%    85.7%        4"):
        assert words in output


def test_calibration_error_against_a_value_worked_out_by_hand(in_python):
    """In the bin up to 14/15, 2 are right where 2.7 are expected; up to 6/15, 1 of 0.74."""
    probabilities = np.zeros((5, 7))
    probabilities[:3, :2] = 0.9, 0.1
    probabilities[3:, :3] = (0.39, 0.31, 0.3), (0.35, 0.33, 0.32)
    oracle = Oracle(probabilities)
    figures, _ = evaluate(oracle, np.array([0, 0, 1, 0, 1]), np.ones(5, bool))
    assert figures["calibration_error"] == pytest.approx((0.7 + 0.26) / 5)


def test_views_are_the_image_in_three_sizes_and_at_three_heights_and_mirrored(in_python):
    """90 images, which take more than one call of the network."""
    images = np.random.default_rng(0).integers(0, 256, (90, 48, 48, 1), "uint8")
    views = []
    for margin, down in itertools.product((2, 0, -2), (-2, 0, 2)):  # seen from that much within
        rows, columns = (np.arange(margin + by, 48 - margin + by).clip(0, 47) for by in (down, 0))
        views.append(np.stack([
            ndimage.zoom(image[..., 0].astype("float32"), 48 / len(rows), order=1, mode="nearest",
                         grid_mode=True) for image in images[:, rows][:, :, columns]]))
    calls = []

    def network(views):  # tells the views apart: the sum of its probabilities is of no matter
        calls.append(np.asarray(views))
        return np.repeat(np.eye(18)[:, :7], len(views) // 18, axis=0)

    probabilities = script.classify_faces(network, images)
    for number, expected in enumerate((*views, *(view[:, :, ::-1] for view in views))):
        seen = np.concatenate([np.split(call, 18)[number] for call in calls])
        assert np.allclose(seen[..., 0], expected, atol=0.01)
    assert len(calls) > 1 and np.allclose(probabilities, 1 / 18)


def test_evaluate_model_averages_over_the_views(in_python):
    """The first image alone is taken for disgust; with its mirror image, for angry."""
    single = np.array([[0.4, 0.6, 0, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0, 0, 0]])
    mirrored = np.array([[0.7, 0.3, 0, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0, 0, 0]])
    oracle = Oracle(single, mirrored)
    figures, _ = evaluate(oracle, np.zeros(2, int), np.ones(2, bool))
    assert figures["single_image_accuracy"] == 0.5
    assert figures["accuracy"] == figures["clean_accuracy"] == figures["balanced_accuracy"] == 1
    assert figures["loss"] == pytest.approx(-(np.log(0.55) + np.log(0.9)) / 2, rel=1e-5)


def test_evaluate_model_where_every_test_image_stands_in_train(in_python):
    oracle = Oracle(np.eye(7))
    figures, _ = evaluate(oracle, np.arange(7), np.zeros(7, bool))
    assert figures["accuracy"] == 1 and figures["loss"] == pytest.approx(0, abs=1e-5)
    assert figures["clean_accuracy"] is None and figures["clean_images"] == 0


def scores_with(confusion):
    """Return what `plot_performance` takes of the scores."""
    return {"emotions": dict.fromkeys(EMOTIONS), "confusion_matrix": confusion.tolist()}


@pytest.fixture
def figures(monkeypatch):
    """Return the list of the figures that are saved from now on."""
    saved, savefig = [], script.Figure.savefig

    def save(figure, *arguments, **settings):
        saved.append(figure)
        return savefig(figure, *arguments, **settings)

    monkeypatch.setattr(script.Figure, "savefig", save)
    return saved


def test_plots_show_the_history_and_the_confusion_matrix(tmp_path, figures):
    history = {"epoch": [1, 2, 3], "accuracy": [0.3, 0.5, 0.6], "val_accuracy": [0.4, 0.55, 0.5],
               "loss": [1.9, 1.4, 1.2], "val_loss": [1.7, 1.3, 1.35]}
    confusion = np.eye(7, dtype=int) * 3
    confusion[1, 0] = 1  # one of four disgusted faces taken for angry
    confusion[6] = 0  # nobody is surprised
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
    for name in "accuracy", "loss", "confusion_matrix":
        with Image.open(tmp_path / "plots" / f"{name}.png") as picture:
            assert min(picture.size) >= 800
            assert len(set(picture.convert("L").tobytes())) > 50  # not blank


def test_plot_of_a_single_epoch_has_whole_numbers_on_its_axis(tmp_path, figures):
    history = {"epoch": [1], "accuracy": [0.3], "val_accuracy": [0.4], "loss": [1.9],
               "val_loss": [1.7]}
    script.plot_performance(history, scores_with(np.eye(7, dtype=int)), tmp_path)
    figures[0].draw_without_rendering()
    assert all(tick == int(tick) for tick in figures[0].axes[0].get_xticks())


def test_examples_are_the_surest_of_each_emotion_right_and_wrong(tmp_path, figures):
    """Angry: five right, two wrong.  Disgust: nothing wrong.  Fear: no images.  Others: wrong."""
    labels = np.repeat([0, 1, 3, 4, 5, 6], [7, 1, 1, 1, 1, 1])
    predicted = np.array([0, 0, 0, 0, 0, 3, 6, 1, 0, 0, 0, 0])
    confidence = np.array([0.5, 0.9, 0.7, 0.6, 0.8, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5])
    probabilities = np.repeat((1 - confidence[:, np.newaxis]) / 6, 7, axis=1)
    probabilities[range(12), predicted] = confidence
    images = np.broadcast_to(np.arange(12, dtype="uint8")[:, None, None, None], (12, 48, 48, 1))
    test = script.LabelledImages(images, labels, clean=None)
    script.plot_examples(test, probabilities, EMOTIONS, tmp_path)
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
        "Surest and right", "Surest and wrong: taken for"]
    with Image.open(tmp_path / "examples.png") as picture:
        assert min(picture.size) >= 800 and len(set(picture.convert("L").tobytes())) > 10


def test_kind_of_a_filter_is_what_it_responds_to():
    """Filters at each angle, light and dark; the angle of an edge is that of its change."""
    y, x = np.mgrid[-2:3, -2:3]
    for angle, offset in itertools.product((-170, -90, -20, 0, 45, 130), (-0.2, 0, 0.1)):
        along = x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle))
        kind, found = script.kind_of_filter(along + offset)
        assert kind == "gradient" and found == pytest.approx(angle)
        for line in np.exp(-along**2), -np.exp(-along**2):
            kind, found = script.kind_of_filter(line + offset)
            assert kind == "edge" and abs((found - angle + 90) % 180 - 90) < 15
    thin_lines = (x == 0), (y == 1), (x == y), (x == -y)
    assert {script.kind_of_filter(line * 1.0)[0] for line in thin_lines} == {"edge"}
    distance = x**2 + y**2
    for spot in distance == 0, np.exp(-distance), -np.exp(-distance), np.exp(-distance) - 0.12:
        assert script.kind_of_filter(spot * 1.0)[0] == "spot"
    rng = np.random.default_rng(0)
    kinds = [script.kind_of_filter(rng.normal(size=(5, 5)))[0] for _ in range(1000)]
    assert 0.9 < kinds.count("mixed") / 1000 < 0.98
    assert all(5 < kinds.count(kind) < 40 for kind in ("gradient", "edge", "spot"))


def test_first_filters_are_drawn_in_the_order_of_their_kinds():
    y, x = np.mgrid[-2:3, -2:3]
    spot, gradient, edge = np.exp(-(x**2.0 + y**2)), x * 1.0, np.exp(-y**2.0)
    mixed = np.random.default_rng(0).normal(size=(5, 5))
    figure = script.Figure()
    script.draw_first_filters(figure, np.stack([mixed, spot, 5 * gradient, edge] + [spot] * 8))
    first_row, second_row, scale = figure.axes
    assert [text.get_text() for text in first_row.texts] == ["edge", "gradient"] + ["spot"] * 9
    assert [text.get_text() for text in second_row.texts] == ["mixed"]
    drawn = [image.get_array() for image in first_row.images]
    assert np.allclose(drawn[0], edge / edge.max()) and np.allclose(drawn[1], gradient / 2)
    assert scale.get_ylabel() and scale.get_ylim() == (-1, 1)


def test_second_filters_are_shown_with_what_excites_them_most():
    """One filter is made to look for a bright spot, which happy images have; none is surprised."""
    model = script.create_CNN(7)
    first, second = script.convolutions(model)
    middle = np.zeros((5, 5, 1, 32), "float32")
    middle[2, 2, 0, 0] = 1
    first.set_weights([middle])
    looks_for_spots = np.zeros((3, 3, 32, 384), "float32")
    looks_for_spots[1, 1, 0, 99] = 1
    second.set_weights([looks_for_spots])
    rng = np.random.default_rng(0)
    images = rng.integers(90, 110, (60, 48, 48, 1)).astype("uint8")
    labels = np.arange(60) % 6
    spots = {}
    for i in np.flatnonzero(labels == 3):
        spots[i] = rng.integers(3, 45, 2)
        images[i, spots[i][0], spots[i][1]] = 255 - i
    figure = script.Figure()
    test = script.LabelledImages(images, labels, clean=None)
    script.draw_second_filters(figure, model, test, EMOTIONS)
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == EMOTIONS[:6]
    happy = figure.axes[3]
    assert happy.get_ylabel() == "happy\nfilter 99"
    assert [text.get_text() for text in happy.texts] == ["happy"] * 7
    strongest = sorted(spots)[:7]  # the brightest ones
    for image, frame, i in zip(happy.images, happy.patches, strongest, strict=True):
        assert np.array_equal(image.get_array(), images[i, :, :, 0])
        left_of_image = image.get_extent()[0]
        row, column = spots[i]
        left, top = frame.get_x() - left_of_image, frame.get_y()
        assert left <= column < left + frame.get_width()
        assert top <= row < top + frame.get_height()
        assert left >= 0 and left + frame.get_width() <= 48 and 11 <= frame.get_width() <= 14
        assert top >= 0 and top + frame.get_height() <= 48 and 11 <= frame.get_height() <= 14


def test_filters_are_drawn_for_every_network_and_few_images(tmp_path):
    """Two emotions, one of them without an image; the page is not blank."""
    test = script.LabelledImages(np.zeros((1, 48, 48, 1), "uint8"), np.array([1]), clean=None)
    script.plot_filters(script.create_CNN(2), test, ["a", "b"], str(tmp_path))
    with Image.open(tmp_path / "filters.png") as picture:
        assert min(picture.size) >= 700 and len(set(picture.convert("L").tobytes())) > 50


def test_demo_learns_and_says_what_its_accuracy_is_worth(demo):
    folder, process = demo
    assert process.returncode == 0, process.stderr
    assert "means nothing for real faces" in process.stdout
    metrics = json.loads((folder / "output/metrics.json").read_text())
    assert metrics["test"]["accuracy"] >= 0.9
    assert metrics["images"] == {"training": 2100, "validation": 350, "test": 350}
    assert metrics["settings"]["demo"] and not metrics["settings"]["data_dir"]
    assert {path.name for path in folder.iterdir()} == {"output", "process.json"}


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
    assert len(rows) == metrics["settings"]["epochs"] == 4
    rates = [float(row["learning_rate"]) for row in rows]  # at the start of each epoch
    highest = metrics["settings"]["learning_rate"]
    cosine = [highest * (1 + math.cos(math.pi * done / len(rows))) / 2 for done in range(len(rows))]
    assert rates == pytest.approx(cosine, rel=1e-3)
    best = max(rows, key=lambda row: float(row["val_accuracy"]))
    assert metrics["best_epoch"] == int(best["epoch"])
    assert metrics["validation"]["accuracy"] == pytest.approx(float(best["val_accuracy"]))


def test_metrics_say_what_it_takes_to_repeat_the_run(demo):
    folder, process = demo
    metrics = json.loads((folder / "output/metrics.json").read_text())
    assert metrics["settings"]["seed"] == 0
    assert metrics["seconds"] > sum(float(row["seconds"]) for row in csv.DictReader(
        (folder / "output/history.csv").read_text().splitlines()))
    assert set(metrics["settings"]) == {
        "data_dir", "demo", "epochs", "batch_size", "learning_rate", "precision", "seed"}
    assert metrics["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert metrics["versions"]["keras"] == keras.__version__ and metrics["versions"]["tensorflow"]
    network = folder / "output/emotion_recognition_cnn.keras"
    parameters = keras.models.load_model(network).count_params()
    megabytes = round(network.stat().st_size / 1e6, 1)
    assert metrics["network"] == {"parameters": parameters, "megabytes": megabytes}
    assert f"Network: {parameters:,} parameters, {megabytes} MB\n" in process.stdout
    assert process.stdout.startswith(
        f"{metrics['processor']}, {metrics['settings']['precision']}\n")
    confusion = np.array(metrics["test"]["confusion_matrix"])
    assert confusion.sum() == 350
    assert metrics["test"]["accuracy"] == pytest.approx(np.trace(confusion) / 350)


def test_saved_model_alone_gives_the_accuracy_of_the_best_epoch(demo, tmp_path):
    """The file is the best epoch's network, and it takes pixels as they are."""
    folder, _ = demo
    model = keras.models.load_model(folder / "output/emotion_recognition_cnn.keras")
    metrics = json.loads((folder / "output/metrics.json").read_text())
    script.draw_faces(tmp_path, seed=0)
    data = script.load_data(tmp_path)
    for part, accuracy in ((data.validation, metrics["validation"]["accuracy"]),
                           (data.test, metrics["test"]["single_image_accuracy"])):
        predictions = model.predict(part.images, verbose=0).argmax(axis=1)
        assert np.mean(predictions == part.labels) == pytest.approx(accuracy)
