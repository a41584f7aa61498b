"""Tell what minutes and seeds make of accuracy: a table and a picture of finished runs.

    python emotion_recognition_cnn.py --epochs 12 --seed 1 --output-dir runs/12-1     and so on
    python tests/measure/budgets.py runs/* --picture accuracy_against_minutes.png

Runs of as many epochs on the same processor, in the same precision, make one row: mean and standard
deviation over their seeds, minutes of the fastest run, as the others may have shared the processor.
The README's table is of docs/runs/*.
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

FIGURES = {"accuracy": "accuracy", "clean": "clean_accuracy", "balanced": "balanced_accuracy",
           "single image": "single_image_accuracy"}  # of the test images


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of finished runs")
    parser.add_argument("--picture", type=Path, help="where to draw accuracy against minutes")
    options = parser.parse_args()
    budgets = {}  # epochs, processor and precision: the metrics of each run
    for run in options.runs:
        metrics = json.loads((run / "metrics.json").read_text())
        settings = metrics["hyper_parameters"]
        processor = re.sub(r"\(R\)| Processor", "", metrics["processor"])
        budget = settings["epochs"], f"{processor}, {settings['precision']}"
        budgets.setdefault(budget, []).append(metrics)
    points = {}  # by processor and precision: minutes, mean accuracy, standard deviation, epochs
    print("| epochs | processor | seeds | minutes | " + " | ".join(FIGURES) + " | PublicTest |\n"
          + "| --- " * (5 + len(FIGURES)) + "|")
    for (epochs, processor), runs in sorted(budgets.items()):
        values = [*([run["test"][name] for run in runs] for name in FIGURES.values()),
                  [run["validation"]["accuracy"] for run in runs]]
        means = [100 * statistics.mean(of) for of in values]
        spreads = [100 * statistics.stdev(of) if len(of) > 1 else math.nan for of in values]
        minutes = min(run["seconds"] for run in runs) / 60
        points.setdefault(processor, []).append((minutes, means[0], spreads[0], epochs))
        seeds = " ".join(str(seed) for seed in sorted(run["seed"] for run in runs))
        print(f"| {epochs} | {processor} | {seeds} | {minutes:.1f} | " + " | ".join(
                  f"{mean:.1f}" + (f" ± {spread:.1f}" if len(runs) > 1 else "") + " %"
                  for mean, spread in zip(means, spreads)) + " |")
    if options.picture:
        plt.rcParams.update({"font.size": 15, "figure.dpi": 150, "lines.linewidth": 2.5})
        figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
        styles = itertools.cycle([("o-", "#0072B2", (14, -20)), ("s-", "#D55E00", (14, -5)),
                                  ("D-", "#009E73", (-120, -5))])
        for (form, color, offset), (processor, of) in zip(styles, sorted(points.items())):
            minutes, means, spreads, budget = zip(*of)
            axes.errorbar(minutes, means, spreads, fmt=form, color=color, capsize=5,
                          label=processor)
            for x, y, epochs in zip(minutes, means, budget):
                axes.annotate(f"{epochs} epochs", (x, y), offset, textcoords="offset points")
        axes.legend(loc="lower right")
        axes.set(title="Accuracy on PrivateTest against time", ylabel="accuracy (%)",
                 xlabel="minutes of the run (logarithmic)", xscale="log")
        ticks = (1, 2, 5, 10, 20, 30, 60, 120, 240)
        axes.set_xticks(ticks, map(str, ticks))
        all_minutes = [point[0] for of in points.values() for point in of]
        axes.set_xlim(min(all_minutes) / 2, max(all_minutes) * 2)
        axes.minorticks_off()
        axes.margins(y=0.2)
        axes.grid(alpha=0.3)
        figure.savefig(options.picture)


if __name__ == "__main__":
    main()
