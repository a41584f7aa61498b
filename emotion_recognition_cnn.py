"""Train a small convolutional network to recognise facial emotions in FER-2013.

    python emotion_recognition_cnn.py           FER-2013, from data/ or downloaded
    python emotion_recognition_cnn.py --demo    drawn faces, nothing to download
    python emotion_recognition_cnn.py --predict PHOTO     with that network, or one of docs/runs

Two convolution blocks, flatten, two dense layers; the best epoch is chosen on the PublicTest images
and evaluated once on PrivateTest: 70.2 % accuracy after an hour on two cores without AVX-512;
71.1 % after 50 minutes with it (--epochs 88), 71.5 % after 46 with AMX (--epochs 120).
Plots, figures and network are left in output/.

FER-2013: Goodfellow et al. (2013), "Challenges in representation learning", arXiv:1307.0414.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageOps

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # without AVX-512, TensorFlow leaves it off
# TensorFlow 2.21 logs before it reads that level, straight to descriptor 2: that points elsewhere.
stderr = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
try:
    import keras
    import tensorflow as tf
    from keras import layers
    from tensorflow.keras.preprocessing.image import ImageDataGenerator
finally:
    os.dup2(stderr, 2)

matplotlib.set_loglevel("error")  # no word on its font cache, which the next line may build
from matplotlib.figure import Figure
matplotlib.rcParams.update({"font.size": 15, "figure.dpi": 150, "lines.linewidth": 2.5})
Image.MAX_IMAGE_PIXELS = 125_000_000  # Pillow reads twice as many: phones take 200 megapixels

# Folder names of the Kaggle dataset msambare/fer2013; a label is an index into them.
EMOTIONS = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
IMAGE_SIZE = (48, 48)  # height, width
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
MODEL, CHECKPOINT = "emotion_recognition_cnn.keras", "checkpoint.npz"  # finished, unfinished run
OUTPUT = Path("output")  # unless --output-dir names another folder
BLUE, VERMILION = "#0072B2", "#D55E00"  # Okabe and Ito: colour-blind readers tell them apart


class InputError(Exception):
    """A mistake in options or data; its one line names it and says what to do."""


def complain(problem):
    """Print one line on stderr."""
    print(" ".join(problem.split()), file=sys.stderr)


@contextlib.contextmanager
def delayed_interrupt():
    """Give an Event that Ctrl-C sets: raised in TensorFlow, it may come out as another error."""
    pressed = threading.Event()
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, handler)


# --- Data -----------------------------------------------------------------------------------------
def find_dataset():
    """Return data/, or FER-2013 downloaded into kagglehub's cache; InputError where that fails."""
    if Path("data").exists():
        return "data"
    try:
        from kagglehub import dataset_download
        return dataset_download("msambare/fer2013")
    except Exception as error:  # from any layer: network, HTTP status, archive, disk
        raise InputError(
            f"no data/ folder, and no download of FER-2013 ({type(error).__name__}). Ways on: get "
            "https://www.kaggle.com/datasets/msambare/fer2013 by hand and unpack it into data/, "
            "name its folder with --data-dir, or try drawn faces with --demo")


def find_images(paths):
    """Return, in order, those of `paths` that are images by their ending and not hidden."""
    return sorted(path for path in paths
                  if path.suffix.lower() in IMAGE_ENDINGS and path.name[0] != ".")


