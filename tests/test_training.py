"""The network and its training from Python: precision, weights, checkpoints."""

import importlib.util
import inspect
import math
import os

import keras
import numpy as np
import pytest
from conftest import EMOTIONS, changed_script, make_dataset, script, small_network
from PIL import Image
from tensorflow.keras.preprocessing.image import ImageDataGenerator


@pytest.fixture
def data(small_dataset, capfd):
    """Return the small dataset."""
    return script.load_data(small_dataset)


@pytest.fixture
def dtype_policy():
    """Return Keras's function to set the dtype policy, and reset the policy after the test."""
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def no_plots(monkeypatch):
    """Disable plots during training, for tests that do not check them."""
    monkeypatch.setattr(script, "plot_history", lambda *_: None)


def train(model, data, **settings):
    """Train and return the history; by default, for one epoch with a batch size of 8."""
    return script.train_model(model, data, **{"epochs": 1, "batch_size": 8} | settings)


def without_seconds(history):
    """Return a history without the seconds, which differ between runs."""
    return {name: values for name, values in history.items() if name != "seconds"}


def dropout_rates(model):
    """Return the rates of the dropout layers of a network."""
    return [layer.rate for layer in model.layers if hasattr(layer, "rate")]


def test_network_is_two_convolution_blocks_flatten_and_two_dense_layers():
    model = script.create_CNN(7)
    kinds = [type(layer).__name__ for layer in model.layers]
    fixed = [kind for kind in kinds if any(
        word in kind for word in ("Conv", "Pooling", "Flatten", "Dense"))]
    assert fixed == [
        "Conv2D", "MaxPooling2D", "Conv2D", "MaxPooling2D", "Flatten", "Dense", "Dense"]
    assert model.input_shape == (None, 48, 48, 1) and model.output_shape == (None, 7)
    assert model.layers[-1].activation is keras.activations.softmax
    assert script.create_CNN(3).output_shape == (None, 3)


@pytest.mark.parametrize(("epochs", "rates"), [(11, (0.0225, 0.05)), (44, (0.09, 0.2)),
                                               (88, (0.18, 0.4)), (120, (0.18, 0.4))])
def test_dropout_increases_with_the_number_of_epochs(
        small_dataset, tmp_path, run_here, monkeypatch, epochs, rates):
    trained = []

    def fit(model, *_, **__):
        trained.append(model)
        raise OSError("enough of it")

    monkeypatch.setattr(keras.Sequential, "fit", fit)
    process = run_here("--data-dir", small_dataset, "--epochs", epochs, cwd=tmp_path)
    assert process.returncode == 2 and "enough of it" in process.stderr
    assert dropout_rates(trained[0]) == pytest.approx(rates)


def test_defaults_in_python_are_consistent_and_match_the_command_line():
    of_training = {name: parameter.default for name, parameter
                   in inspect.signature(script.train_model).parameters.items()}
    assert dropout_rates(script.create_CNN(7)) == pytest.approx(
        dropout_rates(script.create_CNN(7, of_training["epochs"])))
    options = script.parse_command_line([])
    for name in "epochs", "batch_size", "learning_rate", "seed":
        assert getattr(options, name) == of_training[name]
    assert of_training["checkpoint"] is None and of_training["source"] is None


def test_batch_size_must_be_at_least_two(capsys):
    """Batch normalisation in the dense block turns a single image into zeros."""
    assert script.parse_command_line(["--batch-size", "2"]).batch_size == 2
    with pytest.raises(SystemExit) as end:
        script.parse_command_line(["--batch-size", "1"])
    assert end.value.code == 2
    assert "error: argument --batch-size: 1 is " in capsys.readouterr().err.splitlines()[-1]


