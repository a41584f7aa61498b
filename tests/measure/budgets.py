"""Summarise finished runs: print a table, and plot accuracy against minutes.

    python emotion_recognition_cnn.py --epochs 12 --seed 1 --output-dir runs/12-1     for example
    python tests/measure/budgets.py runs/* --picture accuracy_against_minutes.png

Runs with the same number of epochs, processor and precision share a row.  It has the mean and the
standard deviation over their seeds and the minutes of the fastest run, because other programs may
have slowed down the others.  The tables in the README and docs/RESULTS.md show docs/runs/*.
"""

import argparse
import itertools
import json
import math
import re
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SCORES = {"accuracy": "accuracy", "clean": "clean_accuracy", "balanced": "balanced_accuracy",
          "single image": "single_image_accuracy"}  # on the test images


def read_runs(folders):
    """Return a dict from (epochs, "processor, precision") to the metrics of these runs."""
    budgets = {}
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        settings = metrics["settings"]
        processor = re.sub(r"\(R\)| Processor", "", metrics["processor"])
        budget = settings["epochs"], f"{processor}, {settings['precision']}"
        budgets.setdefault(budget, []).append(metrics)
    return budgets


def least_minutes(runs):
    """Return the minutes of the fastest run."""
    return min(run["seconds"] for run in runs) / 60


def mean_and_spread(values):
    """Return mean and standard deviation in per cent; for a single value, the latter is NaN."""
    mean = 100 * statistics.mean(values)
    spread = 100 * statistics.stdev(values) if len(values) > 1 else math.nan
    return mean, spread


def print_table(budgets):
    """Print a table with a row per budget."""
    columns = "epochs", "CPU", "precision", "seeds", "minutes", *SCORES, "PublicTest"
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for (epochs, processor), runs in sorted(budgets.items()):
        seeds = sorted(run["settings"]["seed"] for run in runs)
        row = [str(epochs), *processor.rsplit(", ", 1), " ".join(map(str, seeds)),
               f"{least_minutes(runs):.1f}"]
        accuracies = [[run["test"][name] for run in runs] for name in SCORES.values()]
        accuracies.append([run["validation"]["accuracy"] for run in runs])
        for values in accuracies:
            mean, spread = mean_and_spread(values)
            row.append(f"{mean:.1f} %" if len(runs) == 1 else f"{mean:.1f} ± {spread:.1f} %")
        print("| " + " | ".join(row) + " |")


def draw_curve(axes, points, processor, form, color, offset):
    """Draw the points (minutes, accuracy, standard deviation, epochs) of a processor."""
    minutes, accuracy, spread, budgets = zip(*points)
    axes.errorbar(minutes, accuracy, spread, fmt=form, color=color, capsize=5, label=processor)
    for x, y, epochs in zip(minutes, accuracy, budgets):
        axes.annotate(epochs, (x, y), offset, textcoords="offset points", color=color)


def draw_picture(budgets, path):
    """Plot accuracy against minutes, with a curve per processor and precision."""
    curves = {}
    for (epochs, processor), runs in sorted(budgets.items()):
        mean, spread = mean_and_spread([run["test"]["accuracy"] for run in runs])
        curves.setdefault(processor, []).append((least_minutes(runs), mean, spread, epochs))
    plt.rcParams.update({"font.size": 15, "figure.dpi": 150, "lines.linewidth": 2.5})
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    styles = itertools.cycle([("o-", "#0072B2", (9, -16)), ("s-", "#D55E00", (8, -24)),
                              ("D-", "#009E73", (9, 2)), ("^-", "#CC79A7", (-36, 4))])
    for style, (processor, points) in zip(styles, sorted(curves.items())):
        draw_curve(axes, points, processor, *style)
    figure.legend(loc="outside lower center", ncols=2)
    axes.set(title="Accuracy on PrivateTest against time; numbers: epochs", ylabel="accuracy (%)",
             xlabel="minutes of the run (logarithmic)", xscale="log")
    ticks = (1, 2, 5, 10, 20, 30, 60, 120, 240)
    axes.set_xticks(ticks, map(str, ticks))
    all_minutes = [least_minutes(runs) for runs in budgets.values()]
    axes.set_xlim(min(all_minutes) / 1.3, max(all_minutes) * 1.3)
    axes.minorticks_off()
    axes.margins(y=0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of finished runs")
    parser.add_argument("--picture", type=Path, help="file for a plot of accuracy against minutes")
    options = parser.parse_args()
    budgets = read_runs(options.runs)
    print_table(budgets)
    if options.picture:
        draw_picture(budgets, options.picture)


if __name__ == "__main__":
    main()