def open_image(path):
    """Open an image as a person sees it: upright, 8 bits, grey or RGB; InputError if it cannot."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
            image = image.point(lambda value: value / 256).convert("L")
        elif image.has_transparency_data:  # on white paper
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "L" else image.convert("RGB")
    except Image.DecompressionBombError:
        raise InputError(f"{path} is too large: reduce it to at most 250 megapixels")
    except Exception as error:  # Pillow raises many kinds on a broken file
        raise InputError(f"{path} is missing, empty, damaged or no image "
                         f"({type(error).__name__}): replace or delete it")


def face_pixels(photo, box=None):
    """Return a photo, or the box in it, as the network sees it: 48x48 grey pixels (uint8)."""
    if box:  # it may reach beyond the photo: the edge is repeated there
        columns = np.arange(box[0], box[2]).clip(0, photo.width - 1)
        rows = np.arange(box[1], box[3]).clip(0, photo.height - 1)
        photo = Image.fromarray(np.asarray(photo)[np.ix_(rows, columns)])
    return np.asarray(photo.convert("L").resize(IMAGE_SIZE, Image.Resampling.BILINEAR))


def read_images(folder):
    """Read every image in the seven emotion folders of `folder`.

    Returns paths, images (uint8, n x 48 x 48 x 1) and labels (int, n: indices into EMOTIONS).
    Raises InputError where an emotion folder is missing, empty or one too many, or an image bad.
    """
    found = {entry.name for entry in folder.glob("[!.]*/")}
    for name in sorted(found ^ set(EMOTIONS)):
        raise InputError(f"{folder / name} is {'none of' if name in found else 'missing:'} the "
                         f"seven emotion folders of --data-dir ({', '.join(EMOTIONS)})")
    paths, labels = [], []
    for label, emotion in enumerate(EMOTIONS):
        paths += find_images((folder / emotion).iterdir())
        labels += [label] * (len(paths) - len(labels))
        if label not in labels:
            raise InputError(f"{folder / emotion} holds no images ({' '.join(IMAGE_ENDINGS)})")
    images = np.stack([face_pixels(open_image(path)) for path in paths])[..., np.newaxis]
    return paths, images, np.array(labels)


class AugmentedBatches(keras.utils.PyDataset):
    """Batches of images in a new order in every epoch, augmented by ImageDataGenerator.

    All that is random is drawn when an epoch starts: whichever worker makes a batch, it is the
    same.  The workers of Keras's own iterators draw from NumPy's global random numbers at once.
    """
    augmentation = dict(horizontal_flip=True, rotation_range=10, width_shift_range=0.1,
                        height_shift_range=0.1, zoom_range=0.1)

    def __init__(self, images, labels, batch_size, seed):
        # One worker would leave the queue to tf.data, which held up some epochs by up to a minute.
        super().__init__(workers=2)
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.generator = ImageDataGenerator(**self.augmentation)
        self.start_epoch(0)

    def start_epoch(self, epoch):
        """Draw the order of the images and their transforms for the given epoch, counted from 0."""
        np.random.seed([self.seed, epoch])
        self.order = np.random.permutation(len(self.labels))
        self.transforms = np.array(
            [self.generator.get_random_transform((*IMAGE_SIZE, 1)) for _ in self.order])

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size:(index + 1) * self.batch_size]
        images = map(self.generator.apply_transform, self.images[chosen], self.transforms[chosen])
        return np.stack(list(images)), self.labels[chosen]


def load_data(data_dir, batch_size, seed):
    """Load FER-2013, or a dataset of the same layout, into memory.

    Training is train/, validation the PublicTest and test the PrivateTest images of test/.  Where
    file names do not tell these apart, a seeded, stratified tenth of train/ is held out for
    validation and all of test/ is the test set.  Raises InputError as `read_images` does.
    Returns training (AugmentedBatches), validation (images, labels) and test (images, labels, and
    for each image whether it is clean: not in train/ too, byte for byte); images as `read_images`.
    """
    print(f"Reading {data_dir}")
    train_paths, train_images, train_labels = read_images(data_dir / "train")
    test_paths, test_images, test_labels = read_images(data_dir / "test")
    train_files = {path.read_bytes() for path in train_paths}
    clean = np.array([path.read_bytes() not in train_files for path in test_paths])
    public, private = (np.array([path.name.startswith(kind) for path in test_paths])
                       for kind in ("PublicTest_", "PrivateTest_"))
    if public.any() and private.any() and (public | private).all():
        validation = test_images[public], test_labels[public]
        test = test_images[private], test_labels[private], clean[private]
    else:
        print("test/ does not tell PublicTest from PrivateTest images by name: a tenth of train/ "
              "is held out for validation, all of test/ is the test set")
        held_out = np.zeros(len(train_labels), bool)
        rng = np.random.default_rng(seed)
        for label in range(len(EMOTIONS)):
            indices = rng.permutation(np.flatnonzero(train_labels == label))
            held_out[indices[1:][:math.ceil(len(indices) / 10)]] = True  # leave one to train on
        if not held_out.any():
            raise InputError(f"{data_dir / 'train'} holds too few images to hold some out")
        validation = train_images[held_out], train_labels[held_out]
        train_images, train_labels = train_images[~held_out], train_labels[~held_out]
        test = test_images, test_labels, clean
    training = AugmentedBatches(train_images, train_labels, batch_size, seed)
    arrays = train_images, train_labels, *validation, *test  # are they the same at --resume?
    training.checksum = [hashlib.sha256(array).hexdigest() for array in arrays]
    print(f"{len(train_labels):,} training, {len(validation[1]):,} validation and {len(test[1]):,} "
          f"test images; {np.sum(~test[2]):,} of the test images also stand in train/")
    return training, validation, test


# --- Network --------------------------------------------------------------------------------------
def create_CNN(epochs):
    """Build the network: images (n x 48 x 48 x 1, pixels 0-255) to probabilities (n x 7)."""
    strength = min(epochs / 88, 1)  # of dropout: short runs have less time to overfit
    return keras.Sequential([
        keras.Input((*IMAGE_SIZE, 1)),
        # Each image to mean 0 and variance 1: light and contrast of the photo drop out.
        layers.LayerNormalization(axis=[1, 2, 3], center=False, scale=False),
        # Pooling first leaves normalisation and ReLU a ninth of their work.
        layers.Conv2D(32, 5, padding="same", use_bias=False),
        layers.MaxPooling2D(4, 3, padding="same"),
        layers.LayerNormalization(),  # across the filters at each place: local contrast drops out
        layers.ReLU(),
        layers.Conv2D(384, 3, use_bias=False),
        layers.MaxPooling2D(7, 3, padding="same"),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.SpatialDropout2D(0.18 * strength),  # whole filters: neighbours in a pool are alike
        layers.Flatten(),
        layers.Dense(512, use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Dropout(0.4 * strength),
        layers.Dense(len(EMOTIONS), activation="softmax", dtype="float32"),
    ])


# --- Training -------------------------------------------------------------------------------------
def load_checkpoint(run_dir):
    """Return options, history, data checksum and list of arrays of an interrupted run."""
    try:
        state, *arrays = np.load(run_dir / CHECKPOINT).values()
        options, history, checksum = json.loads(str(state))
        return dict(options), dict(history), checksum, arrays
    except Exception:  # of zipfile, NumPy or JSON
        raise InputError(f"{run_dir / CHECKPOINT} is damaged: delete {run_dir} and start anew")


class KeepEpochs(keras.callbacks.Callback):
    """Keep all it takes to go on after each epoch, in one file; let Ctrl-C wait for a batch's end.

    The file holds options, history and data checksum (JSON), the variables of network and
    optimizer, and `best`, the weights of the epoch with the highest validation accuracy.
    """

    def __init__(self, training, options, run_dir):
        super().__init__()
        self.training, self.options, self.run_dir = training, options, run_dir
        self.history, self.best = {}, None

    def on_train_batch_end(self, batch, logs=None):
        if self.interrupt.is_set():
            raise KeyboardInterrupt

    def on_epoch_begin(self, epoch, logs=None):
        self.training.start_epoch(epoch)
        self.learning_rate = float(self.model.optimizer.learning_rate)
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        if not math.isfinite(logs["loss"]):  # TerminateOnNaN has ended the epoch
            raise InputError("the loss is NaN or infinite: start anew with a --learning-rate below "
                             f"{self.options.learning_rate}")
        if logs["val_accuracy"] > max(self.history.get("val_accuracy", [-1])):
            self.best = self.model.get_weights()
        row = {"epoch": epoch + 1, **logs, "learning_rate": self.learning_rate,
               "seconds": round(time.perf_counter() - self.start, 2)}
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        state = json.dumps([vars(self.options), self.history, self.training.checksum], default=str)
        self.run_dir.mkdir(parents=True, exist_ok=True)  # where it was moved or deleted meanwhile
        np.savez(self.run_dir / "part.npz", state, *self.model.variables,
                 *self.model.optimizer.variables, *self.best)
        os.replace(self.run_dir / "part.npz", self.run_dir / CHECKPOINT)  # whole, or the one before
        self.on_train_batch_end(None)  # Ctrl-C while the epoch was validated

    def restore(self, model):
        """Put model, batches and history where the interrupted run left them."""
        _, self.history, checksum, arrays = load_checkpoint(self.run_dir)
        model.optimizer.build(model.trainable_variables)
        variables = [*model.variables, *model.optimizer.variables]
        if checksum != self.training.checksum or [array.shape for array in arrays] != [
                variable.shape for variable in variables + model.weights]:
            raise InputError("--resume: the images or the script have changed since: bring them "
                             f"back, or delete {self.run_dir} and start anew")
        for variable, array in zip(variables, arrays):
            variable.assign(array)
        self.best = arrays[len(variables):]


def train_model(model, training, validation, options, run_dir):
    """Train `model` with AdamW; the learning rate falls along a cosine over all epochs.

    Takes epochs and learning_rate from `options`.  After each epoch `run_dir` holds all it takes to
    go on; where it does already, training goes on from there.  Leaves `model` with the weights of
    the best epoch, in float32, and saves it.  Returns the history, a dict of lists with a value per
    epoch.  Raises InputError where the loss is not finite or the interrupted run does not fit.
    AdamW: Loshchilov and Hutter (2019), arXiv:1711.05101; cosine decay: arXiv:1608.03983.
    """
    steps = options.epochs * len(training)
    schedule = keras.optimizers.schedules.CosineDecay(options.learning_rate, steps)
    model.compile(keras.optimizers.AdamW(schedule), "sparse_categorical_crossentropy",
                  metrics=["accuracy"])
    # The rarer an emotion, the more each of its images weighs: 1 on average, disgust twice that.
    count = np.bincount(training.labels)
    weight = np.cbrt(count.mean() / count)
    weight /= np.average(weight, weights=count)
    keep = KeepEpochs(training, options, run_dir)
    if (run_dir / CHECKPOINT).exists():
        keep.restore(model)
    with delayed_interrupt() as keep.interrupt:
        model.fit(
            training, validation_data=validation, class_weight=dict(enumerate(weight)),
            initial_epoch=len(keep.history.get("epoch", [])), epochs=options.epochs,
            shuffle=False,  # of batches: their images are shuffled already
            verbose=1 if sys.stdout.isatty() else 2,
            callbacks=[keras.callbacks.TerminateOnNaN(), keep])
    model.set_weights(keep.best)
    for layer in model.layers:
        layer.dtype_policy = "float32"  # the trained network predicts the same on any machine
    # SGD has no state: without AdamW's the file is a third of the size.
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.save(run_dir / MODEL)
    return keep.history


# --- Evaluation -----------------------------------------------------------------------------------
def classify_faces(model, images):
    """Return the probabilities (n x 7) of images (n x 48 x 48 x 1), averaged over 18 views."""
    probabilities = []
    for first in range(0, len(images), 32):
        wide = np.pad(images[first:first + 32], ((0, 0), (4, 4), (4, 4), (0, 0)), "edge")
        views = [tf.image.resize(wide[:, top:top + size, left:left + size], IMAGE_SIZE)
                 for left, size in ((6, 44), (4, 48), (2, 52))  # larger, as it is, smaller
                 for top in (left - 2, left, left + 2)]  # two pixels lower, as it is, higher
        views = np.concatenate([*views, *(view[:, :, ::-1] for view in views)])  # and mirrored
        # Calls of the model save what predict takes each time: 0.2 s, and tracing before that.
        probabilities.append(np.reshape(model(views), (18, len(wide), -1)).mean(axis=0))
    return np.concatenate(probabilities)


def evaluate_model(model, images, labels, clean):
    """Evaluate `model` once on the test images and print the figures.

    Takes the test data of `load_data`.  Returns a dict of figures and the probabilities (n x 7),
    averaged over the views of each image.  All but single_image_accuracy are of these: loss
    (cross-entropy, nats), accuracy, balanced_accuracy (mean recall), clean_accuracy, clean_images,
    calibration_error (expected, over 15 bins: Guo et al. 2017, arXiv:1706.04599), precision, recall
    and F1 of the emotions, confusion_matrix (rows: labels), milliseconds_per_face.
    """
    single = model.predict(images, batch_size=256, verbose=0)
    start = time.perf_counter()
    probabilities = classify_faces(model, images)
    milliseconds = 1000 * (time.perf_counter() - start) / len(images)
    predictions, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    correct = predictions == labels
    gaps = np.bincount(np.ceil(15 * confidence).astype(int), correct - confidence)  # summed by bin
    confusion = tf.math.confusion_matrix(labels, predictions, len(EMOTIONS)).numpy()
    hits, count, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    recall = hits / np.maximum(count, 1)  # 0, not 0/0, where an emotion never occurs
    precision = hits / np.maximum(predicted, 1)
    f1 = 2 * hits / np.maximum(count + predicted, 1)
    figures = {
        "single_image_accuracy": (single.argmax(axis=1) == labels).mean(),
        "loss": float(np.mean(keras.losses.sparse_categorical_crossentropy(labels, probabilities))),
        "accuracy": correct.mean(),
        "balanced_accuracy": recall[count > 0].mean(),
        "clean_accuracy": correct[clean].mean() if clean.any() else None,
        "clean_images": int(clean.sum()),
        "calibration_error": np.abs(gaps).sum() / len(labels),
        "emotions": {emotion: {"precision": precision[i], "recall": recall[i], "f1": f1[i],
                               "count": int(count[i])} for i, emotion in enumerate(EMOTIONS)},
        "confusion_matrix": confusion.tolist()}
    print(f"\nTest, {len(labels):,} images, {clean.sum():,} of them clean: not in train/, too\n"
          f"All but the first figure: averaged over 18 views, {milliseconds:.1f} ms an image")
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"  {name.replace('_', ' '):23}{value:{'.4f' if name == 'loss' else '.2%'}}")
    print("\n  emotion    precision   recall       F1   images")
    for emotion, figure in figures["emotions"].items():
        print("  {:9}{precision:11.1%}{recall:9.1%}{f1:9.1%}{count:9,}".format(emotion, **figure))
    return figures | {"milliseconds_per_face": milliseconds}, probabilities


# --- Plots ----------------------------------------------------------------------------------------
def draw_shares(axes, shares, rows):
    """Draw shares (n x 7, from 0 to 1) as a table; `rows` names its rows."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0%}", ha="center", va="center",
                  color="white" if share > 0.6 else "black")
    axes.set_xticks(range(len(EMOTIONS)), EMOTIONS, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)


