"""Train a small convolutional network to recognise facial emotions in FER-2013.

    python emotion_recognition_cnn.py           FER-2013, from data/ or downloaded
    python emotion_recognition_cnn.py --demo    drawn faces, nothing to download
    python emotion_recognition_cnn.py --predict PHOTO    the network in output/, or the included one

The network is two convolution blocks, flatten, two dense layers.  Its best epoch is chosen on the
PublicTest images and evaluated once on the PrivateTest images.  On two processor cores (mean of
three seeds, docs/runs):

    44 epochs, the default    70.2 % of them are classified correctly, after 61 minutes
    88 epochs                 71.1 %, after 50 minutes on a faster processor
    120 epochs                71.5 %, after 46 minutes on a processor with bfloat16

Plots, scores and the network are left in output/.

FER-2013: Goodfellow et al. (2013), "Challenges in representation learning", arXiv:1307.0414.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import itertools
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


def one_line(text):
    """Return a text with a space in place of each line break."""
    return " ".join(text.splitlines())


def complain(problem):
    """Print a problem as one line on stderr."""
    print(one_line(problem), file=sys.stderr)


def open_closed_streams():
    """Open stdout and stderr where they are closed: services start programs so.

    What is printed then goes nowhere.  Otherwise the next file that is opened would get descriptor
    1 or 2, and what is printed would land in it.
    """
    for name, descriptor in ("stdout", 1), ("stderr", 2):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, open(descriptor, "w"))


def drop_missing_backend():
    """Forget the backend that MPLBACKEND names where it is not installed.

    Jupyter sets MPLBACKEND for all programs that it starts, and importing Matplotlib would fail.
    """
    kind, _, module = os.environ.get("MPLBACKEND", "").partition("://")
    if kind == "module" and not importlib.util.find_spec(module.partition(".")[0]):
        del os.environ["MPLBACKEND"]


@contextlib.contextmanager
def hidden_log():
    """Hold back what the block writes to stderr.

    It is printed only if the block raises an exception, other than Ctrl-C and ValueError, or the
    whole process crashes.  A helper process holds it, so that it survives a crash; a mark at the
    end tells the helper to drop it.
    """
    printer = ("import sys; log = sys.stdin.buffer.read()\n"
               "if not log.endswith(b'all went well'): sys.stderr.buffer.write(log)")
    helper = subprocess.Popen([sys.executable, "-c", printer], stdin=subprocess.PIPE,
                              start_new_session=True)  # Ctrl-C does not end it
    stderr = os.dup(2)
    os.dup2(helper.stdin.fileno(), 2)
    try:
        yield
        os.write(2, b"all went well")
    except (KeyboardInterrupt, ValueError):
        os.write(2, b"all went well")
        raise
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        helper.stdin.close()
        helper.wait()


open_closed_streams()
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # without AVX-512, TensorFlow leaves it off
drop_missing_backend()
try:
    # TensorFlow logs some lines before it reads TF_CPP_MIN_LOG_LEVEL, Matplotlib one when it builds
    # its cache of fonts.
    with hidden_log():
        import keras
        import matplotlib.style
        import numpy as np
        import tensorflow as tf
        from filelock import FileLock, Timeout
        from keras import layers
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
        from PIL import Image, ImageDraw, ImageOps
        from tensorflow.keras.preprocessing.image import ImageDataGenerator
        Image.init()  # imports what Pillow has for each kind of file
except KeyboardInterrupt:  # the import takes seconds
    if __name__ != "__main__":
        raise
    complain("interrupted")
    sys.exit(130)  # as shells do
except ValueError as error:  # a value in keras.json, matplotlibrc or the environment is wrong
    if __name__ != "__main__":
        raise
    complain(f"error: Keras, Matplotlib or what they need cannot be imported ({error}): mend that, "
             "perhaps in keras.json, matplotlibrc or the environment")
    sys.exit(2)

tf.get_logger().setLevel("ERROR")  # it warns when several networks are traced, one after another
# What a user's own keras.json and environment may have changed.
keras.config.set_image_data_format("channels_last")
keras.config.set_floatx("float32")
keras.config.set_epsilon(1e-7)
keras.config.set_max_epochs(None)
keras.config.set_max_steps_per_epoch(None)

SIZE = 48  # pixels: height and width of the images of FER-2013
FER2013_EMOTIONS = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
# Endings of the files that Pillow can read: .jpg, .png, .webp and many more.  It knows videos and
# tables of numbers when it sees them, but cannot read these.
IMAGE_ENDINGS = {ending for ending, kind in Image.registered_extensions().items()
                 if kind in Image.OPEN and kind not in ("BUFR", "GRIB", "HDF5", "MPEG")}
# Applied to training images alone.  What --predict needs as well, such as rescaling, belongs in
# create_CNN, as a layer.
AUGMENTATION = {"horizontal_flip": True, "rotation_range": 10, "width_shift_range": 0.1,
                "height_shift_range": 0.1, "zoom_range": 0.1}

NETWORK = "emotion_recognition_cnn.keras"
CHECKPOINT = "checkpoint.npz"
LOCK = "emotion_recognition_cnn.lock"
RESULTS = ("accuracy.png", "confusion_matrix.png", NETWORK, "examples.png", "filters.png",
           "history.csv", "loss.png", "metrics.json")

# From the palette of Okabe and Ito: colour-blind readers can tell these apart.
BLUE, VERMILION, SKY_BLUE = "#0072B2", "#D55E00", "#56B4E9"
BARE = {"xticks": [], "yticks": [], "frame_on": False}  # axes that show an image, and no scale
# From invisible to four fifths opaque: what speaks for an emotion, over the face.
HEAT = LinearSegmentedColormap.from_list("heat", [VERMILION + "00", VERMILION + "D0"])
# Matplotlib's default style, whatever the user's own is, with these changes.
PLOT_STYLE = ["default", {"font.size": 15, "figure.dpi": 150, "savefig.dpi": 150,
                          "lines.linewidth": 2.5, "text.parse_math": False}]
# Pillow warns above this, and refuses above twice this: phones take photos of 200 megapixels.
Image.MAX_IMAGE_PIXELS = 125_000_000


class InputError(Exception):
    """Something that the user can mend; its one line names it and says what to do."""


# --- Settings -------------------------------------------------------------------------------------
def setting(default, meaning, **argument):
    """Return a field of Settings; `argument` are further arguments of argparse's add_argument."""
    return dataclasses.field(default=default, metadata={"help": meaning, **argument})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on.  Each field is also an option of the command line.

    `--resume` restores them, and metrics.json records them.  Settings.epochs, for example, is the
    default number of epochs.  Raises InputError if a value makes no sense.
    """

    data_dir: str = setting("", "folder that holds train/ and test/ (default: data, or a download)",
                            metavar="DIR")
    demo: bool = setting(False, "train on small drawn faces instead")
    epochs: int = setting(44, "passes over the training images (default: {default}; demo: 4)",
                          metavar="N")
    batch_size: int = setting(128, "images per step (default: {default})", metavar="N")
    learning_rate: float = setting(0.006, "learning rate of the first step; it falls from there "
                                   "(default: {default})", metavar="X")
    precision: str = setting("", "number format (default: what is fastest here)",
                             choices=("float32", "mixed_bfloat16", "mixed_float16"))
    seed: int = setting(0, "seed of all random numbers (default: {default})", metavar="N")

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
FER2013_PAGE = "https://www.kaggle.com/datasets/msambare/fer2013"
ARCHIVE_ENDINGS = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".rar", ".7z")
# What other copies of FER-2013 and other datasets call their parts, in lower case.
OTHER_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "privatetest", "publictest", "validation", "valid", "val"),
}


class LabelledImages(NamedTuple):
    """Images and what they show."""

    images: np.ndarray  # uint8, n x 48 x 48 x 1
    labels: np.ndarray  # int, n: indices into the emotions
    clean: np.ndarray  # bool, n: False where the same file is also in train/


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
            f"{FER2013_PAGE} by hand and unpack it into data/, name its folder with --data-dir, or "
            "try drawn faces with --demo") from error


def advice_on_renaming(names):
    """Say which of the entries of a folder, by their names, are to become its train/ and test/."""
    renamings = []
    for part, other_names in OTHER_NAMES.items():
        similar = [name for other in other_names for name in names if name.lower() == other]
        if similar and part not in names:
            renamings.append(f"{similar[0]}/ to {part}/")
    return f"rename {' and '.join(renamings)}" if renamings else ""


def visible_names(folder):
    """Return the sorted names in a folder, but for hidden ones and those of macOS, __MACOSX."""
    return sorted(name for name in os.listdir(folder) if not name.startswith((".", "__")))


def advice_on_files(data_dir, names):
    """Say what to do about an archive or a table among the entries of a folder."""
    archives = [name for name in names if name.lower().endswith(ARCHIVE_ENDINGS)]
    if archives:
        return f"{data_dir} holds {', '.join(archives)}: unpack that there"
    tables = [name for name in names if name.lower().endswith((".csv", ".parquet"))]
    if tables and "train" not in names:
        return f"{data_dir / tables[0]} is a table, not images: get those of {FER2013_PAGE}"
    return ""


def advice_on_contents(data_dir):
    """Say what to do by what a folder holds in place of train/ and test/."""
    deeper = sorted([*data_dir.glob("*/train"), *data_dir.glob("*/*/train")])
    if deeper:
        return f"the dataset lies deeper, in {deeper[0].parent}: name that with --data-dir"
    names = visible_names(data_dir)
    holds = ", ".join(names[:8]) or "nothing"
    return advice_on_files(data_dir, names) or advice_on_renaming(names) or (
        f"{data_dir} holds {holds}. Name the folder that holds train/ and test/, each with a "
        "folder per emotion, with --data-dir")


def advice_on_layout(data_dir):
    """Say what to do about a folder without train/ or test/."""
    general = "name the folder that holds train/ and test/, each with a folder per emotion"
    if data_dir.is_file():
        return f"{data_dir} is a file: unpack it if it is an archive, and {general}"
    if not data_dir.is_dir():
        return f"{general}, with --data-dir"
    above = data_dir.resolve().parent
    if (above / "train").is_dir():
        return f"name the folder above, {above}, with --data-dir"
    return advice_on_contents(data_dir)


def find_emotions(data_dir):
    """Return the emotions of a dataset: the sorted names of the folders of its train/.

    Raises InputError where there are fewer than two, or test/ has others.
    """
    found = {}
    for part in "train", "test":
        folder = data_dir / part
        if not folder.is_dir():
            raise InputError(f"{folder} is missing: {advice_on_layout(data_dir)}")
        found[part] = {name for name in visible_names(folder) if Path(folder, name).is_dir()}
    different = sorted(found["train"] ^ found["test"])
    if different:
        part = "test" if different[0] in found["train"] else "train"
        raise InputError(f"{data_dir / part / different[0]} is missing: train/ and test/ must hold "
                         "the same folders, one per emotion")
    if len(found["train"]) < 2:
        raise InputError(f"{data_dir / 'train'} must hold a folder for each of at least two "
                         "emotions; name another folder with --data-dir")
    for name in found["train"]:
        if not name.isprintable():  # nor can it be drawn
            raise InputError(f"{data_dir / 'train'}: the name {name!r} is not UTF-8, or holds a "
                             "control character: rename that folder, in test/ too")
    return sorted(found["train"])


def find_images(folder):
    """Return the images in a folder, however deep, and all other files: two lists of sorted paths.

    Images are told by their endings.  What is hidden is passed over.  Links are followed, and each
    folder is read once.  A folder that cannot be read is returned as if it were an image:
    `open_image` then says why.
    """
    images, others, seen = [], [], set()
    for place, folders, names in os.walk(folder, followlinks=True,
                                         onerror=lambda error: images.append(Path(error.filename))):
        if os.path.realpath(place) in seen:
            folders.clear()  # a link leads back to it
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in [Path(place, name) for name in names if not name.startswith(".")]:
            if path.suffix.lower() in IMAGE_ENDINGS:
                images.append(path)
            else:
                others.append(path)
    return sorted(images), sorted(others)


def tell_passed_over(paths, reason):
    """Print a line on stderr: files that are passed over, and why."""
    if not paths:
        return
    names = ", ".join(map(str, paths[:10]))
    if len(paths) > 10:
        names += f" and {len(paths) - 10} more"
    complain(f"passed over, {reason}: {names}")


def upright(image):
    """Turn an image (PIL) as its Exif orientation says; as it lies where that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises many kinds on malformed Exif
        return image