def test_brightness_and_contrast_do_not_change_the_prediction():
    rng = np.random.default_rng(0)
    images = rng.uniform(60, 120, (4, 48, 48, 1))
    model = script.create_CNN(7)
    assert np.allclose(model(images), model(2 * images - 60), atol=1e-3)
    assert np.allclose(np.sum(model(images), axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("vendor", "flags", "expected"), [
    ("AuthenticAMD", "sse2 avx2 avx512f", "float32"),
    ("AuthenticAMD", "avx512f avx512_bf16", "mixed_bfloat16"),
    ("GenuineIntel", "avx512f avx512_bf16", "float32"),
    ("GenuineIntel", "avx512_bf16 amx_tile amx_bf16", "mixed_bfloat16"), ("", "", "float32")])
def test_bfloat16_is_only_used_on_processors_where_it_is_faster(
        monkeypatch, vendor, flags, expected):
    monkeypatch.setattr(script.tf.config, "list_physical_devices", lambda kind: [])
    monkeypatch.setattr(
        script, "CPU_INFO",
        f"vendor_id\t: {vendor}\nmodel name\t: Tester 1\nflags\t\t: {flags}\n")
    assert (script.hardware_name(), script.fastest_precision()) == ("Tester 1", expected)
    monkeypatch.setattr(script, "CPU_INFO", "")  # as on a Mac
    assert script.hardware_name() not in ("", "Tester 1")
    assert script.fastest_precision() == "float32"


@pytest.mark.parametrize(("details", "expected"), [
    ({"compute_capability": (8, 0), "device_name": "Tester 2"}, ("Tester 2", "mixed_float16")),
    ({"compute_capability": (7, 0)}, ("GPU", "mixed_float16")),
    ({"compute_capability": (6, 1), "device_name": "Tester 3"}, ("Tester 3", "float32")),
    ({}, ("GPU", "float32"))])
def test_float16_is_only_used_on_gpus_with_tensor_cores(monkeypatch, details, expected):
    monkeypatch.setattr(script.tf.config, "list_physical_devices", lambda kind: ["a GPU"])
    monkeypatch.setattr(script.tf.config.experimental, "get_device_details", lambda gpu: details)
    assert (script.hardware_name(), script.fastest_precision()) == expected


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_saved_model_predicts_in_float32(data, tmp_path, dtype_policy, precision):
    dtype_policy(precision)
    model = script.create_CNN(7)
    assert {layer.compute_dtype for layer in model.layers[:-1]} == {precision.split("_")[-1]}
    train(model, data, batch_size=42)
    dtype_policy("float32")
    script.save_network(model, data.emotions, tmp_path / script.NETWORK_FILE)
    saved = keras.models.load_model(tmp_path / script.NETWORK_FILE)
    assert {layer.compute_dtype for layer in saved.layers} == {"float32"}
    predictions = saved.predict(data.test.images, verbose=0)
    assert predictions.dtype == "float32"
    assert np.array_equal(predictions, model.predict(data.test.images, verbose=0))


def test_images_of_rare_emotions_have_higher_weights():
    labels = np.repeat(range(7), [8, 1, 8, 27, 8, 8, 8])
    weights = script.class_weights(labels)
    relative = [weights[label] / weights[0] for label in range(7)]
    assert relative == pytest.approx([1, 2, 1, 2 / 3, 1, 1, 1])  # cube roots of rarity
    assert np.mean([weights[label] for label in labels]) == pytest.approx(1)


def test_training_uses_these_weights(data, monkeypatch):
    fit, given = keras.Sequential.fit, {}

    def fit_and_tell(model, *arguments, **settings):
        given.update(settings)
        return fit(model, *arguments, **settings)

    monkeypatch.setattr(keras.Sequential, "fit", fit_and_tell)
    data.training.labels[:5] = 6  # angry faces are rare, surprised ones are not
    train(small_network(), data)
    assert given["class_weight"] == script.class_weights(data.training.labels)
    assert given["class_weight"][0] > given["class_weight"][6]


def test_each_epoch_has_its_own_transforms_and_learning_rate(data, monkeypatch):
    """The learning rate decays along a cosine."""
    augmented_batches, seeds = script.augmented_batches, []

    def augment_and_tell(data, batch_size, seed):
        seeds.append(seed)
        return augmented_batches(data, batch_size, seed)

    monkeypatch.setattr(script, "augmented_batches", augment_and_tell)
    history = train(small_network(), data, epochs=3, learning_rate=0.01, seed=5)
    assert history["epoch"] == [1, 2, 3] and seeds == [[5, 0], [5, 1], [5, 2]]
    assert history["learning_rate"] == pytest.approx([0.01, 0.0075, 0.0025])


def test_the_weights_are_those_of_the_best_epoch(data, monkeypatch):
    """Here, the second of three epochs has the highest validation accuracy."""
    fit, after_epoch, accuracies = keras.Sequential.fit, [], iter([0.3, 0.5, 0.4])

    def fit_and_tell(model, *arguments, **settings):
        fitted = fit(model, *arguments, **settings)
        after_epoch.append(model.get_weights())
        fitted.history["val_accuracy"] = [next(accuracies)]
        return fitted

    monkeypatch.setattr(keras.Sequential, "fit", fit_and_tell)
    model = small_network()
    history = train(model, data, epochs=3)
    assert history["val_accuracy"] == [0.3, 0.5, 0.4]
    assert all(map(np.array_equal, model.get_weights(), after_epoch[1]))
    assert not all(map(np.array_equal, model.get_weights(), after_epoch[2]))


def test_training_without_a_checkpoint_writes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(small_network(), data)
    assert not list(tmp_path.iterdir())


def test_the_script_can_be_changed_to_images_of_64_pixels(tmp_path, capfd):
    """Each emotion has stripes of another width.  Only SIZE is changed in the script."""
    path = changed_script(tmp_path, ("SIZE = 48 ", "SIZE = 64 "))
    spec = importlib.util.spec_from_file_location("changed", path)
    larger = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(larger)
    rng = np.random.default_rng(0)

    def draw(emotion, kind, number):
        stripes = 1.5 ** EMOTIONS.index(emotion) * np.linspace(0, 2 * np.pi, 64) + rng.uniform(0, 6)
        pixels = 128 + 60 * np.sin(stripes)[:, np.newaxis] + rng.normal(0, 20, (64, 64))
        return Image.fromarray(pixels.clip(0, 255).astype("uint8"))

    image = rng.uniform(0, 255, (1, 64, 64, 1)).astype("float32")
    of_first_view = {"zx": 11 / 12, "zy": 11 / 12, "ty": -64 / 24}
    expected = ImageDataGenerator(dtype="float32").apply_transform(image[0], of_first_view)
    first_view = larger.transform_images(image, larger.VIEWS[:1])[0]
    assert np.abs(first_view - expected).max() < 0.01

    data = larger.load_data(make_dataset(tmp_path / "data", 12, 2, 8, draw))
    assert data.training.images.shape == (84, 64, 64, 1)
    keras.utils.set_random_seed(0)
    model = larger.create_CNN(7, epochs=3)
    larger.train_model(model, data, epochs=3, batch_size=14)
    scores, _ = larger.evaluate_model(model, data)
    assert scores["single_image_accuracy"] > 0.5  # chance level: 0.14
    assert scores["accuracy"] > scores["single_image_accuracy"] - 0.1


def test_plots_next_to_the_checkpoint_are_updated_after_every_epoch(data, tmp_path, monkeypatch):
    plot, plotted = script.plot_history, []

    def plot_and_tell(history, output_dir):
        plot(history, output_dir)
        plotted.append([*history["epoch"], (output_dir / "accuracy.png").read_bytes()])

    monkeypatch.setattr(script, "plot_history", plot_and_tell)
    train(small_network(), data, epochs=2, checkpoint=tmp_path / script.CHECKPOINT_FILE)
    assert [epochs for *epochs, _ in plotted] == [[1], [1, 2]]
    assert plotted[0][-1] != plotted[1][-1]
    assert {path.name for path in tmp_path.iterdir()} >= {
        "accuracy.png", "loss.png", script.CHECKPOINT_FILE}


def test_checkpoint_is_on_the_disk_before_it_replaces_the_previous_one(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    expected = {"history": {"epoch": [1]}, "run": {}, "source": None}
    script.save_checkpoint(tmp_path / "run.npz", expected, [np.ones(2), np.zeros(3)])
    assert calls == ["fsync", "replace"]
    state, (variable, weight) = script.load_checkpoint(tmp_path / "run.npz")
    assert state == expected
    assert script.load_checkpoint(tmp_path / "run.npz", with_arrays=False) == (expected, [])
    assert variable.tolist() == [1, 1] and weight.tolist() == [0, 0, 0]


def test_a_file_that_cannot_be_written_does_not_replace_the_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file.txt"
    with script.atomic_write(path) as part:
        part.write_text("the one before")
        assert not path.exists()
    with pytest.raises(OSError, match="disk"), script.atomic_write(path) as part:
        part.write_text("half of")
        raise OSError("disk full")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="share"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("share gone")))
        with script.atomic_write(path) as part:
            part.write_text("all of it")
    assert path.read_text() == "the one before" and list(path.parent.iterdir()) == [path]