def plot_performance(history, confusion, output_dir):
    """Write accuracy.png, loss.png (over the epochs) and, if there is one, confusion_matrix.png."""
    best = int(np.argmax(history["val_accuracy"]))
    for name in ("accuracy", "loss"):
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        axes = figure.subplots()
        epochs, validation = history["epoch"], history["val_" + name]
        axes.plot(epochs, history[name], "o-", color=BLUE, label="training (augmented)")
        axes.plot(epochs, validation, "s--", color=VERMILION, label="validation")
        axes.plot(epochs[best], validation[best], "k*", markersize=18,
                  label=f"best epoch: {epochs[best]} ({validation[best]:.3f})")
        axes.set(title=f"Training and validation {name}", xlabel="epoch",
                 ylabel=name + (" (cross-entropy)" if name == "loss" else ""))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(output_dir / f"{name}.png")
    if confusion is not None:
        shares = confusion / np.maximum(np.sum(confusion, axis=1, keepdims=True), 1)
        figure = Figure(figsize=(8, 7.5), layout="constrained")
        axes = figure.subplots()
        draw_shares(axes, shares, EMOTIONS)
        axes.set(title="Test images", xlabel="predicted", ylabel="labelled")
        figure.savefig(output_dir / "confusion_matrix.png")


def plot_examples(images, labels, probabilities, output_dir):
    """Write examples.png: of each emotion (rows: labels) the test images classified most surely."""
    figure = Figure(figsize=(8, 10.5), layout="constrained")
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    for half, right, color in zip(figure.subfigures(1, 2), (True, False), (BLUE, VERMILION)):
        half.suptitle("Surest and right" if right else "Surest and wrong: taken for", color=color)
        for row, line in enumerate(half.subplots(len(EMOTIONS), 3, subplot_kw=bare)):
            found = np.flatnonzero((labels == row) & ((predicted == row) == right))
            for axes, i in zip(line, found[np.argsort(-confidence[found], kind="stable")]):
                axes.imshow(images[i], cmap="gray", vmin=0, vmax=255)
                axes.set_title(f"{EMOTIONS[predicted[i]]} {confidence[i]:.0%}", size=10)
            line[0].set_ylabel(EMOTIONS[row] if right else "")
    figure.savefig(output_dir / "examples.png")


