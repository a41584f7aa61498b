"""Train a small convolutional network to recognise facial emotions in FER-2013.

    python emotion_recognition_cnn.py           FER-2013, from data/ or downloaded
    python emotion_recognition_cnn.py --demo    drawn faces, nothing to download
    python emotion_recognition_cnn.py --predict PHOTO    classify faces with what was trained

The network is two convolution blocks, flatten, two dense layers.  Its best epoch is chosen on the
PublicTest images and evaluated once on the PrivateTest images: after 44 epochs, the default, 70.1 %
of them are classified correctly (mean of three seeds, two processor cores; see docs/RESULTS.md).
Plots, scores and the network are left in output/.

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

# False if imported, or run in a notebook with %run.  Asked before Keras, which imports IPython.
IS_PROGRAM = __name__ == "__main__" and "IPython" not in sys.modules
if IS_PROGRAM:
    os.environ["MPLBACKEND"] = "agg"  # Jupyter names its own to all programs that it starts
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else: in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without traceback
os.environ["KERAS_BACKEND"] = "tensorflow"
# Without oneDNN, bfloat16 is up to 60 times slower, and TensorFlow's own messages suggest 0.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# By default, TensorFlow takes all the memory of a GPU, which other notebooks may use as well.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

# TensorFlow logs some lines before it reads TF_CPP_MIN_LOG_LEVEL: stderr leads nowhere meanwhile.
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

tf.get_logger().setLevel("ERROR")  # it warns when several networks are traced, one after another
# A user's keras.json may say otherwise.
keras.config.set_image_data_format("channels_last")
keras.config.set_floatx("float32")
keras.config.set_epsilon(1e-7)

SIZE = 48  # pixels: height and width of the images of FER-2013
LARGEST_CROP = 64  # pixels: images of up to this size are faces, cut out already
PIXELS_TO_SEARCH = 1280 * 960  # larger photos are scaled to this area, in which faces are searched
# Arguments of ImageDataGenerator, for the training images alone: any of those in AFFINE.
AUGMENTATION = {"horizontal_flip": True, "rotation_range": 10, "width_shift_range": 0.1,
                "height_shift_range": 0.1, "zoom_range": 0.1}
AFFINE = {"horizontal_flip", "vertical_flip", "rotation_range", "width_shift_range",
          "height_shift_range", "shear_range", "zoom_range"}  # shifts as shares of the image
EPOCHS = 44
BATCH_SIZE = 128
LEARNING_RATE = 0.006
PROGRESS = 1 if sys.stdout.isatty() else 2  # `verbose` of fit(): a bar, or a line per epoch

NETWORK = "emotion_recognition_cnn.keras"
CHECKPOINT = "checkpoint.npz"

# Pillow recognises videos and scientific data, too, but cannot decode them.
IMAGE_ENDINGS = {".heic", ".heif"} | {
    ending for ending, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in ("BUFR", "GRIB", "HDF5", "MPEG")}
# Pillow refuses more than twice this; phones take photos of 200 megapixels.
Image.MAX_IMAGE_PIXELS = 125_000_000

# From the palette of Okabe and Ito: colour-blind readers can tell these apart.
BLUE, VERMILION, SKY_BLUE = "#0072B2", "#D55E00", "#56B4E9"
BARE = {"xticks": [], "yticks": [], "frame_on": False}  # axes that show an image, and no scale


class InputError(Exception):
    """Something that the user can mend: one line that names it and says what to do."""


def optional_package(name, purpose):
    """Return a package that only a part of the script needs; InputError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{purpose} needs the package {name} ({error}): install it with "
                         f"pip install {name}") from error


# --- Data -----------------------------------------------------------------------------------------
class LabelledImages(NamedTuple):
    """Images and what they show."""

    images: np.ndarray  # uint8, n x 48 x 48 x 1
    labels: np.ndarray  # int, n: indices into the emotions
    clean: np.ndarray  # bool, n; of test images: False where the same image is also in train/


class Data(NamedTuple):
    """A dataset in memory."""

    emotions: list  # names, sorted
    augmentation: ImageDataGenerator  # draws the transforms of the training images
    training: LabelledImages
    validation: LabelledImages
    test: LabelledImages


def find_dataset():
    """Return data/, or FER-2013 downloaded into kagglehub's cache; InputError where that fails."""
    if Path("data").exists():
        return "data"
    try:
        kagglehub = optional_package("kagglehub", "the download")
        # With its version, a copy in the cache is found without a network, too.
        return kagglehub.dataset_download("msambare/fer2013/versions/1")
    except Exception as error:  # from any layer: network, HTTP status, archive, disk, cache
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"no data/ folder, and no download of FER-2013 ({reason}). Ways on: get "
            "https://www.kaggle.com/datasets/msambare/fer2013 by hand and unpack it into data/, "
            "name its folder with --data-dir, or try drawn faces with --demo") from error


def find_folders(data_dir):
    """Return the folders of training, validation (if there is one) and test images."""
    validation = [data_dir / name for name in ("val", "valid", "validation")
                  if (data_dir / name).is_dir()]
    folders = data_dir / "train", *validation, data_dir / "test"
    for folder in folders:
        if not folder.is_dir():
            holds = sorted(path.name for path in data_dir.glob("*"))[:8]
            raise InputError(f"{folder} is missing: name the folder that holds train/ and test/, "
                             f"unpacked, with --data-dir; {data_dir} holds {holds}")
    if len(validation) > 1:
        raise InputError(f"{validation[0]} and {validation[1]} both exist: keep one of them")
    return folders


def find_emotions(folders):
    """Return the names of the folders in each of `folders`, sorted.

    Raises InputError if these are not the same in all, too few or cannot be printed.
    """
    names = [{path.name for path in folder.glob("[!.]*") if path.is_dir()} for folder in folders]
    for folder, found in zip(folders, names):
        missing = set.union(*names) - found
        if missing:
            raise InputError(f"{folder / min(missing)} is missing: "
                             f"{' and '.join(f'{folder.name}/' for folder in folders)} must hold "
                             "the same folders, one per emotion")
    emotions = sorted(names[0])
    if len(emotions) < 2:
        raise InputError(f"{folders[0]} must hold a folder for each of two or more emotions")
    if not "".join(emotions).isprintable():
        raise InputError(f"{folders[0]} holds a folder whose name cannot be printed: {emotions}")
    return emotions


def find_images(folder):
    """Return the images in a folder, however deep, sorted; count on stderr what else is there."""
    visible = [path for path in sorted(folder.rglob("*")) if path.is_file()
               and not any(name.startswith(".") for name in path.relative_to(folder).parts)]
    images = [path for path in visible if path.suffix.lower() in IMAGE_ENDINGS]
    if len(images) < len(visible):
        endings = sorted({path.suffix for path in visible} - {path.suffix for path in images})
        print(f"{folder}: {len(visible) - len(images)} of {len(visible)} files passed over, no "
              f"images by their endings ({', '.join(endings)})", file=sys.stderr)
    return images


