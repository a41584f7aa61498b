"""Train a small convolutional network to recognise facial emotions in FER-2013.

    python emotion_recognition_cnn.py           FER-2013, from data/ or downloaded
    python emotion_recognition_cnn.py --demo    drawn faces, nothing to download
    python emotion_recognition_cnn.py --predict PHOTO     with the trained network

Two convolution blocks, flatten, two dense layers.  The network is trained on the competition's
Training images, its best epoch is chosen on the PublicTest images, and the PrivateTest images are
evaluated once, at the end: 69.0 % accuracy (mean of three seeds) after 28 minutes on two cores of
an AMD EPYC.  Plots, figures and the trained network are left in output/.

FER-2013: Goodfellow et al. (2013), "Challenges in representation learning", arXiv:1307.0414.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow 2.21 logs before it reads that level, straight to file descriptor 2: point the
# descriptor elsewhere while TensorFlow is imported.
stderr = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
try:
    import keras
    import tensorflow as tf
    from keras import layers
    from tensorflow.keras.preprocessing.image import ImageDataGenerator
finally:
    os.dup2(stderr, 2)

matplotlib.use("Agg")  # draw into files, with or without a display
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no word on its font cache
import matplotlib.pyplot as plt

# Folder names of the Kaggle dataset msambare/fer2013; a label is an index into them.
EMOTIONS = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
IMAGE_SIZE = (48, 48)  # height, width
CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""  # Linux
MODEL, HISTORY, METRICS = "emotion_recognition_cnn.keras", "history.csv", "metrics.json"
CHECKPOINT, SETTINGS = "checkpoint.keras", "settings.json"  # of a run that is not finished
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class InputError(Exception):
    """A mistake in options or data; its one line names it and says what to do."""


def complain(problem):
    """Print one line on stderr."""
    print(" ".join(str(problem).split()), file=sys.stderr)


def fail(error):
    """Print one line on stderr and exit with status 2."""
    complain(f"error: {error}")
    sys.exit(2)


def processor_name():
    """Return the name of the processor as the operating system tells it."""
    name = re.search(r"model name\s*: (.+)", CPUINFO)
    return name[1] if name else platform.processor() or platform.machine()


def fastest_precision():
    """Return the Keras dtype policy that the hardware computes fastest.

    16 bits are worth it where the hardware multiplies them itself: tensor cores, from compute
    capability 7 on (keras.io/api/mixed_precision), or a processor's bfloat16 instructions.
    """
    for gpu in tf.config.list_physical_devices("GPU"):
        capability = tf.config.experimental.get_device_details(gpu).get("compute_capability", (0,))
        return "mixed_float16" if capability[0] >= 7 else "float32"
    return "mixed_bfloat16" if re.search("avx512_bf16|amx_bf16", CPUINFO) else "float32"


def parse_options():
    """Read the command line and make the output folder; exit with status 2 where that fails."""
    parser = argparse.ArgumentParser(description="Train a small CNN to recognise facial emotions.",
                                     allow_abbrev=False)
    parser.error = fail  # one line, where argparse would print its usage first
    data = parser.add_argument_group("data").add_mutually_exclusive_group()
    data.add_argument("--data-dir", metavar="DIR", help="folder that holds train/ and "
                      "test/ (default: data, downloaded from Kaggle where it does not exist)")
    data.add_argument("--demo", action="store_true", help="train on small drawn faces instead")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, metavar="N",
                          help="passes over the training images (default: 48; demo: 8)")
    training.add_argument("--batch-size", type=int, default=128, metavar="N",
                          help="images per step (default: %(default)s)")
    training.add_argument("--learning-rate", type=float, default=3e-3, metavar="X",
                          help="learning rate of the first step (default: %(default)s)")
    training.add_argument("--precision", choices=("float32", "mixed_bfloat16", "mixed_float16"),
                          default=fastest_precision(),
                          help="number format (default: what is fastest here, %(default)s)")
    training.add_argument("--seed", type=int, default=0, metavar="N",
                          help="seeds Python, NumPy and TensorFlow (default: %(default)s)")
    prediction = parser.add_argument_group("prediction with the trained network")
    prediction.add_argument("--predict", nargs="+", type=Path, metavar="PHOTO",
                            help="classify the faces in these photos, or folders of photos")
    prediction.add_argument("--no-detect", action="store_true",
                            help="take every photo as one face: look for none, crop nothing")
    prediction.add_argument("--json", action="store_true",
                            help="print one JSON object per face and nothing else")
    parser.add_argument("--output-dir", type=Path, default=Path("output"), metavar="DIR",
                        help="where plots, model and figures go (default: %(default)s)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the interrupted run in --output-dir, with its settings")
    options = parser.parse_args()
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    of_prediction = {"predict", "no_detect", "json"}
    wrong = given - of_prediction - {"output_dir"} if options.predict else given & of_prediction
    if wrong:
        parser.error(f"--{min(wrong).replace('_', '-')} is of no use "
                     f"{'with' if options.predict else 'without'} --predict")
    run_dir = options.output_dir / "unfinished"
    if options.predict:
        return options, run_dir
    interrupted = (run_dir / CHECKPOINT).exists()
    if options.resume and not interrupted:
        parser.error(f"--resume: there is no interrupted run in {options.output_dir}")
    if interrupted and not options.resume:
        parser.error(f"{run_dir} holds an interrupted run: add --resume, or delete that folder")
    if options.resume:
        try:
            settings = json.loads((run_dir / SETTINGS).read_text())
            read_history(run_dir / HISTORY)["seconds"][0]
        except (OSError, ValueError, LookupError):
            parser.error(f"{SETTINGS} or {HISTORY} in {run_dir} is damaged: delete that folder and "
                         "start anew")
        parser.set_defaults(**settings)  # what is not given now is as it was
        options = parser.parse_args()
        for name, value in settings.items():
            if getattr(options, name) != value:
                parser.error(f"--{name.replace('_', '-')}: the run to resume has {value}")
    if options.epochs is None:
        options.epochs = 8 if options.demo else 48
    for rule, followed in {
        "--epochs must be at least 1": options.epochs >= 1,
        "--batch-size must be at least 1": options.batch_size >= 1,
        "--learning-rate must be a number above 0": 0 < options.learning_rate < math.inf,
        "--seed must lie between 0 and 2**31 - 1": 0 <= options.seed < 2**31,
    }.items():
        if not followed:
            parser.error(rule)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            settings = {name: value for name, value in vars(options).items()
                        if name not in of_prediction | {"output_dir", "resume"}}
            (run_dir / SETTINGS).write_text(json.dumps(settings))
    except OSError as error:
        parser.error(f"--output-dir {options.output_dir} cannot be written: {error.strerror}")
    return options, run_dir


# A drawn face, after the action units of Ekman and Friesen's Facial Action Coding System: inner
# and outer brow up, eyes open (in half faces), smile, mouth open, mouth width, one corner up.
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
    background, skin, dark = rng.uniform((20, 110, 15), (235, 230, 80))
    height, width = rng.uniform((72, 56), (88, 72))  # half of the face's
    x, y = rng.normal(96, 6, 2)
    image = Image.new("L", (192, 192), int(background))  # reduced at the end: smooth lines
    draw = ImageDraw.Draw(image)

    def oval(x, y, rx, ry, shade):
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=int(shade))

    oval(x, y - 0.15 * height, width * 1.08, height * 1.05, rng.uniform(0, 120))  # hair
    oval(x, y + 0.05 * height, width, height * 0.96, skin)
    eye_y, look, eye = y - height * 0.16, rng.uniform(-3, 3), max(eye, 0.02) * height
    for side in (-width, width):
        eye_x, brow_y = x + 0.42 * side, eye_y - 0.2 * height
        oval(eye_x, eye_y, width * 0.21, eye + 3, dark)
        oval(eye_x, eye_y, width * 0.19, eye, min(255, skin * 1.25))
        oval(eye_x + look, eye_y, min(9, eye), min(9, eye), dark / 2)
        draw.line((eye_x - side * 0.24, brow_y - inner * height,
                   eye_x + side * 0.26, brow_y - outer * height), fill=int(dark), width=7)
    nose = y + 0.2 * height
    draw.line((x, eye_y + 12, x - 6, nose, x + 7, nose), fill=int(skin * 0.7), width=4)
    for wrinkle in (0, 9, 18) if emotion == "disgust" else ():
        draw.arc((x - 17, eye_y + wrinkle - 4, x + 17, eye_y + wrinkle + 14), 200, 340,
                 fill=int(dark), width=4)
    across, mouth = np.linspace(-1, 1, 15), mouth * width
    bow = 1 - across**2
    upper = y + 0.52 * height + mouth * (smile * (bow - .5) - (corner * across + opening * bow) / 2)
    lower = upper + 4 + mouth * max(opening, 0) * bow
    draw.polygon([*zip(x + mouth * across, upper), *zip(x - mouth * across, lower[::-1])],
                 fill=int(dark / 2), outline=int(dark), width=4)
    image = image.rotate(rng.normal(0, 7), Image.Resampling.BILINEAR, fillcolor=int(background))
    pixels = np.asarray(image.resize(IMAGE_SIZE, Image.Resampling.LANCZOS), float)
    pixels *= rng.uniform(0.6, 1.1) * (1 + np.linspace(-1, 1, 48) * rng.normal(0, 0.25))  # light
    pixels += rng.normal(0, 12, pixels.shape)  # noise
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def draw_faces(folder, seed):
    """Write drawn faces into `folder`, laid out and named like Kaggle's FER-2013; return it."""
    rng = np.random.default_rng(seed)
    for kind, count in {"Training": 300, "PublicTest": 50, "PrivateTest": 50}.items():
        for emotion in EMOTIONS:
            emotion_dir = Path(folder, "train" if kind == "Training" else "test", emotion)
            emotion_dir.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw_face(emotion, rng).save(emotion_dir / f"{kind}_{number}.jpg", quality=90)
    return Path(folder)


