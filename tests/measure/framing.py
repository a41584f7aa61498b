"""Measure how faces have to be cut out of photos: as wide as the dataset's frame, or otherwise.

    python tests/measure/framing.py --data-dir data

The dataset's images are faces already.  With their edges drawn out by half a face and four times as
large they stand for photos, in which MTCNN looks for faces as it does for --predict.  Those count
in which it finds exactly one.  Printed are:
  - how much wider the dataset's frame is than MTCNN's box: the median over training images;
  - how many validation images (PublicTest) the included network classifies correctly when their
    faces are cut out as squares around the middle of MTCNN's box, or in the dataset's own frame.
"""

import sys

import numpy as np
from included import accuracy, load_included, script
from PIL import Image

IMAGES = 600  # of training, and of validation
MARGIN = 4 * script.SIZE // 2  # pixels of such a photo
FRAME = (MARGIN, MARGIN, 3 * MARGIN, 3 * MARGIN)  # left, top, right, bottom: the dataset's own


def find_faces(part):
    """Find the face in some images of a part of the dataset, spread evenly over it.

    Returns photos (arrays), MTCNN's boxes (left, top, width, height) and labels where it finds
    exactly one.
    """
    photos, boxes, labels = [], [], []
    for i in np.unique(np.linspace(0, len(part.images) - 1, IMAGES, dtype=int)):
        wide = Image.fromarray(np.pad(part.images[i, :, :, 0], script.SIZE // 2, "edge"))
        photo = wide.resize((4 * MARGIN, 4 * MARGIN), Image.Resampling.BILINEAR)
        pixels = np.asarray(photo.convert("RGB"))
        found = script.face_detector().detect_faces(pixels, fit_to_image=False,
                                                    threshold_onet=0.95)  # as in the script
        if len(found) == 1:
            photos.append(pixels)
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


def main():
    model, data = load_included(__doc__)
    photos, boxes, _ = find_faces(data.training)
    print(f"\nThe dataset's frame is {np.median(2 * MARGIN / boxes[:, 2]):.2f} times as wide as "
          f"MTCNN's box: the median of {len(photos)} training images\n", flush=True)
    photos, boxes, labels = find_faces(data.validation)
    print(f"{len(photos)} validation images:\n")
    print("| square, times as wide as MTCNN's box | accuracy |\n| --- | --- |")
    squares = {str(ratio): squares_around(boxes, ratio) for ratio in (1.0, 1.25, 1.5)}
    squares["the dataset's own frame"] = [FRAME] * len(photos)
    for name, of_photos in squares.items():
        faces = np.stack([script.cut_out(*pair) for pair in zip(photos, of_photos)])
        probabilities = script.classify_faces(model, faces[..., np.newaxis])
        print(f"| {name} | {accuracy(probabilities, labels)} |")


if __name__ == "__main__":
    main()
