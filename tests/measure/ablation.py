"""Measure ingredients of the recipe, and ideas to improve it: train with the script changed.

    python tests/measure/ablation.py --data-dir data

For each ingredient, this program removes or replaces some code of the script; for each idea, it
adds or changes some.  It trains a network and evaluates it on the validation images (PublicTest),
with probabilities averaged over the script's 18 views.  It does not use the test images.

Each run is saved in docs/ablation.csv as it ends, and runs that are there are not repeated.  Then
the program prints the means over the seeds.  Loss is the mean cross-entropy, in nats.

With --backend jax, TensorFlow is not needed.  With --jobs, several networks are trained at once.
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "emotion_recognition_cnn.py"
RUNS = ROOT / "docs" / "ablation.csv"
COLUMNS = ("change", "epochs", "seed", "precision", "accuracy", "balanced_accuracy", "loss",
           "minutes", "processor")

# Changes to the code of the script for each Keras backend: old text, new text.
BACKENDS = {
    "tensorflow": {},
    "jax": {
        'os.environ["KERAS_BACKEND"] = "tensorflow"': 'os.environ["KERAS_BACKEND"] = "jax"',
        "    import tensorflow as tf\n": "",
        'tf.get_logger().setLevel("ERROR")': "",
        "from tensorflow.keras.preprocessing": "from keras.src.legacy.preprocessing"},
}

RECIPE = "nothing (the whole recipe)"
# Changes to the code of the script that remove an ingredient: old text, new text.
INGREDIENTS = {
    RECIPE: {},
    "dropout": {"layers.SpatialDropout2D(0.18 * dropout),": "",
                "layers.Dropout(0.4 * dropout),": ""},
    "weaker dropout in shorter runs": {"0.18 * dropout": "0.18", "0.4 * dropout": "0.4"},
    "overlap in the second pooling": {
        'layers.MaxPooling2D(7, strides=3, padding="same")':
            'layers.MaxPooling2D(3, padding="same")'},
    "half of the second convolution's filters": {"Conv2D(384,": "Conv2D(192,"},
    "half of the first dense layer": {"Dense(512,": "Dense(256,"},
    "class weights": {"np.cbrt(counts.mean() / counts)": "np.ones(len(counts))"},
    "augmentation": {"ImageDataGenerator(**AUGMENTATION)": "ImageDataGenerator()"},
    "standardisation of each image": {
        "layers.GroupNormalization(groups=1, center=False, scale=False)":
            "layers.Rescaling(1 / 255)"},
    "layer normalisation": {
        "layers.LayerNormalization(),": "layers.BatchNormalization(momentum=0.9),"},
    "batch normalisation": {"layers.BatchNormalization(momentum=0.9),": ""},
    "overlap in the first pooling": {
        'layers.MaxPooling2D(4, strides=3, padding="same")': "layers.MaxPooling2D(3)"},
    "dropout of whole feature maps": {
        "layers.SpatialDropout2D(0.18 * ": "layers.Dropout(0.25 * "},
    "cosine decay": {"keras.optimizers.AdamW(schedule,": "keras.optimizers.AdamW(learning_rate,"},
}

# Changes to the code of the script that try an idea: old text, new text.
STANDARDISATION = "        layers.GroupNormalization(groups=1, center=False, scale=False),\n"
IDEAS = {
    "shear of up to 10 degrees": {'"zoom_range": 0.1}': '"zoom_range": 0.1, "shear_range": 10}'},
    "dropout 1.5 times as strong": {"min(epochs / 88, 1)": "1.5 * min(epochs / 88, 1)"},
    "random blur": {
        STANDARDISATION: STANDARDISATION + "        layers.RandomGaussianBlur("
                                           "kernel_size=5, value_range=(-100, 100)),\n"},
    "principal components as first filters": {
        "    steps = epochs * ": """\
    images = data.training.images[::10, :, :, 0].astype("float32")
    images -= images.mean((1, 2), keepdims=True)
    images /= images.std((1, 2), keepdims=True) + 1
    patches = np.lib.stride_tricks.sliding_window_view(images, (5, 5), (1, 2))[:, ::4, ::4]
    patches = patches.reshape(-1, 25)
    components = np.linalg.eigh(patches.T @ patches)[1][:, -16:]  # those of largest variance
    filters = np.concatenate([components, -components], axis=1).reshape(5, 5, 1, 32)
    kernel = next(layer.kernel for layer in model.layers if isinstance(layer, layers.Conv2D))
    kernel.assign(filters * np.linalg.norm(kernel) / np.linalg.norm(filters))
    steps = epochs * """},
    "augmentation that fades over the last quarter": {
        "        batches = augmented_batches(data,": """\
        strength = min(1, 4 * (epochs - epoch) / epochs)
        faded = {name: value if value is True else strength * value
                 for name, value in AUGMENTATION.items()}
        batches = augmented_batches(data._replace(augmentation=ImageDataGenerator(**faded)),"""},
    "weight decay of 0.02": {"WEIGHT_DECAY = 0.004": "WEIGHT_DECAY = 0.02"},
    "weight decay of 0.05": {"WEIGHT_DECAY = 0.004": "WEIGHT_DECAY = 0.05"},
    "weight decay of 0.1": {"WEIGHT_DECAY = 0.004": "WEIGHT_DECAY = 0.1"},
    "batches of 64 images": {"BATCH_SIZE = 128": "BATCH_SIZE = 64",
                             "LEARNING_RATE = 0.006": "LEARNING_RATE = 0.006 / 2**0.5"},
    "batches of 256 images": {"BATCH_SIZE = 128": "BATCH_SIZE = 256",
                              "LEARNING_RATE = 0.006": "LEARNING_RATE = 0.006 * 2**0.5"},
    "normalisation at each position": {
        "  # 14 x 14 to 5 x 5\n": "\n        layers.Flatten(),\n",
        "layers.SpatialDropout2D(0.18 * dropout),  # drops whole maps: neighbours are similar\n"
        "        layers.Flatten(),": "layers.Dropout(0.25 * dropout),"},
    "random erasing in half of the images": {
        STANDARDISATION: STANDARDISATION + "        layers.RandomErasing((0.5, 0.5), fill_value=0, "
                                           "value_range=(-100, 100), dtype='float32'),\n"},
}
# Ideas that are tried together.
COMBINATIONS = (("weight decay of 0.05", "shear of up to 10 degrees"),
                ("weight decay of 0.05", "shear of up to 10 degrees",
                 "normalisation at each position"))
IDEAS |= {", ".join(names): {old: new for name in names for old, new in IDEAS[name].items()}
          for names in COMBINATIONS}
# Ideas that change only runs of more than 88 epochs.  By default, they are not measured.
LONGER_RUNS = {"dropout that increases beyond 88 epochs": {"min(epochs / 88, 1)": "epochs / 88"}}
CHANGES = INGREDIENTS | IDEAS | LONGER_RUNS


def changed_script(change, backend="tensorflow"):
    """Return the code of the script with a change, for a Keras backend."""
    text = SCRIPT.read_text()
    for old, new in (CHANGES[change] | BACKENDS[backend]).items():
        if old not in text:
            sys.exit(f"error: the script does not contain {old!r}. Update {change!r} or "
                     f"{backend!r}")
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


def load_script(change, backend):
    """Return the script with a change as a module, for a Keras backend."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, SCRIPT.name)
        path.write_text(changed_script(change, backend))
        specification = importlib.util.spec_from_file_location("script", path)
        script = importlib.util.module_from_spec(specification)
        sys.modules["script"] = script
        specification.loader.exec_module(script)
    if backend != "tensorflow":
        script.in_batches = batches_without_tensorflow(script)
    return script


def measure(change, seed, options):
    """Train the script's network with a change; return a row of docs/ablation.csv."""
    script = load_script(change, options.backend)
    precision = options.precision or script.fastest_precision()
    script.keras.utils.set_random_seed(seed)
    script.keras.config.set_dtype_policy(precision)
    with contextlib.redirect_stdout(io.StringIO()):
        data = script.load_data(options.data_dir)
        model = script.create_CNN(len(data.emotions), options.epochs)
        history = script.train_model(model, data, options.epochs, seed=seed)
        # The median, in case the machine was busy or suspended for a while.
        minutes = options.epochs * statistics.median(history["seconds"]) / 60
        scores, _ = script.evaluate_model(model, data._replace(test=data.validation))
    processor = script.hardware_name() if options.backend == "tensorflow" else options.backend
    return dict(zip(COLUMNS, (
        change, options.epochs, seed, precision, round(float(scores["accuracy"]), 5),
        round(float(scores["balanced_accuracy"]), 5), round(scores["loss"], 5), round(minutes, 1),
        processor)))


def read_runs(path, epochs):
    """Return the rows of docs/ablation.csv that are about runs of so many epochs."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if row["epochs"] == str(epochs)]


def mean_and_spread(values, style):
    """Return the mean of values, with their standard deviation if there are several, as text."""
    mean = f"{statistics.mean(values):{style}}"
    spread = f" ± {statistics.stdev(values):{style}}" if len(values) > 1 else ""
    return f"{mean}{spread}".replace("% ±", " ±").replace("%", " %")


def table_row(change, rows, recipe):
    """Return a line of the table: the means over the runs of a change.

    `recipe` contains the accuracy of the whole recipe for each seed.
    """
    accuracy, balanced_accuracy, loss, minutes = (
        [float(row[column]) for row in rows]
        for column in ("accuracy", "balanced_accuracy", "loss", "minutes"))
    differences = [100 * (value - recipe[row["seed"]]) for row, value in zip(rows, accuracy)
                   if row["seed"] in recipe and change != RECIPE]
    difference = f"{statistics.mean(differences):+z.1f}" if differences else ""
    return (f"| {change} | {mean_and_spread(accuracy, '.1%')} | {difference} | "
            f"{mean_and_spread(balanced_accuracy, '.1%')} | {mean_and_spread(loss, '.3f')} | "
            f"{len(rows)} | {min(minutes):.1f} |")


def table(runs, changes, title):
    """Return a Markdown table of the means over the seeds of each change.

    "Difference" compares accuracy with the whole recipe's for the same seeds, in points.
    """
    recipe = {row["seed"]: float(row["accuracy"]) for row in runs if row["change"] == RECIPE}
    lines = [f"| {title} | accuracy | difference | balanced accuracy | loss | runs | minutes |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for change in changes:
        rows = [row for row in runs if row["change"] == change]
        if rows:
            lines.append(table_row(change, rows, recipe))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=os.path.abspath,
                        help="folder that contains train/ and test/ (default: train nothing)")
    parser.add_argument("--epochs", type=int, default=44,
                        help="epochs per run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1],
                        help="random seeds, one run each (default: 0 1)")
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=[*INGREDIENTS, *IDEAS],
                        metavar="CHANGE", help="ingredients and ideas to measure (default: all "
                        "but those for runs of more than 88 epochs)")
    parser.add_argument("--precision",
                        help="Keras dtype policy (default: the fastest on this machine)")
    parser.add_argument("--backend", choices=BACKENDS, default="tensorflow",
                        help="Keras backend (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs (default: 1)")
    options = parser.parse_args()
    # By default, each JAX process allocates three quarters of the GPU memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    finished = {(row["change"], int(row["seed"])) for row in read_runs(RUNS, options.epochs)}
    missing = [run for run in itertools.product(options.only, options.seeds)
               if options.data_dir and run not in finished]
    # Each run has its own process, so that no state of Keras is left from the previous run.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"),
                             max_tasks_per_child=1) as pool:
        for run in as_completed([pool.submit(measure, *run, options) for run in missing]):
            is_new = not RUNS.exists()
            with open(RUNS, "a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerow(run.result())
    runs = read_runs(RUNS, options.epochs)
    print(table(runs, INGREDIENTS, "removed"))
    print()
    print(table(runs, IDEAS | LONGER_RUNS, "idea"))


if __name__ == "__main__":
    main()