def in_8_bits(image):
    """Return an image (PIL) in grey or RGB, 8 bits each; what is transparent, on white paper."""
    if image.mode.startswith("I"):  # grey with 16 or 32 bits, which Pillow would cut off at 255
        image = image.convert("I")
        if image.getextrema()[1] > 255:
            image = image.point(lambda value: value / 256)
        return image.convert("L")
    if image.mode == "F" and image.getextrema()[1] <= 1:  # grey from 0 to 1
        return image.point(lambda value: value * 255).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white_paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white_paper, image)
    return image if image.mode == "L" else image.convert("RGB")


def open_image(path):
    """Open an image as a person sees it: upright, 8 bits, grey or RGB; InputError if it cannot."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(path)
            image.load()
            return in_8_bits(upright(image))
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large: reduce it to at most 250 megapixels") from error
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} holds no images that Pillow opens, such as .jpg or .png"
                         ) from error
    except Exception as error:  # Pillow raises many kinds on a broken file, in each of these calls
        if isinstance(error, OSError) and error.errno is not None:  # of the operating system
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        raise InputError(f"{path} is empty, damaged or no image that Pillow opens "
                         f"({type(error).__name__})") from error


def face_pixels(face):
    """Return the picture of a face (PIL image) as the network sees it: 48x48, grey, uint8."""
    return np.asarray(face.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def read_images(folder, emotions):
    """Read every image in the emotion folders of `folder`, however deep it lies there.

    Returns paths, images (uint8, n x 48 x 48 x 1) and labels (int, n: indices into the emotions).
    Raises InputError where an emotion has no images or an image cannot be read.
    """
    paths, labels = [], []
    passed_over = [folder / name for name in visible_names(folder) if (folder / name).is_file()]
    for label, emotion in enumerate(emotions):
        found, others = find_images(folder / emotion)
        passed_over += others
        if not found:
            raise InputError(f"{folder / emotion} holds no images that Pillow opens, such as .jpg "
                             "or .png")
        paths += found
        labels += [label] * len(found)
    tell_passed_over(passed_over, "no images by their endings, or in no emotion's folder")
    show_bar = sys.stdout.isatty()
    progress = keras.utils.Progbar(len(paths), unit_name="image", verbose=int(show_bar))
    images = []
    for path in paths:
        try:
            images.append(face_pixels(open_image(path)))
        except InputError as error:
            raise InputError(f"{error}; replace it, or take it out of the dataset") from error
        progress.add(1)
    return paths, np.stack(images)[..., np.newaxis], np.array(labels)


def hold_out_tenth(labels, seed):
    """Choose a tenth of the images of each emotion at random.

    Takes labels (int, n) and returns a mask (bool, n) of the images held out.
    """
    held_out = np.zeros(len(labels), bool)
    rng = np.random.default_rng(seed)
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        tenth = math.ceil(len(indices) / 10)
        held_out[indices[1:1 + tenth]] = True  # never the first: an emotion may have only one
    return held_out


def file_digest(path):
    """Return the SHA-256 of a file: equal digests mean equal files."""
    return hashlib.sha256(path.read_bytes()).digest()


class AugmentedBatches(keras.utils.PyDataset):
    """Batches of training images in a new order in every epoch, augmented by ImageDataGenerator.

    A batch is images (float32, n x 48 x 48 x 1, pixels 0-255) and labels (int, n).  Keras's own
    iterators draw random numbers in their worker threads, so that their batches differ from run to
    run.  Here all of them are drawn when an epoch starts.
    """

    def __init__(self, images, labels, batch_size, seed):
        # With one worker, Keras feeds batches through tf.data: some epochs stalled for a minute.
        super().__init__(workers=2)
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.generator = ImageDataGenerator(**AUGMENTATION)
        self.start_epoch(0)  # Keras looks at a batch before the first epoch

    def start_epoch(self, epoch):
        """Draw the order of the images and the transform of each for an epoch, counted from 0."""
        state = np.random.get_state()  # get_random_transform draws NumPy's global random numbers
        np.random.seed([self.seed, epoch])
        self.order = np.random.permutation(len(self.images))
        self.transforms = [self.generator.get_random_transform((SIZE, SIZE, 1))
                           for _ in range(len(self.images))]
        np.random.set_state(state)

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size:(index + 1) * self.batch_size]
        batch = []
        for i in chosen:
            # The image is uint8: floats would take longer.
            image = self.generator.apply_transform(self.images[i], self.transforms[i])
            batch.append(self.generator.standardize(image.astype("float32")))
        return np.stack(batch), self.labels[chosen]


class Data(NamedTuple):
    """A dataset: batches to train on, and arrays of images to validate and test with."""

    emotions: list  # names, sorted; labels are indices into them
    training: AugmentedBatches
    validation: LabelledImages
    test: LabelledImages


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
    if emotions != FER2013_EMOTIONS:
        print(f"{len(emotions)} emotions: {', '.join(emotions)}")
    train_paths, train_images, train_labels = read_images(data_dir / "train", emotions)
    test_paths, test_images, test_labels = read_images(data_dir / "test", emotions)
    train_files = {file_digest(path) for path in train_paths}
    clean = np.array([file_digest(path) not in train_files for path in test_paths])
    public = np.array([path.name.startswith("PublicTest_") for path in test_paths])
    private = np.array([path.name.startswith("PrivateTest_") for path in test_paths])
    if public.any() and private.any() and (public | private).all():
        validation = LabelledImages(test_images[public], test_labels[public], clean[public])
        test = LabelledImages(test_images[private], test_labels[private], clean[private])
    else:
        print("test/ does not tell PublicTest from PrivateTest images by name: a tenth of train/ "
              "is held out for validation, all of test/ is the test set")
        held_out = hold_out_tenth(train_labels, seed)
        if not held_out.any():
            raise InputError(f"{data_dir / 'train'} holds too few images to hold some out: it "
                             "takes two of an emotion")
        validation = LabelledImages(train_images[held_out], train_labels[held_out],
                                    clean=np.ones(held_out.sum(), bool))
        train_images, train_labels = train_images[~held_out], train_labels[~held_out]
        test = LabelledImages(test_images, test_labels, clean)
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
        # Pooling comes before normalisation and ReLU, which leaves them a ninth of the work.
        layers.Conv2D(32, 5, padding="same", use_bias=False),
        layers.MaxPooling2D(4, strides=3, padding="same"),  # 48 x 48 to 16 x 16
        layers.LayerNormalization(),  # across the filters at each place: local contrast drops out
        layers.ReLU(),
        layers.Conv2D(384, 3, use_bias=False),
        layers.MaxPooling2D(7, strides=3, padding="same"),  # 14 x 14 to 5 x 5
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
    """Return the weight of an image of each emotion in the loss: {label: weight}.

    Rare emotions weigh more: the weight is the cube root of the mean number of images of an emotion
    by its own (scikit-learn's "balanced" takes the ratio itself), scaled to a mean of 1 per image.
    """
    counts = np.bincount(labels)
    weights = np.cbrt(counts.mean() / counts)
    weights /= np.average(weights, weights=counts)
    return dict(enumerate(weights))


@contextlib.contextmanager
def delayed_interrupt():
    """Yield an Event that Ctrl-C sets; a second Ctrl-C raises KeyboardInterrupt at once.

    A KeyboardInterrupt that is raised within TensorFlow may come out as another error.
    """
    pressed = threading.Event()

    def on_ctrl_c(number, frame):
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    if threading.current_thread() is not threading.main_thread():
        yield pressed  # Python lets only the main thread handle signals
        return
    previous_handler = signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def checksum(*arrays):
    """Return the SHA-256 of arrays, in hexadecimal digits: equal checksums mean equal arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def save_checkpoint(path, run, history, variables, best_weights):
    """Write a checkpoint: whole, or not at all.

    `run` (what the run depends on) and `history` are dicts for JSON, the others lists of arrays.
    The checkpoint before it stays until the new one is on the disk: the process may be killed and
    the plug pulled at any time.
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

    `run` says what the run depends on (a dict for JSON).  `checkpoint` is the file in which all is
    kept (a path, or None).  `pressed` is the Event of `delayed_interrupt`.  `history` becomes a
    dict of lists with a value per epoch, `best_weights` the weights of the epoch with the highest
    validation accuracy.
    """

    def __init__(self, run, training, checkpoint, pressed):
        super().__init__()
        self.run = run
        self.training = training
        self.checkpoint = checkpoint
        self.pressed = pressed
        self.history = {}
        self.best_weights = None
        self.epoch_started = None
        self.epoch_learning_rate = None

    def finished_epochs(self):
        """Return the number of epochs in the history."""
        return len(self.history.get("epoch", []))

    def restore(self, model):
        """Put model, optimizer and history where the checkpoint left them."""
        run, history, stored_variables, best_weights = load_checkpoint(self.checkpoint)
        model.optimizer.build(model.trainable_variables)
        variables = model.variables + model.optimizer.variables
        changed = [name for name in self.run if run.get(name) != self.run[name]]
        if [stored.shape for stored in stored_variables] != [own.shape for own in variables]:
            changed.append("layers")
        if changed:
            raise InputError(f"{self.checkpoint} does not fit: the {' and '.join(changed)} changed "
                             f"since. Bring that back as it was, or delete {self.checkpoint} and "
                             "start anew")
        for variable, stored in zip(variables, stored_variables):
            variable.assign(stored)
        self.history = history
        self.best_weights = best_weights

    def on_epoch_begin(self, epoch, logs=None):
        self.training.start_epoch(epoch)
        self.epoch_learning_rate = float(self.model.optimizer.learning_rate)
        self.epoch_started = time.perf_counter()
        if self.history:
            seconds = np.mean(self.history["seconds"]) * (self.run["epochs"] - epoch)
            print(f"about {math.ceil(seconds / 60)} min left", flush=True)

    def on_train_batch_end(self, batch, logs=None):
        self.interrupt_if_pressed()

    def on_epoch_end(self, epoch, logs=None):
        self.require_finite(logs["loss"])
        best_so_far = max(self.history.get("val_accuracy", []), default=-1)
        if logs["val_accuracy"] > best_so_far:
            self.best_weights = self.model.get_weights()
        row = {"epoch": epoch + 1, **logs, "learning_rate": self.epoch_learning_rate,
               "seconds": round(time.perf_counter() - self.epoch_started, 2)}
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        if self.checkpoint is not None:
            self.save()
        self.interrupt_if_pressed()  # while the epoch was validated

    def require_finite(self, loss):
        """Raise InputError if the loss is not finite, where TerminateOnNaN has ended the epoch."""
        if math.isfinite(loss):
            return
        advice = "start anew"
        if self.checkpoint is not None and self.checkpoint.exists():
            advice = f"delete {self.checkpoint} and start anew"
        raise InputError(f"the loss is NaN or infinite: {advice} with a --learning-rate below "
                         f"{self.run['learning rate']}")

    def save(self):
        """Write the checkpoint, and beside it the plots of the epochs that it holds."""
        variables = self.model.variables + self.model.optimizer.variables
        save_checkpoint(self.checkpoint, self.run, self.history, variables, self.best_weights)
        with contextlib.suppress(OSError):  # a plot is no reason to end the run
            plot_history(self.history, self.checkpoint.parent)

    def interrupt_if_pressed(self):
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.pressed.is_set():
            raise KeyboardInterrupt


def make_portable(model):
    """Let a trained network compute in float32, as any machine can, and its file be small."""
    for layer in model.layers:
        layer.dtype_policy = "float32"
    # SGD has no state: with that of AdamW, the file would be three times as large.
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])


