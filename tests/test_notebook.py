"""The five functions called from Python, and the code of the README."""

import json
import re
import shutil

import numpy as np
from conftest import EMOTIONS, ROOT, make_dataset, script


def code_of_readme(word):
    """Return the block of Python in the README that holds a word."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    block, = [block for block in blocks if word in block]
    return block


def test_five_functions_one_after_another_and_again_with_another_folder(
        small_dataset, tmp_path, capfd):
    other_dataset = make_dataset(tmp_path / "other", 3, 1, 2)
    for data_dir, output_dir, images in ((small_dataset, tmp_path / "output", (42, 14, 14)),
                                         (other_dataset, tmp_path / "output 2", (21, 7, 14))):
        data = script.load_data(str(data_dir))
        model = script.create_CNN(len(data.emotions))
        before = model.get_weights()
        history = script.train_model(model, data.training, data.validation, epochs=1)
        scores, probabilities = script.evaluate_model(model, data.test, data.emotions)
        script.plot_performance(history, scores, str(output_dir))
        of_validation, _ = script.evaluate_model(model, data.validation, data.emotions)
        assert of_validation["accuracy"] == of_validation["clean_accuracy"]
        assert data.emotions == EMOTIONS
        parts = data.training, data.validation, data.test
        assert tuple(len(part.images) for part in parts) == images
        assert history["epoch"] == [1] and not np.array_equal(before[1], model.get_weights()[1])
        assert probabilities.shape == (14, 7)
        assert scores["accuracy"] == np.mean(probabilities.argmax(axis=1) == data.test.labels)
        assert {path.name for path in output_dir.iterdir()} == {
            "accuracy.png", "loss.png", "confusion_matrix.png"}


def test_notebook_of_the_readme(small_dataset, tmp_path, monkeypatch, capfd):
    code = code_of_readme("train_model(")
    assert len(code.splitlines()) <= 12 and "epochs=44" in code
    shutil.copytree(small_dataset, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("epochs=44", "epochs=1"), names)
    assert names["history"]["epoch"] == [1] and 0 <= names["scores"]["accuracy"] <= 1
    assert {path.name for path in (tmp_path / "output").iterdir()} == {
        "accuracy.png", "loss.png", "confusion_matrix.png"}


def test_network_of_the_readme_without_the_script(tmp_path, monkeypatch, capsys):
    """It sees the pixels that --predict sees, in one view of the 18."""
    network, = ROOT.glob(f"docs/runs/*/{script.NETWORK}")
    (tmp_path / "output").mkdir()
    shutil.copy(network, tmp_path / "output")
    rng = np.random.default_rng(0)
    face = script.Image.fromarray(rng.integers(0, 256, (90, 70, 3), "uint8"))
    face.save(tmp_path / "face.jpg")
    monkeypatch.chdir(tmp_path)
    views = []

    def classify_and_tell(model, images):
        views.append(images)
        return model.predict(images, verbose=0)  # of a single view

    monkeypatch.setattr(script, "classify_faces", classify_and_tell)
    script.predict_emotions(["face.jpg"], detect=False, as_json=True)
    predicted = json.loads(capsys.readouterr().out)["probabilities"]
    names = {}
    exec(code_of_readme("load_model("), names)
    assert names["emotions"] == list(predicted) == EMOTIONS
    assert np.allclose(names["probabilities"], list(predicted.values()), atol=1e-6)
    assert views[0].shape == (1, 48, 48, 1)
