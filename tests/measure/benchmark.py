"""Compare the training speed of the script with other implementations of the same training.

    python tests/measure/benchmark.py --data-dir data
    python tests/measure/benchmark.py                     with drawn faces

The default precision is the one that the script chooses on this machine.  Each contender trains in
its own process.  They take turns, so that variations of the machine's speed affect all of them.
All use the script's network, batch size and optimiser:

  script             images in memory, augmented by augmented_batches; the time to draw the
                     transforms of an epoch is distributed over its steps
  script without augmentation
                     images in memory, the same precision and training loop; an upper limit
  plain Keras        as in tutorials: flow_from_directory, the same augmentation, default compile,
                     float32
  PyTorch eager      images in memory, no augmentation, float32
  PyTorch tuned      images in memory, no augmentation, channels last, fused AdamW; bfloat16
                     autocast if the script uses bfloat16
  PyTorch augmented  as PyTorch tuned, but augmented by the same ImageDataGenerator in two worker
                     processes of a DataLoader

PyTorch is measured if it is installed.  Install its CPU build (pip install torch --index-url
https://download.pytorch.org/whl/cpu), as the Triton of other builds crashes with TensorFlow.  The
code of its contenders is in benchmark_pytorch.py.
"""

import argparse
import importlib.util
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import emotion_recognition_cnn as script  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402

WARM_UP = 10  # steps at the start of each epoch that are not measured


def keras_contender(name, data_dir, precision):
    """Return a function that trains for some steps of an epoch and returns their end times.

    Also returns the number of full steps in an epoch.
    """
    keras.utils.set_random_seed(0)
    if name == "plain Keras":
        generator = script.ImageDataGenerator(**script.AUGMENTATION)
        batches = generator.flow_from_directory(
            Path(data_dir, "train"), target_size=(script.SIZE, script.SIZE),
            color_mode="grayscale", class_mode="sparse", batch_size=script.BATCH_SIZE)
        images, classes, weights = batches.samples, batches.num_classes, None
    else:
        keras.config.set_dtype_policy(precision)
        data = script.load_data(data_dir)
        images, classes = len(data.training.images), len(data.emotions)
        weights = script.class_weights(data.training.labels)
        order = np.random.permutation(images)
        batches = script.in_batches((data.training.images[order], data.training.labels[order]),
                                    script.BATCH_SIZE).prefetch(2)
    model = script.create_CNN(classes)
    model.compile(keras.optimizers.AdamW(script.LEARNING_RATE), "sparse_categorical_crossentropy",
                  metrics=["accuracy"])
    epoch = itertools.count()

    def train(steps):
        times = []
        of_epoch, drawing = batches, 0
        if name == "script":
            start = time.time()
            of_epoch = script.augmented_batches(data, script.BATCH_SIZE, [0, next(epoch)])
            drawing = (time.time() - start) * script.BATCH_SIZE / images  # per step
        model.fit(of_epoch, steps_per_epoch=steps, class_weight=weights, shuffle=False, verbose=0,
                  callbacks=[keras.callbacks.LambdaCallback(
                      on_train_batch_end=lambda batch, logs: times.append(time.time()))])
        return [moment + step * drawing for step, moment in enumerate(times)]

    return train, images // script.BATCH_SIZE


def counted(times):
    """Return the number and the duration (seconds) of an epoch's steps after the warm-up."""
    return len(times) - 1 - WARM_UP, times[-1] - times[WARM_UP]


def contend(name, data_dir, precision, seconds):
    """Run one contender: print "ready", then train a round per line of stdin and print images/s."""
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")  # hide the output of libraries
    contender = keras_contender
    if name.startswith("PyTorch"):
        from benchmark_pytorch import pytorch_contender  # PyTorch is optional
        contender = pytorch_contender
    train, most = contender(name, data_dir, precision)
    number, duration = counted(train(min(most, 2 * WARM_UP)))
    print("ready", file=answers, flush=True)
    steps = max(2 * WARM_UP, round(seconds * number / duration))
    epochs = math.ceil(steps / (most - WARM_UP))
    for _ in sys.stdin:
        numbers, durations = zip(*[counted(train(min(most, WARM_UP + math.ceil(steps / epochs))))
                                   for _ in range(epochs)])
        print(script.BATCH_SIZE * sum(numbers) / sum(durations), file=answers, flush=True)


def start_contender(name, data_dir, precision, seconds):
    """Start the process of a contender and return it when it is ready."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--contender", name, "--data-dir", data_dir,
         "--precision", precision, "--seconds", str(seconds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if not process.stdout.readline():
        sys.exit(f"error: {name} failed to start (exit status {process.wait()})")
    return process


def train_round(process):
    """Let a contender train for one round and return images/s."""
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(names, data_dir, precision, rounds, seconds):
    """Let the contenders take turns; return a dict from names to images/s of each round."""
    processes = {name: start_contender(name, data_dir, precision, seconds) for name in names}
    rates = {name: [] for name in names}
    for number in range(1, rounds + 1):
        for name in names:
            rates[name].append(train_round(processes[name]))
        latest = ", ".join(f"{name} {rates[name][-1]:.0f}" for name in names)
        print(f"round {number}: {latest}", flush=True)
    for process in processes.values():
        process.communicate()
    return rates


def print_table(rates):
    """Print a row per contender: images/s (median and range) and the script's relative speed."""
    print("| contender | images/s | ratio |\n| --- | --- | --- |")
    for name, of in rates.items():
        ratio = statistics.median(own / other for own, other in zip(rates["script"], of))
        print(f"| {name} | {statistics.median(of):.0f} ({min(of):.0f} to {max(of):.0f}) | "
              f"{ratio:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="dataset (default: drawn faces)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10,
                        help="length of a round (default: %(default)s)")
    parser.add_argument("--precision", choices=("float32", "mixed_bfloat16", "mixed_float16"),
                        help="default: the script's choice for this machine")
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # used internally
    options = parser.parse_args()
    if options.contender:
        contend(options.contender, options.data_dir, options.precision, options.seconds)
        return

    precision = options.precision or script.fastest_precision()
    names = ["script", "script without augmentation", "plain Keras"]
    if importlib.util.find_spec("torch"):
        names += ["PyTorch eager", "PyTorch tuned", "PyTorch augmented"]
    with tempfile.TemporaryDirectory() as drawings:
        if not options.data_dir:
            script.draw_faces(drawings, 0)
        rates = compare(names, options.data_dir or drawings, precision, options.rounds,
                        options.seconds)
    print(f"\n{script.hardware_name()}, {precision}, batch size {script.BATCH_SIZE}, "
          f"{options.rounds} rounds of {options.seconds:.0f} seconds\n")
    print_table(rates)


if __name__ == "__main__":
    main()
