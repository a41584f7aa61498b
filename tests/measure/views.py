"""Measure what the views of an image give: one, two or the script's 18, on validation images.

    python tests/measure/views.py --data-dir data
    python tests/measure/views.py --data-dir data --network output/emotion_recognition_cnn.keras

The probabilities of the views are averaged.  Validation are the PublicTest images, which the number
of views may be chosen on.  Loss is the mean cross-entropy, in nats.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import emotion_recognition_cnn as script  # noqa: E402
import keras  # noqa: E402


def print_row(views, number, probabilities, labels):
    """Print how well the probabilities (n x classes) from some views fit the labels (n)."""
    accuracy = (probabilities.argmax(axis=1) == labels).mean()
    loss = keras.losses.sparse_categorical_crossentropy(labels, probabilities).numpy().mean()
    print(f"| {views} | {number} | {100 * accuracy:.1f} % | {loss:.3f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder that holds train/ and test/")
    parser.add_argument("--network", help="default: the one included in docs/runs")
    options = parser.parse_args()
    included = sorted(ROOT.glob(f"docs/runs/*/{script.NETWORK}"))
    model, emotions = script.load_network(options.network or included[0])
    data = script.load_data(options.data_dir)
    if emotions != data.emotions:
        sys.exit(f"error: the network knows {emotions}, the images show {data.emotions}")
    images, labels = data.validation.images, data.validation.labels

    upright = model.predict(images, batch_size=256, verbose=0)
    mirrored = model.predict(images[:, :, ::-1], batch_size=256, verbose=0)
    print("\n| views | number | accuracy | loss |")
    print("| --- | --- | --- | --- |")
    print_row("the image", 1, upright, labels)
    print_row("the image and its mirror image", 2, (upright + mirrored) / 2, labels)
    print_row("three sizes at three heights, and all of them mirrored", 18,
              script.classify_faces(model, images), labels)


if __name__ == "__main__":
    main()
