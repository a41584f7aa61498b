"""Train a small convolutional network to recognise facial emotions in FER-2013.

    python emotion_recognition_cnn.py           train on FER-2013, from data/ or downloaded
    python emotion_recognition_cnn.py --demo    train on cartoon faces; nothing is downloaded
    python emotion_recognition_cnn.py --predict PHOTO    classify the faces in a photo

The network has two convolution blocks and two dense layers.  The script chooses the best epoch on
the PublicTest images and evaluates the network once, on the PrivateTest images.  After 44 epochs,
the default, the network classifies 70.1 % of them correctly (mean of three seeds on two CPU cores;
see docs/RESULTS.md).  Plots, scores and the network are saved in output/.

FER-2013: Goodfellow et al. (2013), "Challenges in representation learning", arXiv:1307.0414.
"""

import argparse
import contextlib
import csv
import functools
import glob
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# False if imported or started with %run.  (Keras imports IPython, so this comes before Keras.)
IS_PROGRAM = __name__ == "__main__" and "IPython" not in sys.modules
if IS_PROGRAM:
    warnings.simplefilter("ignore")
    if hasattr(sys.stdout, "reconfigure"):  # IDLE's stdout does not have it
        # Print each line at once, and escape characters that the terminal cannot show.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    os.environ["MPLBACKEND"] = "agg"  # Jupyter sets its own backend for every program it starts
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # False in a background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
os.environ["KERAS_BACKEND"] = "tensorflow"
# oneDNN makes bfloat16 up to 60 times faster.  TensorFlow's log suggests setting this to 0.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow otherwise allocates all GPU memory, and the kernel of a notebook may need some.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

# TensorFlow logs some lines before it reads TF_CPP_MIN_LOG_LEVEL: discard them.
stderr_copy = os.dup(2)
with open(os.devnull, "w") as devnull:
    os.dup2(devnull.fileno(), 2)
try:
    import keras
    import matplotlib.style
    import numpy as np
    import tensorflow as tf
    from keras import layers
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image, ImageDraw, ImageOps
    from tensorflow.keras.preprocessing.image import ImageDataGenerator
finally:
    os.dup2(stderr_copy, 2)
    os.close(stderr_copy)

tf.get_logger().setLevel("ERROR")  # no warning when several networks are traced in one process
logging.getLogger("matplotlib.font_manager").setLevel("ERROR")  # no warning for missing fonts
# Override the user's keras.json.
keras.config.set_image_data_format("channels_last")
keras.config.set_floatx("float32")
keras.config.set_epsilon(1e-7)

SIZE = 48  # pixels: height and width of the images of FER-2013
EPOCHS = 44
BATCH_SIZE = 128
LEARNING_RATE = 0.006  # initial learning rate; decays to 0 along a cosine
WEIGHT_DECAY = 0.004
# Arguments of ImageDataGenerator, for the training images.
AUGMENTATION = {"horizontal_flip": True, "rotation_range": 10, "width_shift_range": 0.1,
                "height_shift_range": 0.1, "zoom_range": 0.1}
AFFINE = {"horizontal_flip", "vertical_flip", "rotation_range", "width_shift_range",
          "height_shift_range", "shear_range", "zoom_range"}
# Argument of fit(): 1 for a progress bar, 2 for a line per epoch.  In windowed programs,
# sys.stdout is None.
VERBOSE = 1 if sys.stdout and sys.stdout.isatty() else 2

CPU_INFO = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
# Options that are saved in metrics.json and restored by --resume.
SETTINGS = "demo", "crop_faces", "epochs", "batch_size", "learning_rate", "precision", "seed"
NETWORK_FILE = "emotion_recognition_cnn.keras"
CHECKPOINT_FILE = "checkpoint.npz"
UNFINISHED_RUN = ("{} contains an unfinished run. If it was interrupted, continue it with --resume "
                  "or delete the folder. If it is still running, choose another --output-dir")

with contextlib.suppress(ImportError):  # optional: photos from iPhones, some cameras
    importlib.import_module("pi_heif").register_heif_opener()
HEIF_EXTENSIONS = {".heic", ".heics", ".heif", ".heifs", ".hif"}
UNSUPPORTED_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow cannot decode these
IMAGE_EXTENSIONS = HEIF_EXTENSIONS | {
    extension for extension, name in Image.registered_extensions().items()
    if name in set(Image.OPEN) - UNSUPPORTED_FORMATS}
Image.MAX_IMAGE_PIXELS = 125_000_000  # Pillow accepts twice this size; phones take 200 megapixels

MAX_CROP_SIZE = 64  # pixels: images of up to this size are treated as cropped faces
DETECTION_PIXELS = 1280 * 960  # larger photos are scaled down to this area to find faces

# Colours that colour-blind readers can distinguish, from the palette of Okabe and Ito.
BLUE, VERMILION, SKY_BLUE = "#0072B2", "#D55E00", "#56B4E9"
NO_AXES = {"xticks": [], "yticks": [], "frame_on": False}  # for axes that only show an image


class InputError(Exception):
    """An error that the user can fix.  The message is one line that says what to do."""


def import_optional(package, purpose):
    """Import a package that only `purpose` needs; raise InputError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{purpose} needs the package {package} ({error}). Install it with "
                         f"pip install {package}") from error


# --- Data -----------------------------------------------------------------------------------------
class LabelledImages(NamedTuple):
    images: np.ndarray  # uint8, n x 48 x 48 x 1
    labels: np.ndarray  # int, n: indices into the emotions
    clean: np.ndarray  # bool, n: False for test images that are also in train/


class Data(NamedTuple):
    emotions: list  # names, sorted
    augmentation: ImageDataGenerator  # of the training images
    training: LabelledImages
    validation: LabelledImages
    test: LabelledImages


def find_dataset():
    """Return the path of data/ or, if it does not exist, of FER-2013 in the cache of kagglehub.

    Downloads FER-2013 on first use.  Raises InputError if the download fails.
    """
    if Path("data").exists():
        return "data"
    try:
        kagglehub = import_optional("kagglehub", "the download")
        # With a version number, kagglehub finds a copy in its cache when offline.
        return kagglehub.dataset_download("msambare/fer2013/versions/1")
    except Exception as error:  # many kinds: network, HTTP status, archive, disk, cache
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())  # in one line
        raise InputError(
            f"there is no data/ folder, and FER-2013 could not be downloaded ({reason}). Download "
            "https://www.kaggle.com/datasets/msambare/fer2013 and unpack it into data/, name "
            "another folder with --data-dir, or train on cartoon faces with --demo") from error


def find_folders(data_dir):
    """Return the folders of the training, validation and test images in `data_dir`.

    The folder of validation images, which may be called val, valid or validation, is optional.
    Raises InputError if train/ or test/ is missing.
    """
    validation = [data_dir / name for name in ("val", "valid", "validation")
                  if (data_dir / name).is_dir()]
    if len(validation) > 1:
        raise InputError(f"{validation[0]} and {validation[1]} both exist. Remove one of them")
    folders = data_dir / "train", *validation, data_dir / "test"
    for folder in folders:
        if not folder.is_dir():
            names = sorted(path.name for path in data_dir.glob("*"))[:8]
            raise InputError(f"{folder} is missing. Use --data-dir to name the unpacked folder "
                             f"that contains train/ and test/; {data_dir} contains {names}")
    return folders


def find_emotions(folders):
    """Return the sorted names of the subfolders, one per emotion.

    Raises InputError if `folders` have different subfolders, or if a name cannot be printed.
    """
    names = [{path.name for path in folder.glob("[!.]*") if path.is_dir()} for folder in folders]
    for folder, found in zip(folders, names):
        missing = set.union(*names) - found
        if missing:
            raise InputError(f"{folder / min(missing)} is missing. "
                             f"{', '.join(f'{folder.name}/' for folder in folders)} must all "
                             "contain the same subfolders, one per emotion")
    emotions = sorted(names[0])
    if len(emotions) < 2:
        raise InputError(f"{folders[0]} must contain at least two subfolders, one per emotion")
    if not "".join(emotions).isprintable():
        raise InputError(f"{folders[0]} contains a folder whose name cannot be printed: {emotions}")
    return emotions


def find_images(folder):
    """Return the images and the other files in a folder and its subfolders, but no hidden files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()
             and not any(name.startswith(".") for name in path.relative_to(folder).parts)]
    images = [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]
    return images, sorted(set(files) - set(images))


