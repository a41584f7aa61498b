"""Measure what each ingredient of the recipe gives: train without it and look at validation.

    python tests/measure/ablation.py --data-dir data --epochs 8 --seeds 0 1

Each ingredient is some text of the script; what stands in its place is the plain alternative.
The network that the changed script trains classifies the validation images (PublicTest), averaged
over the views that the script takes of an image: the test images take no part in any choice.  Loss
is the mean cross-entropy, in nats.

On a GPU, --backend jax needs no TensorFlow, and --jobs trains several networks at once.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "emotion_recognition_cnn.py"

# What goes from the text of the script, and what comes in its place, for a backend of Keras.
BACKENDS = {
    "tensorflow": {},
    "jax": {
        'os.environ["KERAS_BACKEND"] = "tensorflow"': 'os.environ["KERAS_BACKEND"] = "jax"',
        "    import tensorflow as tf\n": "",
        'tf.get_logger().setLevel("ERROR")': "",
        "from tensorflow.keras.preprocessing": "from keras.src.legacy.preprocessing"},
}

# Ingredient: the text of the script that goes, and what comes in its place.
INGREDIENTS = {
    "the whole recipe": {},
    "standardisation of each image": {
        "layers.GroupNormalization(groups=1, center=False, scale=False)":
            "layers.Rescaling(1 / 255)"},
    "batch normalisation": {"layers.BatchNormalization(momentum=0.9),": ""},
    "layer normalisation: batch normalisation in its place": {
        "layers.LayerNormalization(),": "layers.BatchNormalization(momentum=0.9),"},
    "overlap in the first pooling": {
        'layers.MaxPooling2D(4, strides=3, padding="same")': "layers.MaxPooling2D(3)"},
    "overlap in the second pooling": {
        'layers.MaxPooling2D(7, strides=3, padding="same")':
            'layers.MaxPooling2D(3, padding="same")'},
    "half of the second convolution's filters": {"Conv2D(384,": "Conv2D(192,"},
    "half of the dense layer": {"Dense(512,": "Dense(256,"},
    "dropout of whole filters: of features in its place": {
        "layers.SpatialDropout2D(0.18 * ": "layers.Dropout(0.25 * "},
    "dropout": {"layers.SpatialDropout2D(0.18 * dropout),": "",
                "layers.Dropout(0.4 * dropout),": ""},
    "weaker dropout in short runs": {"0.18 * dropout": "0.18", "0.4 * dropout": "0.4"},
    "cosine decay": {"keras.optimizers.AdamW(schedule,": "keras.optimizers.AdamW(learning_rate,"},
    "augmentation": {"ImageDataGenerator(**AUGMENTATION)": "ImageDataGenerator()"},
    "weights of the emotions": {"np.cbrt(counts.mean() / counts)": "np.ones(len(counts))"},
}


def without(name, backend="tensorflow"):
    """Return the text of the script without an ingredient, for a backend of Keras."""
    text = SCRIPT.read_text()
    for old, new in (INGREDIENTS[name] | BACKENDS[backend]).items():
        if old not in text:
            sys.exit(f"error: the script no longer holds {old!r}, of {name!r} or {backend!r}")
        text = text.replace(old, new)
    return text


def batches_without_tensorflow(script):
    """Return what stands for the script's in_batches where TensorFlow's tf.data is absent."""
    class Batches(script.keras.utils.PyDataset):
        def __init__(self, arrays, batch_size, function=lambda *arrays: arrays):
            super().__init__()
            self.arrays, self.batch_size, self.function = arrays, batch_size, function

        def __len__(self):
            return math.ceil(len(self.arrays[0]) / self.batch_size)

        def __getitem__(self, index):
            first = index * self.batch_size
            return self.function(*[array[first:first + self.batch_size] for array in self.arrays])

        def map(self, function):
            return Batches(self.arrays, self.batch_size, function)

        def prefetch(self, number):
            return self

    return Batches


def load_script(name, backend):
    """Return the script without an ingredient, for a backend of Keras, as a module."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, SCRIPT.name)
        path.write_text(without(name, backend))
        specification = importlib.util.spec_from_file_location("script", path)
        script = importlib.util.module_from_spec(specification)
        sys.modules["script"] = script
        specification.loader.exec_module(script)
    if backend != "tensorflow":
        script.in_batches = batches_without_tensorflow(script)
    return script


def measure(name, seed, options):
    """Train without an ingredient; return accuracy, balanced accuracy, loss and the seconds."""
    script = load_script(name, options.backend)
    script.keras.utils.set_random_seed(seed)
    script.keras.config.set_dtype_policy(options.precision)
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        data = script.load_data(options.data_dir)
        model = script.create_CNN(len(data.emotions), options.epochs)
        script.train_model(model, data, options.epochs, seed=seed)
        seconds = time.perf_counter() - start
        scores, _ = script.evaluate_model(model, data._replace(test=data.validation))
    return scores["accuracy"], scores["balanced_accuracy"], scores["loss"], seconds


def mean_and_spread(values, style):
    """Return the mean of some values, and their standard deviation if there are several."""
    text = f"{statistics.mean(values):{style}}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):{style}}"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, type=os.path.abspath,
                        help="folder that holds train/ and test/")
    parser.add_argument("--epochs", type=int, default=8, help="per run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0],
                        help="one run each (default: 0)")
    parser.add_argument("--only", nargs="+", choices=INGREDIENTS, default=list(INGREDIENTS),
                        metavar="INGREDIENT", help="some of the ingredients")
    parser.add_argument("--precision", default="float32", help="default: %(default)s")
    parser.add_argument("--backend", choices=BACKENDS, default="tensorflow",
                        help="of Keras (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    options = parser.parse_args()
    # Else JAX takes three quarters of a GPU's memory for each process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print("| without | accuracy | balanced accuracy | loss | runs | minutes |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    # A process of its own for each run: one script and its Keras stay out of the next one's way.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"),
                             max_tasks_per_child=1) as pool:
        names, seeds = zip(*itertools.product(options.only, options.seeds))
        runs = pool.map(measure, names, seeds, itertools.repeat(options))
        for name in options.only:
            of_name = list(itertools.islice(runs, len(options.seeds)))
            accuracy, balanced_accuracy, loss, seconds = zip(*of_name)
            print(f"| {name} | {mean_and_spread(accuracy, '.1%')} | "
                  f"{mean_and_spread(balanced_accuracy, '.1%')} | {mean_and_spread(loss, '.3f')} | "
                  f"{len(of_name)} | {statistics.mean(seconds) / 60:.1f} |", flush=True)


if __name__ == "__main__":
    main()