def download_faces():
    """Return the folder of FER-2013 in kagglehub's cache, downloaded where it is not there yet.

    Raises InputError, with the other ways to get going, where the download fails.
    """
    try:
        import kagglehub

        return Path(kagglehub.dataset_download("msambare/fer2013"))
    except Exception as error:  # from any layer: network, HTTP status, archive, disk
        raise InputError(
            "there is no data/ folder and FER-2013 could not be downloaded "
            f"({type(error).__name__}). Ways on: download "
            "https://www.kaggle.com/datasets/msambare/fer2013 by hand and unpack it into data/, "
            "name the folder that holds it with --data-dir, or try drawn faces with --demo"
        ) from error


def open_image(contents):
    """Open the contents of an image file as a person sees it: upright, 8 bits, grey or RGB."""
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(contents)))
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
        image = image.point(lambda value: value / 256).convert("L")
    elif image.has_transparency_data:  # on white paper
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "L" else image.convert("RGB")


def face_pixels(image):
    """Return an image of a face as the network sees it: 48x48 grey pixels (uint8)."""
    return np.asarray(image.convert("L").resize(IMAGE_SIZE, Image.Resampling.BILINEAR))


def find_images(paths):
    """Return, in order, those of `paths` that are images by their ending and not hidden."""
    return sorted(path for path in paths
                  if path.suffix.lower() in IMAGE_ENDINGS and path.name[0] != ".")