def report_skipped(folder, images, others):
    """Print to stderr how many files in a folder are skipped because they are not images."""
    if others:
        extensions = ", ".join(sorted({path.suffix or path.name for path in others}))
        print(f"{folder}: skipped {len(others)} of {len(images) + len(others)} files that are not "
              f"images ({extensions})", file=sys.stderr)


def to_uint8(array):
    """Return an image (H x W, H x W x 1 or H x W x 3; uint8, or floats from 0 to 255) as uint8."""
    if array.shape[2:] == (1,):
        array = array[:, :, 0]
    has_shape = array.size and (array.ndim == 2 or array.shape[2:] == (3,))
    highest = array.max(initial=0)  # floats of up to 1 have been scaled to another range
    if np.issubdtype(array.dtype, np.floating) and (highest == 0 or 1 < highest <= 255):
        array = array.round().astype("uint8") if array.min(initial=0) >= 0 else array
    if not has_shape or array.dtype != "uint8":
        raise ValueError("an array must be H x W, H x W x 1 or H x W x 3 (RGB), of uint8 or of "
                         f"floats from 0 to 255 (not 0 to 1); this one is {array.dtype}, "
                         f"{' x '.join(map(str, array.shape))}")
    return array


def open_image(photo):
    """Return a photo as an upright PIL image in RGB.

    Takes a path, an open file, a PIL image, or an array (H x W, H x W x 1 or H x W x 3 in RGB; of
    uint8, or of floats from 0 to 255).  Raises InputError if it cannot be read.
    """
    name = photo if isinstance(photo, (str, os.PathLike)) else f"this {type(photo).__name__}"
    try:
        if isinstance(photo, np.ndarray):
            image = Image.fromarray(to_uint8(np.asarray(photo)))
        elif isinstance(photo, Image.Image):
            image = photo
        elif isinstance(photo, (str, os.PathLike)) or hasattr(photo, "read"):
            if Path(str(photo)).suffix.lower() in HEIF_EXTENSIONS:
                import_optional("pi_heif", "this format")
            image = Image.open(photo)
        else:
            raise TypeError("it must be a path, an open file, a PIL image or an array")
        if image.mode.startswith(("I", "F")):
            raise ValueError("it has more than 8 bits per channel. Convert it to 8 bits")
        image.load()
        with contextlib.suppress(Exception):  # damaged Exif data do not matter
            image = ImageOps.exif_transpose(image)
        return image.convert("RGB")
    except Exception as error:  # for a broken file, Pillow raises many kinds
        reason = " ".join(str(error).split())  # in one line
        raise InputError(f"{name} cannot be read as an image: {reason}") from error


