"""Measure how wide the crop of a face in a photo should be, relative to MTCNN's box.

    python tests/measure/framing.py --data-dir data

This program pads the dataset's images with their edge pixels and enlarges them four times, so that
they look like photos.  MTCNN searches them for faces, as with --predict.  The program uses the
images with exactly one detected face.  It prints:
  - the width of the dataset's frame relative to MTCNN's box: the median over training images
  - the accuracy of the included network on validation images (PublicTest), for square crops around
    the centre of MTCNN's box and for the dataset's own frame
"""

import sys

import numpy as np
from included import accuracy, load_included, script
from PIL import Image

IMAGES = 600  # from the training set, and from the validation set
MARGIN = 4 * script.SIZE // 2  # in pixels of the enlarged image
FRAME = (MARGIN, MARGIN, 3 * MARGIN, 3 * MARGIN)  # left, top, right, bottom


def find_faces(part):
    """Find the faces in IMAGES evenly spaced images of a part of the dataset.

    Returns photos (arrays), MTCNN's boxes (left, top, width, height) and labels of the images with
    exactly one detected face.
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
        sys.exit("error: MTCNN did not find exactly one face in any image")
    return photos, np.array(boxes, float), np.array(labels)


def squares_around(boxes, ratio):
    """Return squares (left, top, right, bottom) around boxes, `ratio` times as wide."""
    middle = boxes[:, :2] + boxes[:, 2:] / 2
    reach = ratio * boxes[:, 2:3] / 2
    return np.hstack([middle - reach, middle + reach]).round().astype(int)


def main():
    model, data = load_included(__doc__)
    photos, boxes, _ = find_faces(data.training)
    print(f"\nThe dataset's frame is {np.median(2 * MARGIN / boxes[:, 2]):.2f} times as wide as "
          f"MTCNN's box (median of {len(photos)} training images)\n", flush=True)
    photos, boxes, labels = find_faces(data.validation)
    print(f"Accuracy on {len(photos)} validation images:\n")
    print("| width of the square, relative to MTCNN's box | accuracy |\n| --- | --- |")
    squares = {str(ratio): squares_around(boxes, ratio) for ratio in (1.0, 1.25, 1.5)}
    squares["the dataset's own frame"] = [FRAME] * len(photos)
    for name, of_photos in squares.items():
        faces = np.stack([script.cut_out(*pair) for pair in zip(photos, of_photos)])
        probabilities = script.classify_faces(model, faces[..., np.newaxis])
        print(f"| {name} | {accuracy(probabilities, labels)} |")


if __name__ == "__main__":
    main()
