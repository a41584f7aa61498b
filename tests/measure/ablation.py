"""Measure what each ingredient of the recipe gives: train without it and look at validation.

    python tests/measure/ablation.py --data-dir data --epochs 20 --seeds 0 1 2

Each ingredient is some text of the script; what stands in its place is the plain alternative.
The changed script is run as a user would run it, and the network that it leaves classifies the
validation images (PublicTest), averaged over the views that the script takes of an image: the test
images take no part in any choice.  Loss is the mean cross-entropy, in nats.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parents[2] / "emotion_recognition_cnn.py"
sys.path.insert(0, str(SCRIPT.parent))

import emotion_recognition_cnn as original  # noqa: E402

# Ingredient: the text of the script that goes, and what comes in its place.
INGREDIENTS = {
    "the whole recipe": {},
    "standardisation of each image": {
        "layers.LayerNormalization(axis=[1, 2, 3], center=False, scale=False)":
            "layers.Rescaling(1 / 255)"},
    "batch normalisation": {"layers.BatchNormalization(momentum=0.9),": ""},
    "layer normalisation: batch normalisation in its place": {
        "layers.LayerNormalization(), ": "layers.BatchNormalization(momentum=0.9), "},
    "overlap in the first pooling": {
        'layers.MaxPooling2D(4, 3, padding="same")': "layers.MaxPooling2D(3)"},
    "overlap in the second pooling": {
        'layers.MaxPooling2D(7, 3, padding="same")':
            'layers.MaxPooling2D(3, padding="same")'},
    "half of the second convolution's filters": {"Conv2D(384,": "Conv2D(192,"},
    "half of the dense layer": {"Dense(512,": "Dense(256,"},
    "dropout of whole filters: of features in its place": {
        "layers.SpatialDropout2D(0.18 * ": "layers.Dropout(0.25 * "},
    "dropout": {"layers.SpatialDropout2D(0.18 * dropout),": "",
                "layers.Dropout(0.4 * dropout),": ""},
    "weaker dropout in short runs": {"min(self.epochs / 88, 1)": "1"},
    "cosine decay": {"keras.optimizers.AdamW(schedule)": "keras.optimizers.AdamW(learning_rate)"},
    "augmentation": {"ImageDataGenerator(**AUGMENTATION)": "ImageDataGenerator()"},
    "weights of the emotions": {"np.cbrt(count.mean() / count)": "np.ones(len(count))"},
}


def without(name):
    """Return the text of the script without an ingredient."""
    text = SCRIPT.read_text()
    for old, new in INGREDIENTS[name].items():
        if old not in text:
            sys.exit(f"error: the script no longer holds {old!r}, the ingredient {name!r}")
        text = text.replace(old, new)
    return text


def train(name, data_dir, epochs, seed):
    """Train without an ingredient; return the network, its emotions and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, SCRIPT.name)
        script.write_text(without(name))
        output_dir = Path(folder, "output")
        subprocess.run(
            [sys.executable, script, "--data-dir", data_dir, "--epochs", str(epochs),
             "--seed", str(seed), "--output-dir", output_dir],
            check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads((output_dir / "metrics.json").read_text())
        model, emotions = original.load_network(output_dir / original.NETWORK)
    return model, emotions, metrics["seconds"]


def measure(name, data_dir, epochs, seed):
    """Train without an ingredient; return accuracy, balanced accuracy, loss and the seconds."""
    model, emotions, seconds = train(name, data_dir, epochs, seed)
    with contextlib.redirect_stdout(None):
        # The seed chooses the validation images where file names do not tell them.
        validation = original.load_data(data_dir, seed=seed).validation
        none_clean = np.zeros(len(validation.labels), bool)  # of no matter here
        scores, _ = original.evaluate_model(model, validation._replace(clean=none_clean), emotions)
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
    parser.add_argument("--epochs", type=int, default=20, help="per run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0],
                        help="one run each (default: 0)")
    parser.add_argument("--only", nargs="+", choices=INGREDIENTS, default=list(INGREDIENTS),
                        metavar="INGREDIENT", help="some of the ingredients")
    options = parser.parse_args()
    print("| without | accuracy | balanced accuracy | loss | runs | minutes |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.only:
        runs = [measure(name, options.data_dir, options.epochs, seed) for seed in options.seeds]
        accuracy, balanced_accuracy, loss, seconds = zip(*runs)
        print(f"| {name} | {mean_and_spread(accuracy, '.1%')} | "
              f"{mean_and_spread(balanced_accuracy, '.1%')} | {mean_and_spread(loss, '.3f')} | "
              f"{len(runs)} | {statistics.mean(seconds) / 60:.1f} |", flush=True)


if __name__ == "__main__":
    main()
