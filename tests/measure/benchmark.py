"""Measure how fast the script trains, beside other ways to train the same network.

    python tests/measure/benchmark.py --data-dir data
    python tests/measure/benchmark.py                     on drawn faces

The precision is the one that the script chooses on this machine, or that of --precision.
Each contender trains in a process of its own; they take turns, round by round, so that a noisy
machine is as noisy for all.  All have the script's network, batch size and optimiser:

  script          the script's own pipeline: images in memory, augmented by ImageDataGenerator
  ceiling         the same network and precision on images in memory, nothing augmented
  plain Keras     what tutorials write: flow_from_directory, the same augmentation, default compile
  PyTorch eager   float32, images in memory, nothing augmented
  PyTorch tuned   bfloat16 autocast where the script computes in it, channels last, fused AdamW,
                  images in memory, nothing augmented

PyTorch takes part where it is installed (pip install torch).
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

BATCH_SIZE, LEARNING_RATE = 128, 6e-3
WARM_UP = 10  # steps at the start of a round that are not counted


def keras_contender(name, data_dir, precision):
    """Return a function that trains for some steps and gives the times at which each ended."""
    import emotion_recognition_cnn as script
    import keras

    keras.utils.set_random_seed(0)
    if name == "plain Keras":
        augmentation = script.ImageDataGenerator(**script.AugmentedBatches.augmentation)
        training = augmentation.flow_from_directory(
            Path(data_dir, "train"), target_size=script.IMAGE_SIZE, color_mode="grayscale",
            class_mode="sparse", batch_size=BATCH_SIZE)
        data = {"x": training}
    else:
        keras.config.set_dtype_policy(precision)
        training, _, _ = script.load_data(Path(data_dir), BATCH_SIZE, 0)
        data = {"x": training}
        if name == "ceiling":
            data = {"x": training.images, "y": training.labels, "batch_size": BATCH_SIZE}
    model = script.create_CNN(44)
    model.compile(keras.optimizers.AdamW(LEARNING_RATE), "sparse_categorical_crossentropy",
                  metrics=["accuracy"])

    def train(steps):
        times = []
        model.fit(**data, steps_per_epoch=steps, verbose=0, callbacks=[
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: times.append(time.time()))])
        return times

    return train, len(training)


def as_torch(model):
    """Translate the layers of the script's network into PyTorch modules."""
    from torch import nn

    class FilterNorm(nn.LayerNorm):
        """Normalises across the filters at each place, as Keras's LayerNormalization."""
        def forward(self, images):
            return super().forward(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    modules, channels = [], 1
    for layer in model.layers:
        kind = type(layer).__name__
        size, shape = layer.input.shape[1], layer.output.shape
        if kind == "LayerNormalization":  # across the image, or across the filters
            modules.append(nn.LayerNorm([1, *shape[1:3]], layer.epsilon, elementwise_affine=False)
                           if len(layer.axis) == 3 else FilterNorm(channels, layer.epsilon))
        elif kind == "Conv2D":
            modules.append(nn.Conv2d(channels, layer.filters, layer.kernel_size, layer.strides,
                                     padding=layer.padding, bias=layer.use_bias))
        elif kind == "MaxPooling2D":
            # Of an odd border, Keras puts the larger part below and right; so does ceil_mode.
            border = (shape[1] - 1) * layer.strides[0] + layer.pool_size[0] - size
            modules.append(nn.MaxPool2d(layer.pool_size, layer.strides, max(border, 0) // 2,
                                        ceil_mode=True))
        elif kind == "BatchNormalization":
            norm = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
            modules.append(norm(shape[-1], layer.epsilon, 1 - layer.momentum))
        elif kind == "ReLU":
            modules.append(nn.ReLU())
        elif kind == "SpatialDropout2D":
            modules.append(nn.Dropout2d(layer.rate))
        elif kind == "Dropout":
            modules.append(nn.Dropout(layer.rate))
        elif kind == "Flatten":
            modules.append(nn.Flatten())
        elif kind == "Dense":  # the softmax is part of PyTorch's cross-entropy
            modules.append(nn.Linear(channels, layer.units, bias=layer.use_bias))
        else:
            raise NotImplementedError(f"no translation for a {kind} layer")
        channels = shape[-1]
    return nn.Sequential(*modules)


def torch_contender(name, data_dir, precision):
    """As `keras_contender`, in PyTorch."""
    import emotion_recognition_cnn as script
    import torch

    torch.manual_seed(0)
    training, _, _ = script.load_data(Path(data_dir), BATCH_SIZE, 0)
    images = torch.from_numpy(training.images).permute(0, 3, 1, 2).float()
    labels = torch.from_numpy(training.labels)
    model = as_torch(script.create_CNN(44))
    tuned = name == "PyTorch tuned"
    if tuned:
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=tuned)
    bfloat16 = tuned and precision == "mixed_bfloat16"

    def train(steps):
        times = []
        for chosen in torch.randperm(len(labels))[: steps * BATCH_SIZE].split(BATCH_SIZE):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            times.append(time.time())
        return times

    return train, len(labels) // BATCH_SIZE