def face_pixels(face):
    """Convert the image of a face (PIL image) to the network's input (uint8, 48 x 48, grey)."""
    return np.asarray(face.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def read_faces(paths, crop_faces):
    """Read images as the network's input: a list of arrays (uint8, 48 x 48).

    With `crop_faces`, each array is the largest face in its image, or None if there is no face.
    Also returns the number of images larger than MAX_CROP_SIZE that were not cropped.
    """
    def read(path):
        photo = open_image(path)
        if not crop_faces:
            return face_pixels(photo), max(photo.size) > MAX_CROP_SIZE
        box = max(find_faces(photo), key=lambda box: box[2] - box[0], default=None)
        return cut_out(np.asarray(photo), box) if box else None, False

    progress = keras.utils.Progbar(len(paths), verbose=1 if VERBOSE == 1 else 0)
    faces, large = [], 0
    # Threads hide the delay of a network drive.  MTCNN uses all cores already.
    with ThreadPoolExecutor(1 if crop_faces else 8) as threads:
        for face, is_large in threads.map(read, paths):
            faces.append(face)
            large += is_large
            progress.add(1)
    return faces, large


def read_images(folder, emotions, crop_faces):
    """Read the images in the subfolders of `folder`, one subfolder per emotion.

    With `crop_faces`, cuts out the largest face of each image and skips images without a face.
    Returns paths, images (uint8, n x 48 x 48 x 1) and labels (int, n).  Raises InputError if an
    image cannot be read, or if there are no images of an emotion.
    """
    paths, labels, others = [], [], []
    for label, emotion in enumerate(emotions):
        found, skipped = find_images(folder / emotion)
        if not found:
            raise InputError(f"{folder / emotion} contains no images, such as .jpg or .png")
        paths += found
        labels += [label] * len(found)
        others += skipped
    report_skipped(folder, paths, others)
    faces, large = read_faces(paths, crop_faces)
    if large:
        print(f"{folder}: {large:,} of {len(paths):,} images are larger than {MAX_CROP_SIZE} "
              "pixels. If they show more than the face, use --crop-faces")
    kept = [i for i, face in enumerate(faces) if face is not None]
    if len(kept) < len(paths):
        print(f"{folder}: skipped {len(paths) - len(kept):,} of {len(paths):,} images because no "
              "face was found")
    labels = np.array(labels)[kept]
    without_faces = set(range(len(emotions))) - set(labels)
    if without_faces:
        raise InputError(f"{folder / emotions[min(without_faces)]}: no face was found in any image")
    return [paths[i] for i in kept], np.stack([faces[i] for i in kept])[..., np.newaxis], labels


def split(part, chosen):
    """Split LabelledImages in two: those chosen by a mask (bool, n), and the others."""
    return (LabelledImages(*(array[chosen] for array in part)),
            LabelledImages(*(array[~chosen] for array in part)))


def hold_out_validation(training, test, test_paths):
    """Return training, validation and test images for a dataset without a validation folder.

    The validation images are the PublicTest images of test/ if all its files are named PublicTest_*
    or PrivateTest_*; otherwise, they are every tenth image of each emotion in train/.  Raises
    InputError if only some files have such names, or if train/ is too small.
    """
    prefixes = np.array([path.name.partition("_")[0] for path in test_paths])
    is_official = np.isin(prefixes, ("PublicTest", "PrivateTest"))
    if is_official.any() and not is_official.all():
        raise InputError(f"{test_paths[np.argmin(is_official)]}: its name is neither PublicTest_* "
                         f"nor PrivateTest_*, unlike {is_official.sum():,} others. Rename or "
                         "remove it")
    if set(prefixes) == {"PublicTest", "PrivateTest"}:
        return training, *split(test, prefixes == "PublicTest")
    print("The file names in test/ do not distinguish PublicTest from PrivateTest images: a tenth "
          "of train/ is held out for validation, and all of test/ is the test set")
    # Index within each emotion (labels are sorted).  Index 0 stays: it may be the only image.
    index = np.concatenate([np.arange(count) for count in np.bincount(training.labels)])
    validation, training = split(training, index % 10 == 1)
    if not len(validation.images):
        raise InputError("train/ contains too few images to hold some out for validation")
    return training, validation, test


def load_data(data_dir, crop_faces=False):
    """Load FER-2013, or a dataset with the same layout, into memory; return Data.

    The emotions are the subfolders, as in Keras's flow_from_directory.  The validation images are
    those in val/, valid/ or validation/; if there is no such folder, see `hold_out_validation`.
    With `crop_faces`, the largest face of each image is cut out, framed as in `find_faces`.  Raises
    InputError if the dataset cannot be used.
    """
    unsupported = set(AUGMENTATION) - AFFINE
    if unsupported:
        raise InputError(f"AUGMENTATION: {min(unsupported)} is not affine. Use a layer instead")
    folders = find_folders(Path(data_dir))
    print(f"Reading {data_dir}: {', '.join(folder.name for folder in folders)}")
    emotions = find_emotions(folders)
    print(f"{len(emotions)} emotions: {', '.join(emotions)}")
    # Paths, images and labels of each folder.
    contents = [read_images(folder, emotions, crop_faces) for folder in folders]
    in_train = {image.tobytes() for image in contents[0][1]}
    parts = [LabelledImages(images, labels, np.array([image.tobytes() not in in_train
                                                      for image in images]))
             for _, images, labels in contents]
    if len(parts) == 2:
        parts = hold_out_validation(*parts, test_paths=contents[-1][0])
    training, validation, test = parts
    print(f"{len(training.images):,} training, {len(validation.images):,} validation and "
          f"{len(test.images):,} test images; {np.sum(~test.clean):,} of the test images are also "
          "in train/")
    return Data(emotions, ImageDataGenerator(**AUGMENTATION), training, validation, test)


# --- Network --------------------------------------------------------------------------------------
def create_CNN(classes, epochs=EPOCHS):
    """Return the network, not yet compiled.

    Its input is a batch of images (n x 48 x 48 x 1, pixels from 0 to 255), its output is their
    probabilities (n x classes).  Pass the same `epochs` to `train_model`.
    """
    # Factor of the dropout rates: longer training overfits more.  88 was chosen on PublicTest.
    dropout = min(epochs / 88, 1)
    return keras.Sequential([
        keras.Input((SIZE, SIZE, 1)),
        # Standardises each image, so that its lighting and contrast do not matter.
        layers.GroupNormalization(groups=1, center=False, scale=False),
        # Pooling before normalisation and ReLU leaves them a ninth of the work.
        layers.Conv2D(32, 5, padding="same", use_bias=False),
        layers.MaxPooling2D(4, strides=3, padding="same"),  # 48 x 48 to 16 x 16
        layers.LayerNormalization(),  # across the filters at each position: evens out contrast
        layers.ReLU(),
        layers.Conv2D(384, 3, use_bias=False),
        layers.MaxPooling2D(7, strides=3, padding="same"),  # 14 x 14 to 5 x 5
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.SpatialDropout2D(0.18 * dropout),  # drops whole maps: neighbours are similar
        layers.Flatten(),
        layers.Dense(512, use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Dropout(0.4 * dropout),
        layers.Dense(classes, activation="softmax", dtype="float32"),
    ])


# --- Training -------------------------------------------------------------------------------------
def random_transforms(generator, count, random):
    """Draw `count` transforms from an ImageDataGenerator at once.

    Returns arguments of `affine_matrices`: a dict of arrays (count).  They are the numbers of
    `generator.get_random_transform`, but drawn from `random` (a RandomState) instead of NumPy's
    global state, and for FER-2013 in milliseconds instead of half a second.  (Keras draws shifts
    of 1 or more as whole pixels; here, they are any numbers of pixels in the range.)
    """
    # Keras draws the horizontal shift, tx, from height_shift_range, and ty from width_shift_range.
    ranges = {"theta": generator.rotation_range, "tx": generator.height_shift_range,
              "ty": generator.width_shift_range, "shear": generator.shear_range}
    limits = {name: (-limit, limit) for name, limit in ranges.items() if limit}
    if tuple(generator.zoom_range) != (1, 1):
        limits |= {"zx": generator.zoom_range, "zy": generator.zoom_range}
    limits |= {"flip_horizontal": (0, 1), "flip_vertical": (0, 1)}
    low, high = np.transpose(list(limits.values()))
    numbers = low + (high - low) * random.random_sample((count, len(limits)))
    drawn = dict(zip(limits, numbers.T))
    for shift in {"tx", "ty"} & set(limits):
        drawn[shift] *= SIZE if ranges[shift] < 1 else 1  # a fraction of the image, or pixels
    drawn["flip_horizontal"] = (drawn["flip_horizontal"] < 0.5) & generator.horizontal_flip
    drawn["flip_vertical"] = (drawn["flip_vertical"] < 0.5) & generator.vertical_flip
    return drawn


def affine_matrices(theta=0, tx=0, ty=0, shear=0, zx=1, zy=1, flip_horizontal=False,
                    flip_vertical=False):
    """Convert transforms of ImageDataGenerator to matrices (n x 8) for Keras's affine_transform.

    Each argument is a number or an array (n).  Like `ImageDataGenerator.apply_transform`, a matrix
    rotates, shifts, shears, zooms and flips about the centre of the image.  It maps a pixel (x, y)
    of the result to its position in the image.
    """
    def matrices(*two_rows):  # n x 3 x 3; the third row is 0 0 1
        return np.stack(np.broadcast_arrays(*two_rows, 0, 0, 1), axis=-1).reshape(-1, 3, 3)

    theta, shear, middle = np.radians(theta), np.radians(shear), (SIZE - 1) / 2
    zx = np.multiply(zx, 1 - 2 * np.asarray(flip_horizontal))  # a flip is a zoom by -1
    zy = np.multiply(zy, 1 - 2 * np.asarray(flip_vertical))
    product = (matrices(1, 0, middle, 0, 1, middle)
               @ matrices(np.cos(theta), -np.sin(theta), 0, np.sin(theta), np.cos(theta), 0)
               @ matrices(1, 0, tx, 0, 1, ty)
               @ matrices(1, -np.sin(shear), 0, 0, np.cos(shear), 0)
               @ matrices(zx, 0, 0, 0, zy, 0)
               @ matrices(1, 0, -middle, 0, 1, -middle))
    return product.reshape(-1, 9)[:, :8].astype("float32")


def transform_images(images, matrices):
    """Apply `affine_matrices` to images (n x 48 x 48 x 1).  Beyond an edge, its pixels repeat."""
    return keras.ops.image.affine_transform(keras.ops.cast(images, "float32"), matrices,
                                            interpolation="bilinear", fill_mode="nearest")


def in_batches(arrays, batch_size):
    """Return arrays (n x ...) in memory as a tf.data.Dataset of batches."""
    options = tf.data.Options()
    # The autotuning thread sleeps for up to a minute, and the end of an epoch would wait for it.
    options.autotune.enabled = False
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size).with_options(options)


def augmented_batches(data, batch_size, seed):
    """Return the training images of Data, shuffled and augmented, as batches for one epoch.

    The batches are a tf.data.Dataset of images (float32, n x 48 x 48 x 1) and labels (n).  `seed`,
    an int or a list of ints, determines the order and the transforms.
    """
    random = np.random.RandomState(seed)
    order = random.permutation(len(data.training.images))
    matrices = affine_matrices(**random_transforms(data.augmentation, len(order), random))

    def augment(images, labels, matrices):
        return transform_images(images, matrices), labels

    shuffled = data.training.images[order], data.training.labels[order], matrices
    return in_batches(shuffled, batch_size).map(augment).prefetch(2)


def class_weights(labels):
    """Return the weight of each emotion in the training loss: {label: weight}.

    Rare emotions have larger weights: the cube root of m / n, where n is the number of images of
    the emotion and m the mean of these numbers.  The weights are scaled to a mean of 1 per image.
    (scikit-learn's "balanced" is m / n without the root.)
    """
    counts = np.bincount(labels)
    weights = np.cbrt(counts.mean() / counts)
    weights /= np.average(weights, weights=counts)
    return dict(enumerate(weights))


@contextlib.contextmanager
def atomic_write(path, overwrite=True):
    """Yield a temporary path; after the block, the file there replaces the one at `path`.

    If the block fails, or if the process is killed, the earlier file at `path` remains.  Without
    `overwrite`, raises FileExistsError after the block if there is one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}" if overwrite else f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        if not overwrite:
            path.touch(exist_ok=False)  # of two processes that write the file, one succeeds
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, state, arrays, overwrite=True):
    """Save a JSON-compatible dict and a list of arrays."""
    with atomic_write(path, overwrite) as temporary, open(temporary, "wb") as file:
        np.savez(file, *map(np.asarray, arrays), state=json.dumps(state))
        file.flush()
        os.fsync(file.fileno())  # written to disk before the rename, in case of a power failure


def check_no_checkpoint(path):
    """Raise InputError if there is a checkpoint; delete an empty one, which a killed run left."""
    if path.exists() and not path.stat().st_size:
        path.unlink(missing_ok=True)
    if path.exists():
        raise InputError(UNFINISHED_RUN.format(path.parent))


def create_checkpoint(path, state, arrays):
    """Save the first checkpoint of a run; raise InputError if another run has saved one."""
    try:
        save_checkpoint(path, state, arrays, overwrite=False)
    except FileExistsError:
        raise InputError(UNFINISHED_RUN.format(Path(path).parent)) from None
    finally:
        with contextlib.suppress(OSError):  # it contains the checkpoint, unless saving failed
            Path(path).parent.rmdir()


def load_checkpoint(path, with_arrays=True):
    """Return the state and the arrays of `save_checkpoint`, or only the state, which is fast.

    Raises InputError if there is no checkpoint, or if it is not usable.
    """
    if not os.path.exists(path):
        raise InputError(f"there is no {path} to continue. Name another --output-dir, or start a "
                         "new run without --resume")
    try:
        with np.load(path) as file:
            state = json.loads(str(file["state"]))
            if not {"source", "run", "history"} <= set(state):
                raise ValueError("saved by another version of the script")
            count = len(file) - 1 if with_arrays else 0  # without the state
            return state, [file[f"arr_{i}"] for i in range(count)]  # NumPy's names
    except Exception as error:  # from zipfile, NumPy or JSON
        raise InputError(f"{path} is not a usable checkpoint ({type(error).__name__}: {error}). "
                         "Delete its folder and start again") from error


def checksum(data):
    """Return the SHA-256 of the images and labels of Data."""
    arrays = *data.training, *data.validation, *data.test
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def restore_checkpoint(path, run, history, variables):
    """Update `history` and the variables from a checkpoint; return the best weights so far.

    Raises InputError if it is not a checkpoint of `run`.
    """
    state, arrays = load_checkpoint(path)
    changed = [name.replace("_", " ") for name in run if state["run"].get(name) != run[name]]
    if changed:
        raise InputError(f"{path} does not match this run: the {' and the '.join(changed)} "
                         "changed. Undo the change, or delete its folder and start again")
    for variable, array in zip(variables, arrays):
        variable.assign(array)
    history.update(state["history"])
    return arrays[len(variables):]


def train_model(model, data, epochs=EPOCHS, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE,
                seed=0, checkpoint=None, resume=False, source=None):
    """Train `model` on Data with AdamW; the learning rate decays to 0 along a cosine.

    `checkpoint` is the path of a file that is saved after each epoch, together with plots of the
    history.  `source`, a JSON-compatible dict that says where the data came from, is saved in it.
    With `resume`, training continues from the checkpoint and ends as if it had never been
    interrupted; without `resume`, the file must not exist.

    Afterwards, `model` has the weights of the epoch with the highest validation accuracy, computes
    in float32, and is compiled for evaluation.  Returns the history, a dict of lists with one value
    per epoch.  Raises InputError if the loss is not finite, or if the checkpoint does not fit.

    AdamW: Loshchilov and Hutter (2019), arXiv:1711.05101; cosine decay: arXiv:1608.03983.
    """
    steps = epochs * math.ceil(len(data.training.images) / batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY),
                  "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.optimizer.build(model.trainable_variables)  # creates the variables that are saved
    variables = model.variables + model.optimizer.variables
    history, best_weights = {"epoch": []}, model.get_weights()
    if checkpoint:
        run = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
               "weight_decay": WEIGHT_DECAY, "seed": seed,
               "precision": keras.config.dtype_policy().name,
               "number_of_parameters": model.count_params(), "augmentation": str(AUGMENTATION),
               "metrics": str(model.get_compile_config()["metrics"]), "images": checksum(data)}
        state = {"source": source, "run": run, "history": history}  # the history grows below
        if resume:
            best_weights = restore_checkpoint(checkpoint, run, history, variables)
        else:
            create_checkpoint(checkpoint, state, variables + best_weights)
    validation = in_batches((data.validation.images, data.validation.labels), 256)
    # fit() trains one epoch at a time: Keras's BackupAndRestore does not save the random state of
    # dropout, and ModelCheckpoint saves the best weights in a second file.
    for epoch in range(len(history["epoch"]), epochs):
        print(f"Epoch {epoch + 1}/{epochs}")
        started, rate = time.perf_counter(), float(model.optimizer.learning_rate)
        batches = augmented_batches(data, batch_size, seed=[seed, epoch])
        logs = model.fit(batches, validation_data=validation, shuffle=False, verbose=VERBOSE,
                         class_weight=class_weights(data.training.labels)).history
        if not math.isfinite(logs["loss"][0]):
            raise InputError("the loss is NaN or infinite. Delete the unfinished run and start "
                             "again with a lower learning rate")
        logs |= {"epoch": [epoch + 1], "learning_rate": [rate],
                 "seconds": [round(time.perf_counter() - started, 2)]}
        for name, values in logs.items():  # lists of one value
            history.setdefault(name, []).extend(values)
        if history["val_accuracy"][-1] > max(history["val_accuracy"][:-1], default=-1):
            best_weights = model.get_weights()
        if checkpoint:
            save_checkpoint(checkpoint, state, variables + best_weights)
            with contextlib.suppress(PermissionError):  # on Windows, if a viewer has a plot open
                plot_history(history, Path(checkpoint).parent)
        minutes = math.ceil(np.mean(history["seconds"]) * (epochs - epoch - 1) / 60)
        if minutes:
            print(f"about {minutes} min of training left")
    model.set_weights(best_weights)
    # Variables are float32 with every policy, so that the policy of built layers can be changed.
    for layer in model.layers:
        layer.dtype_policy = "float32"
    # For evaluate().  SGD has no state; that of AdamW would make the saved network three times as
    # large.
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return history


# --- Evaluation -----------------------------------------------------------------------------------
# Predictions are averaged over 18 views of an image: zoomed to show 44, 48 or 52 pixels, shifted
# vertically by -2, 0 or 2 pixels, with and without mirroring.  (With another SIZE, in proportion.)
FLIPS, ZOOMS, SHIFTS = zip(*itertools.product((False, True), (11 / 12, 1, 13 / 12),
                                              (-SIZE / 24, 0, SIZE / 24)))
VIEWS = affine_matrices(zx=ZOOMS, zy=ZOOMS, ty=SHIFTS, flip_horizontal=FLIPS)


def classify_faces(model, images):
    """Return the probabilities (n x classes) of images (n x 48 x 48 x 1), averaged over VIEWS."""
    means = []
    for first in range(0, len(images), 8):  # larger chunks need more memory and are hardly faster
        chunk = images[first:first + 8]
        views = transform_images(np.repeat(chunk, len(VIEWS), axis=0),
                                 np.tile(VIEWS, (len(chunk), 1)))
        probabilities = model.predict_on_batch(views)
        means.append(probabilities.reshape(len(chunk), len(VIEWS), -1).mean(axis=1))
    return np.concatenate(means)


def evaluate_model(model, data):
    """Evaluate `model` on the test images of Data and print the scores.

    Returns the scores (a dict) and the probabilities (n x classes).  All scores except
    single_image_accuracy use probabilities that are averaged over VIEWS:

    - single_image_accuracy: accuracy with a single view, the image as it is
    - loss: cross-entropy, in nats
    - balanced_accuracy: mean recall of the emotions
    - clean_accuracy: accuracy on images that are not also in train/; None if there are none
    - calibration_error: mean difference between confidence and accuracy in 15 bins of equal width;
      Guo et al. (2017), "On calibration of modern neural networks", arXiv:1706.04599
    - emotions: precision, recall, F1 (0/0 counts as 0) and number of images of each emotion
    - confusion_matrix: rows are labels, columns are predictions
    """
    images, labels, clean = data.test
    single_view = model.predict(images, batch_size=256, verbose=0)
    started = time.perf_counter()
    probabilities = classify_faces(model, images)
    milliseconds = 1000 * (time.perf_counter() - started) / len(images)
    predictions, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    correct = predictions == labels
    confusion = np.zeros((len(data.emotions), len(data.emotions)), int)
    np.add.at(confusion, (labels, predictions), 1)
    hits, labelled, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(labelled, 1)
    f1 = 2 * hits / np.maximum(labelled + predicted, 1)
    # The sum of correct - confidence over the images in each bin.
    gaps = np.bincount(np.ceil(15 * confidence).astype(int), weights=correct - confidence)
    scores = {
        "single_image_accuracy": (single_view.argmax(axis=1) == labels).mean(),
        "loss": float(np.mean(keras.losses.sparse_categorical_crossentropy(labels, probabilities))),
        "accuracy": correct.mean(),
        "balanced_accuracy": recall[labelled > 0].mean(),
        "clean_accuracy": correct[clean].mean() if clean.any() else None,
        "clean_images": int(clean.sum()),
        "calibration_error": np.abs(gaps).sum() / len(labels),
        "emotions": {name: {"precision": precision[i], "recall": recall[i], "f1": f1[i],
                            "count": int(labelled[i])} for i, name in enumerate(data.emotions)},
        "confusion_matrix": confusion.tolist(),
        "milliseconds_per_face": milliseconds,
    }
    print(f"\nTest: {len(labels):,} images, {clean.sum():,} of them clean (not also in train/)\n"
          f"Predictions are averaged over {len(VIEWS)} views ({milliseconds:.1f} ms per image), "
          "except for the single image accuracy")
    for name in ("single_image_accuracy", "accuracy", "balanced_accuracy", "clean_accuracy",
                 "calibration_error", "loss"):
        if scores[name] is not None:
            print(f"  {name.replace('_', ' '):23}{scores[name]:.4f}")
    width = max(9, *map(len, data.emotions))
    print(f"\n  {'emotion':{width}}  precision   recall       F1   images")
    for emotion, score in scores["emotions"].items():
        print(f"  {emotion:{width}}{score['precision']:11.1%}{score['recall']:9.1%}"
              f"{score['f1']:9.1%}{score['count']:9,}")
    return scores, probabilities


# --- Plots ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def plot_style():
    """Use Matplotlib's default style, with the user's fonts for what DejaVu Sans lacks."""
    fonts = {name: matplotlib.rcParams[name] for name in ("font.sans-serif", "font.serif")}
    families = dict.fromkeys(["DejaVu Sans", *matplotlib.rcParams["font.family"]])
    with matplotlib.style.context(["default", fonts, {
            "font.family": list(families), "font.size": 15, "figure.dpi": 150, "savefig.dpi": 150,
            "lines.linewidth": 2.5, "text.parse_math": False}]):
        yield


def plotted_metrics(history):
    """Return the names of the metrics in a history that have training and validation values."""
    return [name for name in history if f"val_{name}" in history]


@plot_style()
def plot_history(history, output_dir):
    """Save a plot of each metric over the epochs, such as accuracy.png and loss.png."""
    epochs = history["epoch"]
    best = int(np.argmax(history["val_accuracy"]))
    for name in plotted_metrics(history):
        training, validation = history[name], history[f"val_{name}"]
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(epochs, training, "o-", color=BLUE, label="training (augmented)")
        axes.plot(epochs, validation, "s--", color=VERMILION, label="validation")
        axes.plot(epochs[best], validation[best], "k*", markersize=18,
                  label=f"best epoch: {epochs[best]} ({validation[best]:.3f})")
        axes.set(title=f"Training and validation {name}", xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_write(Path(output_dir, f"{name}.png")) as temporary:
            figure.savefig(temporary)


def draw_table(axes, shares, rows, columns):
    """Draw shares (rows x columns, from 0 to 1) as a table with named rows and columns."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0%}", ha="center", va="center",
                  size=min(15, 150 / len(columns)), color="white" if share > 0.6 else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(labelsize=min(15, 240 / len(columns)))


@plot_style()
def plot_performance(history, scores, output_dir):
    """Save accuracy.png and loss.png, as `plot_history` does, and confusion_matrix.png."""
    plot_history(history, output_dir)
    confusion = np.array(scores["confusion_matrix"])
    labelled = confusion.sum(axis=1, keepdims=True)
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    axes = figure.subplots()
    draw_table(axes, confusion / np.maximum(labelled, 1), scores["emotions"], scores["emotions"])
    axes.set(title="Test images", xlabel="predicted", ylabel="labelled")
    with atomic_write(Path(output_dir, "confusion_matrix.png")) as temporary:
        figure.savefig(temporary)


@plot_style()
def plot_examples(data, probabilities, output_dir):
    """Save examples.png: the most confident correct and incorrect predictions for each emotion."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    most_confident_first = np.argsort(-confidence, kind="stable")
    figure = Figure(figsize=(8, 1.5 * len(data.emotions)), layout="constrained")
    left_half, right_half = figure.subfigures(1, 2)
    left_half.suptitle("Most confident: correct", color=BLUE)
    right_half.suptitle("Most confident: incorrect", color=VERMILION)
    for half, correct in (left_half, True), (right_half, False):
        grid = half.subplots(len(data.emotions), 3, subplot_kw=NO_AXES)
        for label, axes_of_row in enumerate(grid):
            shown = [i for i in most_confident_first
                     if data.test.labels[i] == label and (predicted[i] == label) == correct]
            for axes, i in zip(axes_of_row, shown):  # at most three images
                axes.imshow(data.test.images[i], cmap="gray", vmin=0, vmax=255)
                axes.set_title(f"{data.emotions[predicted[i]]} {confidence[i]:.0%}", size=10)
            if correct:
                axes_of_row[0].set_ylabel(data.emotions[label])
    with atomic_write(Path(output_dir, "examples.png")) as temporary:
        figure.savefig(temporary)


def receptive_field(model, layer):
    """Return the receptive field of a layer of a Sequential model: size, step, start; in pixels.

    Along either axis, position i of the layer's output sees `size` pixels of the image, beginning
    at start + i * step.  Kernels and pools must be square and not dilated.
    Araujo et al. (2019), "Computing receptive fields of convolutional neural networks", Distill.
    """
    size, step, start = 1, 1, 0
    for current in model.layers[:model.layers.index(layer) + 1]:
        if isinstance(current, layers.Conv2D):
            kernel = current.kernel_size[0]
        elif isinstance(current, layers.MaxPooling2D):
            kernel = current.pool_size[0]
        else:
            continue
        stride, width = current.strides[0], current.input.shape[1]
        if current.padding == "same":  # TensorFlow pads less on the top and left
            start -= max((math.ceil(width / stride) - 1) * stride + kernel - width, 0) // 2 * step
        size += (kernel - 1) * step
        step *= stride
    return size, step, start


@plot_style()
def plot_filters(model, data, output_dir):
    """Save filters.png: what the network of `create_CNN` has learned to look for.

    The upper part shows the filters of the first convolution.  The lower part has a row for each
    emotion: the filter of the second convolution that best separates the test images of this
    emotion from the others, and the images that activate it most, with its receptive field.
    """
    first, second = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)][:2]
    kernels = np.asarray(first.kernel)[:, :, 0].transpose(2, 0, 1)
    rows = math.ceil(len(kernels) / 16)
    present = np.unique(data.test.labels)
    figure = Figure(figsize=(10, 1.2 + 0.7 * rows + 1.45 * len(present)), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=(0.6 + 0.7 * rows, 0.6 + 1.45 * len(present)))
    above.suptitle("Filters of the first convolution, each scaled by its largest weight", size=13)
    grid = above.subplots(rows, 16, subplot_kw=NO_AXES)
    for axes, kernel in zip(grid.flat, kernels):
        picture = axes.imshow(kernel / np.abs(kernel).max(), cmap="RdBu_r", vmin=-1, vmax=1)
    above.colorbar(picture, ax=grid, ticks=(-1, 0, 1)).ax.tick_params(labelsize=10)

    below.suptitle("Second convolution: the filter that best separates each emotion from the\n"
                   "others, and the images that activate it most (above them: their labels)",
                   size=13)
    to_maps = keras.Model(model.inputs, second.output)
    maximum = layers.GlobalMaxPooling2D(dtype="float32")(second.output)
    maxima = keras.Model(model.inputs, maximum).predict(data.test.images, batch_size=128, verbose=0)
    size, step, start = receptive_field(model, second)
    grid = below.subplots(len(present), 7, subplot_kw=NO_AXES, squeeze=False)
    for label, axes_of_row in zip(present, grid):
        # The emotion's mean activation minus the overall mean, in standard deviations.
        lead = maxima[data.test.labels == label].mean(axis=0) - maxima.mean(axis=0)
        best = np.argmax(lead / (maxima.std(axis=0) + 1e-7))
        axes_of_row[0].set_ylabel(f"{data.emotions[label]}\nfilter {best}", size=11)
        shown = np.argsort(-maxima[:, best], kind="stable")[:7]
        maps = to_maps.predict_on_batch(data.test.images[shown])[..., best]
        for axes, i, activation in zip(axes_of_row, shown, maps):
            axes.imshow(data.test.images[i], cmap="gray", vmin=0, vmax=255)
            axes.set_title(data.emotions[data.test.labels[i]], size=10)
            corner = start + step * np.array(np.unravel_index(activation.argmax(),
                                                              activation.shape))
            # In a plot, pixel i reaches from i - 0.5 to i + 0.5.
            (top, left), (bottom, right) = np.clip((corner, corner + size), 0, SIZE) - 0.5
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False,
                                     color=SKY_BLUE, linewidth=2, clip_on=False))
    with atomic_write(Path(output_dir, "filters.png")) as temporary:
        figure.savefig(temporary)


# --- Prediction -----------------------------------------------------------------------------------
def save_network(model, emotions, path):
    """Save a network and the names of its emotions in one file."""
    with atomic_write(path) as temporary:
        model.save(temporary)
        with zipfile.ZipFile(temporary, "a") as file:  # Keras ignores the additional member
            file.writestr("emotions.json", json.dumps(emotions))


def load_network(path):
    """Return the network and the emotions that `save_network` saved.

    Raises InputError if the file cannot be read or was not saved by it.
    """
    try:
        model = keras.models.load_model(path, compile=False)
        with zipfile.ZipFile(path) as file:
            emotions = json.loads(file.read("emotions.json"))
        if model.input_shape[1:] != (SIZE, SIZE, 1) or model.output_shape[1:] != (len(emotions),):
            raise ValueError("its input or output has another shape")
    except Exception as error:  # from zipfile, JSON, h5py or Keras, whose last line is the cause
        reason = str(error).strip().rpartition("\n")[2]
        raise InputError(
            f"{path} is missing or damaged, is not a network of this script, or was saved by a "
            f"Keras version other than {keras.__version__} ({reason}). Train a network, or name "
            "another folder with --output-dir") from error
    return model, emotions


def strongest_boxes(boxes, threshold, **_):
    """Return MTCNN's boxes (n x 6: image, left, top, right, bottom, score), highest score first.

    Of boxes that overlap by more than `threshold` of their union, only the strongest is kept.  This
    replaces MTCNN's own function, which needs 15 GB for a crowd of 945 faces.
    """
    return boxes[tf.image.non_max_suppression(boxes[:, 1:5], boxes[:, 5], len(boxes), threshold)]


def in_chunks(network, images):
    """Return the outputs of a network, computed for 64 images at a time."""
    starts = range(0, max(len(images), 1), 64)  # at least one chunk, even if it is empty
    chunks = [network(images[i:i + 64]) for i in starts]
    return [tf.concat(output, axis=0) for output in zip(*chunks)]


@functools.cache
def face_detector():
    """Return the face detector MTCNN: Zhang et al. (2016), arXiv:1604.02878."""
    mtcnn = import_optional("mtcnn", "finding faces")
    from mtcnn import stages
    policy, hook = keras.config.dtype_policy(), sys.unraisablehook
    try:
        keras.config.set_dtype_policy("float32")  # MTCNN fails with any other policy
        sys.unraisablehook = lambda _: None  # on Python 3.13, lz4 prints errors about closed files
        detector = mtcnn.MTCNN()
    finally:
        keras.config.set_dtype_policy(policy)
        sys.unraisablehook = hook
    for module in stages.stage_pnet, stages.stage_rnet:
        module.smart_nms_from_bboxes = strongest_boxes
    for stage in detector.stages[1:]:  # a crowd's crops at once would take gigabytes
        stage.model.call = functools.partial(in_chunks, stage.model.call)
    return detector


detector_lock = threading.Lock()


def find_faces(photo):
    """Find the faces in a photo (PIL image) and frame them in the same way as FER-2013.

    Returns boxes (left, top, right, bottom; pixels) from left to right.  A box may extend beyond
    the photo.  If the photo is a cropped face already, the only box is the whole photo.
    """
    whole_photo = (0, 0, *photo.size)
    longest_side = max(photo.size)
    if longest_side <= MAX_CROP_SIZE:
        return [whole_photo]
    scale = max(1, math.sqrt(photo.size[0] * photo.size[1] / DETECTION_PIXELS))
    if min(photo.size) < 20 * scale:  # smaller than the smallest face that MTCNN looks for
        return []
    small = photo.resize([round(side / scale) for side in photo.size])
    with detector_lock:  # only one thread loads it
        detector = face_detector()
    found = detector.detect_faces(np.asarray(small), fit_to_image=False,
                                  threshold_onet=0.95)  # with 0.8, it finds faces in curtains
    boxes = []
    for face in found:
        left, top, width, height = (scale * float(pixels) for pixels in face["box"])
        x, y = left + width / 2, top + height / 2
        # FER-2013 shows about this square around MTCNN's box; see tests/measure/framing.py.
        reach = 1.25 * width / 2  # half of a side
        boxes.append((round(x - reach), round(y - reach), round(x + reach), round(y + reach)))
    # A small photo that is filled by one face is a cropped face.
    if (len(boxes) == 1 and longest_side <= 400
            and boxes[0][2] - boxes[0][0] > longest_side * 2 / 3):
        return [whole_photo]
    return sorted(boxes)


def cut_out(photo, box):
    """Convert a box of a photo (array) to the network's input.  Pixels repeat beyond an edge."""
    left, top, right, bottom = box
    rows = np.arange(top, bottom).clip(0, photo.shape[0] - 1)
    columns = np.arange(left, right).clip(0, photo.shape[1] - 1)
    return face_pixels(Image.fromarray(photo[np.ix_(rows, columns)]))


def classify_photo(photo, model, emotions, detect=True):
    """Return the faces in a photo from left to right, as a list of dicts:

    - face: number, starting at 1
    - box: left, top, right, bottom; in pixels, may extend beyond the photo
    - emotion, confidence: the most probable emotion and its probability
    - probabilities: the probability of each emotion

    Takes whatever `open_image` takes, and the network and the emotions of `load_network`.  Without
    `detect`, the whole photo is treated as a face.  Raises InputError if the photo cannot be read.
    """
    photo = open_image(photo)
    boxes = find_faces(photo) if detect else [(0, 0, *photo.size)]
    if not boxes:
        return []
    pixels = np.asarray(photo)
    crops = np.stack([cut_out(pixels, box) for box in boxes])[..., np.newaxis]
    rows = classify_faces(model, crops).tolist()
    return [{"face": number, "box": box, "emotion": emotions[np.argmax(row)],
             "confidence": max(row), "probabilities": dict(zip(emotions, row))}
            for number, (box, row) in enumerate(zip(boxes, rows), 1)]


def occlusion_map(model, face, label):
    """Return how much each part of a face supports an emotion (48 x 48).

    Takes the network's input (uint8, 48 x 48) and the index of the emotion.  A square of
    8 x 8 pixels in the face's mean grey is moved to 11 x 11 positions, 4 pixels apart.  The
    value of a pixel is the mean decrease in the emotion's probability over the squares that cover
    the pixel, for a single view.
    Zeiler and Fergus (2014), arXiv:1311.2901; tests/measure/heat_maps.py compares with Grad-CAM.
    """
    corners = [(top, left) for top in range(0, SIZE - 7, 4) for left in range(0, SIZE - 7, 4)]
    covered = np.repeat(face[np.newaxis, :, :, np.newaxis].astype("float32"), len(corners) + 1, 0)
    for image, (top, left) in zip(covered, corners):  # the last image remains uncovered
        image[top:top + 8, left:left + 8] = face.mean()
    probabilities = model.predict_on_batch(covered)[:, label]
    decreases, covers = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE))
    for decrease, (top, left) in zip(probabilities[-1] - probabilities, corners):
        decreases[top:top + 8, left:left + 8] += decrease
        covers[top:top + 8, left:left + 8] += 1
    return decreases / np.maximum(covers, 1)