def to_uint8(array):
    """Return an image (H x W, H x W x 1 or H x W x 3; uint8, or floats from 0 to 255) as uint8."""
    if array.shape[2:] == (1,):
        array = array[:, :, 0]
    has_pixels = array.ndim == 2 or array.shape[2:] == (3,)
    highest = array.max(initial=0)  # floats of up to 1 are scaled to another range
    if np.issubdtype(array.dtype, np.floating) and (highest == 0 or 1 < highest <= 255):
        array = array.round().astype("uint8") if array.min(initial=0) >= 0 else array
    if not has_pixels or array.dtype != "uint8":
        raise ValueError("an array must be H x W, H x W x 1 or H x W x 3 (RGB), of uint8 or of "
                         f"floats from 0 to 255; this one is {array.dtype} "
                         f"{' x '.join(map(str, array.shape))}")
    return array


def open_image(photo):
    """Return a photo upright, as a PIL image in RGB.

    Takes a path, an open file, a PIL image or an array as `to_uint8` does.  Raises InputError if it
    is none of these or cannot be read.
    """
    try:
        if isinstance(photo, np.ndarray):
            image = Image.fromarray(to_uint8(photo))
        elif isinstance(photo, Image.Image):
            image = photo
        elif isinstance(photo, (str, os.PathLike)) or hasattr(photo, "read"):
            if str(photo).lower().endswith((".heic", ".heif")):  # of iPhones
                optional_package("pi_heif", "opening it").register_heif_opener()
            image = Image.open(photo)
        else:
            raise TypeError("it must be a path, a PIL image or an array")
        if image.mode.startswith(("I", "F")):
            raise ValueError("it has more than 8 bits a channel: convert it")
        image.load()
        with contextlib.suppress(Exception):  # where only the Exif data are damaged
            image = ImageOps.exif_transpose(image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds on a broken file
        name = photo if isinstance(photo, (str, Path)) else f"this {type(photo).__name__}"
        reason = " ".join(str(error).split())  # in one line
        raise InputError(f"{name} cannot be read as an image: {reason}") from error


def face_pixels(face):
    """Return the picture of a face (PIL image) as the network sees it: 48 x 48, grey, uint8."""
    return np.asarray(face.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def read_faces(paths, crop_faces):
    """Read images as the network sees them: a list of arrays (uint8, 48 x 48).

    With `crop_faces`, cuts out the largest face of each; None stands for an image without one.
    """
    def read(path):
        photo = open_image(path)
        boxes = find_faces(photo) if crop_faces else [(0, 0, *photo.size)]
        largest = max(boxes, key=lambda box: box[2] - box[0], default=None)
        face = cut_out(np.asarray(photo), largest) if largest else None
        return face, max(photo.size) > LARGEST_CROP

    faces, large = [], 0
    progress = keras.utils.Progbar(len(paths), verbose=1 if sys.stdout.isatty() else 0)
    # A network drive waits for each file; MTCNN takes all cores for a single one.
    with ThreadPoolExecutor(1 if crop_faces else 8) as threads:
        for face, is_large in threads.map(read, paths):
            faces.append(face)
            large += is_large
            progress.add(1)
    if large and not crop_faces:
        print(f"{large:,} of {len(paths):,} images are larger than {LARGEST_CROP} pixels and are "
              "scaled as they are: if they show more than a face, use --crop-faces")
    return faces


def read_images(folder, emotions, crop_faces=False):
    """Read the images in the folders of the emotions, which lie in `folder`.

    With `crop_faces`, cuts out the largest face of each, and skips images without one.  Returns
    paths, images (uint8, n x 48 x 48 x 1) and labels (int, n).  Raises InputError where an emotion
    has no images or an image cannot be read.
    """
    paths, labels = [], []
    for label, emotion in enumerate(emotions):
        found = find_images(folder / emotion)
        if not found:
            raise InputError(f"{folder / emotion} holds no images, such as .jpg or .png")
        paths += found
        labels += [label] * len(found)
    faces = read_faces(paths, crop_faces)
    kept = [i for i, face in enumerate(faces) if face is not None]
    if len(kept) < len(paths):
        print(f"{folder}: skipped {len(paths) - len(kept):,} of {len(paths):,} images, in which no "
              "face was found")
    labels = np.array(labels)[kept]
    without = set(range(len(emotions))) - set(labels)
    if without:
        raise InputError(f"{folder / emotions[min(without)]}: no face was found in any image")
    return [paths[i] for i in kept], np.stack([faces[i] for i in kept])[..., np.newaxis], labels


def split(part, chosen):
    """Return LabelledImages in two parts: those chosen by a mask (bool, n), and the others."""
    return (LabelledImages(*(array[chosen] for array in part)),
            LabelledImages(*(array[~chosen] for array in part)))


def hold_out_validation(training, test, test_paths):
    """Return training, validation and test images, where there is no folder for validation.

    These are the PublicTest images of test/.  Where file names do not tell these, they are every
    tenth image of each emotion in train/.
    """
    prefixes = np.array([path.name.partition("_")[0] for path in test_paths])
    is_official = np.isin(prefixes, ("PublicTest", "PrivateTest"))
    if is_official.any() and not is_official.all():
        raise InputError(f"{test_paths[np.argmin(is_official)]}: its name is neither PublicTest_* "
                         f"nor PrivateTest_*, unlike {is_official.sum():,} others. Rename or "
                         "remove it")
    if set(prefixes) == {"PublicTest", "PrivateTest"}:
        return training, *split(test, prefixes == "PublicTest")
    print("test/ does not tell PublicTest from PrivateTest images by name: a tenth of train/ is "
          "held out for validation, all of test/ is the test set")
    # Counted from 0 in each emotion; never the first, as it may be the only one.
    number = np.concatenate([np.arange(count) for count in np.bincount(training.labels)])
    validation, training = split(training, number % 10 == 1)
    if not len(validation.images):
        raise InputError("train/ holds too few images to hold some out")
    return training, validation, test


def check_augmentation():
    """Raise InputError if AUGMENTATION holds what `random_transforms` does not draw."""
    for name, value in AUGMENTATION.items():
        if name not in AFFINE:
            raise InputError(f"AUGMENTATION: {name} is not affine: make it a layer in create_CNN")
        if "shift" in name and not (np.isscalar(value) and 0 <= value < 1):
            raise InputError(f"AUGMENTATION: {name} must be a share of the image, such as 0.1")


def load_data(data_dir, crop_faces=False):
    """Load FER-2013, or a dataset of the same layout, into memory.

    The emotions are the folders of train/, as in Keras's flow_from_directory.  Validation is val/,
    valid/ or validation/; without these, as `hold_out_validation` says.  With `crop_faces`, the
    largest face of each image is cut out, as `find_faces` frames it for predictions.

    Returns Data.  Raises InputError as `find_folders`, `find_emotions`, `read_images` and
    `hold_out_validation` do, and where AUGMENTATION is not affine.
    """
    check_augmentation()
    folders = find_folders(Path(data_dir))
    print(f"Reading {data_dir}: {', '.join(folder.name for folder in folders)}")
    emotions = find_emotions(folders)
    print(f"{len(emotions)} emotions: {', '.join(emotions)}")
    parts, in_train = [], set()
    for folder in folders:
        paths, images, labels = read_images(folder, emotions, crop_faces)
        clean = np.array([image.tobytes() not in in_train for image in images])
        in_train = in_train or {image.tobytes() for image in images}  # of the first folder
        parts.append(LabelledImages(images, labels, clean))
    if len(parts) == 2:
        parts = hold_out_validation(*parts, paths)
    training, validation, test = parts
    print(f"{len(training.images):,} training, {len(validation.images):,} validation and "
          f"{len(test.images):,} test images; {np.sum(~test.clean):,} of the test images also "
          "stand in train/")
    return Data(emotions, ImageDataGenerator(**AUGMENTATION), training, validation, test)


# --- Network --------------------------------------------------------------------------------------
def create_CNN(classes, epochs=EPOCHS):
    """Return the network, not yet compiled, for a training of so many epochs.

    It takes images (n x 48 x 48 x 1, pixels 0-255) and gives probabilities (n x classes).
    """
    dropout = min(epochs / 88, 1)  # the shorter a run, the less it overfits
    return keras.Sequential([
        keras.Input((SIZE, SIZE, 1)),
        # Each image to mean 0 and variance 1: light and contrast of the photo cancel out.
        layers.GroupNormalization(groups=1, center=False, scale=False),
        # Pooling comes before normalisation and ReLU, which leaves them a ninth of the work.
        layers.Conv2D(32, 5, padding="same", use_bias=False),
        layers.MaxPooling2D(4, strides=3, padding="same"),  # 48 x 48 to 16 x 16
        layers.LayerNormalization(),  # over the channels at each place: local contrast cancels out
        layers.ReLU(),
        layers.Conv2D(384, 3, use_bias=False),
        layers.MaxPooling2D(7, strides=3, padding="same"),  # 14 x 14 to 5 x 5
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.SpatialDropout2D(0.18 * dropout),  # whole maps: neighbours in one are alike
        layers.Flatten(),
        layers.Dense(512, use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Dropout(0.4 * dropout),
        layers.Dense(classes, activation="softmax", dtype="float32"),
    ])


# --- Training -------------------------------------------------------------------------------------
def random_transforms(generator, count, random):
    """Draw the transforms of `count` images at once, as an ImageDataGenerator draws each.

    Returns arguments of `affine_matrices`: a dict of arrays (count).  The numbers are those of
    `generator.get_random_transform`, which draws from NumPy's global state instead of `random` (a
    RandomState), and takes half a second for FER-2013.
    """
    reaches = {"theta": generator.rotation_range, "tx": generator.height_shift_range,
               "ty": generator.width_shift_range, "shear": generator.shear_range}
    limits = {name: (-reach, reach) for name, reach in reaches.items() if reach}
    if tuple(generator.zoom_range) != (1, 1):
        limits |= {"zx": generator.zoom_range, "zy": generator.zoom_range}
    limits |= {"flip_horizontal": (0, 1), "flip_vertical": (0, 1)}
    low, high = np.transpose(list(limits.values()))
    numbers = low + (high - low) * random.random_sample((count, len(limits)))
    drawn = dict(zip(limits, numbers.T))
    for shift in {"tx", "ty"} & set(limits):
        drawn[shift] *= SIZE
    drawn["flip_horizontal"] = (drawn["flip_horizontal"] < 0.5) & generator.horizontal_flip
    drawn["flip_vertical"] = (drawn["flip_vertical"] < 0.5) & generator.vertical_flip
    return drawn


def affine_matrices(theta=0, tx=0, ty=0, shear=0, zx=1, zy=1, flip_horizontal=False,
                    flip_vertical=False):
    """Return transforms of ImageDataGenerator as matrices (n x 8) of Keras's affine_transform.

    Takes what `get_random_transform` returns, each one number or one for each image (n).  The
    product is that of `apply_transform`: rotation, shift, shear, zoom and flips, about the middle
    of the image.  A matrix takes a pixel (x, y) of the result to its place in the image.
    """
    def matrices(*two_rows):  # n x 3 x 3; the third row is always the same
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
    """Apply `affine_matrices` to images (n x 48 x 48 x 1); the edge is repeated beyond it."""
    return keras.ops.image.affine_transform(keras.ops.cast(images, "float32"), matrices,
                                            interpolation="bilinear", fill_mode="nearest")


def in_batches(arrays, batch_size):
    """Return arrays (n x ...) in memory as a tf.data.Dataset of batches."""
    options = tf.data.Options()
    # The autotuning thread sleeps for up to a minute, and the end of an epoch would wait for it.
    options.autotune.enabled = False
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size).with_options(options)


def augmented_batches(data, batch_size, seed):
    """Return one epoch of the training images of Data: shuffled, augmented, in batches.

    A tf.data.Dataset of images (float32, n x 48 x 48 x 1) and labels (n).  Order and transforms
    depend on `seed` alone, an int or a sequence of them.
    """
    random = np.random.RandomState(seed)
    order = random.permutation(len(data.training.images))
    matrices = affine_matrices(**random_transforms(data.augmentation, len(order), random))

    def augment(images, labels, matrices):
        return transform_images(images, matrices), labels

    shuffled = data.training.images[order], data.training.labels[order], matrices
    return in_batches(shuffled, batch_size).map(augment).prefetch(2)


def class_weights(labels):
    """Return the weight of an image of each emotion in the loss: {label: weight}.

    Rare emotions weigh more: the weight is the cube root of m / n, where n is the emotion's number
    of images and m the mean of these numbers (scikit-learn's "balanced" is m / n itself), scaled to
    a mean of 1 per image.
    """
    counts = np.bincount(labels)
    weights = np.cbrt(counts.mean() / counts)
    weights /= np.average(weights, weights=counts)
    return dict(enumerate(weights))


def checksum(data):
    """Return the SHA-256 of Data: equal checksums mean equal images and labels."""
    arrays = *data.training, *data.validation, *data.test
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


@contextlib.contextmanager
def whole_file(path):
    """Yield a path to write a file to; at the end of the block it becomes `path`, if all went well.

    Even if the process is killed or the disk is full, `path` holds all or what it held before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, state, arrays):
    """Write what training goes on from: a dict for JSON, and a list of arrays."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, *map(np.asarray, arrays), state=json.dumps(state))
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes its name: the plug may be pulled


def is_checkpoint(path):
    """Return whether a checkpoint was written: an empty file only claims its place."""
    return os.path.exists(path) and os.path.getsize(path) > 0


def load_checkpoint(path, run=None):
    """Return the state and the arrays that `save_checkpoint` wrote.

    Raises InputError if the file does not hold them, or was written by a run with other values than
    those in the dict `run`.
    """
    try:
        with np.load(path) as file:
            arrays = [file[f"arr_{i}"] for i in range(len(file) - 1)]  # as NumPy names them
            state = json.loads(str(file["state"]))
            changed = [name for name in run or {} if state["run"].get(name) != run[name]]
    except Exception as error:  # of zipfile, NumPy or JSON, and whatever else the file may hold
        raise InputError(f"{path} holds no run to go on with ({type(error).__name__}): delete the "
                         "unfinished run, if there is one, and start anew") from error
    if changed:
        raise InputError(f"{path} does not fit: the {' and '.join(changed)} changed since. Bring "
                         "that back as it was, or delete the unfinished run and start anew")
    return state, arrays


def train_model(model, data, epochs=EPOCHS, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE,
                seed=0, checkpoint=None, settings=None):
    """Train `model` on Data with AdamW; the learning rate falls along a cosine over all epochs.

    `checkpoint` is the path of a file that is written after each epoch, with plots beside it.  If
    it exists and is not empty, training goes on from it and ends as if it had never stopped; a
    finished run is not trained again.  `settings` (a dict for JSON) are kept in it for the caller.

    Leaves `model` with the weights of the epoch with the highest validation accuracy, in float32,
    compiled for evaluation.  Returns the history, a dict of lists with a value per epoch.  Raises
    InputError if the loss is not finite, or the checkpoint is damaged or of another run.
    AdamW: Loshchilov and Hutter (2019), arXiv:1711.05101; cosine decay: arXiv:1608.03983.
    """
    steps = epochs * math.ceil(len(data.training.images) / batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    model.compile(keras.optimizers.AdamW(schedule), "sparse_categorical_crossentropy",
                  metrics=["accuracy"])
    model.optimizer.build(model.trainable_variables)  # else it has no variables before a step
    variables = model.variables + model.optimizer.variables
    history, best_weights = {"epoch": []}, model.get_weights()
    if checkpoint:
        run = {"epochs": epochs, "batch size": batch_size, "learning rate": learning_rate,
               "seed": seed, "precision": keras.config.dtype_policy().name,
               "number of parameters": model.count_params(), "augmentation": str(AUGMENTATION),
               "metrics": str(model.get_compile_config()["metrics"]), "images": checksum(data)}
        if is_checkpoint(checkpoint):
            saved, arrays = load_checkpoint(checkpoint, run)
            for variable, array in zip(variables, arrays):
                variable.assign(array)
            history, best_weights = saved["history"], arrays[len(variables):]
        state = {"settings": settings, "run": run, "history": history}  # which grows below
        save_checkpoint(checkpoint, state, variables + best_weights)
    validation = in_batches((data.validation.images, data.validation.labels), 256)
    for epoch in range(len(history["epoch"]), epochs):
        print(f"Epoch {epoch + 1}/{epochs}")  # fit() trains for one, and prints no number
        started, rate = time.perf_counter(), float(model.optimizer.learning_rate)
        batches = augmented_batches(data, batch_size, [seed, epoch])  # shuffled: fit() need not
        row = model.fit(batches, validation_data=validation, shuffle=False, verbose=PROGRESS,
                        class_weight=class_weights(data.training.labels)).history
        if not math.isfinite(row["loss"][0]):
            raise InputError("the loss is NaN or infinite: delete the unfinished run and start "
                             "anew with a lower learning rate")
        row |= {"epoch": [epoch + 1], "learning_rate": [rate],
                "seconds": [round(time.perf_counter() - started, 2)]}
        for name, values in row.items():  # one value each
            history.setdefault(name, []).extend(values)
        if history["val_accuracy"][-1] > max(history["val_accuracy"][:-1], default=-1):
            best_weights = model.get_weights()
        if checkpoint:
            save_checkpoint(checkpoint, state, variables + best_weights)
            with contextlib.suppress(PermissionError):  # on Windows, where a viewer shows one
                plot_history(history, Path(checkpoint).parent)
        minutes = np.mean(history["seconds"]) * (epochs - epoch - 1) / 60
        print(f"about {math.ceil(minutes)} min of training left")
    model.set_weights(best_weights)
    for layer in model.layers:
        layer.dtype_policy = "float32"  # any machine can compute in it
    # SGD has no state: with that of AdamW, the network's file would be three times as large.
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return history


# --- Evaluation -----------------------------------------------------------------------------------
# 18 views of an image: of 44, 48 and 52 of its 48 pixels, each 2 pixels higher, level and 2 lower,
# and all of them mirrored; at another SIZE in proportion.
FLIPS, ZOOMS, HEIGHTS = zip(*itertools.product((False, True), (11 / 12, 1, 13 / 12),
                                               (-SIZE / 24, 0, SIZE / 24)))
VIEWS = affine_matrices(zx=ZOOMS, zy=ZOOMS, ty=HEIGHTS, flip_horizontal=FLIPS)


def classify_faces(model, images):
    """Return the probabilities (n x classes) of images (n x 48 x 48 x 1): the mean over VIEWS."""
    means = []
    for first in range(0, len(images), 8):  # more at once take more memory, and hardly less time
        faces = images[first:first + 8]
        views = transform_images(np.repeat(faces, len(VIEWS), axis=0),
                                 np.tile(VIEWS, (len(faces), 1)))
        probabilities = model.predict_on_batch(views)
        means.append(probabilities.reshape(len(faces), len(VIEWS), -1).mean(axis=1))
    return np.concatenate(means)


def evaluate_model(model, data):
    """Evaluate `model` on the test images of Data; print the scores.

    Returns the scores (a dict) and the probabilities (n x classes).  single_image_accuracy is that
    of the images as they are; all other scores are those of the mean over VIEWS:

    - loss: cross-entropy, in nats
    - balanced_accuracy: the mean of the emotions' recall
    - clean_accuracy: of the images that are not also in train/; None if there are none
    - calibration_error: by how much confidence and accuracy differ, on average over 15 bins of
      equal width: Guo et al. (2017), "On calibration of modern neural networks", arXiv:1706.04599
    - emotions: precision, recall, F1 (0/0 counts as 0) and the number of images of each
    - confusion_matrix: rows are labels, columns predictions
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
    # For each bin of confidence, the sum of correct - confidence over its images.
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
    print(f"\nTest, {len(labels):,} images, {clean.sum():,} of them clean: not in train/\n"
          f"All but the single image accuracy: averaged over {len(VIEWS)} views, "
          f"{milliseconds:.1f} ms an image")
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
    """Draw in Matplotlib's own style, whatever the user's is; their fonts stand in for glyphs."""
    fonts = {name: matplotlib.rcParams[name] for name in ("font.sans-serif", "font.serif")}
    families = dict.fromkeys(["DejaVu Sans", *matplotlib.rcParams["font.family"]])
    with matplotlib.style.context(["default", fonts, {
            "font.family": list(families), "font.size": 15, "figure.dpi": 150, "savefig.dpi": 150,
            "lines.linewidth": 2.5, "text.parse_math": False}]):
        yield


@plot_style()
def plot_history(history, output_dir):
    """Write accuracy.png, loss.png and so on, one a metric: training and validation by epoch."""
    epochs = history["epoch"]
    best = int(np.argmax(history["val_accuracy"]))
    metrics = [name for name in history if f"val_{name}" in history]
    for name in metrics:
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
        with whole_file(Path(output_dir, f"{name}.png")) as temporary:
            figure.savefig(temporary)


def draw_shares(axes, shares, rows, columns):
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
    """Write accuracy.png and loss.png, as `plot_history` does, and confusion_matrix.png."""
    plot_history(history, output_dir)
    confusion = np.array(scores["confusion_matrix"])
    labelled = confusion.sum(axis=1, keepdims=True)
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    axes = figure.subplots()
    draw_shares(axes, confusion / np.maximum(labelled, 1), scores["emotions"], scores["emotions"])
    axes.set(title="Test images", xlabel="predicted", ylabel="labelled")
    with whole_file(Path(output_dir, "confusion_matrix.png")) as temporary:
        figure.savefig(temporary)


@plot_style()
def plot_examples(data, probabilities, output_dir):
    """Write examples.png: of each emotion (rows: labels) the test images classified most surely."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    surest_first = np.argsort(-confidence, kind="stable")
    figure = Figure(figsize=(8, 1.5 * len(data.emotions)), layout="constrained")
    left_half, right_half = figure.subfigures(1, 2)
    left_half.suptitle("Surest and right", color=BLUE)
    right_half.suptitle("Surest and wrong: taken for", color=VERMILION)
    for half, correct in (left_half, True), (right_half, False):
        grid = half.subplots(len(data.emotions), 3, subplot_kw=BARE)
        for label, axes_of_row in enumerate(grid):
            shown = [i for i in surest_first
                     if data.test.labels[i] == label and (predicted[i] == label) == correct]
            for axes, i in zip(axes_of_row, shown):  # zip stops after the three axes
                axes.imshow(data.test.images[i], cmap="gray", vmin=0, vmax=255)
                axes.set_title(f"{data.emotions[predicted[i]]} {confidence[i]:.0%}", size=10)
            if correct:
                axes_of_row[0].set_ylabel(data.emotions[label])
    with whole_file(Path(output_dir, "examples.png")) as temporary:
        figure.savefig(temporary)


def receptive_field(model, layer):
    """Return the receptive field of a layer of a Sequential model: size, step, start; in pixels.

    Place i of its output, along either axis, sees `size` pixels of the image, from start + i * step
    on.  Takes square kernels and pools, without dilation.
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
        if current.padding == "same":  # as TensorFlow pads: the smaller half comes before
            start -= max((math.ceil(width / stride) - 1) * stride + kernel - width, 0) // 2 * step
        size += (kernel - 1) * step
        step *= stride
    return size, step, start


@plot_style()
def plot_filters(model, data, output_dir):
    """Write filters.png: what the network of `create_CNN` has learned to look for.

    Above are the filters of the first convolution.  Below is a row for each emotion: the filter of
    the second convolution that best tells the test images of the emotion from the others, and the
    images that excite it most; framed is what it sees of them.
    """
    first, second = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)][:2]
    kernels = np.asarray(first.kernel)[:, :, 0].transpose(2, 0, 1)
    rows = math.ceil(len(kernels) / 16)
    present = np.unique(data.test.labels)
    figure = Figure(figsize=(10, 1.2 + 0.7 * rows + 1.45 * len(present)), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=(0.6 + 0.7 * rows, 0.6 + 1.45 * len(present)))
    above.suptitle("Filters of the first convolution, each scaled to its largest weight", size=13)
    grid = above.subplots(rows, 16, subplot_kw=BARE)
    for axes, kernel in zip(grid.flat, kernels):
        picture = axes.imshow(kernel / np.abs(kernel).max(), cmap="RdBu_r", vmin=-1, vmax=1)
    above.colorbar(picture, ax=grid, ticks=(-1, 0, 1)).ax.tick_params(labelsize=10)

    below.suptitle("What excites filters of the second convolution most: for each emotion, the\n"
                   "filter that best tells it apart; above each image, its own label", size=13)
    to_maps = keras.Model(model.inputs, second.output)
    maximum = layers.GlobalMaxPooling2D(dtype="float32")(second.output)
    maxima = keras.Model(model.inputs, maximum).predict(data.test.images, batch_size=128, verbose=0)
    size, step, start = receptive_field(model, second)
    grid = below.subplots(len(present), 7, subplot_kw=BARE, squeeze=False)
    for label, axes_of_row in zip(present, grid):
        # The mean over the emotion's images less that over all, in standard deviations.
        lead = maxima[data.test.labels == label].mean(axis=0) - maxima.mean(axis=0)
        best = np.argmax(lead / (maxima.std(axis=0) + 1e-7))
        axes_of_row[0].set_ylabel(f"{data.emotions[label]}\nfilter {best}", size=11)
        shown = np.argsort(-maxima[:, best], kind="stable")[:7]
        excited = to_maps.predict_on_batch(data.test.images[shown])[..., best]
        for axes, i, places in zip(axes_of_row, shown, excited):
            axes.imshow(data.test.images[i], cmap="gray", vmin=0, vmax=255)
            axes.set_title(data.emotions[data.test.labels[i]], size=10)
            # Pixels reach from half below their number to half above it.
            place = start + step * np.array(np.unravel_index(places.argmax(), places.shape))
            (top, left), (bottom, right) = np.clip((place, place + size), 0, SIZE) - 0.5
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False,
                                     color=SKY_BLUE, linewidth=2, clip_on=False))
    with whole_file(Path(output_dir, "filters.png")) as temporary:
        figure.savefig(temporary)


# --- Prediction -----------------------------------------------------------------------------------
def save_network(model, emotions, path):
    """Save a network, and in the same file the names of its emotions."""
    with whole_file(path) as temporary:
        model.save(temporary)
        with zipfile.ZipFile(temporary, "a") as file:  # Keras passes over what it does not know
            file.writestr("emotions.json", json.dumps(emotions))


def load_network(path):
    """Return the network and the emotions that `save_network` wrote; InputError if it cannot."""
    try:
        model = keras.models.load_model(path, compile=False)
        with zipfile.ZipFile(path) as file:
            emotions = json.loads(file.read("emotions.json"))
        if model.input_shape[1:] != (SIZE, SIZE, 1) or model.output_shape[1:] != (len(emotions),):
            raise ValueError("other images or emotions")
    except Exception as error:  # of zipfile, JSON, h5py or Keras, which tells the cause last
        reason = str(error).strip().rpartition("\n")[2]
        raise InputError(
            f"{path} is not a network of this script, damaged, or of another version of Keras than "
            f"{keras.__version__} ({reason}): train one, or name another folder with "
            "--output-dir") from error
    return model, emotions


def strongest_boxes(boxes, threshold, **_):
    """Return MTCNN's boxes (n x 6: image, left, top, right, bottom, score) by falling score.

    Of those that overlap by more than `threshold` of their union, only the strongest stays.
    """
    return boxes[tf.image.non_max_suppression(boxes[:, 1:5], boxes[:, 5], len(boxes), threshold)]


def in_parts(network, images):
    """Return the outputs of a network, computed for 64 images at a time."""
    starts = range(0, max(len(images), 1), 64)  # of no images, one empty part
    parts = [network(images[i:i + 64]) for i in starts]
    return [tf.concat(output, axis=0) for output in zip(*parts)]


detector_lock = threading.Lock()


@functools.cache
def face_detector():
    """Return the face detector MTCNN: Zhang et al. (2016), arXiv:1604.02878."""
    mtcnn = optional_package("mtcnn", "finding faces, unlike --no-detect,")
    stages = importlib.import_module("mtcnn.stages")
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")  # it fails in any other
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    detector = mtcnn.MTCNN()  # on Python 3.13, it tells how it closes the files of its weights
    sys.unraisablehook = hook
    keras.config.set_dtype_policy(policy)
    # Of a crowd, it would compare all of 5,000 boxes in pairs and pass all crops through a network
    # at once: that takes gigabytes.
    for module in stages.stage_pnet, stages.stage_rnet:
        module.smart_nms_from_bboxes = strongest_boxes
    for stage in detector.stages[1:]:
        stage.model.call = functools.partial(in_parts, stage.model.call)
    return detector


def find_faces(photo):
    """Find the faces in a photo (PIL image) and frame them as FER-2013 frames its faces.

    Returns boxes (left, top, right, bottom; pixels) from left to right, which may reach beyond
    the photo.  Returns the whole photo as the only box where it is the crop of a face already.
    """
    whole_photo = (0, 0, *photo.size)
    longest_side = max(photo.size)
    if longest_side <= LARGEST_CROP:  # too little to detect in
        return [whole_photo]
    scale = max(1, math.sqrt(photo.size[0] * photo.size[1] / PIXELS_TO_SEARCH))
    if min(photo.size) < 20 * scale:  # narrower than the smallest face that MTCNN looks for
        return []
    small = photo.resize([round(side / scale) for side in photo.size])
    with detector_lock:  # of several threads, one loads it
        detector = face_detector()
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
    """Return the box of a photo (array) as the network sees it; beyond it, the edge is repeated."""
    left, top, right, bottom = box
    rows = np.arange(top, bottom).clip(0, photo.shape[0] - 1)
    columns = np.arange(left, right).clip(0, photo.shape[1] - 1)
    return face_pixels(Image.fromarray(photo[np.ix_(rows, columns)]))


def classify_photo(photo, model, emotions, detect=True):
    """Return the faces in a photo, as `open_image` takes it, from left to right: a list of dicts.

    - face: its number, from 1 on
    - box: left, top, right, bottom; in pixels, may reach beyond the photo
    - emotion, confidence: the most probable emotion and its probability
    - probabilities: by emotion

    Takes the network and the emotions of `load_network`.  Without `detect`, the photo is one face.
    Raises InputError if the photo cannot be read.
    """
    photo = open_image(photo)
    boxes = find_faces(photo) if detect else [(0, 0, *photo.size)]
    if not boxes:
        return []
    pixels = np.asarray(photo)
    crops = np.stack([cut_out(pixels, box) for box in boxes])[..., np.newaxis]
    faces = []
    for number, (box, row) in enumerate(zip(boxes, classify_faces(model, crops).tolist()), 1):
        faces.append({"face": number, "box": box, "emotion": emotions[np.argmax(row)],
                      "confidence": max(row), "probabilities": dict(zip(emotions, row))})
    return faces


def occlusion_map(model, face, label):
    """Return how much the parts of a face speak for an emotion (48 x 48).

    Takes the face as the network sees it (uint8, 48 x 48) and the index of the emotion.  A square
    of the face's mean grey, 8 pixels wide, covers it in 11 x 11 places, 4 pixels apart.  The value
    of a pixel is by how much the emotion's probability falls, on average over the squares that
    cover the pixel.  It is the probability of one view, the face as it is.
    Zeiler and Fergus (2014), arXiv:1311.2901; tests/measure/heat_maps.py compares it with Grad-CAM.
    """
    corners = [(top, left) for top in range(0, SIZE - 7, 4) for left in range(0, SIZE - 7, 4)]
    covered = np.repeat(face[np.newaxis, :, :, np.newaxis].astype("float32"), len(corners) + 1, 0)
    for image, (top, left) in zip(covered, corners):  # the last remains as it is
        image[top:top + 8, left:left + 8] = face.mean()
    probabilities = model.predict_on_batch(covered)[:, label]
    falls, covers = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE))
    for fall, (top, left) in zip(probabilities[-1] - probabilities, corners):
        falls[top:top + 8, left:left + 8] += fall
        covers[top:top + 8, left:left + 8] += 1
    return falls / np.maximum(covers, 1)


@plot_style()
def draw_photo(photo, faces, model, path):
    """Write a picture of a photo (PIL image), and below it a row for each of its first 20 faces.

    In a row are the face as the network sees it, the same with its `occlusion_map` in orange, and
    the probabilities.  Takes the faces of `classify_photo`.
    """
    width, height = photo.size
    shown = faces[:20]
    row_height = np.clip(4 / len(shown), 0.85, 1.3)  # all lengths in inches
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
        scene.set_title(f"{len(faces)} faces, the first {len(shown)} of them below", size=13)
    for face in faces:
        left, top, right, bottom = face["box"]
        if face["box"] != (0, 0, width, height):  # else the photo is all face
            scene.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False,
                                      color=SKY_BLUE, linewidth=2))
            scene.text(max(left, 0), max(top, 0), f"{face['face']} {face['emotion']}", va="bottom",
                       size=5 if is_crowd else 11,
                       bbox={"color": SKY_BLUE, "pad": 1 if is_crowd else 4})
    pixels = np.asarray(photo)
    # From invisible to four fifths opaque.
    heat = LinearSegmentedColormap.from_list("heat", [VERMILION + "00", VERMILION + "D0"])
    for number, face in enumerate(shown, 1):
        crop = cut_out(pixels, face["box"])
        heat_map = occlusion_map(model, crop, list(face["probabilities"]).index(face["emotion"]))
        seen = figure.add_subplot(grid[number, 0], **BARE)
        marked = figure.add_subplot(grid[number, 1], **BARE)
        seen.set_ylabel(f"{number} {face['emotion']}", rotation=0, ha="right", va="center")
        for axes in seen, marked:
            axes.imshow(crop, cmap="gray", vmin=0, vmax=255)
        strongest = max(heat_map.max(), 0.01)  # a fall by less than a hundredth is none
        marked.imshow(heat_map, cmap=heat, vmin=0, vmax=strongest)
        if number == 1:
            seen.set_title("seen as", size=11)
            marked.set_title("speaks for it", size=11)
    table = figure.add_subplot(grid[1:, 2])
    shares = np.array([list(face["probabilities"].values()) for face in shown])
    draw_shares(table, shares, [], faces[0]["probabilities"])
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=100)


def save_picture(photo, faces, model, path, output_dir):
    """Draw a photo that was read from `path` into predictions/; return whether it was written."""
    # Photos of one name in several folders differ in the checksum.  A name may have 255 bytes.
    path_checksum = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    picture = Path(output_dir, "predictions", f"{path.stem[:50]}-{path_checksum}.emotions.jpg")
    try:
        draw_photo(photo, faces, model, picture)
    except OSError as error:  # the folder is read-only, say
        print(f"error: {picture} cannot be written: {error.strerror or error}", file=sys.stderr)
        return False
    print(f"  drawn in {picture}")
    return True


def find_photos(paths):
    """Return the photos in `paths` and in the folders there, without those that were drawn."""
    photos = []
    for name in [paths] if isinstance(paths, (str, Path)) else paths:
        # On Windows, the shell leaves patterns such as *.jpg to the program.
        names = [name] if os.path.exists(name) else sorted(glob.glob(str(name))) or [name]
        for path in map(Path, names):
            found = find_images(path) if path.is_dir() else [path]
            found = [photo for photo in found if not photo.name.endswith(".emotions.jpg")]
            photos += found or [path]  # a folder without photos stays: reported as unreadable
    return photos


def predict_emotions(paths, output_dir="output", detect=True, as_json=False):
    """Classify the faces in photos, and in folders of photos, with the network in `output_dir`.

    If there is none, it is the one included in docs/runs.  Prints a row per face and draws a
    picture per photo into predictions/ there, or only prints a JSON object per face.  A photo
    without a face, one that cannot be read, and a picture that cannot be written get a line on
    stderr.  Returns whether all could be read and written.  Raises InputError where no network can
    be loaded, or no detector.
    """
    network = Path(output_dir, NETWORK)
    if not network.exists():
        network = Path(__file__).resolve().parent / "docs" / "runs" / "88-0" / NETWORK
        print(f"no network in {output_dir} yet: predicting with {network}", file=sys.stderr)
    model, emotions = load_network(network)
    photos, all_well = find_photos(paths), True
    for number, path in enumerate(photos, 1):
        try:
            photo = open_image(path)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            all_well = False
            continue
        faces = classify_photo(photo, model, emotions, detect)
        if not faces:
            print(f"{path}: no face found; --no-detect classifies it whole", file=sys.stderr)
        elif as_json:
            for face in faces:
                print(json.dumps({"file": str(path), **face}))
        else:
            for face in faces:
                shares = ", ".join(f"{emotion} {share:.1%}"
                                   for emotion, share in face["probabilities"].items())
                print(f"{number}/{len(photos)} {path}, face {face['face']}: {face['emotion']} "
                      f"{face['confidence']:.1%}  ({shares})")
            all_well &= save_picture(photo, faces, model, path, output_dir)
    return all_well


# --- Drawn faces ----------------------------------------------------------------------------------
# After the action units of Ekman and Friesen's Facial Action Coding System: how far the inner and
# the outer brow are up, half the height of an eye, how far the corners of the mouth are up and the
# mouth is open (in parts of its width), and half its width; brows, eye and width in half faces.
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
    """Draw a face (48 x 48, grey, PIL image); shape, position, tilt, light, noise are random."""
    inner, outer, eye, smile, opening, mouth = EXPRESSIONS[emotion] + rng.normal(0, SPREAD)
    eye = max(eye, 0.02)
    back, skin, dark = map(int, rng.uniform((20, 110, 15), (235, 230, 80)))
    # Drawn four times as large as the image: middle and half of the face (x, y) in these pixels.
    middle = rng.normal(96, 6, 2)
    half = rng.uniform((56, 72), (72, 88))
    image = Image.new("L", (192, 192), back)
    draw = ImageDraw.Draw(image)

    def place(*points):  # points in half faces from the middle
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
    image = image.rotate(rng.normal(0, 7), Image.Resampling.BILINEAR, fillcolor=back)
    light = rng.uniform(0.6, 1.1) * (1 + np.linspace(-1, 1, SIZE) * rng.normal(0, 0.25))
    pixels = light * image.resize((SIZE, SIZE)) + rng.normal(0, 12, (SIZE, SIZE))
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
def cpu_information():
    """Return what Linux tells about the CPU; elsewhere, an empty text."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else ""


def hardware_name():
    """Return the name of the GPU, or else of the CPU."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    name = cpu_information().partition("model name\t: ")[2].partition("\n")[0]
    return name or platform.processor() or platform.machine()


def fastest_precision():
    """Return the name of the dtype policy in which training is fastest on this machine."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        has_tensor_cores = details.get("compute_capability", (0, 0)) >= (7, 0)
        return "mixed_float16" if has_tensor_cores else "float32"
    cpu = cpu_information()
    # Without AMX, bfloat16 takes Intel's processors 1.4 times as long as float32.
    is_fast = "amx_bf16" in cpu or ("AMD" in cpu and "avx512_bf16" in cpu)
    return "mixed_bfloat16" if is_fast else "float32"


def between(kind, low, high):
    """Return a type for argparse: numbers of a kind, int or float, from `low` to `high`."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number


def parse_command_line(arguments):
    """Return the options; argparse ends the program if they make no sense."""
    parser = argparse.ArgumentParser(description="Train a network to recognise facial emotions, or "
                                     "use it.", allow_abbrev=False)
    training = parser.add_argument_group("training")
    data = training.add_mutually_exclusive_group()
    data.add_argument("--data-dir", metavar="DIR", help="folder that holds train/ and test/ "
                      "(default: data, or a download)")
    data.add_argument("--demo", action="store_true", help="train on small drawn faces instead")
    training.add_argument("--crop-faces", action="store_true",
                          help="cut the largest face out of each image of the dataset")
    training.add_argument("--epochs", type=between(int, 1, 100_000), metavar="N",
                          help=f"passes over the training images (default: {EPOCHS}; demo: 4)")
    training.add_argument("--batch-size", type=between(int, 2, 100_000), default=BATCH_SIZE,
                          metavar="N", help="images per step (default: %(default)s)")
    training.add_argument("--learning-rate", type=between(float, 1e-9, 1e3), default=LEARNING_RATE,
                          metavar="X", help="learning rate of the first step; it falls from there "
                          "(default: %(default)s)")
    training.add_argument("--precision", choices=("float32", "mixed_bfloat16", "mixed_float16"),
                          help="number format (default: what is fastest here)")
    training.add_argument("--seed", type=between(int, 0, 2**31 - 1), default=0, metavar="N",
                          help="seed of all random numbers (default: %(default)s)")
    training.add_argument("--resume", action="store_true",
                          help="go on with the run in --output-dir that was interrupted, and does "
                          "not run any more")
    prediction = parser.add_argument_group("prediction with the trained network")
    prediction.add_argument("--predict", nargs="+", action="extend", metavar="PHOTO",
                            help="classify the faces in photos, or folders of photos")
    prediction.add_argument("--no-detect", action="store_true",
                            help="take every photo as one face: look for none")
    prediction.add_argument("--json", action="store_true",
                            help="print a JSON object per face and draw nothing")
    parser.add_argument("--output-dir", metavar="DIR",
                        help="where all results are (default: output; demo: demo)")
    options = parser.parse_args(arguments)
    if "" in arguments:  # a variable of the shell that is not set, say
        parser.error("an argument is empty")
    # The names of the options given: --name value or --name=value.
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    if options.predict:
        useless = given - {"--predict", "--no-detect", "--json", "--output-dir"}
    elif options.resume:
        useless = given - {"--resume", "--data-dir", "--output-dir"}
    else:
        useless = given & {"--no-detect", "--json"}
    if useless:
        parser.error(f"{', '.join(sorted(useless))} would have no effect here: leave it out")
    options.output_dir = options.output_dir or ("demo" if options.demo else "output")
    return options


def save_results(output_dir, model, settings, data, history, scores, seconds):
    """Write history.csv, and metrics.json with all that it takes to repeat the run."""
    rows = [history, *zip(*history.values())]  # the names; a row per epoch
    with whole_file(output_dir / "history.csv") as temporary:
        with open(temporary, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    best = int(np.argmax(history["val_accuracy"]))
    megabytes = round((output_dir / NETWORK).stat().st_size / 1e6, 1)
    metrics = {
        # Without the path, which is the user's own.
        "settings": {name: value for name, value in settings.items() if name != "data_dir"},
        "images": {part: len(getattr(data, part).images)
                   for part in ("training", "validation", "test")},
        "network": {"parameters": model.count_params(), "megabytes": megabytes},
        "test": scores,
        "best_epoch": history["epoch"][best],
        "validation": {"accuracy": history["val_accuracy"][best],
                       "loss": history["val_loss"][best]},
        "seconds": round(seconds, 1),
        "processor": hardware_name(),
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__,
                     "keras": keras.__version__},
    }
    with whole_file(output_dir / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    started = time.perf_counter()
    options = parse_command_line(sys.argv[1:])
    output_dir = Path(options.output_dir)
    checkpoint = output_dir / "unfinished" / CHECKPOINT

    faces_dir = tempfile.TemporaryDirectory()  # stays empty without --demo
    in_the_way = InputError(f"{checkpoint.parent} holds a run: if it was interrupted, go on with "
                            "--resume or delete the folder; if it still runs, name another "
                            "--output-dir")
    is_running = False  # whether the unfinished run is this one

    def tell_end(reason):
        faces_dir.cleanup()
        if is_running and is_checkpoint(checkpoint):
            folder = "" if options.output_dir == "output" else f" --output-dir {output_dir}"
            reason += f"; --resume{folder} goes on"
        elif is_running:  # there is nothing to go on with, and an empty checkpoint bars a new run
            with contextlib.suppress(OSError):
                checkpoint.with_name(f".{CHECKPOINT}").unlink(missing_ok=True)  # half written
                checkpoint.unlink(missing_ok=True)
                checkpoint.parent.rmdir()
        print(reason, file=sys.stderr)

    def end_at_once(number, frame):  # KeyboardInterrupt may come out of TensorFlow as another error
        if sys.stderr.isatty():
            print(file=sys.stderr)  # ends the line of the progress bar
        tell_end("interrupted")
        os._exit(130)  # as shells do

    if IS_PROGRAM:
        warnings.simplefilter("ignore")
        # Each line comes out at once, and characters that a terminal lacks as their numbers.
        if hasattr(sys.stdout, "reconfigure"):  # IDLE's does not need it
            sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, end_at_once)
    try:
        if options.predict:
            all_well = predict_emotions(options.predict, options.output_dir,
                                        not options.no_detect, options.json)
            sys.exit(0 if all_well else 2)

        if options.resume:
            state, _ = load_checkpoint(checkpoint)
            settings = state["settings"]
            if options.data_dir:  # it was moved
                settings["data_dir"] = os.path.abspath(options.data_dir)
            started -= sum(state["history"].get("seconds", []))  # as if it had never stopped
            is_running = True
        elif checkpoint.exists():
            raise in_the_way
        else:
            data_dir = None if options.demo else os.path.abspath(options.data_dir or find_dataset())
            settings = {"data_dir": data_dir, "demo": options.demo,
                        "crop_faces": options.crop_faces,
                        "epochs": options.epochs or (4 if options.demo else EPOCHS),
                        "batch_size": options.batch_size, "learning_rate": options.learning_rate,
                        "precision": options.precision or fastest_precision(),
                        "seed": options.seed}
        keras.utils.set_random_seed(settings["seed"])
        keras.config.set_dtype_policy(settings["precision"])
        print(f"{hardware_name()}, {settings['precision']}")
        if settings["demo"]:
            draw_faces(faces_dir.name, settings["seed"])
        data = load_data(settings["data_dir"] or faces_dir.name, settings["crop_faces"])
        faces_dir.cleanup()
        model = create_CNN(len(data.emotions), settings["epochs"])
        if not options.resume:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            try:
                checkpoint.touch(exist_ok=False)  # the lock
            except FileExistsError:
                raise in_the_way from None
            is_running = True
        history = train_model(model, data, settings["epochs"], settings["batch_size"],
                              settings["learning_rate"], settings["seed"], checkpoint, settings)
        save_network(model, data.emotions, output_dir / NETWORK)
        scores, probabilities = evaluate_model(model, data)
        save_results(output_dir, model, settings, data, history, scores,
                     time.perf_counter() - started)
        plot_performance(history, scores, output_dir)
        plot_examples(data, probabilities, output_dir)
        plot_filters(model, data, output_dir)
        try:
            for name in CHECKPOINT, *(f"{metric}.png" for metric in history):
                checkpoint.with_name(name).unlink(missing_ok=True)
                checkpoint.with_name(f".{name}").unlink(missing_ok=True)  # of a run that was killed
            checkpoint.parent.rmdir()
        except OSError as error:  # another program has it open, say
            print(f"{checkpoint.parent} could not be removed: {error.strerror}.  The run is "
                  "finished: delete the folder when you can", file=sys.stderr)
        print(f"\nSaved in {output_dir}: {', '.join(sorted(os.listdir(output_dir)))}")
    except BrokenPipeError:  # what read the output has ended: `head`, say
        faces_dir.cleanup()
        os._exit(141)  # as shells do
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # the disk is full, say
        tell_end(f"error: {error.filename or output_dir}: {error.strerror or error}")
        sys.exit(2)
