"""Measure what a further photo with one face costs, against a face in a batch of 128.

    python tests/measure/photo_speed.py

Faces are drawn; the network is the included one.  The photos are classified as by --predict, four
at a time; opening them and looking for faces is left out, as is what is paid once.  In every round
each is timed several times, one after the other, and the median taken: the ratio is of one machine
at one time.  Also printed: a photo by itself, and the heat map of a face, which a picture takes.
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

    photos = [script.Photo(Path("x"), (48, 48), None, [(0, 0, 48, 48)], faces[i:i + 1])
              for i in range(16)]

    def classify_photos():
        for first in range(0, len(photos), 4):
            script.classify_photos(photos[first:first + 4], model, emotions)

    def classify_single_photo():
        script.classify_photos(photos[:1], model, emotions)

    def classify_batch():
        script.classify_faces(model, faces)

    def map_one():
        script.occlusion_map(model, faces[0], 0)

    for function in classify_single_photo, classify_photos, classify_batch, map_one:
        function()
        function()  # TensorFlow traces a second time for another number of faces
    print(script.processor_name())
    print("| a further photo | a face in a batch of 128 | ratio | a single photo | a heat map |")
    print("| --- | --- | --- | --- | --- |")
    ratios = []
    for _ in range(options.rounds):
        photo = milliseconds(classify_photos, 7) / len(photos)
        face = milliseconds(classify_batch, 3) / len(faces)
        ratios.append(photo / face)
        print(f"| {photo:.1f} ms | {face:.1f} ms | {ratios[-1]:.2f} | "
              f"{milliseconds(classify_single_photo, 15):.1f} ms | "
              f"{milliseconds(map_one, 5):.0f} ms |", flush=True)
    print(f"\nratio, median of {options.rounds} rounds: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