def read_images(folder):
    """Read every image in the seven emotion folders of `folder`.

    Returns file names, undecoded contents (bytes), images (uint8, n x 48 x 48 x 1) and labels
    (int, n: indices into EMOTIONS).  Files that are no images by their ending are passed over;
    images of another size or in colour are converted.

    Raises InputError where an emotion folder is missing, empty or one too many, or an image
    cannot be decoded.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: --data-dir must name the one that holds "
                         "train/ and test/")
    found = {entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."}
    if found != set(EMOTIONS):
        name = min(found ^ set(EMOTIONS))
        raise InputError(f"{folder / name} is {'none of' if name in found else 'missing:'} "
                         f"the seven emotion folders ({', '.join(EMOTIONS)})")
    names, contents, images, labels = [], [], [], []
    for label, emotion in enumerate(EMOTIONS):
        paths = find_images((folder / emotion).iterdir())
        if not paths:
            raise InputError(f"{folder / emotion} holds no images ({' '.join(IMAGE_ENDINGS)})")
        for path in paths:
            try:
                contents.append(path.read_bytes())
                images.append(face_pixels(open_image(contents[-1])))
            except Exception as error:  # Pillow raises many kinds on a broken file
                raise InputError(f"{path} is empty, damaged or no image ({type(error).__name__}): "
                                 "replace or delete it") from error
            names.append(path.name)
            labels.append(label)
    return np.array(names), contents, np.stack(images)[..., np.newaxis], np.array(labels)


class AugmentedBatches(keras.utils.PyDataset):
    """Batches of images in a new order in every epoch, augmented by ImageDataGenerator.

    An augmented image serves in two epochs, mirrored in the second: half the augmentation is
    saved.  Alternating flips: Jordan (2024), arXiv:2404.00498.

    A batch follows from seed, epoch and index, whichever worker makes it; Keras's own iterators
    let their workers draw from NumPy's global random numbers all at once.
    """

    augmentation = dict(horizontal_flip=True, rotation_range=10, width_shift_range=0.1,
                        height_shift_range=0.1, zoom_range=0.1)

    def __init__(self, images, labels, batch_size, seed, workers=2):
        # With one worker Keras leaves the queue to tf.data, whose autotuner holds up the end of
        # some epochs by up to a minute; with two it fills the queue itself.
        super().__init__(workers=workers)
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.augmented = np.empty_like(images)
        self.generator = ImageDataGenerator(**self.augmentation, data_format="channels_first")
        self.lock = threading.Lock()
        self.start_epoch(0)

    def start_epoch(self, epoch):
        """Shuffle the images for the given epoch, counted from 0."""
        self.epoch = epoch
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.labels))

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size:(index + 1) * self.batch_size]
        if self.epoch % 2 == 0:
            self.augment(chosen, index)
            return self.augmented[chosen], self.labels[chosen]
        return self.augmented[chosen][:, :, ::-1], self.labels[chosen]

    def augment(self, chosen, index):
        """Augment the chosen images, those of the batch with the given index."""
        # Four images at once, as the channels of one: that saves a third of the time.
        fours = [chosen[first:first + 4] for first in range(0, len(chosen), 4)]
        with self.lock:  # get_random_transform draws from NumPy's global random numbers
            np.random.seed([self.seed, self.epoch, index])
            transforms = [self.generator.get_random_transform((1, *IMAGE_SIZE)) for _ in fours]
        for four, transform in zip(fours, transforms):
            self.augmented[four, ..., 0] = self.generator.apply_transform(
                self.images[four, ..., 0], transform)


def load_data(data_dir, batch_size, seed):
    """Load FER-2013, or a dataset of the same layout, into memory.

    Training is train/, validation the PublicTest and test the PrivateTest images of test/.
    Where file names do not tell these apart, a seeded, stratified tenth of train/ is held out for
    validation and all of test/ is the test set.

    Returns training (AugmentedBatches), validation (images, labels) and test (images, labels, and
    for each image whether it is clean: does not stand in train/ too, byte for byte).  Images are
    uint8, n x 48 x 48 x 1, pixels 0-255.  Raises InputError as `read_images` does.
    """
    print(f"Reading {data_dir}")
    _, train_files, train_images, train_labels = read_images(data_dir / "train")
    names, test_files, test_images, test_labels = read_images(data_dir / "test")
    train_files = set(train_files)
    clean = np.array([file not in train_files for file in test_files])

    public = np.char.startswith(names, "PublicTest_")
    private = np.char.startswith(names, "PrivateTest_")
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
    print(f"{len(train_labels):,} training, {len(validation[1]):,} validation and {len(test[1]):,} "
          f"test images; {np.sum(~test[2]):,} of the test images also stand in train/")
    return training, validation, test


def create_CNN():
    """Build the network: two convolution blocks, flatten, two dense layers.

    Input: images (n x 48 x 48 x 1, pixels 0-255).  Output: probabilities (n x 7), in the order
    of EMOTIONS.
    """
    return keras.Sequential([
        keras.Input((*IMAGE_SIZE, 1)),
        # Each image to mean 0 and variance 1: light and contrast of the photo drop out.
        layers.LayerNormalization(axis=[1, 2, 3], center=False, scale=False),
        # Pooling first leaves normalisation and ReLU a ninth of their work.
        layers.Conv2D(32, 5, padding="same", use_bias=False),
        layers.MaxPooling2D(4, 3, padding="same"),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Conv2D(256, 4, padding="same", use_bias=False),
        layers.MaxPooling2D(5, 3, padding="same"),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dropout(0.25),
        layers.Dense(512, use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Dropout(0.4),
        layers.Dense(len(EMOTIONS), activation="softmax", dtype="float32"),
    ])


def save_whole(model, path):
    """Save `model` beside `path`, then put it there: a file is whole, or it is the one before."""
    model.save(path.with_stem("part"))
    os.replace(path.with_stem("part"), path)


class EpochLog(keras.callbacks.CSVLogger):
    """Keras's CSVLogger, with epochs counted from 1, the learning rate and the seconds."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()
        self.learning_rate = float(self.model.optimizer.learning_rate)
        for layer in self.model.layers:
            if isinstance(layer, layers.Dropout):  # no file keeps where its random numbers were
                seed = layer.seed_generator.state[0]
                layer.seed_generator.state.assign([seed, epoch * self.params["steps"]])

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch + 1, logs | {
            "learning_rate": self.learning_rate,
            "seconds": round(time.perf_counter() - self.start, 2)})


