"""The network and its training, called from Python: precision, weights, checkpoints, Ctrl-C."""

import os
import signal

import keras
import numpy as np
import pytest
from conftest import kept_history, script, small_network


@pytest.fixture
def data(small_dataset, capfd):
    """Return the small dataset, loaded in batches of 8."""
    return script.load_data(small_dataset, batch_size=8, seed=3)


@pytest.fixture
def dtype_policy():
    """Return Keras's function that sets the dtype policy; afterwards it is float32 again."""
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


def train(model, data, **settings):
    """Train on `data`, for one epoch unless `settings` say otherwise; return the history."""
    return script.train_model(model, data.training, data.validation, **{"epochs": 1} | settings)


def without_seconds(history):
    """Return a history without what differs from run to run."""
    return {name: values for name, values in history.items() if name != "seconds"}


def test_network_is_two_convolution_blocks_flatten_and_two_dense_layers():
    model = script.create_CNN(7)
    kinds = [type(layer).__name__ for layer in model.layers]
    free = {"LayerNormalization", "BatchNormalization", "ReLU", "Dropout", "SpatialDropout2D"}
    assert [kind for kind in kinds if kind not in free] == [
        "Conv2D", "MaxPooling2D", "Conv2D", "MaxPooling2D", "Flatten", "Dense", "Dense"]
    assert model.input_shape == (None, 48, 48, 1) and model.output_shape == (None, 7)
    assert model.layers[-1].activation is keras.activations.softmax
    assert script.create_CNN(3).output_shape == (None, 3)


@pytest.mark.parametrize(("epochs", "rates"), [(11, (0.0225, 0.05)), (44, (0.09, 0.2)),
                                               (88, (0.18, 0.4)), (120, (0.18, 0.4))])
def test_dropout_grows_with_the_length_of_the_run(epochs, rates):
    model = script.create_CNN(7, script.Settings(epochs=epochs).dropout)
    dropout = [layer.rate for layer in model.layers if hasattr(layer, "rate")]
    assert dropout == pytest.approx(rates)


def test_light_and_contrast_do_not_change_the_prediction():
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
def test_bfloat16_only_where_the_processor_is_faster_with_it(monkeypatch, vendor, flags, expected):
    monkeypatch.setattr(script.tf.config, "list_physical_devices", lambda kind: [])
    text = f"vendor_id\t: {vendor}\nmodel name\t: Tester 1\nflags\t\t: {flags}\n"
    monkeypatch.setattr(script, "processor_information", lambda: text)
    assert script.fastest_precision() == expected
    assert script.processor_name() == "Tester 1"


@pytest.mark.parametrize(("details", "expected"), [
    ({"compute_capability": (8, 0)}, "mixed_float16"), ({"compute_capability": (6, 1)}, "float32"),
    ({}, "float32")])
def test_float16_only_on_gpus_that_have_tensor_cores(monkeypatch, details, expected):
    monkeypatch.setattr(script.tf.config, "list_physical_devices", lambda kind: ["a GPU"])
    monkeypatch.setattr(script.tf.config.experimental, "get_device_details", lambda gpu: details)
    assert script.fastest_precision() == expected


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_saved_model_predicts_in_float32(data, tmp_path, dtype_policy, precision):
    dtype_policy(precision)
    model = script.create_CNN(7)
    assert {layer.compute_dtype for layer in model.layers[:-1]} == {precision.split("_")[-1]}
    train(model, data)
    dtype_policy("float32")
    script.save_network(model, data.emotions, tmp_path / script.NETWORK)
    saved = keras.models.load_model(tmp_path / script.NETWORK)
    assert {layer.compute_dtype for layer in saved.layers} == {"float32"}
    predictions = saved.predict(data.test.images, verbose=0)
    assert predictions.dtype == "float32"
    assert np.array_equal(predictions, model.predict(data.test.images, verbose=0))


def test_images_of_rare_emotions_weigh_more():
    labels = np.repeat(range(7), [8, 1, 8, 27, 8, 8, 8])
    weights = script.class_weights(labels)
    relative = [weights[label] / weights[0] for label in range(7)]
    assert relative == pytest.approx([1, 2, 1, 2 / 3, 1, 1, 1])  # cube roots of rarity
    assert np.mean([weights[label] for label in labels]) == pytest.approx(1)


def test_training_takes_these_weights(data, monkeypatch):
    fit, given = keras.Sequential.fit, {}

    def fit_and_tell(model, *arguments, **settings):
        given.update(settings)
        return fit(model, *arguments, **settings)

    monkeypatch.setattr(keras.Sequential, "fit", fit_and_tell)
    data.training.labels[:5] = 6  # angry faces are rare, surprised ones are not
    train(small_network(), data)
    assert given["class_weight"] == script.class_weights(data.training.labels)
    assert given["class_weight"][0] > given["class_weight"][6]


def test_one_and_two_workers_give_the_same_history(data):
    histories = []
    for workers in (1, 2):
        data.training.workers = workers
        keras.utils.set_random_seed(3)
        histories.append(without_seconds(train(small_network(), data, epochs=2)))
    assert histories[0] == histories[1] and len(histories[0]["loss"]) == 2


def test_training_without_a_checkpoint_writes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(small_network(), data)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_never_makes_the_next_one_train_nothing(data, tmp_path):
    histories = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        model = small_network()
        before = model.get_weights()
        histories.append(train(model, data, checkpoint=str(tmp_path / "run.npz")))
        assert not all(map(np.array_equal, before, model.get_weights()))
        assert {path.name for path in tmp_path.iterdir()} == {"accuracy.png", "loss.png"}
    assert without_seconds(histories[0]) == without_seconds(histories[1])


