"""Tell what minutes and seeds make of accuracy: a table and a picture of finished runs.

    python emotion_recognition_cnn.py --epochs 12 --seed 1 --output-dir runs/12-1     and so on
    python tests/measure/budgets.py runs/* --picture accuracy_against_minutes.png

Runs of as many epochs make one row: mean and standard deviation over their seeds, minutes of the
fastest run, as the others may have shared the processor.  The README's table is of docs/runs/*.
"""

import argparse
import json
import math
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
    budgets = {}  # epochs: the metrics of each run
    for run in options.runs:
        metrics = json.loads((run / "metrics.json").read_text())
        budgets.setdefault(metrics["hyper_parameters"]["epochs"], []).append(metrics)
    points = []  # minutes, mean accuracy, standard deviation
    print("| epochs | seeds | minutes | " + " | ".join(FIGURES) + " | PublicTest |\n"
          + "| --- " * (4 + len(FIGURES)) + "|")
    for epochs, runs in sorted(budgets.items()):
        values = [*([run["test"][name] for run in runs] for name in FIGURES.values()),
                  [run["validation"]["accuracy"] for run in runs]]
        means = [100 * statistics.mean(of) for of in values]
        spreads = [100 * statistics.stdev(of) if len(of) > 1 else math.nan for of in values]
        minutes = min(run["seconds"] for run in runs) / 60
        points.append((minutes, means[0], spreads[0]))
        print(f"| {epochs} | {' '.join(str(seed) for seed in sorted(r['seed'] for r in runs))} | "
              f"{minutes:.1f} | " + " | ".join(
                  f"{mean:.1f}" + (f" ± {spread:.1f}" if len(runs) > 1 else "") + " %"
                  for mean, spread in zip(means, spreads)) + " |")
    if options.picture:
        plt.rcParams.update({"font.size": 15, "figure.dpi": 150, "lines.linewidth": 2.5})
        figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
        minutes, means, spreads = zip(*points)
        axes.errorbar(minutes, means, spreads, fmt="o-", color="#0072B2", capsize=5)
        for (x, y, _), epochs in zip(points, sorted(budgets)):
            axes.annotate(f"{epochs} epochs", (x, y), (-8, 8), textcoords="offset points",
                          ha="right")
        axes.set(title="Accuracy on PrivateTest against time", ylabel="accuracy (%)",
                 xlabel="minutes of the run (logarithmic)", xscale="log")
        ticks = (1, 2, 5, 10, 20, 30, 60, 120, 240)
        axes.set_xticks(ticks, map(str, ticks))
        axes.set_xlim(min(minutes) / 2, max(minutes) * 1.3)
        axes.minorticks_off()
        axes.margins(y=0.2)
        axes.grid(alpha=0.3)
        figure.savefig(options.picture)


if __name__ == "__main__":
    main()