@plot_style()
def draw_photo(photo, faces, model, path):
    """Save a picture of a photo (PIL image) with a row below it for each of its first 20 faces.

    A row shows the network's input, the same with its `occlusion_map` in orange, and the
    probabilities.  Takes the faces of `classify_photo`.
    """
    width, height = photo.size
    shown = faces[:20]
    row_height = np.clip(4 / len(shown), 0.85, 1.3)  # inches
    heights = [np.clip(8 * height / width, 3, 10), *[row_height] * len(shown)]
    figure = Figure(figsize=(10, sum(heights) + 1.1), layout="constrained")  # 1.1 for the emotions
    grid = figure.add_gridspec(len(heights), 3, width_ratios=(row_height, row_height, 5.5),
                               height_ratios=heights)
    scene = figure.add_subplot(grid[0, :])
    scene.imshow(photo.reduce(math.ceil(max(photo.size) / 1280)), extent=(0, width, height, 0))
    scene.set_axis_off()
    scene.autoscale(False)
    is_crowd = len(faces) > len(shown)
    if is_crowd:
        scene.set_title(f"{len(faces)} faces; the first {len(shown)} are shown below", size=13)
    for face in faces:
        left, top, right, bottom = face["box"]
        if face["box"] != (0, 0, width, height):  # no frame around the whole photo
            scene.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False,
                                      color=SKY_BLUE, linewidth=2))
            scene.text(max(left, 0), max(top, 0), f"{face['face']} {face['emotion']}", va="bottom",
                       size=5 if is_crowd else 11,
                       bbox={"color": SKY_BLUE, "pad": 1 if is_crowd else 4})
    pixels = np.asarray(photo)
    # From transparent to 80 % opaque.
    heat = LinearSegmentedColormap.from_list("heat", [VERMILION + "00", VERMILION + "D0"])
    for number, face in enumerate(shown, 1):
        crop = cut_out(pixels, face["box"])
        heat_map = occlusion_map(model, crop, list(face["probabilities"]).index(face["emotion"]))
        plain = figure.add_subplot(grid[number, 0], **NO_AXES)
        marked = figure.add_subplot(grid[number, 1], **NO_AXES)
        plain.set_ylabel(f"{number} {face['emotion']}", rotation=0, ha="right", va="center")
        for axes in plain, marked:
            axes.imshow(crop, cmap="gray", vmin=0, vmax=255)
        strongest = max(heat_map.max(), 0.01)  # keeps drops of less than a percentage point faint
        marked.imshow(heat_map, cmap=heat, vmin=0, vmax=strongest)
        if number == 1:
            plain.set_title("input", size=11)
            marked.set_title("evidence", size=11)
    table = figure.add_subplot(grid[1:, 2])
    shares = np.array([list(face["probabilities"].values()) for face in shown])
    draw_table(table, shares, [], faces[0]["probabilities"])
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)