class InterruptBetweenBatches(keras.callbacks.Callback):
    """Ctrl-C waits for the end of a batch: within TensorFlow it may come out as another error.

    A second Ctrl-C does not wait.
    """

    def on_train_begin(self, logs=None):
        self.pressed = False
        self.handler = signal.signal(signal.SIGINT, self.press)

    def press(self, number, frame):
        self.pressed = True
        signal.signal(signal.SIGINT, self.handler)

    def on_train_batch_end(self, batch, logs=None):
        if self.pressed:
            raise KeyboardInterrupt

    def on_train_end(self, logs=None):
        signal.signal(signal.SIGINT, self.handler)
        if self.pressed:  # while the last epoch was validated
            raise KeyboardInterrupt


def read_history(path):
    """Return history.csv as a dict of lists with one value per epoch; ValueError if damaged."""
    with open(path, newline="") as file:
        lines = [line for line in file if line.endswith("\n")]  # a full disk may cut the last one
    columns = zip(*csv.reader(lines), strict=True)
    return {name: [float(value) for value in values] for name, *values in columns}


def train_model(model, training, validation, epochs, learning_rate, run_dir):
    """Train `model` with AdamW; the learning rate falls along a cosine over all epochs.

    After each epoch `run_dir` holds the history, the best weights and, in one file, all it takes
    to go on; where that file is there already, training goes on from it.  In the end `model` has
    the weights of the epoch with the highest validation accuracy, in float32, and is saved.

    Returns the history: a dict of lists with one value per epoch.  Raises InputError where the
    loss is not finite, OSError where `run_dir` cannot be written.
    AdamW: Loshchilov and Hutter (2019), arXiv:1711.05101; cosine decay: arXiv:1608.03983.
    """
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * len(training))
    model.compile(keras.optimizers.AdamW(schedule), "sparse_categorical_crossentropy",
                  metrics=["accuracy"])
    # The rarer an emotion, the more each of its images weighs: 1 on average, disgust twice that.
    count = np.bincount(training.labels)
    weight = np.cbrt(count.mean() / count)
    weight /= np.average(weight, weights=count)
    log, best, checkpoint = run_dir / HISTORY, run_dir / "best.weights.h5", run_dir / CHECKPOINT
    done, best_accuracy = 0, None
    if checkpoint.exists():
        model.optimizer.build(model.trainable_variables)
        try:
            with warnings.catch_warnings(action="error", category=UserWarning):  # what is left out
                model.load_weights(checkpoint)
        except Exception as error:  # of zipfile, h5py or Keras
            raise InputError(f"{checkpoint} is damaged: delete {run_dir} and start anew") from error
        done = int(model.optimizer.iterations) // len(training)
        # An epoch that was logged but not yet in the checkpoint is trained again.
        lines = log.read_bytes().splitlines(keepends=True)[:1 + done]
        log.with_stem("part").write_bytes(b"".join(lines))
        os.replace(log.with_stem("part"), log)
        best_accuracy = max(read_history(log)["val_accuracy"])
        if done % 2:  # the epoch to come mirrors the images of the one before: make them again
            training.start_epoch(done - 1)
            list(training)
    try:
        model.fit(
            training,
            validation_data=validation,
            class_weight=dict(enumerate(weight)),
            initial_epoch=done,
            epochs=epochs,
            shuffle=False,  # of batches: their images are shuffled already
            verbose=1 if sys.stdout.isatty() else 2,
            callbacks=[
                keras.callbacks.TerminateOnNaN(raise_error=True),
                EpochLog(log, append=checkpoint.exists()),
                keras.callbacks.ModelCheckpoint(
                    best, monitor="val_accuracy", save_best_only=True, save_weights_only=True,
                    initial_value_threshold=best_accuracy),
                keras.callbacks.LambdaCallback(
                    on_epoch_begin=lambda epoch, logs: training.start_epoch(epoch),
                    on_epoch_end=lambda epoch, logs: save_whole(model, checkpoint)),
                InterruptBetweenBatches(),
            ],
        )
    except RuntimeError as error:
        if "NaN" not in str(error):  # not TerminateOnNaN's
            raise
        raise InputError(f"{error} Start anew with a lower --learning-rate than {learning_rate}")
    model.load_weights(best)
    for layer in model.layers:
        layer.dtype_policy = "float32"  # the trained network predicts the same on any machine
    # SGD has no state: without AdamW's the file is a third of the size.
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    save_whole(model, run_dir / MODEL)
    return read_history(log)