def train_model(model, training, validation, epochs=Settings.epochs,
                learning_rate=Settings.learning_rate, checkpoint=None, keep_checkpoint=False,
                notes=None):
    """Train `model` with AdamW; the learning rate falls along a cosine over all epochs.

    Takes the training and validation data of `load_data`.  With `checkpoint`, a path, that file
    holds after each epoch all that it takes to go on, and the plots beside it show the epochs so
    far; if the file exists, training goes on from there, exactly.  It is deleted when training is
    done, unless `keep_checkpoint` is True.  `notes` (a dict for JSON) are kept in it.

    Leaves `model` with the weights of the epoch with the highest validation accuracy, in float32,
    compiled for evaluation.  Returns the history, a dict of lists with a value per epoch.  Raises
    InputError if the loss is not finite, or the checkpoint is damaged or of another run, and
    KeyboardInterrupt on Ctrl-C.
    AdamW: Loshchilov and Hutter (2019), arXiv:1711.05101; cosine decay: arXiv:1608.03983.
    """
    checkpoint = None if checkpoint is None else Path(checkpoint)
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * len(training))
    model.compile(keras.optimizers.AdamW(schedule), "sparse_categorical_crossentropy",
                  metrics=["accuracy"])
    images = checksum(training.images, training.labels, validation.images, validation.labels)
    run = {"epochs": int(epochs), "learning rate": float(learning_rate), "images": images,
           "batch size": training.batch_size, "seed": training.seed, "augmentation": AUGMENTATION,
           **(notes or {})}
    with delayed_interrupt() as pressed:
        keeper = EpochKeeper(run, training, checkpoint, pressed)
        if checkpoint is not None and checkpoint.exists():
            keeper.restore(model)
        model.fit(
            training, validation_data=(validation.images, validation.labels),
            class_weight=class_weights(training.labels),
            initial_epoch=keeper.finished_epochs(), epochs=epochs,
            shuffle=False,  # AugmentedBatches shuffles the images itself
            verbose=1 if sys.stdout.isatty() else 2,
            callbacks=[keras.callbacks.TerminateOnNaN(), keeper])
    model.set_weights(keeper.best_weights)
    make_portable(model)
    if checkpoint is not None and not keep_checkpoint:
        checkpoint.unlink()
    return keeper.history