def contend(name, data_dir, precision, seconds):
    """Be one contender: train a round for each line on stdin, answer with a line of JSON."""
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")  # what libraries print is no answer
    contender = torch_contender if "PyTorch" in name else keras_contender
    train, most = contender(name, data_dir, precision)
    times = train(2 * WARM_UP)
    step = (times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP)
    steps = min(most, WARM_UP + max(10, round(seconds / step)))
    print(json.dumps({"first_batch": times[0]}), file=answers, flush=True)
    for _ in sys.stdin:
        times = train(steps)
        rate = (steps - 1 - WARM_UP) * BATCH_SIZE / (times[-1] - times[WARM_UP])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak /= 2**20 if platform.system() == "Darwin" else 2**10  # bytes there, KiB here
        print(json.dumps({"rate": rate, "peak": peak}), file=answers, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder that holds train/ and test/")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="length of a round")
    parser.add_argument("--precision", choices=("float32", "mixed_bfloat16", "mixed_float16"),
                        help="default: the script's choice on this machine")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        return contend(options.contender, options.data_dir, options.precision, options.seconds)

    import emotion_recognition_cnn as script

    drawings = tempfile.TemporaryDirectory()
    data_dir = options.data_dir or drawings.name
    precision = options.precision or script.fastest_precision()
    if not options.data_dir:
        script.draw_faces(data_dir, 0)
    names = ["script", "ceiling", "plain Keras"]
    if importlib.util.find_spec("torch"):
        names += ["PyTorch eager", "PyTorch tuned"]
    processes, first_batch, rates, peak = {}, {}, {name: [] for name in names}, {}
    for name in names:  # one after the other: each start is measured alone
        start = time.time()
        processes[name] = subprocess.Popen(
            [sys.executable, __file__, "--contender", name, "--data-dir", str(data_dir),
             "--precision", precision, "--seconds", str(options.seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        first_batch[name] = json.loads(processes[name].stdout.readline())["first_batch"] - start
    for number in range(options.rounds):
        for name, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            rates[name].append(answer["rate"])
            peak[name] = answer["peak"]
        print(f"round {number + 1}:", ", ".join(f"{name} {rates[name][-1]:.0f}" for name in names),
              flush=True)
    for process in processes.values():
        process.communicate()

    print(f"\n{script.processor_name()}, {precision}, batch size {BATCH_SIZE}, "
          f"{options.rounds} rounds of {options.seconds:.0f} s\n")
    print("| contender | images/s (median) | lowest to highest | script is | peak memory | "
          "start to first batch |\n| --- | --- | --- | --- | --- | --- |")
    for name in names:
        ratio = statistics.median(own / other for own, other in zip(rates["script"], rates[name]))
        print(f"| {name} | {statistics.median(rates[name]):.0f} | {min(rates[name]):.0f} to "
              f"{max(rates[name]):.0f} | {ratio:.2f} times as fast | {peak[name]:.0f} MiB | "
              f"{first_batch[name]:.1f} s |")


if __name__ == "__main__":
    main()
