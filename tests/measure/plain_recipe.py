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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True,
                        help="folder that holds train/ and test/")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    _, (images, labels), _ = script.load_data(options.data_dir, 64, options.seed)
    augmentation = script.ImageDataGenerator(rescale=1 / 255,
                                             **script.AugmentedBatches.augmentation)
    training = augmentation.flow_from_directory(
        options.data_dir / "train", target_size=script.IMAGE_SIZE, color_mode="grayscale",
        batch_size=64, class_mode="sparse", seed=options.seed)
    model = keras.Sequential([
        keras.Input((*script.IMAGE_SIZE, 1)),
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(128, activation="relu"),
        layers.Dense(len(script.EMOTIONS), activation="softmax"),
    ])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    start, best = time.time(), 0

    def report(epoch, logs):
        nonlocal best
        minutes, best = (time.time() - start) / 60, max(best, logs["val_accuracy"])
        print(f"{minutes:5.1f} minutes, epoch {epoch + 1}: validation accuracy "
              f"{logs['val_accuracy']:.2%}, best {best:.2%}", flush=True)
        model.stop_training = minutes >= options.minutes

    model.fit(training, validation_data=(images / 255, labels), epochs=10**6,
              verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=report)])


if __name__ == "__main__":
    main()