def classify_faces(model, images):
    """Return the probabilities (n x 7) of images (n x 48 x 48 x 1), averaged over four views.

    The views are the image two pixels higher, and two pixels lower and a tenth larger, and these
    two mirrored.
    """
    probabilities = []
    for first in range(0, len(images), 64):
        batch = images[first:first + 64]
        higher = np.pad(batch[:, 2:], ((0, 0), (0, 2), (0, 0), (0, 0)), "edge")
        larger = tf.image.resize(batch[:, :44, 2:46], IMAGE_SIZE)
        views = np.concatenate([higher, larger])
        views = np.concatenate([views, views[:, :, ::-1]])
        # Calls of the model save what predict takes each time: 0.2 s, and tracing before that.
        probabilities.append(np.reshape(model(views), (4, len(batch), -1)).mean(axis=0))
    return np.concatenate(probabilities)


def evaluate_model(model, images, labels, clean):
    """Evaluate `model` once on the test images and print the figures.

    Takes what `load_data` returns as test data.  Returns a dict: single_image_accuracy, and, from
    probabilities averaged over the views of each image, loss (mean cross-entropy, nats),
    accuracy, balanced_accuracy (mean recall over the emotions), clean_accuracy (over the images
    that do not also stand in train/) and clean_images (how many those are), emotions (per emotion
    precision, recall, f1 and count) and confusion_matrix (counts; rows: labels, columns:
    predictions).  Fractions lie between 0 and 1.
    """
    single = model.predict(images, batch_size=256, verbose=0)
    probabilities = classify_faces(model, images)
    predictions = probabilities.argmax(axis=1)
    correct = predictions == labels
    confusion = tf.math.confusion_matrix(labels, predictions, len(EMOTIONS)).numpy()
    hits, count, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    recall = hits / np.maximum(count, 1)  # 0, not 0/0, where an emotion never occurs
    precision = hits / np.maximum(predicted, 1)
    f1 = 2 * hits / np.maximum(count + predicted, 1)
    figures = {
        "loss": float(np.mean(keras.losses.sparse_categorical_crossentropy(labels, probabilities))),
        "single_image_accuracy": float((single.argmax(axis=1) == labels).mean()),
        "accuracy": float(correct.mean()),
        "balanced_accuracy": float(recall[count > 0].mean()),
        "clean_accuracy": float(correct[clean].mean()) if clean.any() else None,
        "clean_images": int(clean.sum()),
        "emotions": {
            emotion: {"precision": float(precision[i]), "recall": float(recall[i]),
                      "f1": float(f1[i]), "count": int(count[i])}
            for i, emotion in enumerate(EMOTIONS)},
        "confusion_matrix": confusion.tolist(),
    }
    print(f"\nTest, {len(labels):,} images\n"
          f"  single-image accuracy  {figures['single_image_accuracy']:.2%}\n"
          "averaged over four views: one higher, one lower and larger, and both mirrored\n"
          f"  accuracy               {figures['accuracy']:.2%}\n"
          f"  balanced accuracy      {figures['balanced_accuracy']:.2%}")
    if clean.any():
        print(f"  clean accuracy         {figures['clean_accuracy']:.2%}  "
              f"({clean.sum():,} images that do not also stand in train/)")
    print(f"  loss                   {figures['loss']:.4f}")
    print("\n  emotion    precision   recall       F1   images")
    for emotion, figure in figures["emotions"].items():
        print("  {:9}{precision:11.1%}{recall:9.1%}{f1:9.1%}{count:9,}".format(emotion, **figure))
    return figures