def save_picture(photo, faces, model, path, output_dir):
    """Save a picture of a photo in predictions/; return whether this succeeded."""
    # The checksum distinguishes photos with the same name.  A file name must not exceed 255 bytes.
    path_checksum = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    picture = Path(output_dir, "predictions", f"{path.stem[:50]}-{path_checksum}.emotions.jpg")
    try:
        draw_photo(photo, faces, model, picture)
    except OSError as error:  # the folder is read-only, for example
        print(f"error: {picture} cannot be written: {error.strerror or error}", file=sys.stderr)
        return False
    print(f"  picture: {picture}")
    return True


def find_photos(paths):
    """Return the photos in a list of paths, patterns and folders, without the script's pictures."""
    photos = []
    for name in paths:
        # On Windows, the shell does not expand patterns such as *.jpg.
        names = [name] if os.path.exists(name) else sorted(glob.glob(str(name))) or [name]
        for path in map(Path, names):
            found, others = find_images(path) if path.is_dir() else ([path], [])
            report_skipped(path, found, others)
            found = [photo for photo in found if not photo.name.endswith(".emotions.jpg")]
            photos += found or [path]  # a folder without photos is reported as unreadable later
    return photos


def predict_emotions(paths, output_dir="output", detect=True, as_json=False):
    """Classify the faces in photos and in folders of photos with the network in `output_dir`.

    If there is no network, uses the one in docs/runs.  Prints a line per face and draws a picture
    per photo in predictions/; with `as_json`, only prints a JSON object per face.  Prints a line to
    stderr for each photo that cannot be read or has no face, and for each picture that cannot be
    written.  Returns whether all photos were read and all pictures written.  Raises InputError if
    the network or the face detector cannot be loaded.
    """
    network = Path(output_dir, NETWORK_FILE)
    if not network.exists():
        network = Path(__file__).resolve().parent / "docs" / "runs" / "88-0" / NETWORK_FILE
        print(f"no network in {output_dir} yet: using {network}", file=sys.stderr)
    model, emotions = load_network(network)
    photos, succeeded = find_photos([paths] if isinstance(paths, (str, Path)) else paths), True
    for number, path in enumerate(photos, 1):
        try:
            photo = open_image(path)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            succeeded = False
            continue
        faces = classify_photo(photo, model, emotions, detect)
        if not faces:
            print(f"{path}: no face found; --no-detect classifies the whole photo", file=sys.stderr)
        elif as_json:
            for face in faces:
                print(json.dumps({"file": str(path), **face}))
        else:
            for face in faces:
                shares = ", ".join(f"{emotion} {share:.1%}"
                                   for emotion, share in face["probabilities"].items())
                print(f"{number}/{len(photos)} {path}, face {face['face']}: {face['emotion']} "
                      f"{face['confidence']:.1%}  ({shares})")
            succeeded &= save_picture(photo, faces, model, path, output_dir)
    return succeeded