class Interruption(Exception):
    """Interrupts the training in these tests."""


def interrupt(monkeypatch, checkpoints):
    """Interrupt the training after a given number of checkpoints."""
    save, written = script.save_checkpoint, []

    def save_and_interrupt(*arguments, **settings):
        save(*arguments, **settings)
        written.append(arguments)
        if len(written) == checkpoints:
            raise Interruption

    monkeypatch.setattr(script, "save_checkpoint", save_and_interrupt)


def test_an_interrupted_training_resumes_exactly(
        data, tmp_path, monkeypatch, no_plots):
    """The first checkpoint is saved before the first epoch."""
    keras.utils.set_random_seed(3)
    whole = small_network()
    history = train(whole, data, epochs=2)
    for checkpoints in 1, 2:
        checkpoint = tmp_path / f"{checkpoints}.npz"
        with monkeypatch.context() as patch, pytest.raises(Interruption):
            interrupt(patch, checkpoints)
            keras.utils.set_random_seed(3)
            train(small_network(), data, epochs=2, checkpoint=checkpoint)
        state, _ = script.load_checkpoint(checkpoint)
        assert len(state["history"]["epoch"]) == checkpoints - 1
        keras.utils.set_random_seed(99)  # a new process has other random numbers
        resumed = small_network()
        resumed_history = train(resumed, data, epochs=2, checkpoint=str(checkpoint), resume=True)
        assert without_seconds(resumed_history) == without_seconds(history)
        assert all(map(np.array_equal, resumed.get_weights(), whole.get_weights()))