# --- Evaluation -----------------------------------------------------------------------------------
def views_of(images):
    """Return 18 views of images (n x 48 x 48 x 1, float32): a list of tensors of that shape.

    Three sizes, each at three heights, and all of them mirrored.
    """
    repeated_edge = np.arange(-4, SIZE + 4).clip(0, SIZE - 1)  # the outermost four times more
    wide = keras.ops.take(images, repeated_edge, axis=1)
    wide = keras.ops.take(wide, repeated_edge, axis=2)  # 56 x 56
    views = []
    for size in (44, 48, 52):  # of the part that is seen: the face looks larger, as it is, smaller
        margin = (56 - size) // 2
        for shift in (-2, 0, 2):  # the face looks lower, as it is, higher
            top = margin + shift
            view = wide[:, top:top + size, margin:margin + size]
            views.append(keras.ops.image.resize(view, (SIZE, SIZE)))
    mirrored = [view[:, :, ::-1] for view in views]
    return views + mirrored


@tf.function(reduce_retracing=True)  # compiled once, it takes half the time for a single face
def average_views(model, images):
    """Return the probabilities (n x classes) of images: the mean over their views."""
    views = views_of(images)
    probabilities = model(keras.ops.concatenate(views))
    return keras.ops.mean(keras.ops.split(probabilities, len(views)), axis=0)


def classify_faces(model, images):
    """Return the probabilities (n x classes) of any number of images (n x 48 x 48 x 1).

    They are the mean over 18 views; 32 images at a time save memory.
    """
    probabilities = []
    for first in range(0, len(images), 32):
        batch = images[first:first + 32].astype("float32")
        probabilities.append(np.asarray(average_views(model, batch)))
    return np.concatenate(probabilities)


def calibration_error(confidence, correct):
    """Return the expected calibration error, in 15 bins of equal width.

    It tells how far confidence and accuracy lie apart on average.  Takes the confidence (0 to 1) of
    n predictions and whether they are correct (bool).
    Guo et al. (2017), "On calibration of modern neural networks", arXiv:1706.04599.
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
    """Evaluate `model` on the test images and print the scores.

    Takes the test data and the emotions of `load_data`.  Returns the probabilities (n x classes),
    averaged over 18 views of each image, and before them the scores, a dict:

    - single_image_accuracy: with one view, the image as it is; all others are with 18
    - loss: cross-entropy, in nats
    - accuracy, balanced_accuracy: the share of images, and the mean of the emotions' recall
    - clean_accuracy, clean_images: of images that are not also in train/; None if there are none
    - calibration_error: see `calibration_error`
    - emotions: precision, recall, F1 and number of images (count) of each
    - confusion_matrix: rows are labels, columns predictions
    - milliseconds_per_face: the time that the probabilities took
    """
    single_view = model.predict(test.images, batch_size=256, verbose=0)
    started = time.perf_counter()
    probabilities = classify_faces(model, test.images)
    seconds = time.perf_counter() - started
    predictions = probabilities.argmax(axis=1)
    correct = predictions == test.labels
    confusion = np.zeros((len(emotions), len(emotions)), int)
    np.add.at(confusion, (test.labels, predictions), 1)
    by_emotion = scores_by_emotion(confusion, emotions)
    recalls = [score["recall"] for score in by_emotion.values() if score["count"]]
    losses = keras.losses.sparse_categorical_crossentropy(test.labels, probabilities)
    scores = {
        "single_image_accuracy": (single_view.argmax(axis=1) == test.labels).mean(),
        "loss": float(np.mean(losses)),
        "accuracy": correct.mean(),
        "balanced_accuracy": np.mean(recalls),
        "clean_accuracy": correct[test.clean].mean() if test.clean.any() else None,
        "clean_images": int(test.clean.sum()),
        "calibration_error": calibration_error(probabilities.max(axis=1), correct),
        "emotions": by_emotion,
        "confusion_matrix": confusion.tolist(),
        "milliseconds_per_face": 1000 * seconds / len(test.images),
    }
    print_scores(scores)
    return scores, probabilities


def print_scores(scores):
    """Print the scores of `evaluate_model`."""
    images = sum(score["count"] for score in scores["emotions"].values())
    print(f"\nTest, {images:,} images, {scores['clean_images']:,} of them clean: not in train/")
    print("All but the single image accuracy: averaged over 18 views, "
          f"{scores['milliseconds_per_face']:.1f} ms an image")
    for name in ("single_image_accuracy", "accuracy", "balanced_accuracy", "clean_accuracy",
                 "calibration_error"):
        if scores[name] is not None:
            print(f"  {name.replace('_', ' '):23}{scores[name]:.2%}")
    print(f"  {'loss':23}{scores['loss']:.4f}")
    width = max(9, *map(len, scores["emotions"]))
    print(f"\n  {'emotion':{width}}  precision   recall       F1   images")
    for emotion, score in scores["emotions"].items():
        print(f"  {emotion:{width}}{score['precision']:11.1%}{score['recall']:9.1%}"
              f"{score['f1']:9.1%}{score['count']:9,}")


# --- Plots ----------------------------------------------------------------------------------------
@matplotlib.style.context(PLOT_STYLE)
def plot_history(history, output_dir):
    """Write accuracy.png and loss.png: training and validation over the epochs."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)  # where it was moved or deleted meanwhile
    epochs = history["epoch"]
    best = int(np.argmax(history["val_accuracy"]))
    for name in "accuracy", "loss":
        training, validation = history[name], history["val_" + name]
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(epochs, training, "o-", color=BLUE, label="training (augmented)")
        axes.plot(epochs, validation, "s--", color=VERMILION, label="validation")
        axes.plot(epochs[best], validation[best], "k*", markersize=18,
                  label=f"best epoch: {epochs[best]} ({validation[best]:.3f})")
        axes.set(title=f"Training and validation {name}", xlabel="epoch")
        axes.set_ylabel("loss (cross-entropy)" if name == "loss" else name)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(output_dir / f"{name}.png")


def short_names(emotions):
    """Return the names of emotions as pictures have room for: 14 letters at most."""
    return [name if len(name) <= 14 else name[:13] + "…" for name in emotions]


def draw_shares(axes, shares, rows, columns):
    """Draw shares (rows x columns, from 0 to 1) as a table with named rows and columns."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0%}", ha="center", va="center",
                  color="white" if share > 0.6 else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)


@matplotlib.style.context(PLOT_STYLE)
def plot_performance(history, scores, output_dir):
    """Plot how training went and what came of it.

    Takes the history of `train_model` and the scores of `evaluate_model`.  Writes accuracy.png and
    loss.png (training and validation over the epochs) and confusion_matrix.png into `output_dir`.
    """
    plot_history(history, output_dir)
    emotions = short_names(scores["emotions"])
    confusion = np.array(scores["confusion_matrix"])
    labelled = confusion.sum(axis=1, keepdims=True)
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    axes = figure.subplots()
    draw_shares(axes, confusion / np.maximum(labelled, 1), emotions, emotions)
    axes.set(title="Test images", xlabel="predicted", ylabel="labelled")
    figure.savefig(Path(output_dir, "confusion_matrix.png"))


@matplotlib.style.context(PLOT_STYLE)
def plot_examples(test, probabilities, emotions, output_dir):
    """Write examples.png: of each emotion (rows: labels) the test images classified most surely."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    surest_first = np.argsort(-confidence, kind="stable")
    names = short_names(emotions)
    figure = Figure(figsize=(8, 1.5 * len(emotions)), layout="constrained")
    left_half, right_half = figure.subfigures(1, 2)
    left_half.suptitle("Surest and right", color=BLUE)
    right_half.suptitle("Surest and wrong: taken for", color=VERMILION)
    for half, correct in (left_half, True), (right_half, False):
        grid = half.subplots(len(emotions), 3, subplot_kw=BARE)
        for label, axes_of_row in enumerate(grid):
            shown = [i for i in surest_first
                     if test.labels[i] == label and (predicted[i] == label) == correct]
            for axes, i in zip(axes_of_row, shown):  # as many as there are axes for
                axes.imshow(test.images[i], cmap="gray", vmin=0, vmax=255)
                axes.set_title(f"{names[predicted[i]]} {confidence[i]:.0%}", size=10)
            if correct:
                axes_of_row[0].set_ylabel(names[label])
    figure.savefig(Path(output_dir, "examples.png"))


