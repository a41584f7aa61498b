"""Measure what a photo with one face costs to classify, against a face in a batch of 128.

    python tests/measure/photo_speed.py

Faces are drawn; the network is the included one.  In every round each is timed several times, one
after the other, and the median taken: the ratio is of one machine at one time.  Start-up and what
is paid once are left out.  Also printed: the heat map of a face, which a picture takes.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import emotion_recognition_cnn as script  # noqa: E402


def milliseconds(function, times):
    """Return how long a function takes: the median over several calls."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    options = parser.parse_args()
    model, emotions = script.load_network(sorted(ROOT.glob(f"docs/runs/*/{script.NETWORK}"))[0])
    rng = np.random.default_rng(0)
    faces = np.stack([script.face_pixels(script.draw_face(emotions[i % 7], rng))
                      for i in range(128)])[..., np.newaxis]

    def classify_one():
        script.classify_faces(model, faces[:1])

    def classify_all():
        script.classify_faces(model, faces)

    def map_one():
        script.occlusion_map(model, faces[0], 0)

    for function in classify_one, classify_all, map_one:
        function()
        function()  # TensorFlow traces a second time for another number of faces
    print(script.processor_name())
    print("| a photo with one face | a face in a batch of 128 | ratio | a heat map |")
    print("| --- | --- | --- | --- |")
    ratios = []
    for _ in range(options.rounds):
        one, batch = milliseconds(classify_one, 15), milliseconds(classify_all, 3) / len(faces)
        ratios.append(one / batch)
        print(f"| {one:.1f} ms | {batch:.1f} ms | {ratios[-1]:.2f} | "
              f"{milliseconds(map_one, 5):.0f} ms |", flush=True)
    print(f"\nratio, median of {options.rounds} rounds: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
