"""Measure what the views of an image give: one, two or the script's 18, on validation images.

    python tests/measure/views.py --data-dir data

The probabilities of the views are averaged.  The network is the included one.  Validation are the
PublicTest images, which the number of views may be chosen on.  Loss is the mean cross-entropy, in
nats.
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
            ("three sizes at three heights, and all of them mirrored", len(script.VIEWS),
             script.classify_faces(model, images))):
        losses = script.keras.losses.sparse_categorical_crossentropy(labels, probabilities)
        print(f"| {views} | {number} | {accuracy(probabilities, labels)} | "
              f"{losses.numpy().mean():.3f} |")


if __name__ == "__main__":
    main()
