"""Train what tutorials write for FER-2013, to compare: validation accuracy against minutes.

    python tests/measure/plain_recipe.py --data-dir data --minutes 20

32 and 64 filters 3x3, each followed by 2x2 pooling, Dense 128, Adam with Keras's defaults,
flow_from_directory with pixels rescaled to 0-1 and the augmentation of the script, batches of 64.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import emotion_recognition_cnn as script  # noqa: E402
import keras  # noqa: E402
from keras import layers  # noqa: E402


def create_plain_CNN(classes):
    """Build the network of the tutorials: images (n x 48 x 48 x 1, pixels 0-1) to probabilities."""
    return keras.Sequential([
        keras.Input((script.SIZE, script.SIZE, 1)),
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(128, activation="relu"),
        layers.Dense(classes, activation="softmax"),
    ])


class Report(keras.callbacks.Callback):
    """Print the validation accuracy after each epoch; stop when the minutes are over."""

    def __init__(self, minutes):
        super().__init__()
        self.minutes = minutes
        self.best = 0
        self.start = time.time()

    def on_epoch_end(self, epoch, logs=None):
        minutes = (time.time() - self.start) / 60
        self.best = max(self.best, logs["val_accuracy"])
        print(f"{minutes:5.1f} minutes, epoch {epoch + 1}: validation accuracy "
              f"{logs['val_accuracy']:.2%}, best {self.best:.2%}", flush=True)
        self.model.stop_training = minutes >= self.minutes


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True,
                        help="folder that holds train/ and test/")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    data = script.load_data(options.data_dir, seed=options.seed)
    generator = script.ImageDataGenerator(rescale=1 / 255, **script.AUGMENTATION)
    training = generator.flow_from_directory(
        options.data_dir / "train", target_size=(script.SIZE, script.SIZE), color_mode="grayscale",
        batch_size=64, class_mode="sparse", seed=options.seed)
    model = create_plain_CNN(len(data.emotions))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(training, validation_data=(data.validation.images / 255, data.validation.labels),
              epochs=10**6, verbose=0, callbacks=[Report(options.minutes)])


if __name__ == "__main__":
    main()