def kind_of_filter(weights):
    """Return the kind of a filter (5 x 5) and its direction in degrees.

    The kind is the first of these that fits; each fits one in fifty filters of random numbers:

    - "gradient": a tilted plane makes up more than 28 % of the sum of squares
    - "edge", or line: it changes along one direction, whichever; the coherence of its structure
      tensor, Bigun and Granlund (1987), is above 0.67
    - "spot": rings around the middle make up more than 52 % of the sum of squares
    - "mixed": none of these
    """
    y, x = np.mgrid[-2:3, -2:3]
    sum_of_squares = (weights**2).sum()
    slope_x, slope_y = (weights * x).sum(), (weights * y).sum()
    if (slope_x**2 + slope_y**2) / (x**2).sum() > 0.28 * sum_of_squares:
        return "gradient", np.degrees(np.arctan2(slope_y, slope_x))
    right, down = np.diff(weights, axis=1), np.diff(weights, axis=0)
    right = right[:-1] + right[1:]  # both now in the middle of four weights
    down = down[:, :-1] + down[:, 1:]
    # Of twice the angle of each change, so that opposite directions count as one.
    cosine, sine = (right**2 - down**2).sum(), (2 * right * down).sum()
    if np.hypot(cosine, sine) > 0.67 * (right**2 + down**2).sum():
        return "edge", np.degrees(np.arctan2(sine, cosine)) / 2
    distance = x**2 + y**2
    rings = [weights[distance == value] for value in np.unique(distance)]
    if sum(ring.sum()**2 / len(ring) for ring in rings) > 0.52 * sum_of_squares:
        return "spot", 0.0
    return "mixed", 0.0


def draw_row(axes, images, titles, columns, **options):
    """Draw square images side by side in `columns` columns, each below its title.

    All in one axes: many axes are slow to draw.  Returns each image's left edge.  `options` are
    further arguments of imshow.
    """
    width = len(images[0])
    lefts = [1.15 * width * i for i in range(columns)]
    for image, title, left in zip(images, titles, lefts):
        axes.imshow(image, extent=(left, left + width, width, 0), **options)
        axes.text(left + width / 2, 0, title, size=10, ha="center", va="bottom")
    axes.set(xlim=(0, lefts[-1] + width), ylim=(width, 0))
    return lefts


def draw_first_filters(figure, kernels):
    """Draw the filters of the first convolution (n x 5 x 5) by kind, and then by direction."""
    kinds = [kind_of_filter(kernel) for kernel in kernels]
    order = ("edge", "gradient", "spot", "mixed")
    in_order = sorted(range(len(kernels)), key=lambda i: (order.index(kinds[i][0]), kinds[i][1]))
    columns = 11
    rows = figure.subplots(math.ceil(len(kernels) / columns), subplot_kw=BARE)
    for row, axes in enumerate(rows):
        shown = in_order[row * columns:(row + 1) * columns]
        images = [kernels[i] / np.abs(kernels[i]).max() for i in shown]
        titles = [kinds[i][0] for i in shown]
        draw_row(axes, images, titles, columns, cmap="RdBu_r", vmin=-1, vmax=1)
    scale = figure.colorbar(axes.images[0], ax=rows, shrink=0.8, ticks=(-1, 0, 1))
    scale.set_label("weight, as part\nof the largest", size=11)
    figure.suptitle("Filters of the first convolution", size=13)


def convolutions(model):
    """Return the first and the second convolution of the network of `create_CNN`."""
    return [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]


def strongest_places(model, images):
    """Return the highest activation of each filter of the second convolution in each image.

    Takes images (n x 48 x 48 x 1).  Returns two arrays (n x filters): the maximum over all places,
    before pooling, and its place: row * 14 + column.
    """
    _, second = convolutions(model)
    convolution = keras.Model(model.inputs, second.output)
    maxima, places = [], []
    for first in range(0, len(images), 128):
        maps = convolution.predict_on_batch(images[first:first + 128])  # n x 14 x 14 x filters
        maps = maps.reshape(len(maps), -1, maps.shape[-1])
        maxima.append(maps.max(axis=1))
        places.append(maps.argmax(axis=1))
    return np.concatenate(maxima), np.concatenate(places)


def draw_second_filters(figure, model, test, emotions):
    """Draw a row for each emotion: a filter of the second convolution, and what excites it most.

    It is the filter that best tells the emotion's images from the others.  Framed are the 14 x 14
    pixels that it sees.  The row of an emotion without an image is left out.
    """
    maxima, places = strongest_places(model, test.images)
    present = np.unique(test.labels)
    names = short_names(emotions)
    rows = figure.subplots(len(present), subplot_kw=BARE, squeeze=False)[:, 0]
    for axes, label in zip(rows, present):
        # The mean over the emotion's images less that over all, in standard deviations.
        lead = maxima[test.labels == label].mean(axis=0) - maxima.mean(axis=0)
        best = np.argmax(lead / (maxima.std(axis=0) + 1e-7))
        axes.set_ylabel(f"{names[label]}\nfilter {best}", size=11)
        strongest = np.argsort(-maxima[:, best], kind="stable")[:7]
        titles = [names[test.labels[i]] for i in strongest]
        lefts = draw_row(axes, test.images[strongest], titles, 7, cmap="gray", vmin=0, vmax=255)
        for i, left in zip(strongest, lefts):
            row, column = divmod(places[i, best], 14)
            # Row r sees the pooled rows r to r + 2.  They see 3 r to 3 r + 9 of the first
            # convolution, which sees two pixels more on each side; columns likewise.
            x, y = max(3 * column - 2, 0), max(3 * row - 2, 0)
            width, height = min(3 * column + 12, SIZE) - x, min(3 * row + 12, SIZE) - y
            axes.add_patch(Rectangle((left + x, y), width, height, fill=False, color=SKY_BLUE,
                                     linewidth=2, clip_on=False))
    figure.suptitle("What excites filters of the second convolution most: for each emotion, the\n"
                    "filter that best tells it apart; above each image, its own label", size=13)


@matplotlib.style.context(PLOT_STYLE)
def plot_filters(model, test, emotions, output_dir):
    """Write filters.png: what the network of `create_CNN` has learned to look for.

    Takes the test data and the emotions of `load_data`.
    """
    first, _ = convolutions(model)
    kernels = np.asarray(first.kernel)[:, :, 0].transpose(2, 0, 1)
    height_below = 0.6 + 1.45 * len(np.unique(test.labels))  # inches
    figure = Figure(figsize=(10, 3.6 + height_below), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=(3.6, height_below))
    draw_first_filters(above, kernels)
    draw_second_filters(below, model, test, emotions)
    figure.savefig(Path(output_dir, "filters.png"))


# --- Prediction -----------------------------------------------------------------------------------
class Face(NamedTuple):
    """A face in a photo, and what it was taken for."""

    box: tuple  # left, top, right, bottom; in pixels, may reach beyond the photo
    emotion: str
    confidence: float  # the probability of that emotion
    probabilities: dict  # by emotion


def save_network(model, emotions, path):
    """Save a network, and in the same file the names of its emotions."""
    model.save(path)
    with zipfile.ZipFile(path, "a") as file:  # Keras's own format, which passes over other members
        file.writestr("emotions.json", json.dumps(emotions))


