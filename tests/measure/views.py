"""Measure the benefit of averaging over 1, 2 or 18 views of an image.

    python tests/measure/views.py --data-dir data

This program evaluates the included network on the validation images (PublicTest).  Loss is the mean
cross-entropy, in nats.
"""

from included import accuracy, load_included, script


def main():
    model, data = load_included(__doc__)
    images, labels, _ = data.validation
    upright = model.predict(images, batch_size=256, verbose=0)
    mirrored = model.predict(images[:, :, ::-1], batch_size=256, verbose=0)
    print("\n| views | number | accuracy | loss |\n| --- | --- | --- | --- |")
    for views, number, probabilities in (
            ("the image", 1, upright),
            ("the image and its mirror image", 2, (upright + mirrored) / 2),
            ("three sizes at three heights, and their mirror images", len(script.VIEWS),
             script.classify_faces(model, images))):
        losses = script.keras.losses.sparse_categorical_crossentropy(labels, probabilities)
        print(f"| {views} | {number} | {accuracy(probabilities, labels)} | "
              f"{losses.numpy().mean():.3f} |")


if __name__ == "__main__":
    main()
