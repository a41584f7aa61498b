"""Measure how much each ingredient of the recipe contributes: train without it.

    python tests/measure/ablation.py --data-dir data --epochs 8 --seeds 0 1

For each ingredient, this program removes or replaces some code of the script and trains a network.
It evaluates the network on the validation images (PublicTest), with probabilities averaged over
the script's 18 views.  It does not use the test images.  Loss is the mean cross-entropy, in nats.

With --backend jax, TensorFlow is not needed.  With --jobs, a GPU trains several networks at once.
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

# Changes to the code of the script for each Keras backend: old text, new text.
BACKENDS = {
    "tensorflow": {},
    "jax": {
        'os.environ["KERAS_BACKEND"] = "tensorflow"': 'os.environ["KERAS_BACKEND"] = "jax"',
        "    import tensorflow as tf\n": "",
        'tf.get_logger().setLevel("ERROR")': "",
        "from tensorflow.keras.preprocessing": "from keras.src.legacy.preprocessing"},
}

# Changes to the code of the script that remove an ingredient: old text, new text.
INGREDIENTS = {
    "the whole recipe": {},
    "standardisation of each image": {
        "layers.GroupNormalization(groups=1, center=False, scale=False)":
            "layers.Rescaling(1 / 255)"},
    "batch normalisation": {"layers.BatchNormalization(momentum=0.9),": ""},
    "layer normalisation": {
        "layers.LayerNormalization(),": "layers.BatchNormalization(momentum=0.9),"},
    "overlap in the first pooling": {
        'layers.MaxPooling2D(4, strides=3, padding="same")': "layers.MaxPooling2D(3)"},
    "overlap in the second pooling": {
        'layers.MaxPooling2D(7, strides=3, padding="same")':
            'layers.MaxPooling2D(3, padding="same")'},
    "half of the second convolution's filters": {"Conv2D(384,": "Conv2D(192,"},
    "half of the first dense layer": {"Dense(512,": "Dense(256,"},
    "dropout of whole feature maps": {
        "layers.SpatialDropout2D(0.18 * ": "layers.Dropout(0.25 * "},
    "dropout": {"layers.SpatialDropout2D(0.18 * dropout),": "",
                "layers.Dropout(0.4 * dropout),": ""},
    "weaker dropout in short runs": {"0.18 * dropout": "0.18", "0.4 * dropout": "0.4"},
    "cosine decay": {"keras.optimizers.AdamW(schedule,": "keras.optimizers.AdamW(learning_rate,"},
    "augmentation": {"ImageDataGenerator(**AUGMENTATION)": "ImageDataGenerator()"},
    "class weights": {"np.cbrt(counts.mean() / counts)": "np.ones(len(counts))"},
}


def without(name, backend="tensorflow"):
    """Return the code of the script without an ingredient, for a Keras backend."""
    text = SCRIPT.read_text()
    for old, new in (INGREDIENTS[name] | BACKENDS[backend]).items():
        if old not in text:
            sys.exit(f"error: the script does not contain {old!r}. Update {name!r} or {backend!r}")
        text = text.replace(old, new)
    return text


def batches_without_tensorflow(script):
    """Return a replacement for the script's in_batches that does not use tf.data."""
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
    """Return the script without an ingredient as a module, for a Keras backend."""
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
    """Train without an ingredient; return accuracy, balanced accuracy, loss and seconds."""
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
    """Return the mean of values, with their standard deviation if there are several, as text."""
    text = f"{statistics.mean(values):{style}}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):{style}}"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, type=os.path.abspath,
                        help="folder that contains train/ and test/")
    parser.add_argument("--epochs", type=int, default=8,
                        help="epochs per run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0],
                        help="random seeds, one run each (default: 0)")
    parser.add_argument("--only", nargs="+", choices=INGREDIENTS, default=list(INGREDIENTS),
                        metavar="INGREDIENT", help="ingredients to measure (default: all)")
    parser.add_argument("--precision", default="float32",
                        help="Keras dtype policy (default: %(default)s)")
    parser.add_argument("--backend", choices=BACKENDS, default="tensorflow",
                        help="Keras backend (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs (default: 1)")
    options = parser.parse_args()
    # By default, each JAX process allocates three quarters of the GPU memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print("| removed | accuracy | balanced accuracy | loss | runs | minutes |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    # Each run has its own process, so that no state of Keras is left from the previous run.
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