def load_network(path):
    """Return the network and the emotions that `save_network` wrote; InputError if it is none."""
    way_on = "train a network, or name another folder with --output-dir"
    if not Path(path).exists():
        raise InputError(f"{path} is missing: {way_on}")
    emotions = []
    written_by = ""
    try:
        with zipfile.ZipFile(path) as file:
            version = json.loads(file.read("metadata.json"))["keras_version"]
            written_by = f", written by Keras {version}"
            if "emotions.json" in file.namelist():
                emotions = list(json.loads(file.read("emotions.json")))
        model = keras.models.load_model(path)
    except Exception as error:  # of zipfile, JSON, h5py or Keras
        reason = f"{type(error).__name__}: {error}".splitlines()[-1]  # Keras tells the cause last
        raise InputError(f"{path} is damaged or of another version of Keras than "
                         f"{keras.__version__}{written_by} ({reason}): {way_on}") from error
    if model.input_shape != (None, SIZE, SIZE, 1) or model.output_shape != (None, len(emotions)):
        raise InputError(f"{path} is no network of this script, or of an earlier version: {way_on}")
    return model, emotions


def find_network(output_dir):
    """Return the path of the network in `output_dir`, else of the one included in docs/runs."""
    network = Path(output_dir, NETWORK)
    if os.path.exists(network):
        return network
    included = Path(__file__).resolve().parent / "docs" / "runs" / "88-0" / NETWORK
    if not included.exists():
        raise InputError(f"{network} is missing, and so is the included {included}: train one, or "
                         "name another folder with --output-dir")
    complain(f"no network in {output_dir} yet: predicting with {included}")
    return included


def drawn_by_script(path):
    """Tell whether a picture is one of this script's, by its name and the files beside it."""
    if path.name in RESULTS:
        return any(os.path.exists(path.parent / name) for name in ("metrics.json", CHECKPOINT))
    return path.name.endswith(".emotions.jpg")