def plot_performance(history, confusion, output_dir):
    """Write accuracy.png and loss.png (over the epochs) and confusion_matrix.png.

    `history` is what `train_model` returns, `confusion` the matrix of `evaluate_model`, or None
    where there is none yet.
    """
    plt.rcParams.update({"font.size": 15, "figure.dpi": 150, "lines.linewidth": 2.5})
    epochs = np.arange(1, len(history["loss"]) + 1)
    best = int(np.argmax(history["val_accuracy"]))
    for name in ("accuracy", "loss"):
        figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
        # Blue and vermilion of Okabe and Ito's palette, told apart by colour-blind readers.
        axes.plot(epochs, history[name], "o-", color="#0072B2", label="training (augmented)")
        axes.plot(epochs, history["val_" + name], "s--", color="#D55E00", label="validation")
        axes.plot(best + 1, history["val_" + name][best], "k*", markersize=18,
                  label=f"best epoch: {best + 1} ({history['val_' + name][best]:.3f})")
        axes.set(title=f"Training and validation {name}", xlabel="epoch",
                 ylabel=name + (" (cross-entropy)" if name == "loss" else ""))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(output_dir / f"{name}.png")
        plt.close(figure)

    if confusion is None:
        return
    shares = np.array(confusion) / np.maximum(np.sum(confusion, axis=1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(8, 7.5), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0%}", ha="center", va="center",
                  color="white" if share > 0.6 else "black")
    axes.set(title="Test images: label against prediction", xlabel="predicted", ylabel="labelled")
    axes.set_xticks(range(len(EMOTIONS)), EMOTIONS, rotation=45, ha="right")
    axes.set_yticks(range(len(EMOTIONS)), EMOTIONS)
    figure.savefig(output_dir / "confusion_matrix.png")
    plt.close(figure)