# --- Prediction -----------------------------------------------------------------------------------
def find_faces(photo, detector):
    """Find the faces in a photo (PIL image) and frame them as FER-2013 frames its faces.

    Returns boxes (left, top, right, bottom; pixels) from left to right, which may reach beyond
    the photo; the whole photo where it is a crop of one face already or there is no detector.
    Detector: MTCNN, Zhang et al. (2016), arXiv:1604.02878.
    """
    whole, longest = (0, 0, *photo.size), max(photo.size)
    if detector is None or longest <= 64:  # too little to detect in
        return [whole]
    scale = max(1, longest / 1280)
    if min(photo.size) < 20 * scale:  # narrower than the smallest face that MTCNN looks for
        return []
    small = photo.resize([round(side / scale) for side in photo.size]).convert("RGB")
    boxes = []
    for face in detector.detect_faces(np.asarray(small), fit_to_image=False,
                                      threshold_onet=0.95):  # at 0.8 it sees faces in curtains
        left, top, width, height = (scale * float(pixels) for pixels in face["box"])
        # Median of 568 images of train/: the square around MTCNN's box, 1.25 times as wide as it.
        x, y, reach = left + width / 2, top + height / 2, 1.25 * width / 2
        boxes.append((round(x - reach), round(y - reach), round(x + reach), round(y + reach)))
    filled = len(boxes) == 1 and boxes[0][2] - boxes[0][0] > longest * 2 / 3
    return [whole] if filled and longest <= 400 else sorted(boxes)


