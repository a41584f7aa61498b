"""Compare heat maps: cover the pixels that they mark, and measure how the prediction changes.

    python tests/measure/heat_maps.py --data-dir data

In 400 validation images (PublicTest), each method marks the tenth of the pixels that is the
strongest evidence for the emotion that the included network predicts.  This program covers these
pixels.  It prints the mean drop of the emotion's probability (averaged over 18 views) and how often
the prediction changes.  As a control, it also covers the pixels that are marked for another image.
  - Grad-CAM: Selvaraju et al. (2017), arXiv:1610.02391, on the second convolution
  - HiResCAM: Draelos and Carin (2020), arXiv:2011.08891, without averaging the gradient
  - occlusion: the script's method
"""

import time

import numpy as np
from included import load_included, script
from PIL import Image

import tensorflow as tf  # after the script, which configures it

IMAGES = 400
COVERED = script.SIZE**2 // 10  # pixels


def gradient_of_second_convolution(model, image, label):
    """Return the output of the second convolution for an image (48 x 48), and its gradient.

    This is the gradient of the emotion's log-probability.  Both arrays are 14 x 14 x filters.
    """
    _, second = [number for number, layer in enumerate(model.layers)
                 if isinstance(layer, script.layers.Conv2D)]
    after_second = second + 1
    maps = tf.convert_to_tensor(image[np.newaxis, :, :, np.newaxis].astype("float32"))
    for layer in model.layers[:after_second]:
        maps = layer(maps)
    with tf.GradientTape() as tape:
        tape.watch(maps)
        output = maps
        for layer in model.layers[after_second:]:
            output = layer(output)
        logarithm = tf.math.log(output[0, label])
    return maps[0].numpy(), tape.gradient(logarithm, maps)[0].numpy()


def enlarge(places):
    """Enlarge a map of the second convolution (14 x 14) to the size of the image (48 x 48).

    The centre of position i is at pixel 3 i + 4.5, so the map covers the central 42 pixels.
    """
    image = Image.fromarray(places.astype("float32")).resize((42, 42), Image.Resampling.BILINEAR)
    return np.pad(np.asarray(image), 3, "edge")


def grad_cam(model, image, label):
    maps, gradient = gradient_of_second_convolution(model, image, label)
    return enlarge(np.maximum((maps * gradient.mean(axis=(0, 1))).sum(axis=2), 0))


def hires_cam(model, image, label):
    maps, gradient = gradient_of_second_convolution(model, image, label)
    return enlarge(np.maximum((maps * gradient).sum(axis=2), 0))


def cover_with_grey(image, marked):
    """Return the image (48 x 48) with the marked pixels replaced by its mean."""
    return np.where(marked, image.mean(), image)


def cover_with_blur(image, marked):
    """Return the image (48 x 48) with the marked pixels replaced by a blurred copy."""
    small = Image.fromarray(image).resize((6, 6), Image.Resampling.BOX)
    return np.where(marked, small.resize(image.shape, Image.Resampling.BICUBIC), image)


def mark(heat_map):
    """Mark the tenth of the pixels where a map is highest (bool, 48 x 48)."""
    marked = np.zeros(heat_map.size, bool)
    marked[np.argsort(-heat_map.ravel(), kind="stable")[:COVERED]] = True
    return marked.reshape(heat_map.shape)


def falls(model, images, marks, cover):
    """Return, as text, the mean drop of the probability and how often the prediction changes."""
    covered = np.stack([cover(image, marked) for image, marked in zip(images, marks)])
    before, after = [script.classify_faces(model, faces[..., np.newaxis])
                     for faces in (images, covered)]
    seen = before.argmax(axis=1)
    rows = np.arange(len(images))
    fall = (before[rows, seen] - after[rows, seen]).mean()
    return f"{100 * fall:.1f} | {100 * (after.argmax(axis=1) != seen).mean():.0f} %"


def random_square(rng):
    """Mark a square at a random position that covers a tenth of the image."""
    marked = np.zeros((script.SIZE, script.SIZE), bool)
    side = round(COVERED**0.5)
    top, left = rng.integers(0, script.SIZE - side + 1, 2)
    marked[top:top + side, left:left + side] = True
    return marked


def main():
    model, data = load_included(__doc__)
    rng = np.random.default_rng(0)
    images = rng.choice(data.validation.images[..., 0], IMAGES, replace=False)
    seen = script.classify_faces(model, images[..., np.newaxis]).argmax(axis=1)

    print(f"\n{IMAGES} validation images, {COVERED} of {script.SIZE**2} pixels covered; drop of "
          "the probability in percentage points\n")
    print("| method | ms per map | drop, grey | changed, grey | drop, other map | changed, other "
          "map | drop, blurred | changed, blurred |\n" + "| --- " * 8 + "|")
    for name, method in (("Grad-CAM", grad_cam), ("HiResCAM", hires_cam),
                         ("occlusion", script.occlusion_map)):
        started = time.perf_counter()
        heat_maps = [method(model, image, label) for image, label in zip(images, seen)]
        milliseconds = 1000 * (time.perf_counter() - started) / IMAGES
        marks = [mark(heat_map) for heat_map in heat_maps]
        of_others = marks[1:] + marks[:1]
        print(f"| {name} | {milliseconds:.0f} | {falls(model, images, marks, cover_with_grey)} | "
              f"{falls(model, images, of_others, cover_with_grey)} | "
              f"{falls(model, images, marks, cover_with_blur)} |", flush=True)
    marks = [random_square(rng) for _ in images]
    print(f"| random square | | {falls(model, images, marks, cover_with_grey)} | | | "
          f"{falls(model, images, marks, cover_with_blur)} |")


if __name__ == "__main__":
    main()