# --- Cartoon faces --------------------------------------------------------------------------------
# After the action units of Ekman and Friesen's Facial Action Coding System.  Relative to half the
# face: how far the ends of the brows are raised, half the height of the eyes, half the width of the
# mouth.  Relative to the width of the mouth: its curve and its opening.
#             inner  outer
#             brow   brow   eye   smile opening mouth
EXPRESSIONS = {
    "angry":    (-0.16,  0.06, 0.07, -0.35, 0.10, 0.39),
    "disgust":  (-0.08, -0.02, 0.04, -0.20, 0.35, 0.34),
    "fear":     ( 0.16,  0.00, 0.15, -0.15, 0.45, 0.49),
    "happy":    ( 0.04,  0.04, 0.09,  0.55, 0.35, 0.52),
    "neutral":  ( 0.00,  0.00, 0.09,  0.00, 0.10, 0.39),
    "sad":      ( 0.14, -0.10, 0.06, -0.50, 0.10, 0.34),
    "surprise": ( 0.20,  0.20, 0.15,  0.00, 1.60, 0.22),
}
SPREAD = (0.03, 0.03, 0.015, 0.1, 0.04, 0.03)  # standard deviation of each column


def draw_face(emotion, rng):
    """Draw a face (PIL image, 48 x 48, grey) with random shape, position, lighting and noise."""
    inner, outer, eye, smile, opening, mouth = EXPRESSIONS[emotion] + rng.normal(0, SPREAD)
    eye = max(eye, 0.02)
    background, skin, dark = map(int, rng.uniform((20, 110, 15), (235, 230, 80)))
    # The face is drawn four times as large as the image; lengths are in these pixels (x, y).
    middle = rng.normal(96, 6, 2)
    half = rng.uniform((56, 72), (72, 88))
    image = Image.new("L", (192, 192), background)
    draw = ImageDraw.Draw(image)

    def place(*points):  # points relative to the middle, in units of half
        return [tuple(middle + half * point) for point in points]

    draw.ellipse(place((-1, -1), (1, 1)), skin)
    for side in (-0.42, 0.42):
        for width, shade in (0.2, min(255, skin * 5 // 4)), (0.09, dark // 2):  # white, iris
            draw.ellipse(place((side - width, -0.16 - eye), (side + width, -0.16 + eye)),
                         shade, outline=dark, width=3)
        draw.line(place((0.43 * side, -0.36 - inner), (1.62 * side, -0.36 - outer)), dark, width=7)
    if emotion == "disgust":  # wrinkles
        for y in (-0.14, -0.03, 0.08):
            draw.line(place((-0.24, y), (0, y - 0.06), (0.24, y)), dark, width=4)
    across = np.linspace(-1, 1, 15)
    line = 0.52 + 0.8 * mouth * smile * (0.5 - across**2)
    gap = 0.4 * mouth * max(opening, 0.1) * (1 - across**2) + 0.025
    lips = [*zip(mouth * across, line - gap), *zip(mouth * across[::-1], (line + gap)[::-1])]
    draw.polygon(place(*lips), dark // 2)
    image = image.rotate(rng.normal(0, 7), Image.Resampling.BILINEAR, fillcolor=background)
    light = rng.uniform(0.6, 1.1) * (1 + np.linspace(-1, 1, SIZE) * rng.normal(0, 0.25))
    pixels = light * image.resize((SIZE, SIZE)) + rng.normal(0, 12, (SIZE, SIZE))
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def draw_faces(folder, seed):
    """Save cartoon faces in `folder`, with the layout and the file names of Kaggle's FER-2013."""
    print("Drawing faces (accuracy on cartoon faces says nothing about real faces)")
    rng = np.random.default_rng(seed)
    for part, prefix, count in (("train", "Training", 300), ("test", "PublicTest", 50),
                                ("test", "PrivateTest", 50)):
        for emotion in EXPRESSIONS:
            emotion_dir = Path(folder, part, emotion)
            emotion_dir.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw_face(emotion, rng).save(emotion_dir / f"{prefix}_{number}.jpg")


# --- Command line ---------------------------------------------------------------------------------
def hardware_name():
    """Return the name of the GPU, or of the CPU if there is no GPU."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    name = CPU_INFO.partition("model name\t: ")[2].partition("\n")[0]
    return name or platform.processor() or platform.machine()


def fastest_precision():
    """Return the dtype policy that trains fastest on this machine."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        has_tensor_cores = details.get("compute_capability", (0, 0)) >= (7, 0)
        return "mixed_float16" if has_tensor_cores else "float32"
    # On Intel CPUs without AMX, bfloat16 takes 1.4 times as long as float32.
    is_fast = "amx_bf16" in CPU_INFO or ("AMD" in CPU_INFO and "avx512_bf16" in CPU_INFO)
    return "mixed_bfloat16" if is_fast else "float32"


def number_between(low, high, to_number):
    """Return a type for argparse: numbers from `low` to `high`; `to_number` is int or float."""
    def number(text):
        if not low <= to_number(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return to_number(text)
    return number


def parse_command_line(arguments):
    """Return the options; exit with a usage message if they are invalid."""
    parser = argparse.ArgumentParser(description="Train a network to recognise facial emotions, or "
                                     "classify photos with it.", allow_abbrev=False)
    training = parser.add_argument_group("training")
    data = training.add_mutually_exclusive_group()
    data.add_argument("--data-dir", type=os.path.abspath, metavar="DIR",
                      help="folder that contains train/ and test/ (default: data or, if it is "
                      "missing, a download of FER-2013)")
    data.add_argument("--demo", action="store_true", help="train on cartoon faces, "
                      "download nothing")
    training.add_argument("--crop-faces", action="store_true",
                          help="cut out the largest face of each image; skip images without one")
    training.add_argument("--epochs", type=number_between(1, 100_000, int), metavar="N",
                          help=f"passes over the training images (default: {EPOCHS}; demo: 4)")
    training.add_argument("--batch-size", type=number_between(2, 100_000, int), metavar="N",
                          default=BATCH_SIZE,
                          help="images per training step (default: %(default)s)")
    training.add_argument("--learning-rate", type=number_between(1e-9, 1e3, float), metavar="X",
                          default=LEARNING_RATE, help="initial learning rate; decays to 0 along a "
                          "cosine (default: %(default)s)")
    training.add_argument("--precision", choices=("float32", "mixed_bfloat16", "mixed_float16"),
                          help="dtype policy of Keras (default: the fastest on this machine)")
    training.add_argument("--seed", type=number_between(0, 2**31 - 1, int), default=0, metavar="N",
                          help="random seed (default: %(default)s)")
    training.add_argument("--resume", action="store_true",
                          help="continue the interrupted run in --output-dir with its settings")
    prediction = parser.add_argument_group("prediction")
    prediction.add_argument("--predict", nargs="+", action="extend", metavar="PHOTO",
                            help="classify the faces in photos or in folders of photos")
    prediction.add_argument("--no-detect", action="store_true",
                            help="treat each photo as a single face; use it when no face is found")
    prediction.add_argument("--json", action="store_true",
                            help="print a JSON object per face; save no pictures")
    parser.add_argument("--output-dir", metavar="DIR",
                        help="folder of the network and all results (default: output, or demo "
                        "with --demo)")
    options = parser.parse_args(arguments)
    if "" in arguments:  # for example, a shell variable that is not set
        parser.error("an argument is empty. Remove it")
    # The names of the given options, as --name value or --name=value.
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    if options.predict:
        useless = given - {"--predict", "--no-detect", "--json", "--output-dir", "--demo"}
    elif options.resume:
        useless = given - {"--resume", "--data-dir", "--output-dir", "--demo"}
    else:
        useless = given & {"--no-detect", "--json"}
    if useless:
        parser.error(f"remove {', '.join(sorted(useless))}: no effect in this command")
    output_dir, epochs = ("demo", 4) if options.demo else ("output", EPOCHS)
    options.output_dir = options.output_dir or output_dir
    options.epochs = options.epochs or epochs
    return options


def end_program(reason, status, checkpoint=None):
    """Print one line, which says how to resume if there is a checkpoint, and exit."""
    if checkpoint and checkpoint.exists():
        reason += f"; continue with --resume --output-dir {checkpoint.parent.parent}"
    if status == 130 and sys.stderr.isatty():
        print(file=sys.stderr)  # ends the line of the progress bar
    print(reason, file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def program_errors(options, checkpoint):
    """Report Ctrl-C, and errors that the user can fix, in one line; then exit."""
    resumable = None if options.predict else checkpoint
    interrupted = False

    def interrupt(number, frame):
        nonlocal interrupted
        interrupted = True  # TensorFlow may turn KeyboardInterrupt into another error
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would print a traceback
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set above, before the imports
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BrokenPipeError:  # the program that reads the output, such as `head`, has ended
        os._exit(141)  # the status that a shell reports for SIGPIPE; below, 130 for SIGINT
    except BaseException as error:
        if interrupted:
            end_program("interrupted", 130, resumable)
        if isinstance(error, InputError):
            end_program(f"error: {error}", 2)
        if isinstance(error, OSError):  # the disk is full, for example
            end_program(f"error: {error.filename or options.output_dir}: "
                        f"{error.strerror or error}", 2, resumable)
        raise


def restore_options(options, checkpoint):
    """Set the options to those of an interrupted run; return its training time, in seconds."""
    state, _ = load_checkpoint(checkpoint, with_arrays=False)
    saved = state["run"] | (state["source"] or {})
    for name in set(saved) & set(SETTINGS):
        setattr(options, name, saved[name])
    options.data_dir = options.data_dir or saved.get("data_dir")  # the dataset may have been moved
    return sum(state["history"].get("seconds", []))


def save_results(output_dir, model, options, data, history, scores, seconds):
    """Save history.csv, and metrics.json with the settings of the run and all scores."""
    with atomic_write(output_dir / "history.csv") as temporary:
        with open(temporary, "w", newline="") as file:
            # The names of the columns, and a row per epoch.
            csv.writer(file).writerows([history, *zip(*history.values())])
    best = int(np.argmax(history["val_accuracy"]))
    metrics = {
        "settings": {name: getattr(options, name) for name in SETTINGS}
        | {"weight_decay": WEIGHT_DECAY},
        "images": {part: len(getattr(data, part).images)
                   for part in ("training", "validation", "test")},
        "network": {"parameters": model.count_params(),
                    "megabytes": round((output_dir / NETWORK_FILE).stat().st_size / 1e6, 1)},
        "test": scores,
        "best_epoch": history["epoch"][best],
        "validation": {"accuracy": history["val_accuracy"][best],
                       "loss": history["val_loss"][best]},
        "seconds": round(seconds, 1),
        "processor": hardware_name(),
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__,
                     "keras": keras.__version__},
    }
    with atomic_write(output_dir / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")


def remove_checkpoint(checkpoint, history):
    """Remove the checkpoint of a finished run, the plots beside it, and their folder."""
    try:
        for name in CHECKPOINT_FILE, *(f"{metric}.png" for metric in plotted_metrics(history)):
            checkpoint.with_name(name).unlink(missing_ok=True)
            for temporary in checkpoint.parent.glob(f".*{name}"):  # from runs that were killed
                temporary.unlink()
        checkpoint.parent.rmdir()
    except OSError as error:  # it contains another file, or another program has it open
        print(f"{checkpoint.parent} could not be removed ({error.strerror}). You can delete it",
              file=sys.stderr)


if __name__ == "__main__":
    started = time.perf_counter()
    options = parse_command_line(sys.argv[1:])
    output_dir = Path(options.output_dir)
    checkpoint = output_dir / "unfinished" / CHECKPOINT_FILE
    with program_errors(options, checkpoint), tempfile.TemporaryDirectory() as demo_dir:
        if options.predict:
            succeeded = predict_emotions(options.predict, output_dir, detect=not options.no_detect,
                                        as_json=options.json)
            sys.exit(0 if succeeded else 2)
        if options.resume:
            started -= restore_options(options, checkpoint)  # earlier training counts, too
        else:
            check_no_checkpoint(checkpoint)
        if not (options.demo or options.data_dir):
            options.data_dir = os.path.abspath(find_dataset())
        options.precision = options.precision or fastest_precision()
        print(f"{hardware_name()}, {options.precision}")
        keras.utils.set_random_seed(options.seed)
        keras.config.set_dtype_policy(options.precision)
        if options.demo:
            draw_faces(demo_dir, options.seed)
        data = load_data(options.data_dir or demo_dir, options.crop_faces)
        model = create_CNN(len(data.emotions), options.epochs)
        history = train_model(
            model, data, epochs=options.epochs, batch_size=options.batch_size,
            learning_rate=options.learning_rate, seed=options.seed, checkpoint=checkpoint,
            resume=options.resume, source={"data_dir": options.data_dir, "demo": options.demo,
                                           "crop_faces": options.crop_faces})
        save_network(model, data.emotions, output_dir / NETWORK_FILE)
        scores, probabilities = evaluate_model(model, data)
        save_results(output_dir, model, options, data, history, scores,
                     seconds=time.perf_counter() - started)
        plot_performance(history, scores, output_dir)
        plot_examples(data, probabilities, output_dir)
        plot_filters(model, data, output_dir)
        remove_checkpoint(checkpoint, history)
        plots = *plotted_metrics(history), "confusion_matrix", "examples", "filters"
        print(f"\nSaved in {output_dir}: {NETWORK_FILE}, metrics.json, history.csv, "
              f"{'.png, '.join(plots)}.png")
