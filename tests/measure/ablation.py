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
import keras  # noqa: E402

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
    "dropout": {"layers.SpatialDropout2D(0.18 * strength),": "",
                "layers.Dropout(0.4 * strength),": ""},
    "weaker dropout in short runs": {"min(epochs / 88, 1)": "1"},
    "cosine decay": {"keras.optimizers.AdamW(schedule)": "keras.optimizers.AdamW(options.learning_rate)"},
    "augmentation": {"ImageDataGenerator(**self.augmentation)": "ImageDataGenerator()"},
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


def train(name, seed, validation, options):
    """Train without an ingredient; return accuracy, balanced accuracy, loss and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, SCRIPT.name)
        script.write_text(without(name))
        subprocess.run(
            [sys.executable, script, "--data-dir", options.data_dir, "--epochs",
             str(options.epochs), "--seed", str(seed), "--output-dir", Path(folder, "output")],
            check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads(Path(folder, "output", "metrics.json").read_text())
        model = keras.models.load_model(Path(folder, "output", original.MODEL))
    clean = np.zeros(len(validation[1]), bool)  # of no matter here
    with contextlib.redirect_stdout(None):
        figures, _ = original.evaluate_model(model, *validation, clean)
    return figures["accuracy"], figures["balanced_accuracy"], figures["loss"], metrics["seconds"]


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
    _, validation, _ = original.load_data(Path(options.data_dir), 1, 0)
    print("| without | accuracy | balanced accuracy | loss | runs | minutes |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.only:
        *figures, seconds = zip(*(train(name, seed, validation, options)
                                  for seed in options.seeds))
        columns = [f"{statistics.mean(of):{style}}"
                   + (f" ± {statistics.stdev(of):{style}}" if len(of) > 1 else "")
                   for of, style in zip(figures, (".1%", ".1%", ".3f"))]
        print(f"| {name} | {' | '.join(columns)} | {len(seconds)} | "
              f"{statistics.mean(seconds) / 60:.1f} |", flush=True)


if __name__ == "__main__":
    main()
