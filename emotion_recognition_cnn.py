"""Train a small convolutional network to recognise facial emotions in FER-2013.

    python emotion_recognition_cnn.py           FER-2013, from data/ or downloaded
    python emotion_recognition_cnn.py --demo    drawn faces, nothing to download
    python emotion_recognition_cnn.py --predict PHOTO     with that network, or the included one

Two convolution blocks, flatten, two dense layers.  The best epoch is chosen on the PublicTest
images and evaluated once on PrivateTest: 70.2 % accuracy after an hour on two slow processor cores,
71.1 % after 50 minutes on two faster ones (--epochs 88), 71.5 % after 46 on the fastest
(--epochs 120).  Plots, figures and the network are left in output/.

FER-2013: Goodfellow et al. (2013), "Challenges in representation learning", arXiv:1307.0414.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageOps

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # without AVX-512, TensorFlow leaves it off


@contextlib.contextmanager
def hidden_log():
    """Hide what is written to stderr, unless the block fails or the whole process ends in it.

    A process of its own reads stderr, and prints it unless it hears that all went well.
    """
    printer = ("import sys; log = sys.stdin.buffer.read()\n"
               "if not log.endswith(b'all went well'): sys.stderr.buffer.write(log)")
    reader = subprocess.Popen([sys.executable, "-c", printer], stdin=subprocess.PIPE,
                              start_new_session=True)  # where Ctrl-C does not reach it
    stderr = os.dup(2)
    os.dup2(reader.stdin.fileno(), 2)
    try:
        yield
        os.write(2, b"all went well")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        reader.stdin.close()
        reader.wait()


with hidden_log():  # TensorFlow before it reads TF_CPP_MIN_LOG_LEVEL, Matplotlib of its font cache
    import keras
    import tensorflow as tf
    from keras import layers
    from matplotlib.figure import Figure
    from tensorflow.keras.preprocessing.image import ImageDataGenerator

SIZE = 48  # pixels: height and width of the images of FER-2013
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# Changes to the images of training, new ones in every epoch.  What is to be done to all images,
# those of validation and the photos of --predict too, belongs into the network, as a layer.
AUGMENTATION = {"horizontal_flip": True, "rotation_range": 10, "width_shift_range": 0.1,
                "height_shift_range": 0.1, "zoom_range": 0.1}

NETWORK = "emotion_recognition_cnn.keras"
CHECKPOINT = "checkpoint.npz"
RESULTS = ("accuracy.png", "confusion_matrix.png", NETWORK, "examples.png", "history.csv",
           "loss.png", "metrics.json")

# Of Okabe and Ito: colour-blind readers tell them apart.
BLUE, VERMILION, SKY_BLUE = "#0072B2", "#D55E00", "#56B4E9"
PLOT_STYLE = {"font.size": 15, "figure.dpi": 150, "savefig.dpi": 150, "lines.linewidth": 2.5}
Image.MAX_IMAGE_PIXELS = 125_000_000  # Pillow reads twice as many: phones take 200 megapixels


class InputError(Exception):
    """Something that the user can mend; its one line names it and says what to do."""


def complain(problem):
    """Print a problem as one line on stderr."""
    print(" ".join(problem.split()), file=sys.stderr)


# --- Settings -------------------------------------------------------------------------------------
def setting(default, meaning, **argument):
    """Return a field of Settings; `argument` is what else argparse needs to read it."""
    return dataclasses.field(default=default, metadata={"help": meaning, **argument})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on.  Each field is an option of the command line, too.

    `--resume` restores them, and metrics.json records them.  Raises InputError where a value makes
    no sense.
    """

    data_dir: str = setting("", "folder that holds train/ and test/ (default: data, or a download)",
                            metavar="DIR")
    demo: bool = setting(False, "train on small drawn faces instead")
    epochs: int = setting(44, "passes over the training images (default: {default}; demo: 4)",
                          metavar="N")
    batch_size: int = setting(128, "images per step (default: {default})", metavar="N")
    learning_rate: float = setting(0.006, "of the first step, it falls from there "
                                   "(default: {default})", metavar="X")
    precision: str = setting("float32", "number format (default: what is fastest here)",
                             choices=("float32", "mixed_bfloat16", "mixed_float16"))
    seed: int = setting(0, "of all random numbers (default: {default})", metavar="N")

    def __post_init__(self):
        if self.demo and self.data_dir:
            raise InputError("--demo and --data-dir exclude each other: choose one")
        if self.epochs < 1:
            raise InputError("--epochs must be at least 1")
        if self.batch_size < 1:
            raise InputError("--batch-size must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise InputError("--learning-rate must be a number above 0")
        if not 0 <= self.seed < 2**31:
            raise InputError("--seed must lie between 0 and 2**31 - 1")

    @property
    def dropout(self):
        """Strength of dropout, from 0 to 1: shorter runs have less time to overfit."""
        return min(self.epochs / 88, 1)


# --- Data -----------------------------------------------------------------------------------------
class Images(NamedTuple):
    """Images and what they show."""

    images: np.ndarray  # uint8, n x 48 x 48 x 1
    labels: np.ndarray  # int, n: indices into the emotions
    clean: np.ndarray = None  # bool, n: whether a test image does not stand in train/, too


def find_dataset():
    """Return data/, or FER-2013 downloaded into kagglehub's cache; InputError where that fails."""
    if Path("data").exists():
        return "data"
    from kagglehub import dataset_download  # here: nothing else needs it
    try:
        return dataset_download("msambare/fer2013")
    except Exception as error:  # from any layer: network, HTTP status, archive, disk
        raise InputError(
            f"no data/ folder, and no download of FER-2013 ({type(error).__name__}). Ways on: get "
            "https://www.kaggle.com/datasets/msambare/fer2013 by hand and unpack it into data/, "
            "name its folder with --data-dir, or try drawn faces with --demo") from error


def find_emotions(data_dir):
    """Return the emotions of a dataset: the sorted names of the folders of its train/.

    Raises InputError where there are fewer than two, or test/ has others.
    """
    found = {}
    for part in "train", "test":
        folder = data_dir / part
        if not folder.is_dir():
            raise InputError(f"{folder} is missing: name the folder that holds train/ and test/, "
                             "each with a folder per emotion, with --data-dir")
        found[part] = {entry.name for entry in folder.iterdir()
                       if entry.is_dir() and not entry.name.startswith(".")}
    for part, other in ("train", "test"), ("test", "train"):
        missing = sorted(found[other] - found[part])
        if missing:
            raise InputError(f"{data_dir / part / missing[0]} is missing: train/ and test/ must "
                             f"hold the same emotion folders, and {data_dir / other} has that one")
    if len(found["train"]) < 2:
        raise InputError(f"{data_dir / 'train'} must hold a folder for each of at least two "
                         "emotions; name another folder with --data-dir")
    return sorted(found["train"])


def find_images(paths):
    """Return, in order, those of `paths` that are images by their ending and not hidden."""
    return sorted(path for path in paths
                  if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith("."))


def open_image(path):
    """Open an image as a person sees it: upright, 8 bits, grey or RGB; InputError if it cannot."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
            image = image.point(lambda value: value / 256).convert("L")
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            white_paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white_paper, image)
        return image if image.mode == "L" else image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large: reduce it to at most 250 megapixels") from error
    except Exception as error:  # Pillow raises many kinds on a broken file, in each of these calls
        raise InputError(f"{path} is missing, empty, damaged or no image "
                         f"({type(error).__name__}): replace or delete it") from error


def face_pixels(face):
    """Return the picture of a face (PIL image) as the network sees it: 48x48, grey, uint8."""
    return np.asarray(face.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def read_images(folder, emotions):
    """Read every image in the emotion folders of `folder`.

    Returns paths, images (uint8, n x 48 x 48 x 1) and labels (int, n: indices into the emotions).
    Raises InputError where an emotion has no images or an image cannot be read.
    """
    paths, labels = [], []
    for label, emotion in enumerate(emotions):
        found = find_images((folder / emotion).iterdir())
        if not found:
            raise InputError(f"{folder / emotion} holds no images ({' '.join(IMAGE_ENDINGS)})")
        paths += found
        labels += [label] * len(found)
    progress = keras.utils.Progbar(len(paths), unit_name="image", verbose=int(sys.stdout.isatty()))
    images = []
    for path in paths:
        images.append(face_pixels(open_image(path)))
        progress.add(1)
    return paths, np.stack(images)[..., np.newaxis], np.array(labels)


def hold_out_tenth(labels, seed):
    """Choose a tenth of the images of each emotion by chance; leave one at least.

    Takes labels (int, n) and returns a mask (bool, n) of those held out.
    """
    held_out = np.zeros(len(labels), bool)
    rng = np.random.default_rng(seed)
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        tenth = math.ceil(len(indices) / 10)
        all_but_one = indices[1:]
        held_out[all_but_one[:tenth]] = True
    return held_out


class AugmentedBatches(keras.utils.PyDataset):
    """Batches of images in a new order in every epoch, augmented by ImageDataGenerator.

    A batch is images (float32, n x 48 x 48 x 1, pixels 0-255) and labels (int, n).  All that is
    random is drawn when an epoch starts: whichever worker makes a batch, it is the same.  The
    workers of Keras's own iterators draw from NumPy's global random numbers at once.
    """

    def __init__(self, images, labels, batch_size, seed):
        # One worker would leave the queue to tf.data, which held up some epochs by up to a minute.
        super().__init__(workers=2)
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.generator = ImageDataGenerator(**AUGMENTATION)
        self.start_epoch(0)

    def start_epoch(self, epoch):
        """Draw the order of the images and the transform of each for an epoch, counted from 0."""
        np.random.seed([self.seed, epoch])  # get_random_transform draws from NumPy's global numbers
        self.order = np.random.permutation(len(self.images))
        self.transforms = [self.generator.get_random_transform((SIZE, SIZE, 1))
                           for _ in range(len(self.images))]

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size:(index + 1) * self.batch_size]
        batch = []
        for i in chosen:
            image = self.generator.apply_transform(self.images[i], self.transforms[i])
            batch.append(self.generator.standardize(image.astype("float32")))
        return np.stack(batch), self.labels[chosen]


class Data(NamedTuple):
    """A dataset, ready for training and evaluation."""

    emotions: list  # their names, sorted
    training: AugmentedBatches
    validation: Images
    test: Images


def load_data(data_dir, batch_size=Settings.batch_size, seed=Settings.seed):
    """Load FER-2013, or a dataset of the same layout, into memory.

    The emotions are the folders of train/, as in Keras's flow_from_directory.  Training is train/,
    validation the PublicTest and test the PrivateTest images of test/.  Where file names do not
    tell these apart, a tenth of train/ is held out for validation (stratified, `seed`) and all of
    test/ is the test set.  Returns Data; raises InputError as `find_emotions` and `read_images` do.
    """
    print(f"Reading {data_dir}")
    data_dir = Path(data_dir)
    emotions = find_emotions(data_dir)
    train_paths, train_images, train_labels = read_images(data_dir / "train", emotions)
    test_paths, test_images, test_labels = read_images(data_dir / "test", emotions)
    train_files = {path.read_bytes() for path in train_paths}
    clean = np.array([path.read_bytes() not in train_files for path in test_paths])
    public = np.array([path.name.startswith("PublicTest_") for path in test_paths])
    private = np.array([path.name.startswith("PrivateTest_") for path in test_paths])
    if public.any() and private.any() and (public | private).all():
        validation = Images(test_images[public], test_labels[public])
        test = Images(test_images[private], test_labels[private], clean[private])
    else:
        print("test/ does not tell PublicTest from PrivateTest images by name: a tenth of train/ "
              "is held out for validation, all of test/ is the test set")
        held_out = hold_out_tenth(train_labels, seed)
        if not held_out.any():
            raise InputError(f"{data_dir / 'train'} holds too few images to hold some out")
        validation = Images(train_images[held_out], train_labels[held_out])
        train_images, train_labels = train_images[~held_out], train_labels[~held_out]
        test = Images(test_images, test_labels, clean)
    print(f"{len(train_images):,} training, {len(validation.images):,} validation and "
          f"{len(test.images):,} test images; {np.sum(~test.clean):,} of the test images also "
          "stand in train/")
    training = AugmentedBatches(train_images, train_labels, batch_size, seed)
    return Data(emotions, training, validation, test)


# --- Network --------------------------------------------------------------------------------------
def create_CNN(classes, dropout=1.0):
    """Build the network: images (n x 48 x 48 x 1, pixels 0-255) to probabilities (n x classes).

    `dropout`, from 0 to 1, is its strength: 1 suits runs of 88 epochs and more, 0.5 those of 44.
    """
    return keras.Sequential([
        keras.Input((SIZE, SIZE, 1)),
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
        layers.SpatialDropout2D(0.18 * dropout),  # whole filters: neighbours in a pool are alike
        layers.Flatten(),
        layers.Dense(512, use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Dropout(0.4 * dropout),
        layers.Dense(classes, activation="softmax", dtype="float32"),
    ])


# --- Training -------------------------------------------------------------------------------------
def class_weights(labels):
    """Return by how much an image of each emotion weighs in the loss: {label: weight}.

    The rarer the emotion, the more: the cube root of what scikit-learn calls "balanced" (the mean
    count of the emotions by its own), scaled so that the images weigh 1 on average.
    """
    count = np.bincount(labels)
    weight = np.cbrt(count.mean() / count)
    weight /= np.average(weight, weights=count)
    return dict(enumerate(weight))


@contextlib.contextmanager
def delayed_interrupt():
    """Give an Event that Ctrl-C sets; a second Ctrl-C raises KeyboardInterrupt at once.

    Raised within TensorFlow, KeyboardInterrupt may come out as another error.
    """
    pressed = threading.Event()

    def press(number, frame):
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    if threading.current_thread() is not threading.main_thread():  # Python sends signals there
        yield pressed
        return
    handler = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, handler)


def interrupt_if(pressed):
    """Raise KeyboardInterrupt if the Event `pressed` is set."""
    if pressed.is_set():
        raise KeyboardInterrupt


def checksum(*arrays):
    """Return the SHA-256 of arrays, in hexadecimal digits: are they the same as before?"""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def changed_since(path, what):
    """Return the InputError for a run that cannot go on, because something is not as it was."""
    return InputError(f"{path} does not fit: the {what} changed since. Bring that back as it was, "
                      f"or delete {path} and start anew")


def save_checkpoint(path, run, history, variables, best_weights):
    """Write a checkpoint: whole, or not at all.

    Takes two dicts for JSON and two lists of arrays.  The checkpoint before it stays until the new
    one is on the disk: the process may be killed and the plug pulled at any time.
    """
    state = json.dumps({"run": run, "history": history})
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"variable {i}": variable for i, variable in enumerate(variables)}
    arrays |= {f"best weight {i}": weight for i, weight in enumerate(best_weights)}
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            np.savez(file, state=state, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path):
    """Return run, history, variables and best weights; InputError if the checkpoint is damaged."""
    try:
        with np.load(path) as file:
            state = json.loads(str(file["state"]))
            variables = [file[name] for name in file if name.startswith("variable ")]
            best_weights = [file[name] for name in file if name.startswith("best weight ")]
        return state["run"], state["history"], variables, best_weights
    except Exception as error:  # of zipfile, NumPy or JSON, and whatever else the file may hold
        raise InputError(f"{path} is damaged: delete it and start anew") from error


class EpochKeeper(keras.callbacks.Callback):
    """Record every epoch, and keep all that training needs to go on after it.

    `run` says what the run depends on (a dict for JSON), `checkpoint` is the file to keep
    everything in (a path, or None for no file).  `history` is a dict of lists with a value per
    epoch, `best_weights` the weights of the epoch with the highest validation accuracy.
    """

    def __init__(self, run, checkpoint):
        super().__init__()
        self.run = run
        self.checkpoint = checkpoint
        self.history = {}
        self.best_weights = None
        self.learning_rate = None  # at the start of the epoch
        self.start = None  # of the epoch, in seconds

    def finished_epochs(self):
        """Return the number of epochs in the history."""
        return len(self.history.get("epoch", []))

    def restore(self, model):
        """Put model, optimizer and history where the checkpoint left them."""
        run, history, variables, best_weights = load_checkpoint(self.checkpoint)
        for name, value in self.run.items():
            if run[name] != value:
                raise changed_since(self.checkpoint, name)
        model.optimizer.build(model.trainable_variables)
        own_variables = model.variables + model.optimizer.variables
        if [array.shape for array in variables] != [own.shape for own in own_variables]:
            raise changed_since(self.checkpoint, "layers")
        for own, array in zip(own_variables, variables, strict=True):
            own.assign(array)
        self.history = history
        self.best_weights = best_weights

    def on_epoch_begin(self, epoch, logs=None):
        self.learning_rate = float(self.model.optimizer.learning_rate)
        self.start = time.perf_counter()
        if self.history:
            seconds = np.mean(self.history["seconds"]) * (self.run["epochs"] - epoch)
            print(f"{math.ceil(seconds / 60)} min left", flush=True)

    def on_epoch_end(self, epoch, logs=None):
        if not math.isfinite(logs["loss"]):  # TerminateOnNaN has ended the epoch
            raise InputError("the loss is NaN or infinite: start anew with a --learning-rate below "
                             f"{self.run['learning rate']}")
        if logs["val_accuracy"] > max(self.history.get("val_accuracy", [-1])):
            self.best_weights = self.model.get_weights()
        row = {"epoch": epoch + 1, **logs, "learning_rate": self.learning_rate,
               "seconds": round(time.perf_counter() - self.start, 2)}
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        if self.checkpoint is not None:
            self.save()

    def save(self):
        """Write the checkpoint, and beside it the plots of the epochs that it holds."""
        plot_history(self.history, self.checkpoint.parent)
        variables = self.model.variables + self.model.optimizer.variables
        save_checkpoint(self.checkpoint, self.run, self.history, variables, self.best_weights)


def make_portable(model):
    """Make a trained network predict the same on any machine, and its file small."""
    for layer in model.layers:
        layer.dtype_policy = "float32"
    # SGD has no state: with that of AdamW, the file would be three times as large.
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])


def train_model(model, training, validation, epochs=Settings.epochs,
                learning_rate=Settings.learning_rate, checkpoint=None, keep_checkpoint=False):
    """Train `model` with AdamW; the learning rate falls along a cosine over all epochs.

    Takes the training and validation data of `load_data`.  With `checkpoint`, a path, that file
    holds after each epoch all that it takes to go on, and the plots beside it show the epochs so
    far; where the file exists, training goes on from there, exactly.  It is deleted when training
    is done, unless `keep_checkpoint` says that the caller does so.

    Leaves `model` with the weights of the epoch with the highest validation accuracy, in float32.
    Returns the history, a dict of lists with a value per epoch.  Raises InputError where the loss
    is not finite or the checkpoint is damaged or of another run, KeyboardInterrupt on Ctrl-C.
    AdamW: Loshchilov and Hutter (2019), arXiv:1711.05101; cosine decay: arXiv:1608.03983.
    """
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * len(training))
    model.compile(keras.optimizers.AdamW(schedule), "sparse_categorical_crossentropy",
                  metrics=["accuracy"])
    run = {"epochs": epochs, "learning rate": learning_rate, "batch size": training.batch_size,
           "seed": training.seed,
           "images": checksum(training.images, training.labels, validation.images,
                              validation.labels)}
    keeper = EpochKeeper(run, None if checkpoint is None else Path(checkpoint))
    if keeper.checkpoint is not None and keeper.checkpoint.exists():
        keeper.restore(model)
    with delayed_interrupt() as pressed:
        model.fit(
            training, validation_data=(validation.images, validation.labels),
            class_weight=class_weights(training.labels),
            initial_epoch=keeper.finished_epochs(), epochs=epochs,
            shuffle=False,  # of batches: their images are shuffled already
            verbose=1 if sys.stdout.isatty() else 2,
            callbacks=[
                keras.callbacks.LambdaCallback(
                    on_epoch_begin=lambda epoch, logs: training.start_epoch(epoch)),
                keras.callbacks.TerminateOnNaN(),
                keeper,
                keras.callbacks.LambdaCallback(
                    on_train_batch_end=lambda batch, logs: interrupt_if(pressed),
                    on_epoch_end=lambda epoch, logs: interrupt_if(pressed))])
    model.set_weights(keeper.best_weights)
    make_portable(model)
    if checkpoint is not None and not keep_checkpoint:
        Path(checkpoint).unlink()
    return keeper.history


# --- Evaluation -----------------------------------------------------------------------------------
def views_of(images):
    """Return 18 views of each image (n x 48 x 48 x 1): 18n x 48 x 48 x 1, float32.

    Three sizes at three heights, two pixels apart, and all of them mirrored.
    """
    wide = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), "edge").astype("float32")  # 56 x 56
    views = []
    for size in (44, 48, 52):  # what is cut out: the face looks larger, as it is, smaller
        margin = (56 - size) // 2
        for shift in (-2, 0, 2):  # the face stands lower, as it is, higher
            top = margin + shift
            view = wide[:, top:top + size, margin:margin + size]
            views.append(keras.ops.image.resize(view, (SIZE, SIZE)))
    mirrored = [view[:, :, ::-1] for view in views]
    return np.concatenate(views + mirrored)


def classify_faces(model, images):
    """Return the probabilities (n x classes) of images (n x 48 x 48 x 1): the mean of 18 views."""
    probabilities = []
    for first in range(0, len(images), 32):
        batch = images[first:first + 32]
        # Calls of the model save what predict takes each time: 0.2 s, and tracing before that.
        of_views = np.reshape(model(views_of(batch)), (18, len(batch), -1))
        probabilities.append(of_views.mean(axis=0))
    return np.concatenate(probabilities)


def calibration_error(confidence, correct):
    """Return the expected calibration error: how far confidence and accuracy lie apart on average.

    Takes the confidence (0 to 1) of n predictions and whether they are correct (bool), in 15 bins
    of equal width.  Guo et al. (2017), "On calibration of modern neural networks",
    arXiv:1706.04599.
    """
    bins = np.ceil(15 * confidence).astype(int)
    gap_of_bin = np.bincount(bins, weights=correct - confidence)
    return np.abs(gap_of_bin).sum() / len(confidence)


def scores_by_emotion(confusion, emotions):
    """Return precision, recall, F1 and number of images of each emotion, a dict of dicts.

    Takes the confusion matrix (rows: labels).  What would be 0/0 is 0.
    """
    scores = {}
    for i, emotion in enumerate(emotions):
        hits, labelled, predicted = confusion[i, i], confusion[i].sum(), confusion[:, i].sum()
        scores[emotion] = {"precision": hits / max(predicted, 1), "recall": hits / max(labelled, 1),
                           "f1": 2 * hits / max(labelled + predicted, 1), "count": int(labelled)}
    return scores


def evaluate_model(model, test, emotions):
    """Evaluate `model` once on the test images and print the scores.

    Takes the test data and the emotions of `load_data`.  Returns the scores, a dict, and the
    probabilities (n x classes), which are averaged over 18 views of each image.  All scores but
    single_image_accuracy are of these: loss (cross-entropy, nats), accuracy, balanced_accuracy
    (mean recall), clean_accuracy (of images that do not stand in train/ too), calibration_error,
    precision, recall and F1 of the emotions, confusion_matrix (rows: labels), and how many
    milliseconds_per_face they took.
    """
    single = model.predict(test.images, batch_size=256, verbose=0)
    start = time.perf_counter()
    probabilities = classify_faces(model, test.images)
    seconds = time.perf_counter() - start
    predictions = probabilities.argmax(axis=1)
    correct = predictions == test.labels
    confusion = np.zeros((len(emotions), len(emotions)), int)
    np.add.at(confusion, (test.labels, predictions), 1)
    loss = keras.losses.sparse_categorical_crossentropy(test.labels, probabilities)
    by_emotion = scores_by_emotion(confusion, emotions)
    scores = {
        "single_image_accuracy": (single.argmax(axis=1) == test.labels).mean(),
        "loss": float(np.mean(loss)),
        "accuracy": correct.mean(),
        "balanced_accuracy": np.mean([of["recall"] for of in by_emotion.values() if of["count"]]),
        "clean_accuracy": correct[test.clean].mean() if test.clean.any() else None,
        "clean_images": int(test.clean.sum()),
        "calibration_error": calibration_error(probabilities.max(axis=1), correct),
        "emotions": by_emotion,
        "confusion_matrix": confusion.tolist(),
        "milliseconds_per_face": 1000 * seconds / len(test.images),
    }
    print_scores(scores, len(test.images))
    return scores, probabilities


def print_scores(scores, images):
    """Print the scores of `evaluate_model` on so many images."""
    print(f"\nTest, {images:,} images, "
          f"{scores['clean_images']:,} of them clean: not in train/, too")
    print("All but the first figure: averaged over 18 views, "
          f"{scores['milliseconds_per_face']:.1f} ms an image")
    for name in ("single_image_accuracy", "accuracy", "balanced_accuracy", "clean_accuracy",
                 "calibration_error"):
        if scores[name] is not None:
            print(f"  {name.replace('_', ' '):23}{scores[name]:.2%}")
    print(f"  {'loss':23}{scores['loss']:.4f}")
    width = max(9, *map(len, scores["emotions"]))
    print(f"\n  {'emotion':{width}}  precision   recall       F1   images")
    for emotion, of in scores["emotions"].items():
        print(f"  {emotion:{width}}{of['precision']:11.1%}{of['recall']:9.1%}{of['f1']:9.1%}"
              f"{of['count']:9,}")


# --- Plots ----------------------------------------------------------------------------------------
@matplotlib.rc_context(PLOT_STYLE)
def plot_history(history, output_dir):
    """Write accuracy.png and loss.png: training and validation over the epochs."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)  # where it was moved or deleted meanwhile
    epochs = history["epoch"]
    best = int(np.argmax(history["val_accuracy"]))
    for name, axis_label in ("accuracy", "accuracy"), ("loss", "loss (cross-entropy)"):
        training, validation = history[name], history["val_" + name]
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(epochs, training, "o-", color=BLUE, label="training (augmented)")
        axes.plot(epochs, validation, "s--", color=VERMILION, label="validation")
        axes.plot(epochs[best], validation[best], "k*", markersize=18,
                  label=f"best epoch: {epochs[best]} ({validation[best]:.3f})")
        axes.set(title=f"Training and validation {name}", xlabel="epoch", ylabel=axis_label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(output_dir / f"{name}.png")


def draw_shares(axes, shares, rows, columns):
    """Draw shares (rows x columns, from 0 to 1) as a table with named rows and columns."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0%}", ha="center", va="center",
                  color="white" if share > 0.6 else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)


@matplotlib.rc_context(PLOT_STYLE)
def plot_performance(history, scores, output_dir):
    """Plot how training went and what came of it.

    Takes the history of `train_model` and the scores of `evaluate_model`.  Writes accuracy.png and
    loss.png (training and validation over the epochs) and confusion_matrix.png into `output_dir`.
    """
    plot_history(history, output_dir)
    emotions = list(scores["emotions"])
    confusion = np.array(scores["confusion_matrix"])
    labelled = confusion.sum(axis=1, keepdims=True)
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    axes = figure.subplots()
    draw_shares(axes, confusion / np.maximum(labelled, 1), emotions, emotions)
    axes.set(title="Test images", xlabel="predicted", ylabel="labelled")
    figure.savefig(Path(output_dir, "confusion_matrix.png"))


def draw_examples(axes_of_row, images, titles):
    """Draw images with their titles, as many as there are axes for."""
    for axes, image, title in zip(axes_of_row, images, titles):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, size=10)


@matplotlib.rc_context(PLOT_STYLE)
def plot_examples(test, probabilities, emotions, output_dir):
    """Write examples.png: of each emotion (rows: labels) the test images classified most surely."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    surest_first = np.argsort(-confidence, kind="stable")
    figure = Figure(figsize=(8, 1.5 * len(emotions)), layout="constrained")
    left_half, right_half = figure.subfigures(1, 2)
    left_half.suptitle("Surest and right", color=BLUE)
    right_half.suptitle("Surest and wrong: taken for", color=VERMILION)
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    for half, correct in (left_half, True), (right_half, False):
        grid = half.subplots(len(emotions), 3, subplot_kw=bare)
        for label, axes_of_row in enumerate(grid):
            shown = [i for i in surest_first
                     if test.labels[i] == label and (predicted[i] == label) == correct]
            titles = [f"{emotions[predicted[i]]} {confidence[i]:.0%}" for i in shown]
            draw_examples(axes_of_row, test.images[shown], titles)
            if correct:
                axes_of_row[0].set_ylabel(emotions[label])
    figure.savefig(Path(output_dir, "examples.png"))


# --- Prediction -----------------------------------------------------------------------------------
class Face(NamedTuple):
    """A face in a photo."""

    box: tuple  # left, top, right, bottom; pixels, may reach beyond the photo
    probabilities: np.ndarray  # of the emotions


def save_network(model, emotions, path):
    """Save a network, and in the same file the names of its emotions."""
    model.save(path)
    with zipfile.ZipFile(path, "a") as file:  # Keras's own format, which passes over other members
        file.writestr("emotions.json", json.dumps(emotions))


def load_network(path):
    """Return the network and the emotions that `save_network` wrote; InputError if it is none."""
    try:
        model = keras.models.load_model(path)
    except Exception as error:  # of zipfile, h5py or Keras
        raise InputError(f"{path} is missing, damaged or of another version of Keras than "
                         f"{keras.__version__}: train a network, or name another folder with "
                         "--output-dir") from error
    with zipfile.ZipFile(path) as file:
        names = file.read("emotions.json") if "emotions.json" in file.namelist() else b"[]"
    emotions = json.loads(names)
    if model.input_shape != (None, SIZE, SIZE, 1) or model.output_shape != (None, len(emotions)):
        raise InputError(f"{path} is no network of this script, or of an earlier version: train "
                         "one, or name another folder with --output-dir")
    return model, emotions


def find_network(output_dir):
    """Return the path of the network in `output_dir`, else of the one included in docs/runs."""
    network = Path(output_dir, NETWORK)
    if network.exists():
        return network
    runs = Path(__file__).resolve().parent / "docs" / "runs"
    included = sorted(runs.glob(f"*/{NETWORK}"))
    if not included:
        raise InputError(f"{network} is missing, and {runs} includes none: train one, or name "
                         "another folder with --output-dir")
    complain(f"no network in {output_dir} yet: predicting with {included[0]}")
    return included[0]


def find_photos(paths):
    """Return the photos named, and in place of a folder the photos in it, however deep."""
    photos = []
    for path in map(Path, paths):
        inside = find_images(path.rglob("*"))  # none, where it is no folder
        photos += inside or [path]
    return photos


def find_faces(photo, detector):
    """Find the faces in a photo (PIL image) and frame them as FER-2013 frames its faces.

    Returns boxes (left, top, right, bottom; pixels) from left to right, which may reach beyond
    the photo; the whole photo where it is a crop of one face already or there is no detector.
    Detector: MTCNN, Zhang et al. (2016), arXiv:1604.02878.
    """
    whole_photo, longest_side = (0, 0, *photo.size), max(photo.size)
    if detector is None or longest_side <= 64:  # too little to detect in
        return [whole_photo]
    scale = max(1, longest_side / 1280)
    if min(photo.size) < 20 * scale:  # narrower than the smallest face that MTCNN looks for
        return []
    small = photo.resize([round(side / scale) for side in photo.size]).convert("RGB")
    found = detector.detect_faces(np.asarray(small), fit_to_image=False,
                                  threshold_onet=0.95)  # at 0.8 it sees faces in curtains
    boxes = []
    for face in found:
        left, top, width, height = (scale * float(pixels) for pixels in face["box"])
        # Median of 568 images of train/: the square around MTCNN's box, 1.25 times as wide as it.
        x, y, reach = left + width / 2, top + height / 2, 1.25 * width / 2
        boxes.append((round(x - reach), round(y - reach), round(x + reach), round(y + reach)))
    if len(boxes) == 1 and longest_side <= 400:
        left, _, right, _ = boxes[0]
        if right - left > longest_side * 2 / 3:  # it fills the photo, which is a crop of it
            return [whole_photo]
    return sorted(boxes)


def cut_out(photo, box):
    """Return the box of a photo; where it reaches beyond the photo, the edge is repeated."""
    left, top, right, bottom = box
    columns = np.arange(left, right).clip(0, photo.width - 1)
    rows = np.arange(top, bottom).clip(0, photo.height - 1)
    return Image.fromarray(np.asarray(photo)[np.ix_(rows, columns)])


def classify_photo(photo, detector, model):
    """Return the faces in a photo (PIL image), from left to right."""
    boxes = find_faces(photo, detector)
    if not boxes:
        return []
    faces = np.stack([face_pixels(cut_out(photo, box)) for box in boxes])
    probabilities = classify_faces(model, faces[..., np.newaxis])
    return [Face(*face) for face in zip(boxes, probabilities)]


def print_json(path, faces, emotions):
    """Print a JSON object for each face of a photo."""
    for number, face in enumerate(faces, 1):
        print(json.dumps({
            "file": str(path), "face": number, "box": face.box,
            "emotion": emotions[face.probabilities.argmax()],
            "confidence": float(face.probabilities.max()),
            "probabilities": dict(zip(emotions, face.probabilities.tolist()))}), flush=True)


def print_faces(heading, faces, emotions):
    """Print a line for each face of a photo."""
    for number, face in enumerate(faces, 1):
        emotion, confidence = emotions[face.probabilities.argmax()], face.probabilities.max()
        shares = [f"{name} {share:.1%}" for name, share in zip(emotions, face.probabilities)]
        print(f"{heading}, face {number}: {emotion} {confidence:.1%}  ({', '.join(shares)})",
              flush=True)


@matplotlib.rc_context(PLOT_STYLE)
def draw_photo(photo, faces, emotions):
    """Return a figure (matplotlib) of a photo, the boxes of its faces and their probabilities."""
    names = [f"{number} {emotions[face.probabilities.argmax()]}"
             for number, face in enumerate(faces, 1)]
    photo_height = np.clip(8 * photo.height / photo.width, 3, 10)  # inches
    table_height = 1.5 + 0.4 * len(faces)
    figure = Figure(figsize=(8, photo_height + table_height), dpi=100, layout="constrained")
    scene, table = figure.subplots(2, height_ratios=(photo_height, table_height))
    scene.imshow(photo.reduce(math.ceil(max(photo.size) / 1280)), cmap="gray", vmin=0, vmax=255,
                 extent=(0, photo.width, photo.height, 0))
    scene.set_axis_off()
    scene.autoscale(False)
    for name, face in zip(names, faces):
        if face.box == (0, 0, *photo.size):  # the photo is all face
            continue
        left, top, right, bottom = face.box
        scene.plot((left, right, right, left, left), (top, top, bottom, bottom, top), SKY_BLUE)
        scene.text(max(left, 0), max(top, 0), name, size=11, va="bottom", backgroundcolor=SKY_BLUE)
    draw_shares(table, np.array([face.probabilities for face in faces]), names, emotions)
    return figure


def predict_emotions(paths, output_dir="output", detect=True, as_json=False):
    """Classify the faces in photos, and in folders of photos, with the network in `output_dir`.

    Where there is none, with the one included in docs/runs.  Prints a row per face and draws a
    picture per photo into predictions/ there, or only prints a JSON object per face.  Returns
    whether all photos could be read; one that cannot be read, or has no face, gets a line on
    stderr.  Raises InputError without a network, OSError on a full disk, KeyboardInterrupt on
    Ctrl-C, after the photo at hand.
    """
    model, emotions = load_network(find_network(output_dir))
    detector = None
    if detect:
        from mtcnn import MTCNN  # here: training does without it
        detector = MTCNN()
    photos = find_photos(paths)
    pictures = Path(output_dir, "predictions")
    if not as_json:
        pictures.mkdir(parents=True, exist_ok=True)
    all_read = True
    with delayed_interrupt() as pressed:
        for number, path in enumerate(photos, 1):
            if pressed.is_set():
                raise KeyboardInterrupt(f"interrupted; photos done: {number - 1} of {len(photos)}")
            try:
                photo = open_image(path)
            except InputError as error:
                complain(f"error: {error}")
                all_read = False
                continue
            faces = classify_photo(photo, detector, model)
            if not faces:
                complain(f"{path}: no face found; --no-detect classifies it whole")
            elif as_json:
                print_json(path, faces, emotions)
            else:
                print_faces(f"{number}/{len(photos)} {path}", faces, emotions)
                picture = pictures / f"{number}_{path.stem}.emotions.jpg"
                draw_photo(photo, faces, emotions).savefig(picture, dpi=100)
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
    spread = 0.03, 0.03, 0.015, 0.1, 0.04, 0.03, 0.08
    inner, outer, eye, smile, opening, mouth, corner = (
        EXPRESSIONS[emotion] + rng.normal(0, spread))
    eye = max(eye, 0.02)
    back, hair, skin, dark = map(int, rng.uniform((20, 0, 110, 15), (235, 120, 230, 80)))
    middle, half = rng.normal(96, 6, 2), rng.uniform((56, 72), (72, 88))  # pixels, reduced below
    image = Image.new("L", (192, 192), back)
    draw = ImageDraw.Draw(image)

    def place(*points):  # from half faces around the middle to pixels
        return [tuple(middle + half * point) for point in points]

    draw.ellipse(place((-1.08, -1.2), (1.08, 0.9)), hair)
    draw.ellipse(place((-1, -0.91), (1, 1.01)), skin)
    pupil = min(0.11, eye)
    for side in (-0.42, 0.42):
        for x, y, shade in ((0.21, eye + 0.04, dark),  # lids
                            (0.19, eye, min(255, skin * 5 // 4)), (pupil, pupil, dark // 2)):
            draw.ellipse(place((side - x, -0.16 - y), (side + x, y - 0.16)), shade)
        draw.line(place((0.43 * side, -0.36 - inner), (1.62 * side, -0.36 - outer)), dark, width=7)
    if emotion == "disgust":  # wrinkles
        for y in (-0.14, -0.03, 0.08):
            draw.line(place((-0.24, y), (0, y - 0.06), (0.24, y)), dark, width=4)
    draw.line(place((0, 0), (-0.1, 0.2), (0.1, 0.2)), skin * 7 // 10, width=4)  # nose
    across = np.linspace(-1, 1, 15)
    lips = 0.52 + 0.8 * mouth * (smile * (0.5 - across**2) - corner * across / 2)
    gap = 0.4 * mouth * max(opening, 0.1) * (1 - across**2) + 0.025
    upper_lip, lower_lip = zip(mouth * across, lips - gap), zip(mouth * across, lips + gap)
    draw.polygon(place(*upper_lip, *reversed(list(lower_lip))), dark // 2)
    image = image.rotate(rng.normal(0, 7), Image.Resampling.BILINEAR, fillcolor=back)
    light = rng.uniform(0.6, 1.1) * (1 + np.linspace(-1, 1, SIZE) * rng.normal(0, 0.25))
    noise = rng.normal(0, 12, (SIZE, SIZE))
    pixels = light * image.resize((SIZE, SIZE)) + noise
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def draw_faces(folder, seed):
    """Write drawn faces into `folder`, laid out and named like Kaggle's FER-2013."""
    print("Drawing faces: the accuracy on them means nothing for real faces")
    rng = np.random.default_rng(seed)
    for part, kind, count in (("train", "Training", 300), ("test", "PublicTest", 50),
                              ("test", "PrivateTest", 50)):
        for emotion in EXPRESSIONS:
            emotion_dir = Path(folder, part, emotion)
            emotion_dir.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw_face(emotion, rng).save(emotion_dir / f"{kind}_{number}.jpg")


# --- Command line ---------------------------------------------------------------------------------
def processor_information():
    """Return what Linux tells of the processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def processor_name():
    """Return the name of the processor as the operating system tells it."""
    name = re.search(r"model name\s*: (.+)", processor_information())
    return name[1] if name else platform.processor() or platform.machine()


def fastest_precision():
    """Return the fastest dtype policy of Keras on this machine."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        has_tensor_cores = details.get("compute_capability", (0, 0)) >= (7, 0)
        return "mixed_float16" if has_tensor_cores else "float32"  # keras.io/api/mixed_precision
    processor = processor_information()
    # Without AMX, bfloat16 takes Intel's processors 1.4 times as long as float32.
    if "amx_bf16" in processor or ("AMD" in processor and "avx512_bf16" in processor):
        return "mixed_bfloat16"
    return "float32"


@dataclasses.dataclass(frozen=True)
class Command:
    """What to do with the settings.  Each field is an option of the command line."""

    predict: list = setting((), "classify the faces in photos, or folders of photos", nargs="+",
                            metavar="PHOTO")
    no_detect: bool = setting(False, "take every photo as one face: look for none")
    json: bool = setting(False, "print a JSON object per face and draw nothing")
    output_dir: str = setting("output", "where all results are (default: {default})", metavar="DIR")
    resume: bool = setting(False, "go on with the interrupted run in --output-dir")


class OneLineParser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and a second line."""

    def error(self, message):
        raise InputError(message)


def option_name(name):
    """Return the name of an option on the command line."""
    return "--" + name.replace("_", "-")


def add_options(group, settings):
    """Add an option to a group of argparse for each field of a dataclass."""
    for field in dataclasses.fields(settings):
        argument = dict(field.metadata)
        argument["help"] = argument["help"].format(default=field.default)
        if field.type is bool:
            argument["action"] = "store_true"
        elif field.type is not list:
            argument["type"] = field.type
        group.add_argument(option_name(field.name), **argument)


def refuse(useless, given, mode):
    """Raise InputError if an option was given that would be ignored."""
    refused = sorted(useless & given.keys())
    if refused:
        raise InputError(f"{option_name(refused[0])} is of no use {mode}")


def parse_command_line(arguments):
    """Return the command and the settings of a run; InputError where they make no sense."""
    parser = OneLineParser(description="Recognise facial emotions.", allow_abbrev=False,
                           argument_default=argparse.SUPPRESS)
    add_options(parser.add_argument_group("training"), Settings)
    add_options(parser.add_argument_group("prediction with the trained network, output"), Command)
    given = vars(parser.parse_args(arguments))
    of_settings = {field.name for field in dataclasses.fields(Settings)}
    if "predict" in given:
        refuse(of_settings | {"resume"}, given, "with --predict")
    else:
        refuse({"no_detect", "json"}, given, "without --predict")
    if "resume" in given:
        refuse(of_settings, given, "with --resume")
    settings = {name: value for name, value in given.items() if name in of_settings}
    settings.setdefault("precision", fastest_precision())
    if "demo" in given:
        settings.setdefault("epochs", 4)
    command = {name: value for name, value in given.items() if name not in of_settings}
    return Command(**command), Settings(**settings)


@contextlib.contextmanager
def errors_in_one_line():
    """End the program with one line on stderr, and a status, where a user can mend the error."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        complain(str(interrupt) or "interrupted")
        sys.exit(130)  # as shells do
    except (InputError, OSError) as error:
        complain(f"error: {error}")
        sys.exit(2)


def lock_run(run_dir, resume):
    """Make the folder of an unfinished run and lock it: for a `with`, which unlocks it at its end.

    Raises InputError where the folder cannot be written or is in use, or, with `resume`, holds no
    interrupted run.
    """
    if resume and not Path(run_dir, CHECKPOINT).exists():
        raise InputError(f"--resume: there is no interrupted run in {run_dir.parent}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return FileLock(run_dir / "lock").acquire(timeout=0)  # the system drops it with the process
    except Timeout as error:
        raise InputError(f"{run_dir} is in use by another run: name another --output-dir"
                         ) from error
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written: {error.strerror}; name another --output-dir"
                         ) from error


def kept_epochs(run_dir):
    """Say how many epochs of an unfinished run are kept."""
    try:
        _, history, _, _ = load_checkpoint(run_dir / CHECKPOINT)
    except InputError:
        return "no epoch is kept"
    return f"epochs kept in {run_dir}: {len(history['epoch'])}, --resume goes on"


@contextlib.contextmanager
def telling_what_is_kept(run_dir):
    """Where a run ends early, say how many epochs are kept; where none is, delete its folder."""
    try:
        yield
    except KeyboardInterrupt:
        print()  # ends the line of the progress bar
        raise KeyboardInterrupt(f"interrupted; {kept_epochs(run_dir)}") from None
    except OSError as error:
        raise InputError(f"{error.filename or run_dir} cannot be read or written: "
                         f"{error.strerror}; mend that, or name another --output-dir; "
                         f"{kept_epochs(run_dir)}") from error
    except Exception as error:
        error.add_note(kept_epochs(run_dir))
        raise
    finally:
        if not Path(run_dir, CHECKPOINT).exists():
            shutil.rmtree(run_dir, ignore_errors=True)


def settings_of_run(run_dir, settings, resume):
    """Return the settings of a run, and for how many seconds it has trained before.

    These are `settings`, or with `resume` those of the interrupted run in the folder.  Raises
    InputError where there is one and `resume` is not wanted, or its files are damaged.
    """
    checkpoint = run_dir / CHECKPOINT
    if not resume:
        if checkpoint.exists():
            raise InputError(f"{run_dir} holds an interrupted run: add --resume, or delete it")
        return settings, 0
    _, history, _, _ = load_checkpoint(checkpoint)
    run_file = run_dir / "run.json"
    try:
        settings = Settings(**json.loads(run_file.read_text())["settings"])
    except Exception as error:  # the file may hold anything
        raise InputError(f"{run_file} is missing or damaged: delete {run_dir} and start anew"
                         ) from error
    return settings, sum(history["seconds"])


def keep_settings(run_dir, settings, test):
    """Keep settings in run.json, for --resume; InputError if the test images are others there."""
    run_file = run_dir / "run.json"
    run = {"settings": dataclasses.asdict(settings), "test images": checksum(*test)}
    if not Path(run_dir, CHECKPOINT).exists():
        run_file.write_text(json.dumps(run))
    elif json.loads(run_file.read_text()) != run:
        raise changed_since(run_dir, "test images")


def save_results(run_dir, model, settings, data, history, scores, seconds):
    """Write the network, history.csv, and metrics.json: scores and all to repeat the run."""
    save_network(model, data.emotions, run_dir / NETWORK)
    with open(run_dir / "history.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(history)
        writer.writerows(zip(*history.values()))  # a row per epoch
    best = int(np.argmax(history["val_accuracy"]))
    metrics = {
        "settings": dataclasses.asdict(settings),
        "images": {"training": len(data.training.images),
                   "validation": len(data.validation.images), "test": len(data.test.images)},
        "network": {"parameters": model.count_params(),
                    "megabytes": round((run_dir / NETWORK).stat().st_size / 1e6, 1)},
        "test": scores,
        "best_epoch": history["epoch"][best],
        "validation": {"accuracy": history["val_accuracy"][best],
                       "loss": history["val_loss"][best]},
        "seconds": round(seconds, 1),
        "processor": processor_name(),
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__,
                     "keras": keras.__version__},
    }
    (run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print("\nNetwork: {parameters:,} parameters, {megabytes} MB".format(**metrics["network"]))


def finish_run(run_dir, output_dir):
    """Put the results of a run in place of those before."""
    for name in RESULTS:
        os.replace(run_dir / name, output_dir / name)
    for picture in output_dir.glob("predictions/*.emotions.jpg"):
        picture.unlink()  # it was drawn with the network before
    (run_dir / CHECKPOINT).unlink()  # last: without it there is nothing to resume
    print(f"\nSaved in {output_dir}: {', '.join(RESULTS)}")


if __name__ == "__main__":
    start = time.perf_counter()
    sys.stdout.reconfigure(errors="backslashreplace")  # no path and no bar fails to be printed
    with errors_in_one_line():
        command, settings = parse_command_line(sys.argv[1:])
        if command.predict:
            all_read = predict_emotions(command.predict, command.output_dir,
                                        not command.no_detect, command.json)
            sys.exit(0 if all_read else 2)

        output_dir = Path(command.output_dir)
        run_dir = output_dir / "unfinished"
        with lock_run(run_dir, command.resume), telling_what_is_kept(run_dir):
            settings, trained_before = settings_of_run(run_dir, settings, command.resume)
            keras.utils.set_random_seed(settings.seed)
            keras.config.set_dtype_policy(settings.precision)
            print(f"{processor_name()}, {settings.precision}")
            if settings.demo:
                data_dir = run_dir / "faces"
                draw_faces(data_dir, settings.seed)
            else:
                data_dir = settings.data_dir or find_dataset()
            data = load_data(data_dir, settings.batch_size, settings.seed)
            keep_settings(run_dir, settings, data.test)
            model = create_CNN(len(data.emotions), settings.dropout)
            history = train_model(model, data.training, data.validation, settings.epochs,
                                  settings.learning_rate, run_dir / CHECKPOINT,
                                  keep_checkpoint=True)
            scores, probabilities = evaluate_model(model, data.test, data.emotions)
            plot_performance(history, scores, run_dir)
            plot_examples(data.test, probabilities, data.emotions, run_dir)
            seconds = trained_before + time.perf_counter() - start
            save_results(run_dir, model, settings, data, history, scores, seconds)
            finish_run(run_dir, output_dir)