def find_photos(paths):
    """Return the photos named, and in place of a folder the photos in it, however deep.

    What lies in a folder and is not taken for a photo is named on stderr.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    photos = []
    for path in map(Path, paths):
        if not os.path.isdir(path):
            photos.append(path)
            continue
        images, others = find_images(path)
        own = [image for image in images if drawn_by_script(image)]
        tell_passed_over(own, "drawn by this script")
        tell_passed_over(others, "no photos by their endings")
        found = [image for image in images if image not in own]
        photos += found or [path]  # an empty folder stays: `open_image` says that it holds none
    return photos


def find_faces(photo, detector):
    """Find the faces in a photo (PIL image) and frame them as FER-2013 frames its faces.

    Returns boxes (left, top, right, bottom; pixels) from left to right, which may reach beyond
    the photo.  Returns the whole photo as the only box where it is the crop of a face already, or
    there is no detector.
    Detector: MTCNN, Zhang et al. (2016), arXiv:1604.02878.
    """
    whole_photo = (0, 0, *photo.size)
    longest_side = max(photo.size)
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
        x, y = left + width / 2, top + height / 2
        # FER-2013 shows about this square around MTCNN's box: see tests/measure/framing.py.
        reach = 1.25 * width / 2
        boxes.append((round(x - reach), round(y - reach), round(x + reach), round(y + reach)))
    # A small photo that one face fills is a crop of a face already.
    if len(boxes) == 1 and longest_side <= 400:
        left, _, right, _ = boxes[0]
        if right - left > longest_side * 2 / 3:
            return [whole_photo]
    return sorted(boxes)


def cut_out(photo, box):
    """Return the box of a photo; where it reaches beyond the photo, the edge is repeated."""
    left, top, right, bottom = box
    columns = np.arange(left, right).clip(0, photo.width - 1)
    rows = np.arange(top, bottom).clip(0, photo.height - 1)
    return Image.fromarray(np.asarray(photo)[np.ix_(rows, columns)])


class Photo(NamedTuple):
    """A photo, and the faces that were found in it."""

    path: Path
    size: tuple  # width, height; in pixels
    scene: Image.Image  # the photo, reduced to at most 1280 pixels
    boxes: list  # of the faces, as `find_faces` returns them
    crops: np.ndarray  # the faces as the network sees them: uint8, n x 48 x 48 x 1


def read_photo(path, detector):
    """Read a photo and find its faces; InputError if it cannot be read."""
    image = open_image(path)
    boxes = find_faces(image, detector)
    crops = np.zeros((len(boxes), SIZE, SIZE, 1), "uint8")
    for crop, box in zip(crops, boxes):
        crop[:, :, 0] = face_pixels(cut_out(image, box))
    scene = image.reduce(math.ceil(max(image.size) / 1280))
    return Photo(path, image.size, scene, boxes, crops)


def classify_photos(photos, model, emotions):
    """Return the faces of photos, from left to right: a list for each photo.

    All are classified together: the faces of four photos in one call take 13 ms each, one by one
    15 ms (tests/measure/photo_speed.py).
    """
    if not any(photo.boxes for photo in photos):
        return [[] for _ in photos]
    probabilities = classify_faces(model, np.concatenate([photo.crops for photo in photos]))
    ends = np.cumsum([len(photo.boxes) for photo in photos])
    faces_of_photos = []
    for photo, rows in zip(photos, np.split(probabilities, ends[:-1])):
        faces = []
        for box, row in zip(photo.boxes, rows):
            by_emotion = dict(zip(emotions, row.tolist()))
            surest = max(by_emotion, key=by_emotion.get)
            faces.append(Face(box, surest, by_emotion[surest], by_emotion))
        faces_of_photos.append(faces)
    return faces_of_photos


def occlusion_map(model, face, label):
    """Return how much the parts of a face speak for an emotion (48 x 48).

    Takes the face as the network sees it (uint8, 48 x 48 x 1) and the index of the emotion.  A
    square of the face's mean grey, 8 pixels wide, covers it in 11 x 11 places, 4 pixels apart.  The
    value of a pixel is by how much the emotion's probability falls, on average over the squares
    that cover the pixel.  It is the probability of one view, the face as it is.
    Zeiler and Fergus (2014), arXiv:1311.2901; tests/measure/heat_maps.py compares it with Grad-CAM.
    """
    face = face.astype("float32")
    corners = [(top, left) for top in range(0, SIZE - 7, 4) for left in range(0, SIZE - 7, 4)]
    covered = np.repeat(face[np.newaxis], len(corners), axis=0)
    for image, (top, left) in zip(covered, corners):
        image[top:top + 8, left:left + 8] = face.mean()
    probability = model.predict_on_batch(face[np.newaxis])[0, label]
    probabilities = model.predict_on_batch(covered)[:, label]
    falls, squares = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE))
    for fall, (top, left) in zip(probability - probabilities, corners):
        falls[top:top + 8, left:left + 8] += fall
        squares[top:top + 8, left:left + 8] += 1
    return falls / squares


def print_json(path, faces):
    """Print a JSON object for each face of a photo."""
    for number, face in enumerate(faces, 1):
        print(json.dumps({"file": str(path), "face": number, **face._asdict()}), flush=True)


def print_faces(heading, faces):
    """Print a line for each face of a photo."""
    for number, face in enumerate(faces, 1):
        shares = [f"{emotion} {share:.1%}" for emotion, share in face.probabilities.items()]
        print(f"{one_line(heading)}, face {number}: {face.emotion} {face.confidence:.1%}  "
              f"({', '.join(shares)})", flush=True)


def shorten_overlapping(labels, figure):
    """Cut the labels of neighbouring faces down to their numbers if any two overlap."""
    figure.draw_without_rendering()  # gives all in it their places
    places = [label.get_bbox_patch().get_window_extent() for label in labels]
    if any(one.overlaps(other) for one, other in itertools.combinations(places, 2)):
        for label in labels:
            label.set_text(label.get_text().split()[0])


def draw_scene(axes, photo, faces):
    """Draw a photo with the boxes of its faces, and return their labels (matplotlib)."""
    width, height = photo.size
    axes.imshow(photo.scene, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    axes.set_axis_off()
    axes.autoscale(False)
    labels = []
    names = short_names(face.emotion for face in faces)
    for number, (name, face) in enumerate(zip(names, faces), 1):
        if face.box == (0, 0, width, height):  # the photo is all face
            continue
        left, top, right, bottom = face.box
        axes.plot((left, right, right, left, left), (top, top, bottom, bottom, top), SKY_BLUE)
        labels.append(axes.text(max(left, 0), max(top, 0), f"{number} {name}", size=11,
                                va="bottom", backgroundcolor=SKY_BLUE))
    return labels


@matplotlib.style.context(PLOT_STYLE)
def draw_photo(photo, faces, heat_maps, path):
    """Write a picture of a photo, and below it a row for each of its faces.

    In a row are the face as the network sees it, the same with its heat map (48 x 48), and the
    probabilities.
    """
    width, height = photo.size
    photo_height = np.clip(8 * height / width, 3, 10)  # all lengths in inches
    row_height = np.clip(4 / len(faces), 0.85, 1.3)
    rows_height = row_height * len(faces) + 1.1  # with the emotions below
    figure = Figure(figsize=(10, photo_height + rows_height), layout="constrained")
    grid = figure.add_gridspec(1 + len(faces), 3, width_ratios=(row_height, row_height, 5.5),
                               height_ratios=[photo_height] + [row_height] * len(faces))
    labels = draw_scene(figure.add_subplot(grid[0, :]), photo, faces)
    for number, (face, crop, heat_map) in enumerate(zip(faces, photo.crops, heat_maps), 1):
        seen = figure.add_subplot(grid[number, 0], **BARE)
        marked = figure.add_subplot(grid[number, 1], **BARE)
        seen.set_ylabel(f"{number} {short_names([face.emotion])[0]}", rotation=0, ha="right",
                        va="center")
        for axes in seen, marked:
            axes.imshow(crop, cmap="gray", vmin=0, vmax=255)
        strongest = max(heat_map.max(), 0.01)  # a fall by less than a hundredth is none
        marked.imshow(heat_map, cmap=HEAT, vmin=0, vmax=strongest)
        if number == 1:
            seen.set_title("seen as", size=11)
            marked.set_title("speaks for it", size=11)
    table = figure.add_subplot(grid[1:, 2])
    shares = np.array([list(face.probabilities.values()) for face in faces])
    draw_shares(table, shares, [""] * len(faces), short_names(faces[0].probabilities))
    table.set_yticks([])
    shorten_overlapping(labels, figure)
    figure.savefig(path, dpi=100)
    return figure


def report_photo(photo, faces, heading, model, picture, as_json):
    """Print a row for each face, which starts with the heading, and draw `picture`; or print JSON.

    Prints one line on stderr where there is no face.
    """
    if not faces:
        complain(f"{photo.path}: no face found; --no-detect classifies it whole")
    elif as_json:
        print_json(photo.path, faces)
    else:
        print_faces(heading, faces)
        heat_maps = []
        for crop, face in zip(photo.crops, faces):
            label = list(face.probabilities).index(face.emotion)
            heat_maps.append(occlusion_map(model, crop, label))
        draw_photo(photo, faces, heat_maps, picture)


@contextlib.contextmanager
def report_problem(path, failed):
    """If something goes wrong with a photo, print a line and append its path to `failed`."""
    try:
        yield
    except BrokenPipeError:  # nobody reads the rows of the others either
        raise
    except InputError as error:
        complain(f"error: {error}")
        failed.append(path)
    except Exception as error:  # whatever it is
        complain(f"error: {path}: {type(error).__name__}: {error}")
        failed.append(path)


def stop_if_pressed(pressed, done, photos):
    """Raise KeyboardInterrupt if Ctrl-C was pressed; `done` of the photos are done."""
    if pressed.is_set():
        raise KeyboardInterrupt(f"interrupted; photos done: {done} of {photos}")


def make_folder_for_pictures(output_dir):
    """Make the folder predictions/ and return it; InputError if it cannot be made."""
    pictures = Path(output_dir, "predictions")
    try:
        pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{pictures} cannot be made ({error.strerror}): name another --output-dir"
                         ) from error
    return pictures


def predict_emotions(paths, output_dir="output", detect=True, as_json=False):
    """Classify the faces in photos, and in folders of photos, with the network in `output_dir`.

    Where there is none, with the one included in docs/runs.  Prints a row per face and draws a
    picture per photo into predictions/ there, or only prints a JSON object per face.  A photo
    without a face, and one that something is wrong with, gets a line on stderr.  Returns whether
    nothing was wrong with any.  Raises InputError where no network can be loaded or the pictures
    cannot be written, BrokenPipeError where nobody reads the rows, and KeyboardInterrupt on Ctrl-C,
    after the photo at hand.
    """
    model, emotions = load_network(find_network(output_dir))
    detector = None
    if detect:
        from mtcnn import MTCNN  # here: training does without it
        detector = MTCNN()
    photos = list(enumerate(find_photos(paths), 1))
    pictures = Path() if as_json else make_folder_for_pictures(output_dir)
    failed = []
    faces_found = 0
    with delayed_interrupt() as pressed:
        for first in range(0, len(photos), 4):  # more would take more memory, and Ctrl-C longer
            group = []
            for number, path in photos[first:first + 4]:
                stop_if_pressed(pressed, first, len(photos))
                with report_problem(path, failed):
                    group.append((number, read_photo(path, detector)))
            faces_of_photos = classify_photos([photo for _, photo in group], model, emotions)
            for (number, photo), faces in zip(group, faces_of_photos):
                stop_if_pressed(pressed, number - 1, len(photos))
                heading = f"{number}/{len(photos)} {photo.path}"
                faces_found += len(faces)
                name = photo.path.stem[:50]  # a file's name may have 255 bytes at most
                picture = pictures / f"{number}_{name}.emotions.jpg"
                with report_problem(photo.path, failed):
                    report_photo(photo, faces, heading, model, picture, as_json)
    if faces_found and not as_json:
        print(f"\nPictures saved in {pictures}", flush=True)
    return not failed


# --- Drawn faces ----------------------------------------------------------------------------------
# After the action units of Ekman and Friesen's Facial Action Coding System: how far the inner and
# the outer brow are up, the eyes open (in half faces), the corners of the mouth up, the mouth open,
# its width (in half faces), and one corner further up than the other.
SPREAD = (0.03, 0.03, 0.015, 0.1, 0.04, 0.03, 0.08)  # standard deviation of each column
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
    inner, outer, eye, smile, opening, mouth, corner = (
        EXPRESSIONS[emotion] + rng.normal(0, SPREAD))
    eye = max(eye, 0.02)
    back, hair, skin, dark = map(int, rng.uniform((20, 0, 110, 15), (235, 120, 230, 80)))
    # Drawn four times as large as the image: middle and half of the face (x, y) in these pixels.
    middle = rng.normal(96, 6, 2)
    half = rng.uniform((56, 72), (72, 88))
    image = Image.new("L", (192, 192), back)
    draw = ImageDraw.Draw(image)

    def place(*points):  # points in half faces from the middle
        return [tuple(middle + half * point) for point in points]

    draw.ellipse(place((-1.08, -1.2), (1.08, 0.9)), hair)
    draw.ellipse(place((-1, -0.91), (1, 1.01)), skin)
    white_of_the_eye = min(255, skin * 5 // 4)
    pupil = min(0.11, eye)
    for side in (-0.42, 0.42):
        for width, height, shade in ((0.21, eye + 0.04, dark), (0.19, eye, white_of_the_eye),
                                     (pupil, pupil, dark // 2)):
            draw.ellipse(place((side - width, -0.16 - height), (side + width, -0.16 + height)),
                         shade)
        draw.line(place((0.43 * side, -0.36 - inner), (1.62 * side, -0.36 - outer)), dark, width=7)
    if emotion == "disgust":  # wrinkles
        for y in (-0.14, -0.03, 0.08):
            draw.line(place((-0.24, y), (0, y - 0.06), (0.24, y)), dark, width=4)
    draw.line(place((0, 0), (-0.1, 0.2), (0.1, 0.2)), skin * 7 // 10, width=4)  # nose
    across = np.linspace(-1, 1, 15)
    lips = 0.52 + 0.8 * mouth * (smile * (0.5 - across**2) - corner * across / 2)
    gap = 0.4 * mouth * max(opening, 0.1) * (1 - across**2) + 0.025
    upper_lip = list(zip(mouth * across, lips - gap))
    lower_lip = list(zip(mouth * across, lips + gap))
    draw.polygon(place(*upper_lip, *reversed(lower_lip)), dark // 2)
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


class OneLineParser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and a second line."""

    def error(self, message):
        raise InputError(message)


def complete(settings):
    """Return the settings with what the user left open: the dataset's folder, the precision."""
    data_dir = settings.data_dir
    if not data_dir and not settings.demo:
        data_dir = find_dataset()
    return dataclasses.replace(settings, data_dir=data_dir,
                               precision=settings.precision or fastest_precision())