def test_plots_beside_the_checkpoint_are_current_after_every_epoch(data, tmp_path, monkeypatch):
    plot, plotted = script.plot_history, []

    def plot_and_tell(history, output_dir):
        plot(history, output_dir)
        plotted.append([*history["epoch"], (output_dir / "accuracy.png").read_bytes()])

    monkeypatch.setattr(script, "plot_history", plot_and_tell)
    train(small_network(), data, epochs=2, checkpoint=tmp_path / script.CHECKPOINT)
    assert [epochs for *epochs, _ in plotted] == [[1], [1, 2]]
    assert plotted[0][-1] != plotted[1][-1]


def test_checkpoint_is_on_the_disk_before_it_takes_the_place_of_the_last(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    script.save_checkpoint(tmp_path / "run.npz", {}, {"epoch": [1]}, [np.ones(2)], [np.zeros(3)])
    assert calls == ["fsync", "replace"]
    run, history, (variable,), (weight,) = script.load_checkpoint(tmp_path / "run.npz")
    assert (run, history) == ({}, {"epoch": [1]}) and variable.tolist() == [1, 1]
    assert weight.tolist() == [0, 0, 0]


def interrupt_after_first_checkpoint(monkeypatch):
    """Let Ctrl-C be pressed as soon as the first checkpoint is written."""
    save = script.save_checkpoint

    def save_and_press(*arguments):
        save(*arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(script, "save_checkpoint", save_and_press)


def test_a_notebook_goes_on_where_it_was_interrupted(data, tmp_path, monkeypatch):
    keras.utils.set_random_seed(3)
    whole = small_network()
    history = train(whole, data, epochs=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after_first_checkpoint(patch)
        keras.utils.set_random_seed(3)
        train(small_network(), data, epochs=3, checkpoint=tmp_path / "run.npz")
    assert (tmp_path / "run.npz").exists()
    keras.utils.set_random_seed(99)  # a new process has other random numbers
    resumed = small_network()
    resumed_history = train(resumed, data, epochs=3, checkpoint=tmp_path / "run.npz")
    assert without_seconds(resumed_history) == without_seconds(history)
    assert all(map(np.array_equal, resumed.get_weights(), whole.get_weights()))


def test_float16_resumes_exactly_although_the_loss_scale_skips_steps(
        data, tmp_path, monkeypatch, dtype_policy):
    """A scale that grows with every step soon is too large, and a step is left out."""
    original, optimizers = keras.optimizers.LossScaleOptimizer.__init__, []

    def grow_fast(optimizer, *inner, **settings):
        original(optimizer, *inner, **settings | {"dynamic_growth_steps": 1})
        optimizers.append(optimizer)

    def train_network(name):
        keras.utils.set_random_seed(3)
        model = small_network()
        history = train(model, data, epochs=2, checkpoint=tmp_path / name)
        return without_seconds(history), model.get_weights()

    monkeypatch.setattr(keras.optimizers.LossScaleOptimizer, "__init__", grow_fast)
    dtype_policy("mixed_float16")
    history, weights = train_network("whole.npz")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after_first_checkpoint(patch)
        train_network("interrupted.npz")
    assert int(optimizers[-1].inner_optimizer.iterations) < len(data.training)  # some left out
    resumed_history, resumed_weights = train_network("interrupted.npz")
    assert resumed_history == history and len(history["loss"]) == 2
    assert all(map(np.array_equal, resumed_weights, weights))


@pytest.mark.parametrize(("settings", "what"), [
    ({"epochs": 4}, "epochs"), ({"learning_rate": 0.1}, "learning rate"), ({}, "images")])
def test_a_checkpoint_of_another_run_is_refused_and_stays(
        data, tmp_path, monkeypatch, settings, what):
    checkpoint = tmp_path / "run.npz"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after_first_checkpoint(patch)
        train(small_network(), data, epochs=3, checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    if what == "images":
        data.training.images[0] = 0
    with pytest.raises(script.InputError, match=f"run.npz does not fit: the {what} changed since"):
        train(small_network(), data, **{"epochs": 3, "checkpoint": checkpoint} | settings)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("within, epochs", [("train_step", 0), ("test_step", 1)])
def test_ctrl_c_within_tensorflow_comes_out_after_it(
        data, tmp_path, monkeypatch, within, epochs):
    step, presses = getattr(keras.Sequential, within), iter([signal.SIGINT])

    def press_and_step(*arguments):  # it may be traced twice
        for press in presses:
            signal.raise_signal(press)
        return step(*arguments)

    monkeypatch.setattr(keras.Sequential, within, press_and_step)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        train(script.create_CNN(7), data, checkpoint=tmp_path / "unfinished" / script.CHECKPOINT)
    assert interrupt.traceback[-1].name == "interrupt_if_pressed"  # not within TensorFlow
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(kept_history(tmp_path).get("epoch", [])) == epochs


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), script.delayed_interrupt() as pressed:
        assert not pressed.is_set()
        signal.raise_signal(signal.SIGINT)
        assert pressed.is_set()
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second Ctrl-C did nothing")


def test_ctrl_c_does_what_it_did_after_a_fit_that_failed(data, monkeypatch):
    def fit(*_, **__):
        raise ValueError("broken")

    monkeypatch.setattr(keras.Sequential, "fit", fit)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="broken"):
        train(small_network(), data)
    assert signal.getsignal(signal.SIGINT) is handler