def draw_predictions(photo, boxes, probabilities):
    """Return a figure (matplotlib) of a photo, the boxes of its faces and their probabilities."""
    names = [f"{n} {EMOTIONS[shares.argmax()]}" for n, shares in enumerate(probabilities, 1)]
    heights = np.clip(8 * photo.height / photo.width, 3, 10), 1.5 + 0.4 * len(names)  # inches
    figure = Figure(figsize=(8, sum(heights)), dpi=100, layout="constrained")
    scene, table = figure.subplots(2, height_ratios=heights)
    scene.imshow(photo.reduce(math.ceil(max(photo.size) / 1280)), cmap="gray", vmin=0, vmax=255,
                 extent=(0, photo.width, photo.height, 0))
    scene.set_axis_off()
    scene.autoscale(False)
    for name, box in zip(names, boxes):
        if box != (0, 0, *photo.size):  # not a photo that is all face
            scene.plot(np.take(box, [0, 2, 2, 0, 0]), np.take(box, [1, 1, 3, 3, 1]), "#56B4E9")
            scene.text(max(box[0], 0), max(box[1], 0), name, size=11, va="bottom",
                       backgroundcolor="#56B4E9")
    draw_shares(table, probabilities, names)
    return figure


def predict_emotions(paths, output_dir, detect, as_json):
    """Classify the faces in photos, and in folders of photos, with the network in `output_dir`.

    Without `output_dir`: with that in output/, else with that in docs/runs beside the script.
    Prints a row per face and draws a picture per photo into predictions/ there, or only prints a
    JSON object per face.  Returns whether all photos could be read; one that cannot be read gets a
    line on stderr.  Raises InputError without a network, OSError on a full disk, KeyboardInterrupt
    on Ctrl-C, after the photo at hand.
    """
    network, pictures = (Path(output_dir or OUTPUT, name) for name in (MODEL, "predictions"))
    if output_dir is None and not network.exists():
        for network in Path(__file__).parent.glob(f"docs/runs/*/{MODEL}"):
            complain(f"no network in {OUTPUT} yet: predicting with {network}")
    try:
        model = keras.models.load_model(network)
        classify_faces(model, np.zeros((1, *IMAGE_SIZE, 1)))
    except Exception:  # of zipfile, h5py or Keras
        raise InputError(f"{network} is missing, damaged or no network of this script: train one, "
                         "or name another folder with --output-dir")
    detector = None
    if detect:
        from mtcnn import MTCNN  # here: training does without it
        detector = MTCNN()
    photos = [photo for path in paths  # of no folder, rglob finds nothing
              for photo in find_images(path.rglob("*")) or [path]]
    width = max(len(str(path)) for path in photos)
    if not as_json:
        pictures.mkdir(parents=True, exist_ok=True)
        print(f"    photo  {'file':{width}}  face  emotion   confidence",
              *(f"{emotion:>9}" for emotion in EMOTIONS))
    all_read = True
    with delayed_interrupt() as interrupt:
        for count, path in enumerate(photos, 1):
            if interrupt.is_set():
                raise KeyboardInterrupt(f"interrupted; photos done: {count - 1} of {len(photos)}")
            try:
                photo = open_image(path)
            except InputError as error:
                complain(f"error: {error}")
                all_read = False
                continue
            boxes = find_faces(photo, detector)
            if not boxes:
                complain(f"{path}: no face found; --no-detect classifies it whole")
                continue
            faces = np.stack([face_pixels(photo, box) for box in boxes])[..., np.newaxis]
            probabilities = classify_faces(model, faces)
            for number, (box, shares) in enumerate(zip(boxes, probabilities), 1):
                face = {"file": str(path), "face": number, "box": box,
                        "emotion": EMOTIONS[shares.argmax()], "confidence": float(shares.max()),
                        "probabilities": dict(zip(EMOTIONS, shares.tolist()))}
                row = f"{f'{count}/{len(photos)}':>9}  {str(path):{width}}{number:6}  "
                row += f"{face['emotion']:9}{face['confidence']:11.1%} "
                row += " ".join(f"{share:9.1%}" for share in shares)
                print(json.dumps(face) if as_json else row, flush=True)
            if not as_json:
                picture = pictures / f"{count}_{path.stem}.emotions.jpg"
                draw_predictions(photo, boxes, probabilities).savefig(picture)
    if not as_json:
        print(f"\nPictures saved in {pictures}")
    return all_read


