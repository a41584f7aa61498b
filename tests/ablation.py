"""Measure what each ingredient of the recipe gives: train without it and look at validation.

    python tests/ablation.py --data-dir data --epochs 20 --seeds 0 1 2

Each ingredient is some text of the script; what stands in its place is the plain alternative.
The changed script is run as a user would run it.  Accuracy is that of the validation images
(PublicTest), in the best epoch: the test images take no part in any choice.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "emotion_recognition_cnn.py"
# Ingredient: the text of the script that goes, and what comes in its place.
INGREDIENTS = {
    "the whole recipe": {},
    "standardisation of each image": {
        "layers.LayerNormalization(axis=[1, 2, 3], center=False, scale=False)":
            "layers.Rescaling(1 / 255)"},
    "batch normalisation": {"layers.BatchNormalization(momentum=0.9),": ""},
    "overlap in the first pooling": {
        'layers.MaxPooling2D(4, 3, padding="same")': "layers.MaxPooling2D(3)"},
    "overlap in the second pooling": {
        'layers.MaxPooling2D(5, 3, padding="same")':
            'layers.MaxPooling2D(3, padding="same")'},
    "5x5 in the second convolution": {'Conv2D(128, 5,': 'Conv2D(128, 3,'},
    "dropout on feature maps": {"layers.SpatialDropout2D(0.05),": ""},
    "dropout around the dense layer": {
        "layers.Dropout(0.25),": "", "layers.Dropout(0.35),": ""},
    "label smoothing": {"label_smoothing=0.1": "label_smoothing=0"},
    "warm-up": {"steps // 20": "0"},
    "cosine decay": {"keras.optimizers.AdamW(schedule)": "keras.optimizers.AdamW(learning_rate)"},
    "augmentation": {
        "horizontal_flip=True, rotation_range=10, width_shift_range=0.1, height_shift_range=0.1,":
            "", "        zoom_range=0.1)": ")"},
}


def without(name):
    """Return the text of the script without an ingredient."""
    text = SCRIPT.read_text()
    for old, new in INGREDIENTS[name].items():
        if old not in text:
            sys.exit(f"error: the script no longer holds {old!r}, the ingredient {name!r}")
        text = text.replace(old, new)
    return text


def train(name, seed, options):
    """Train without an ingredient; return the best validation accuracy and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, SCRIPT.name)
        script.write_text(without(name))
        subprocess.run(
            [sys.executable, script, "--data-dir", options.data_dir, "--epochs",
             str(options.epochs), "--seed", str(seed), "--output-dir", Path(folder, "output")],
            check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads(Path(folder, "output/metrics.json").read_text())
    return metrics["validation"]["accuracy"], metrics["seconds"]


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
    print("| without | validation accuracy | runs | minutes |")
    print("| --- | --- | --- | --- |", flush=True)
    for name in options.only:
        accuracies, seconds = zip(*(train(name, seed, options) for seed in options.seeds))
        spread = f" ± {statistics.stdev(accuracies):.1%}" if len(accuracies) > 1 else ""
        print(f"| {name} | {statistics.mean(accuracies):.1%}{spread} | {len(accuracies)} | "
              f"{statistics.mean(seconds) / 60:.1f} |", flush=True)


if __name__ == "__main__":
    main()
