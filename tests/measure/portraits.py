"""Measure what --crop-faces gives for a dataset that shows more than the face.

    python tests/measure/portraits.py --data-dir data

Portraits are made from every fourth image of FER-2013: padded to 102 x 120 pixels with its edge
pixels and, for test images, enlarged four times.  The script trains on them with and without
--crop-faces.  The table shows the accuracy of the evaluation and that of --predict on the test
portraits in which it finds a face; of several faces, the largest counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from included import ROOT
from PIL import Image

SCRIPT = ROOT / "emotion_recognition_cnn.py"
ENLARGED = {"train": 1, "test": 4}


def make_portraits(data_dir, folder, step):
    """Save a portrait of every `step`-th image of each emotion, in the layout of the dataset."""
    for part, factor in ENLARGED.items():
        for path in (path for emotion in sorted(Path(data_dir, part).iterdir())
                     for path in sorted(emotion.iterdir())[::step]):
            image = Image.fromarray(np.pad(np.asarray(Image.open(path).convert("L")),
                                           ((36, 36), (27, 27)), "edge"))
            image = image.resize((factor * image.width, factor * image.height),
                                 Image.Resampling.BILINEAR)
            target = Path(folder, part, path.parent.name, f"{path.stem}.png")
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target)


def predict(photos, output_dir):
    """Return the emotion of the largest face in each photo that has one, by path."""
    process = subprocess.run([sys.executable, SCRIPT, "--predict", *photos, "--json",
                              "--output-dir", output_dir], capture_output=True, text=True)
    faces = [json.loads(line) for line in process.stdout.splitlines()]
    faces.sort(key=lambda face: face["box"][2] - face["box"][0])
    return {face["file"]: face["emotion"] for face in faces}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder that contains train/ and test/")
    parser.add_argument("--step", type=int, default=4, help="use every N-th image (default: 4)")
    parser.add_argument("--epochs", default="5", help="epochs of each training (default: 5)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_portraits(options.data_dir, folder, options.step)
        photos = sorted(map(str, Path(folder).glob("test/*/PrivateTest_*")))
        print("| training | evaluation | --predict | photos with a face |\n" + "| --- " * 4 + "|")
        for name, arguments in ("without", []), ("with", ["--crop-faces"]):
            output_dir = Path(folder, "output", name)
            subprocess.run([sys.executable, SCRIPT, "--data-dir", folder, "--epochs",
                            options.epochs, "--output-dir", output_dir, *arguments],
                           check=True, stdout=subprocess.DEVNULL)
            scores = json.loads((output_dir / "metrics.json").read_text())["test"]
            emotions = predict(photos, output_dir)
            correct = [Path(path).parent.name == emotion for path, emotion in emotions.items()]
            print(f"| {name} --crop-faces | {scores['accuracy']:.1%} | {np.mean(correct):.1%} | "
                  f"{len(correct)} of {len(photos)} |", flush=True)


if __name__ == "__main__":
    main()