# --- Drawn faces ----------------------------------------------------------------------------------
# After the action units of Ekman and Friesen's Facial Action Coding System: inner and outer brow
# up, eyes open (in half faces), smile, mouth open, mouth width, one corner up.
EXPRESSIONS = {
    "angry":    (-0.16,  0.06, 0.07, -0.35, 0.10, 0.39, 0.00),
    "disgust":  (-0.08, -0.02, 0.04, -0.20, 0.35, 0.34, 0.45),
    "fear":     ( 0.16,  0.00, 0.15, -0.15, 0.45, 0.49, 0.00),
    "happy":    ( 0.04,  0.04, 0.09,  0.55, 0.35, 0.52, 0.00),
    "neutral":  ( 0.00,  0.00, 0.09,  0.00, 0.10, 0.39, 0.00),
    "sad":      ( 0.14, -0.10, 0.06, -0.50, 0.10, 0.34, 0.00),
    "surprise": ( 0.20,  0.20, 0.15,  0.00, 1.60, 0.22, 0.00),
}


def draw_face(emotion, rng):
    """Draw a face (48x48 greyscale PIL image); shape, position, tilt, light, noise are random."""
    inner, outer, eye, smile, opening, mouth, corner = EXPRESSIONS[emotion] + rng.normal(
        0, (0.03, 0.03, 0.015, 0.1, 0.04, 0.03, 0.08))
    back, hair, skin, dark = map(int, rng.uniform((20, 0, 110, 15), (235, 120, 230, 80)))
    middle, half = rng.normal(96, 6, 2), rng.uniform((56, 72), (72, 88))  # pixels, reduced below
    image = Image.new("L", (192, 192), back)
    draw = ImageDraw.Draw(image)

    def add(form, shade, *points, **width):  # points in half faces from the middle
        form([tuple(middle + half * point) for point in points], shade, **width)

    add(draw.ellipse, hair, (-1.08, -1.2), (1.08, 0.9))
    add(draw.ellipse, skin, (-1, -0.91), (1, 1.01))
    eye = max(eye, 0.02)
    for side in (-0.42, 0.42):
        for x, y, shade in ((0.21, eye + 0.04, dark), (0.19, eye, min(255, skin * 5 // 4)),
                            (min(0.11, eye), min(0.11, eye), dark // 2)):
            add(draw.ellipse, shade, (side - x, -0.16 - y), (side + x, y - 0.16))
        add(draw.line, dark, (0.43 * side, -0.36 - inner), (1.62 * side, -0.36 - outer), width=7)
    for y in (-0.14, -0.03, 0.08) if emotion == "disgust" else ():  # wrinkles
        add(draw.line, dark, (-0.24, y), (0, y - 0.06), (0.24, y), width=4)
    add(draw.line, skin * 7 // 10, (0, 0), (-0.1, 0.2), (0.1, 0.2), width=4)  # nose
    across = np.linspace(-1, 1, 15)
    upper = 0.52 + 0.8 * mouth * (smile * (0.5 - across**2) - corner * across / 2)
    gap = 0.4 * mouth * max(opening, 0.1) * (1 - across**2) + 0.025
    add(draw.polygon, dark // 2, *zip(mouth * across, upper - gap),
        *zip(-mouth * across, (upper + gap)[::-1]))
    image = image.rotate(rng.normal(0, 7), Image.Resampling.BILINEAR, fillcolor=back)
    light = rng.uniform(0.6, 1.1) * (1 + np.linspace(-1, 1, 48) * rng.normal(0, 0.25))
    pixels = light * image.resize(IMAGE_SIZE) + rng.normal(0, 12, IMAGE_SIZE)  # with noise
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def draw_faces(folder, seed):
    """Write drawn faces into `folder`, laid out and named like Kaggle's FER-2013."""
    print("Drawing faces: the accuracy on them means nothing for real faces")
    rng = np.random.default_rng(seed)
    for kind, count in ("Training", 300), ("PublicTest", 50), ("PrivateTest", 50):
        for emotion in EMOTIONS:
            emotion_dir = Path(folder, "train" if kind == "Training" else "test", emotion)
            emotion_dir.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw_face(emotion, rng).save(emotion_dir / f"{kind}_{number}.jpg")


# --- Command line ---------------------------------------------------------------------------------
CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""  # Linux


def processor_name():
    """Return the name of the processor as the operating system tells it."""
    name = re.search(r"model name\s*: (.+)", CPUINFO)
    return name[1] if name else platform.processor() or platform.machine()


def fastest_precision():
    """Return the fastest dtype policy; without AMX, Intel's bfloat16 takes 1.4 times as long."""
    for gpu in tf.config.list_physical_devices("GPU"):
        capability = tf.config.experimental.get_device_details(gpu).get("compute_capability", (0,))
        return "mixed_float16" if capability[0] >= 7 else "float32"  # keras.io/api/mixed_precision
    return "mixed_bfloat16" if re.search("(?s)amx_bf16|AMD.*avx512_bf16", CPUINFO) else "float32"


def parse_options():
    """Read the command line; raises InputError where it makes no sense."""
    parser = argparse.ArgumentParser(description="Recognise facial emotions.", allow_abbrev=False)

    def error(problem):  # one line, where argparse would print its usage first
        raise InputError(problem)
    parser.error = error
    add = parser.add_argument_group("data").add_mutually_exclusive_group().add_argument
    add("--data-dir", metavar="DIR", help="holds train/ and test/ (default: data, or a download)")
    add("--demo", action="store_true", help="train on small drawn faces instead")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, metavar="N", help="passes over the images (default: 44; demo: 4)")
    add("--batch-size", type=int, default=128, metavar="N", help="images per step (default: 128)")
    add("--learning-rate", type=float, default=6e-3, metavar="X", help="at first (default: 0.006)")
    add("--precision", choices=("float32", "mixed_bfloat16", "mixed_float16"),
        default=fastest_precision(), help="number format (default: what is fastest, %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: 0)")
    add = parser.add_argument_group("prediction with the trained network").add_argument
    add("--predict", nargs="+", type=Path, metavar="PHOTO", help="photos, or folders of photos")
    add("--no-detect", action="store_true", help="take every photo as one face: look for none")
    add("--json", action="store_true", help="print a JSON object per face and draw nothing")
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, metavar="DIR", help=f"default: {OUTPUT}")
    add("--resume", action="store_true", help="go on with the interrupted run in --output-dir")
    options = parser.parse_args()
    given = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    of_prediction = {"--predict", "--no-detect", "--json"}
    for mode, wrong in (
            ("with --predict", options.predict and given - of_prediction - {"--output-dir"}),
            ("without --predict", not options.predict and given & of_prediction),
            ("with --resume", options.resume and given - {"--resume", "--output-dir"})):
        if wrong:
            error(f"{min(wrong)} is of no use {mode}")
    options.epochs = options.epochs if "--epochs" in given else 4 if options.demo else 44
    for rule, followed in (
            ("--epochs must be at least 1", options.epochs >= 1),
            ("--batch-size must be at least 1", options.batch_size >= 1),
            ("--learning-rate must be a number above 0", 0 < options.learning_rate < math.inf),
            ("--seed must lie between 0 and 2**31 - 1", 0 <= options.seed < 2**31)):
        if not followed:
            error(rule)
    return options


@contextlib.contextmanager
def unfinished_run(output_dir, resume):
    """Give the folder of a run until it is finished; then put its files into `output_dir`.

    Raises InputError where that is in use, cannot be written or is not as `resume` wants it,
    KeyboardInterrupt on Ctrl-C; both tell how many epochs are kept.
    """
    run_dir = output_dir / "unfinished"
    checkpoint = run_dir / CHECKPOINT
    if resume and not checkpoint.exists():
        raise InputError(f"--resume: there is no interrupted run in {output_dir}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(run_dir / "lock", timeout=0):  # the system drops it with the process
            if checkpoint.exists() and not resume:
                raise InputError(f"{run_dir} holds an interrupted run: add --resume, or delete it")
            try:
                yield run_dir
                names = sorted(file.name for file in run_dir.glob("*.*") if file.suffix != ".npz")
                for name in names:
                    os.replace(run_dir / name, output_dir / name)
                for picture in output_dir.glob("predictions/*.emotions.jpg"):
                    picture.unlink()  # it was drawn with the network before
                checkpoint.unlink()  # last: without it there is nothing to resume
                print(f"\nSaved in {output_dir}: {', '.join(names)}")
            finally:
                if not checkpoint.exists():
                    shutil.rmtree(run_dir, ignore_errors=True)
    except Timeout:
        raise InputError(f"{run_dir} is in use by another run: name another --output-dir")
    except (OSError, KeyboardInterrupt) as error:
        kept = "no epoch is kept"
        with contextlib.suppress(OSError):  # the disk may be full, or gone
            (run_dir / "part.npz").unlink(missing_ok=True)
            if checkpoint.exists():
                _, history, *_ = load_checkpoint(run_dir)
                kept = f"epochs kept in {run_dir}: {len(history['epoch'])}, --resume goes on"
                plot_performance(history, None, run_dir)
        if isinstance(error, KeyboardInterrupt):
            print()  # ends the line of the progress bar
            raise KeyboardInterrupt(f"interrupted; {kept}")
        raise InputError(f"{error.filename or output_dir} cannot be read or written: "
                         f"{error.strerror}; mend that, or name another --output-dir; {kept}")


def save_results(model, run_dir, options, counts, history, figures, start):
    """Write history.csv, and metrics.json: test figures and all it takes to repeat the run."""
    with open(run_dir / "history.csv", "w", newline="") as file:
        csv.writer(file).writerows([history, *zip(*history.values())])
    best = np.argmax(history["val_accuracy"])
    settings = "epochs", "batch_size", "learning_rate", "precision"
    megabytes = round((run_dir / MODEL).stat().st_size / 1e6, 1)
    network = {"parameters": model.count_params(), "megabytes": megabytes}
    print("\nNetwork: {parameters:,} parameters, {megabytes} MB".format(**network))
    (run_dir / "metrics.json").write_text(json.dumps({
        "data": "drawn faces (--demo)" if options.demo else options.data_dir,
        "images": dict(zip(("training", "validation", "test"), counts)),
        "network": network, "test": figures, "best_epoch": history["epoch"][best],
        "validation": {name: history["val_" + name][best] for name in ("accuracy", "loss")},
        "seconds": round(time.perf_counter() - start, 1), "seed": options.seed,
        "hyper_parameters": {name: vars(options)[name] for name in settings},
        "processor": processor_name(),
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__,
                     "keras": keras.__version__}}, indent=2) + "\n")


if __name__ == "__main__":
    start = time.perf_counter()
    sys.stdout.reconfigure(errors="backslashreplace")  # no path and no bar fails to be printed
    try:
        options = parse_options()
        if options.predict:
            sys.exit(0 if predict_emotions(options.predict, options.output_dir,
                                           not options.no_detect, options.json) else 2)
        with unfinished_run(options.output_dir or OUTPUT, options.resume) as run_dir:
            if options.resume:
                of_the_run, history, *_ = load_checkpoint(run_dir)
                vars(options).update(of_the_run)
                start -= sum(history["seconds"])  # the time before the interruption counts, too
            keras.utils.set_random_seed(options.seed)
            keras.config.set_dtype_policy(options.precision)
            print(f"{processor_name()}, {options.precision}")
            if options.demo:
                draw_faces(run_dir / "faces", options.seed)
            elif options.data_dir is None:
                options.data_dir = find_dataset()
            training, validation, test = load_data(Path(options.data_dir or run_dir / "faces"),
                                                   options.batch_size, options.seed)
            model = create_CNN(options.epochs)
            history = train_model(model, training, validation, options, run_dir)
            figures, probabilities = evaluate_model(model, *test)
            plot_performance(history, figures["confusion_matrix"], run_dir)
            plot_examples(*test[:2], probabilities, run_dir)
            counts = map(len, (training.labels, validation[1], test[1]))
            save_results(model, run_dir, options, counts, history, figures, start)
    except (InputError, OSError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        complain(str(error) or "interrupted" if interrupted else f"error: {error}")
        sys.exit(130 if interrupted else 2)  # 130: as shells do