def test_a_finished_training_is_restored_from_its_checkpoint(data, tmp_path, monkeypatch, no_plots):
    first, again = small_network(), small_network()
    history = train(first, data, checkpoint=tmp_path / "run.npz")
    monkeypatch.setattr(keras.Sequential, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert train(again, data, checkpoint=tmp_path / "run.npz", resume=True) == history
    assert all(map(np.array_equal, first.get_weights(), again.get_weights()))


def test_a_checkpoint_on_a_full_disk_does_not_replace_the_previous_one(
        data, tmp_path, monkeypatch, no_plots):
    """Simulates a full disk, as not every machine can mount a small one."""
    checkpoint, replace, kept = tmp_path / "run.npz", os.replace, []

    def replace_once(source, target):
        if kept:
            raise OSError("No space left on device")
        replace(source, target)
        kept.append(checkpoint.read_bytes())

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(OSError, match="No space left"):
        train(small_network(), data, checkpoint=checkpoint)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == kept
    assert script.load_checkpoint(checkpoint)[0]["history"] == {"epoch": []}


def test_a_run_with_tuples_in_its_augmentation_resumes(data, tmp_path, monkeypatch, no_plots):
    """JSON turns tuples into lists."""
    monkeypatch.setattr(script, "AUGMENTATION", {
        "zoom_range": (0.9, 1.1), "width_shift_range": 0.1})
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        interrupt(patch, checkpoints=1)
        train(small_network(), data, checkpoint=tmp_path / "run.npz")
    history = train(small_network(), data, checkpoint=tmp_path / "run.npz", resume=True)
    assert history["epoch"] == [1]


def test_float16_resumes_exactly_although_the_loss_scale_skips_steps(
        data, tmp_path, monkeypatch, dtype_policy, no_plots):
    """Here, the scale grows in every step.  It soon becomes too large, so steps are skipped."""
    original, optimizers = keras.optimizers.LossScaleOptimizer.__init__, []

    def grow_fast(optimizer, *inner, **settings):
        original(optimizer, *inner, **settings | {"dynamic_growth_steps": 1})
        optimizers.append(optimizer)

    def train_network(name, **settings):
        keras.utils.set_random_seed(3)
        model = small_network()
        history = train(model, data, epochs=2, checkpoint=tmp_path / name, **settings)
        return without_seconds(history), model.get_weights()

    monkeypatch.setattr(keras.optimizers.LossScaleOptimizer, "__init__", grow_fast)
    dtype_policy("mixed_float16")
    history, weights = train_network("whole.npz")
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        interrupt(patch, checkpoints=2)
        train_network("interrupted.npz")
    steps = math.ceil(len(data.training.images) / 8)
    assert int(optimizers[-1].inner_optimizer.iterations) < steps  # some were skipped
    resumed_history, resumed_weights = train_network("interrupted.npz", resume=True)
    assert resumed_history == history and len(history["loss"]) == 2
    assert all(map(np.array_equal, resumed_weights, weights))


def test_loss_that_is_not_finite_ends_the_training(data, tmp_path):
    model = small_network()
    with pytest.raises(script.InputError, match="loss is NaN or infinite. .* lower learning rate"):
        train(model, data, learning_rate=1e30, checkpoint=tmp_path / "run.npz")
    state, _ = script.load_checkpoint(tmp_path / "run.npz")
    assert state["history"] == {"epoch": []}  # the epoch is not saved


@pytest.mark.parametrize(("settings", "what"), [
    ({"epochs": 4}, "epochs"), ({"batch_size": 16}, "batch size"), ({"seed": 1}, "seed"),
    ({"learning_rate": 0.1}, "learning rate"), ({}, "images"), ({}, "labels"),
    ({}, "augmentation"), ({}, "precision"), ({}, "number of parameters"),
    ({"epochs": 4, "seed": 1}, "epochs and the seed")])
def test_a_checkpoint_of_another_run_is_refused_and_kept(
        data, tmp_path, monkeypatch, dtype_policy, settings, what):
    checkpoint = tmp_path / "run.npz"
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        interrupt(patch, checkpoints=1)
        train(small_network(), data, epochs=3, checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    if what == "images":
        data.training.images[0] = 0
    elif what == "labels":
        data.validation.labels[0] = 3
        what = "images"
    elif what == "augmentation":
        monkeypatch.setattr(script, "AUGMENTATION", {"rotation_range": 11})
    elif what == "precision":
        dtype_policy("mixed_bfloat16")
    model = script.create_CNN(7) if what == "number of parameters" else small_network()
    with pytest.raises(script.InputError, match=f"run.npz does not .* run: the {what} changed"):
        train(model, data, **{"epochs": 3, "checkpoint": checkpoint, "resume": True} | settings)
    assert checkpoint.read_bytes() == before


def test_the_checkpoint_contains_the_source_of_the_data(data, tmp_path, monkeypatch):
    source = {"data_dir": "somewhere", "demo": False}
    interrupt(monkeypatch, checkpoints=1)
    with pytest.raises(Interruption):
        train(small_network(), data, checkpoint=tmp_path / "run.npz", source=source)
    state, _ = script.load_checkpoint(tmp_path / "run.npz")
    assert state["source"] == source and state["run"]["weight_decay"] == script.WEIGHT_DECAY


def test_a_checkpoint_is_not_overwritten_by_a_new_run(data, tmp_path, no_plots):
    train(small_network(), data, checkpoint=tmp_path / "run.npz")
    before = (tmp_path / "run.npz").read_bytes()
    with pytest.raises(script.InputError, match="contains an unfinished run.* --resume or delete"):
        train(small_network(), data, checkpoint=tmp_path / "run.npz")
    assert (tmp_path / "run.npz").read_bytes() == before


def test_a_run_does_not_replace_the_first_checkpoint_that_another_one_saves_meanwhile(
        tmp_path, monkeypatch):
    path, savez = tmp_path / "run.npz", np.savez
    first, second = ({"source": seed, "run": {}, "history": {}} for seed in (1, 2))

    def save_first(*arguments, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(np, "savez", savez)
            patch.setattr(os, "getpid", lambda: 1)
            script.check_no_checkpoint(path)  # of a run that starts while this one saves
            script.create_checkpoint(path, first, [])
        savez(*arguments, **settings)

    monkeypatch.setattr(np, "savez", save_first)
    with pytest.raises(script.InputError, match="contains an unfinished run"):
        script.create_checkpoint(path, second, [])
    assert script.load_checkpoint(path) == (first, []) and list(tmp_path.iterdir()) == [path]


def test_a_failed_first_checkpoint_leaves_no_files(
        data, tmp_path, monkeypatch, no_plots):
    checkpoint = tmp_path / "unfinished/run.npz"
    for error in OSError("disk full"), KeyboardInterrupt:
        with monkeypatch.context() as patch, pytest.raises((OSError, KeyboardInterrupt)):
            patch.setattr(np, "savez", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            train(small_network(), data, checkpoint=checkpoint)
        assert not list(tmp_path.iterdir())
