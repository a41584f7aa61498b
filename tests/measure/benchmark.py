"""Measure how fast the script trains, beside other ways to train the same network.

    python tests/measure/benchmark.py --data-dir data
    python tests/measure/benchmark.py                     on drawn faces

The precision is the one that the script chooses on this machine, or that of --precision.
Each contender trains in a process of its own; they take turns, round by round, so that a noisy
machine is as noisy for all.  All have the script's network, batch size and optimiser:

  script             the script's own pipeline: images in memory, augmented by ImageDataGenerator
                     in two threads
  ceiling            the same network and precision on images in memory, nothing augmented
  plain Keras        what tutorials write: flow_from_directory, the same augmentation, default
                     compile, float32
  PyTorch eager      float32, images in memory, nothing augmented
  PyTorch tuned      bfloat16 autocast where the script computes in it, channels last, fused AdamW,
                     images in memory, nothing augmented
  PyTorch augmented  as tuned, the images augmented by the same ImageDataGenerator in two processes
                     of PyTorch's DataLoader: what script is, in PyTorch

PyTorch takes part where it is installed (pip install torch).  Its contenders stand in
benchmark_pytorch.py.  Peak memory is that of the process that trains, without the two beside it.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import emotion_recognition_cnn as script  # noqa: E402
import keras  # noqa: E402

SETTINGS = script.Settings()
WARM_UP = 10  # steps at the start of a round that are not counted


def keras_contender(name, data_dir, precision):
    """Return a function that trains for some steps and gives the times at which each ended.

    Returns, too, how many steps it can train for at most.
    """
    keras.utils.set_random_seed(SETTINGS.seed)
    if name == "plain Keras":
        generator = script.ImageDataGenerator(**script.AUGMENTATION)
        training = generator.flow_from_directory(
            Path(data_dir, "train"), target_size=(script.SIZE, script.SIZE),
            color_mode="grayscale", class_mode="sparse", batch_size=SETTINGS.batch_size)
        images, classes = training.samples, training.num_classes
    else:
        keras.config.set_dtype_policy(precision)
        emotions, training, _, _ = script.load_data(data_dir)
        images, classes = len(training.images), len(emotions)
    data = {"x": training}
    if name == "ceiling":
        data = {"x": training.images, "y": training.labels, "batch_size": SETTINGS.batch_size}
    model = script.create_CNN(classes, SETTINGS.dropout)
    model.compile(keras.optimizers.AdamW(SETTINGS.learning_rate),
                  "sparse_categorical_crossentropy", metrics=["accuracy"])

    def train(steps):
        times = []
        drawing = 0
        if name == "script":  # the start of an epoch draws its transforms: each step has its share
            start = time.time()
            training.start_epoch(0)
            drawing = (time.time() - start) / len(training)
        model.fit(**data, steps_per_epoch=steps, verbose=0, callbacks=[
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: times.append(time.time()))])
        return [moment + step * drawing for step, moment in enumerate(times)]

    return train, images // SETTINGS.batch_size


def contend(name, data_dir, precision, seconds):
    """Be one contender: train a round for each line on stdin, answer with a line of JSON."""
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")  # what libraries print is no answer
    contender = keras_contender
    if name.startswith("PyTorch"):
        from benchmark_pytorch import pytorch_contender  # here: PyTorch need not be installed
        contender = pytorch_contender
    train, most = contender(name, data_dir, precision)
    times = train(min(most, 2 * WARM_UP))
    step = (times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP)
    steps = min(most, WARM_UP + max(10, round(seconds / step)))
    print(json.dumps({"first_batch": times[0]}), file=answers, flush=True)
    for _ in sys.stdin:
        times = train(steps)
        rate = (steps - 1 - WARM_UP) * SETTINGS.batch_size / (times[-1] - times[WARM_UP])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak /= 2**20 if platform.system() == "Darwin" else 2**10  # bytes there, KiB here
        print(json.dumps({"rate": rate, "peak": peak}), file=answers, flush=True)


def start_contender(name, data_dir, precision, seconds):
    """Start the process of a contender; return it and the seconds to its first batch."""
    start = time.time()
    process = subprocess.Popen(
        [sys.executable, __file__, "--contender", name, "--data-dir", data_dir,
         "--precision", precision, "--seconds", str(seconds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    answer = json.loads(process.stdout.readline())
    return process, answer["first_batch"] - start


def train_round(process):
    """Let a contender train for a round; return images/s and its peak memory in MiB."""
    process.stdin.write("go\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    return answer["rate"], answer["peak"]


def compare(names, data_dir, precision, rounds, seconds):
    """Let the contenders train in turns.

    Returns, by name, images/s of each round, peak memory in MiB and the seconds to the first batch.
    """
    processes, first_batch, rates, peak = {}, {}, {name: [] for name in names}, {}
    for name in names:  # one after the other: each start is measured alone
        processes[name], first_batch[name] = start_contender(name, data_dir, precision, seconds)
    for number in range(1, rounds + 1):
        for name in names:
            rate, peak[name] = train_round(processes[name])
            rates[name].append(rate)
        latest = ", ".join(f"{name} {rates[name][-1]:.0f}" for name in names)
        print(f"round {number}: {latest}", flush=True)
    for process in processes.values():
        process.communicate()
    return rates, peak, first_batch


def print_table(rates, peak, first_batch):
    """Print a row for each contender."""
    print("| contender | images/s (median) | lowest to highest | script is | peak memory | "
          "start to first batch |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, of in rates.items():
        ratio = statistics.median(own / other for own, other in zip(rates["script"], of))
        print(f"| {name} | {statistics.median(of):.0f} | {min(of):.0f} to {max(of):.0f} | "
              f"{ratio:.2f} times as fast | {peak[name]:.0f} MiB | {first_batch[name]:.1f} s |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder that holds train/ and test/")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="length of a round")
    parser.add_argument("--precision", choices=("float32", "mixed_bfloat16", "mixed_float16"),
                        help="default: the script's choice on this machine")
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # by this script itself
    options = parser.parse_args()
    if options.contender:
        contend(options.contender, options.data_dir, options.precision, options.seconds)
        return

    precision = options.precision or script.fastest_precision()
    names = ["script", "ceiling", "plain Keras"]
    if importlib.util.find_spec("torch"):
        names += ["PyTorch eager", "PyTorch tuned", "PyTorch augmented"]
    with tempfile.TemporaryDirectory() as drawings:
        if not options.data_dir:
            script.draw_faces(drawings, 0)
        rates, peak, first_batch = compare(names, options.data_dir or drawings, precision,
                                           options.rounds, options.seconds)
    print(f"\n{script.processor_name()}, {precision}, batch size {SETTINGS.batch_size}, "
          f"{options.rounds} rounds of {options.seconds:.0f} s\n")
    print_table(rates, peak, first_batch)


if __name__ == "__main__":
    main()