def save_metrics(run_dir, options, data_dir, labels, history, figures, start):
    """Write metrics.json: test figures, best epoch, and all it takes to repeat the run.

    `labels` maps training, validation and test to their labels; `start` is the clock
    (time.perf_counter) at the start of the program.
    """
    best = int(np.argmax(history["val_accuracy"]))
    metrics = {
        "data": "drawn faces (--demo)" if options.demo else str(data_dir),
        "test": figures,
        "best_epoch": best + 1,
        "validation": {name: history["val_" + name][best] for name in ("accuracy", "loss")},
        "images": {name: len(of) for name, of in labels.items()},
        "seconds": round(time.perf_counter() - start, 1),
        "seed": options.seed,
        "hyper_parameters": {name: getattr(options, name)
                             for name in ("epochs", "batch_size", "learning_rate", "precision")},
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__,
                     "keras": keras.__version__},
        "processor": processor_name(),
    }
    (run_dir / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")


def publish(run_dir, output_dir):
    """Put the files of a finished run in place of those of the one before, each of them whole."""
    names = ("accuracy.png", "loss.png", "confusion_matrix.png", HISTORY, METRICS, MODEL)
    for name in names:
        shutil.copy(run_dir / name, output_dir / "part")
        os.replace(output_dir / "part", output_dir / name)
    (run_dir / CHECKPOINT).unlink()  # first: without it there is nothing to resume
    shutil.rmtree(run_dir)
    print(f"\nSaved in {output_dir}: {', '.join(names)}")


def find_faces(photo, detector):
    """Find the faces in a photo (PIL image) and frame them as FER-2013 frames its faces.

    Returns boxes (left, top, right, bottom; pixels) from left to right, which may reach beyond
    the photo.  For a photo that is a crop of one face already, the box is the whole photo.
    Detector: MTCNN, Zhang et al. (2016), arXiv:1604.02878.
    """
    whole = 0, 0, *photo.size
    if max(photo.size) <= 64:  # little more than the network's input, and too little to detect in
        return [whole]
    small = ImageOps.contain(photo, (1280, 1280)) if max(photo.size) > 1280 else photo
    scale = photo.width / small.width
    boxes = []
    for face in detector.detect_faces(np.asarray(small.convert("RGB")), fit_to_image=False,
                                      threshold_onet=0.95):  # at 0.8 it sees faces in curtains
        left, top, width, height = (scale * float(pixels) for pixels in face["box"])
        # The median of 568 images of train/ is the square around the middle of MTCNN's box that
        # is 1.25 times as wide as the box.
        x, y, reach = left + width / 2, top + height / 2, 1.25 * width / 2
        boxes.append((round(x - reach), round(y - reach), round(x + reach), round(y + reach)))
    filled = len(boxes) == 1 and boxes[0][2] - boxes[0][0] > max(photo.size) * 2 / 3
    return [whole] if filled and max(photo.size) <= 400 else sorted(boxes)


def crop_face(photo, box):
    """Cut a box out of a photo; where it reaches beyond the photo, the edge is repeated."""
    left, top, right, bottom = box
    rows = np.arange(top, bottom).clip(0, photo.height - 1)
    columns = np.arange(left, right).clip(0, photo.width - 1)
    return Image.fromarray(np.asarray(photo)[np.ix_(rows, columns)])


FONT = ImageFont.load_default(16)


@functools.cache
def draw_text(text):
    """Return a picture of a word, drawn once: that saves half a millisecond a face."""
    picture = Image.new("RGB", (80, 21), "white")
    ImageDraw.Draw(picture).text((0, 0), text, "black", FONT)
    return picture


def draw_predictions(photo, boxes, probabilities):
    """Return a picture of a photo with a box and the emotion on each face, and bars beside it.

    `boxes` (left, top, right, bottom; pixels) and `probabilities` (n x 7) have a row per face.
    """
    photo = photo.convert("RGB")  # a copy, where boxes have their colour on grey photos, too
    titles = [f"{n} {EMOTIONS[shares.argmax()]}" for n, shares in enumerate(probabilities, 1)]
    draw = ImageDraw.Draw(photo)
    for box, title in zip(boxes, titles):
        if max(box[:2]) > 0:  # not a photo that is all face
            label = (max(0, min(box[0], photo.width - FONT.getlength(title))), max(0, box[1] - 20))
            draw.rectangle(box, outline="#56B4E9", width=3)
            draw.rectangle(draw.textbbox(label, title, FONT), fill="#56B4E9")
            draw.text(label, title, "black", FONT)
    rows = max(1, photo.height // 180)  # of bar charts
    width = photo.width + 260 * math.ceil(len(boxes) / rows)
    picture = Image.new("RGB", (width, max(photo.height, 180)), "white")
    picture.paste(photo)
    draw = ImageDraw.Draw(picture)
    for number, (title, shares) in enumerate(zip(titles, probabilities)):
        left, top = photo.width + 10 + 260 * (number // rows), 180 * (number % rows)
        draw.text((left, top + 4), title, "black", FONT)
        for index, share in enumerate(shares):
            y, end = top + 28 + 21 * index, left + 80 + 110 * float(share)
            picture.paste(draw_text(EMOTIONS[index]), (left, y))
            draw.rectangle((left + 80, y + 2, end, y + 16),
                           fill="#D55E00" if index == shares.argmax() else "#0072B2")
            picture.paste(draw_text(f"{share:.0%}"), (round(end) + 8, y))
    return picture


def load_network(path):
    """Return the trained network in the file `path`; raises InputError where there is none."""
    if not path.exists():
        raise InputError(f"there is no {path}: train a network first, or name the folder of a "
                         "trained one with --output-dir")
    try:
        model = keras.models.load_model(path)
        classify_faces(model, np.zeros((1, *IMAGE_SIZE, 1)))
    except Exception as error:  # of zipfile, h5py or Keras
        raise InputError(f"{path} is damaged or no network of this script") from error
    return model


def predict_emotions(paths, output_dir, detect, as_json):
    """Classify the faces in photos, and in folders of photos, with the network in `output_dir`.

    Prints a row, or a JSON object, per face and draws a picture per photo into predictions/
    there.  A photo that cannot be read gets a line on stderr, and the others are gone on with.
    Returns whether all could be read.  Raises InputError where there is no trained network,
    OSError where a picture cannot be written.
    """
    model, detector = load_network(output_dir / MODEL), None
    if detect:
        from mtcnn import MTCNN  # here: training does without it

        detector = MTCNN()
    photos = []
    for path in paths:
        photos += find_images(path.rglob("*")) or [path]  # of no folder, rglob finds nothing
    width = max(len(str(path)) for path in photos)
    if not as_json:
        print(f"{'file':{width}}  face  emotion   confidence", *(f"{e:>9}" for e in EMOTIONS))
    (output_dir / "predictions").mkdir(exist_ok=True)
    taken, all_read = {path.resolve() for path in photos}, True
    at_once = 10 if detect else 250  # rows soon, or full batches
    for first in range(0, len(photos), at_once):
        batch, crops = [], []
        for path in photos[first:first + at_once]:
            try:
                photo = open_image(path.read_bytes())
                boxes = find_faces(photo, detector) if detect else [(0, 0, *photo.size)]
                crops += [face_pixels(crop_face(photo, box)) for box in boxes]
            except Exception as error:  # as in read_images
                complain(f"error: {path} is missing, damaged or no image ({type(error).__name__})")
                all_read = False
                continue
            if not boxes:
                complain(f"{path}: no face found; --no-detect classifies it whole")
            scene = ImageOps.contain(photo, (1280, min(max(photo.height, 180), 720)))
            batch.append((path, boxes, scene, scene.width / photo.width))
        crops = np.reshape(crops, (-1, *IMAGE_SIZE, 1))
        results = iter(classify_faces(model, crops) if len(crops) else ())
        for path, boxes, scene, scale in batch:
            picture = output_dir / "predictions" / f"{path.stem}.jpg"
            while picture.resolve() in taken:  # by another of that name, or a photo to classify
                picture = picture.with_stem(picture.stem + "_")
            taken.add(picture.resolve())
            probabilities = [next(results) for _ in boxes]
            scaled = [tuple(scale * pixels for pixels in box) for box in boxes]
            draw_predictions(scene, scaled, probabilities).save(picture, quality=90)
            for number, (box, shares) in enumerate(zip(boxes, probabilities), 1):
                emotion, confidence = EMOTIONS[shares.argmax()], float(shares.max())
                if as_json:
                    print(json.dumps({
                        "file": str(path), "face": number, "box": box, "emotion": emotion,
                        "confidence": confidence,
                        "probabilities": dict(zip(EMOTIONS, map(float, shares))),
                        "picture": str(picture)}))
                else:
                    print(f"{str(path):{width}}{number:6}  {emotion:9}{confidence:11.1%}",
                          *(f"{share:9.1%}" for share in shares))
    if not as_json:
        print(f"\nPictures saved in {output_dir / 'predictions'}")
    return all_read


def stop(error, run_dir):
    """End the program with one line on what went wrong and what is kept of the training."""
    kept = "; nothing was trained yet"
    if not (run_dir / CHECKPOINT).exists():
        shutil.rmtree(run_dir, ignore_errors=True)
    elif not isinstance(error, InputError):
        history = read_history(run_dir / HISTORY)
        with contextlib.suppress(OSError):  # the disk may be full
            plot_performance(history, None, run_dir)
        kept = (f"; the first {len(history['loss'])} epochs are kept in {run_dir}, with history "
                "and plots, and --resume goes on from there")
    if isinstance(error, KeyboardInterrupt):
        print(f"\ninterrupted{kept}", file=sys.stderr)
        sys.exit(130)  # as shells do
    if isinstance(error, OSError):
        error = (f"{error.filename or run_dir} cannot be read or written: "
                 f"{error.strerror or error}{kept}")
    fail(error)


if __name__ == "__main__":
    start = time.perf_counter()
    sys.stdout.reconfigure(errors="backslashreplace")  # no path and no bar fails to be printed
    options, run_dir = parse_options()
    if options.predict:
        try:
            sys.exit(0 if predict_emotions(options.predict, options.output_dir,
                                           not options.no_detect, options.json) else 2)
        except (InputError, OSError) as error:
            fail(error)
        except KeyboardInterrupt:
            sys.exit(130)
    keras.utils.set_random_seed(options.seed)
    keras.config.set_dtype_policy(options.precision)
    try:
        print(f"{processor_name()}, {options.precision}")
        if options.resume:  # the time before the interruption counts, too
            start -= sum(read_history(run_dir / HISTORY)["seconds"])
        with tempfile.TemporaryDirectory() as drawings:
            data_dir = Path(options.data_dir or "data")
            if options.demo:
                print("Demo: drawing faces")
                data_dir = draw_faces(drawings, options.seed)
            elif options.data_dir is None and not data_dir.exists():
                data_dir = download_faces()
            training, validation, test = load_data(data_dir, options.batch_size, options.seed)
        model = create_CNN()
        history = train_model(model, training, validation, options.epochs, options.learning_rate,
                              run_dir)
        figures = evaluate_model(model, *test)
        if options.demo:
            print("\nThe faces are drawn: this accuracy means nothing for real faces.")
        plot_performance(history, figures["confusion_matrix"], run_dir)
        labels = {"training": training.labels, "validation": validation[1], "test": test[1]}
        save_metrics(run_dir, options, data_dir, labels, history, figures, start)
        publish(run_dir, options.output_dir)
    except (InputError, OSError, KeyboardInterrupt) as error:
        stop(error, run_dir)
