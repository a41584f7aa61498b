"""Measure how faces have to be cut out of photos: as wide as the dataset's frame, or otherwise.

    python tests/measure/framing.py --data-dir data

The dataset's images are faces already.  With their edges drawn out by half a face and four times as
large they stand for photos, in which MTCNN looks for faces as it does for --predict.  Those count
in which it finds exactly one.  Printed are:
  - how much wider the dataset's frame is than MTCNN's box: the median over training images;
  - how many validation images (PublicTest) the included network classifies correctly when their
    faces are cut out as squares around the middle of MTCNN's box, or in the dataset's own frame.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import emotion_recognition_cnn as script  # noqa: E402
from mtcnn import MTCNN  # noqa: E402  after the script, which sets up TensorFlow

MARGIN = 4 * script.SIZE // 2  # pixels of such a photo
FRAME = (MARGIN, MARGIN, 3 * MARGIN, 3 * MARGIN)  # left, top, right, bottom: the dataset's own


def find_faces(part, number, detector):
    """Find the face in so many images of a part of the dataset, spread evenly over it.

    Returns photos, MTCNN's boxes (left, top, width, height) and labels where it finds exactly one.
    """
    photos, boxes, labels = [], [], []
    for i in np.unique(np.linspace(0, len(part.images) - 1, number, dtype=int)):
        wide = Image.fromarray(np.pad(part.images[i, :, :, 0], script.SIZE // 2, "edge"))
        photo = wide.resize((4 * MARGIN, 4 * MARGIN), Image.Resampling.BILINEAR)
        found = detector.detect_faces(np.asarray(photo.convert("RGB")), fit_to_image=False,
                                      threshold_onet=0.95)  # as in the script
        if len(found) == 1:
            photos.append(photo)
            boxes.append(found[0]["box"])
            labels.append(part.labels[i])
    if not photos:
        sys.exit("error: MTCNN finds a single face in none of the images")
    return photos, np.array(boxes, float), np.array(labels)


def squares_around(boxes, ratio):
    """Return squares (left, top, right, bottom) around boxes, `ratio` times as wide as those."""
    middle = boxes[:, :2] + boxes[:, 2:] / 2
    reach = ratio * boxes[:, 2:3] / 2
    return np.hstack([middle - reach, middle + reach]).round().astype(int)


def print_row(name, photos, squares, labels, model):
    """Print the accuracy on the squares that are cut out of the photos."""
    faces = [script.face_pixels(script.cut_out(*of)) for of in zip(photos, squares)]
    probabilities = script.classify_faces(model, np.stack(faces)[..., np.newaxis])
    accuracy = (probabilities.argmax(axis=1) == labels).mean()
    print(f"| {name} | {100 * accuracy:.1f} % |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder that holds train/ and test/")
    parser.add_argument("--images", type=int, default=600,
                        help="of training, and of validation (default: %(default)s)")
    options = parser.parse_args()
    model, emotions = script.load_network(sorted(ROOT.glob(f"docs/runs/*/{script.NETWORK}"))[0])
    data = script.load_data(options.data_dir)
    if emotions != data.emotions:
        sys.exit(f"error: the network knows {emotions}, the images show {data.emotions}")
    detector = MTCNN()
    photos, boxes, _ = find_faces(data.training, options.images, detector)
    print(f"\nThe dataset's frame is {np.median(2 * MARGIN / boxes[:, 2]):.2f} times as wide as "
          f"MTCNN's box: the median of {len(photos)} training images\n", flush=True)
    photos, boxes, labels = find_faces(data.validation, options.images, detector)
    print(f"{len(photos)} validation images:\n")
    print("| square, times as wide as MTCNN's box | accuracy |\n| --- | --- |")
    for ratio in (1.0, 1.25, 1.5):
        print_row(ratio, photos, squares_around(boxes, ratio), labels, model)
    print_row("the dataset's own frame", photos, [FRAME] * len(photos), labels, model)


if __name__ == "__main__":
    main()