def option_name(setting_name):
    """Return the name of the command line's option for a setting."""
    return "--" + setting_name.replace("_", "-")


def add_setting(group, field):
    """Add the option for a field of Settings to a group of argparse."""
    argument = dict(field.metadata)
    argument["help"] = argument["help"].format(default=field.default)
    if field.type is bool:
        argument["action"] = "store_true"
    else:
        argument["type"] = field.type
    group.add_argument(option_name(field.name), default=argparse.SUPPRESS, **argument)


def parse_command_line(arguments):
    """Return the options and the settings of a run; InputError if they make no sense."""
    parser = OneLineParser(description="Train a network to recognise facial emotions, or use it.",
                           allow_abbrev=False)
    training = parser.add_argument_group("training")
    for field in dataclasses.fields(Settings):
        add_setting(training, field)
    training.add_argument("--resume", action="store_true",
                          help="go on with the interrupted run in --output-dir")
    prediction = parser.add_argument_group("prediction with the trained network")
    prediction.add_argument("--predict", nargs="+", action="extend", metavar="PHOTO",
                            help="classify the faces in photos, or folders of photos")
    prediction.add_argument("--no-detect", action="store_true",
                            help="take every photo as one face: look for none")
    prediction.add_argument("--json", action="store_true",
                            help="print a JSON object per face and draw nothing")
    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", default="output", metavar="DIR",
                        help="where all results are (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.predict and "" in options.predict:
        raise InputError("--predict: the name of a photo is empty")
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)
             if hasattr(options, field.name)}
    refuse_useless(options, given)
    if "demo" in given:
        given.setdefault("epochs", 4)
    return options, Settings(**given)


def refuse_useless(options, given):
    """Raise InputError for an option that would do nothing; `given` are the settings given."""
    if options.predict and options.resume:
        raise InputError("--resume does nothing with --predict: leave it out")
    if options.predict and given:
        raise InputError(f"{option_name(min(given))} does nothing with --predict: leave it out")
    if options.resume and given:
        raise InputError(f"{option_name(min(given))} does nothing with --resume, which goes on "
                         "with the settings of the run: leave it out")
    if (options.no_detect or options.json) and not options.predict:
        raise InputError("--no-detect and --json do nothing without --predict")


@contextlib.contextmanager
def errors_in_one_line():
    """End the program with one line on stderr, and a status, where a user can mend the error."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        complain(str(interrupt) or "interrupted")
        sys.exit(130)
    except BrokenPipeError:  # what read the output has ended: `head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python writes there at its end
        sys.exit(141)  # as shells do
    except (InputError, OSError) as error:
        complain(f"error: {error}")
        sys.exit(2)


# --- Unfinished runs, and what a finished one leaves ----------------------------------------------
def lock_run(run_dir):
    """Make the folder of an unfinished run and lock it; the end of a `with` unlocks it.

    Raises InputError if the folder cannot be written, or another run or something of the user's own
    is in it.
    """
    try:
        is_own = any(os.path.exists(run_dir / name) for name in (LOCK, CHECKPOINT))
        if not is_own and run_dir.is_dir() and any(run_dir.iterdir()):
            raise InputError(f"{run_dir} holds something that is not of this script: name another "
                             "--output-dir")
        run_dir.mkdir(parents=True, exist_ok=True)
        return FileLock(run_dir / LOCK).acquire(timeout=0)  # the system drops it with the process
    except Timeout as error:
        raise InputError(f"{run_dir} is in use by another run: name another --output-dir"
                         ) from error
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written: {error.strerror}; name another --output-dir"
                         ) from error


def settings_to_resume(checkpoint):
    """Return the settings of an interrupted run, and for how many seconds it has trained."""
    run, history, _, _ = load_checkpoint(checkpoint)
    try:
        return Settings(**run["settings"]), sum(history["seconds"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{checkpoint} is of another version of this script: delete it and start "
                         "anew") from error


def kept_epochs(run_dir):
    """Return a phrase: how many epochs of an unfinished run are kept."""
    try:
        _, history, _, _ = load_checkpoint(run_dir / CHECKPOINT)
    except InputError:
        return "no epoch is kept"
    return f"epochs kept in {run_dir}: {len(history['epoch'])}, --resume goes on"


@contextlib.contextmanager
def telling_what_is_kept(run_dir):
    """If a run ends early, say how many epochs are kept; at its end, delete what is not needed."""
    try:
        yield
    except InputError:
        raise
    except KeyboardInterrupt:
        print()  # ends the line of the progress bar
        raise KeyboardInterrupt(f"interrupted; {kept_epochs(run_dir)}") from None
    except BrokenPipeError:
        complain(f"error: nobody reads the output any more; {kept_epochs(run_dir)}")
        raise
    except OSError as error:
        raise InputError(f"{error.filename or run_dir} cannot be read or written: "
                         f"{error.strerror}; mend that, or name another folder; "
                         f"{kept_epochs(run_dir)}") from error
    except Exception as error:  # a mistake in the script: its traceback is what a report needs
        error.add_note(kept_epochs(run_dir))
        raise
    finally:
        if not Path(run_dir, CHECKPOINT).exists():
            delete_run(run_dir)


def delete_run(run_dir):
    """Delete the folder of an unfinished run, but nothing in it that is not of the script."""
    shutil.rmtree(run_dir / "faces", ignore_errors=True)
    with contextlib.suppress(OSError):  # it was moved meanwhile, or something else is in it
        for name in (*RESULTS, Path(CHECKPOINT).with_suffix(".part"), LOCK):
            Path(run_dir, name).unlink(missing_ok=True)
        run_dir.rmdir()


def save_results(run_dir, model, settings, data, history, scores, seconds):
    """Write the network, history.csv, and metrics.json with all that it takes to repeat the run."""
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
    network = metrics["network"]
    print(f"\nNetwork: {network['parameters']:,} parameters, {network['megabytes']} MB")


def finish_run(run_dir, output_dir):
    """Put the results of a run in place of those before."""
    for name in RESULTS:
        os.replace(run_dir / name, output_dir / name)
    for picture in output_dir.glob("predictions/*.emotions.jpg"):
        picture.unlink()  # it was drawn with the network before
    (run_dir / CHECKPOINT).unlink()  # last: without it, there is nothing to resume
    print(f"\nSaved in {output_dir}: {', '.join(RESULTS)}", flush=True)


if __name__ == "__main__":
    started = time.perf_counter()
    warnings.filterwarnings("ignore", "Glyph .* missing")  # Matplotlib's font lacks some letters
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that a terminal lacks
    with errors_in_one_line():
        options, settings = parse_command_line(sys.argv[1:])
        if options.predict:
            all_well = predict_emotions(options.predict, options.output_dir,
                                        detect=not options.no_detect, as_json=options.json)
            sys.exit(0 if all_well else 2)

        output_dir = Path(options.output_dir)
        run_dir = output_dir / "unfinished"
        checkpoint = run_dir / CHECKPOINT
        if options.resume and not checkpoint.exists():
            raise InputError(f"--resume: there is no interrupted run in {output_dir}")
        with lock_run(run_dir), telling_what_is_kept(run_dir):
            if options.resume:
                settings, trained_before = settings_to_resume(checkpoint)
            elif checkpoint.exists():
                raise InputError(f"{run_dir} holds an interrupted run: add --resume, or delete it")
            else:
                settings, trained_before = complete(settings), 0
            keras.utils.set_random_seed(settings.seed)
            keras.config.set_dtype_policy(settings.precision)
            print(f"{processor_name()}, {settings.precision}")
            data_dir = settings.data_dir
            if settings.demo:
                data_dir = run_dir / "faces"
                draw_faces(data_dir, settings.seed)
            data = load_data(data_dir, settings.batch_size, settings.seed)
            model = create_CNN(len(data.emotions), settings.dropout)
            notes = {"settings": dataclasses.asdict(settings), "test images": checksum(*data.test)}
            history = train_model(model, data.training, data.validation, settings.epochs,
                                  settings.learning_rate, checkpoint, keep_checkpoint=True,
                                  notes=notes)
            scores, probabilities = evaluate_model(model, data.test, data.emotions)
            plot_performance(history, scores, run_dir)
            plot_examples(data.test, probabilities, data.emotions, run_dir)
            plot_filters(model, data.test, data.emotions, run_dir)
            seconds = trained_before + time.perf_counter() - started
            save_results(run_dir, model, settings, data, history, scores, seconds)
            finish_run(run_dir, output_dir)
