"""The contenders of benchmark.py that train the script's network in PyTorch."""

import itertools
import time

import emotion_recognition_cnn as script
import numpy as np
import torch
from torch import nn


# --- Network --------------------------------------------------------------------------------------
class FilterNorm(nn.LayerNorm):
    """Normalises across the filters at each position, like Keras's LayerNormalization."""

    def forward(self, images):
        return super().forward(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def group_normalization(layer):
    return nn.GroupNorm(layer.groups, layer.input.shape[-1], layer.epsilon, affine=layer.scale)


def convolution(layer):
    return nn.Conv2d(layer.input.shape[-1], layer.filters, layer.kernel_size, layer.strides,
                     padding=layer.padding, bias=layer.use_bias)


def pooling(layer):
    height, pooled_height = layer.input.shape[1], layer.output.shape[1]
    border = (pooled_height - 1) * layer.strides[0] + layer.pool_size[0] - height
    # If the padding is odd, Keras adds the extra pixel at the bottom and right, like ceil_mode.
    return nn.MaxPool2d(layer.pool_size, layer.strides, max(border, 0) // 2, ceil_mode=True)


def batch_normalization(layer):
    shape = layer.output.shape
    norm = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    return norm(shape[-1], layer.epsilon, 1 - layer.momentum)


def dense(layer):  # PyTorch's cross-entropy includes the softmax
    return nn.Linear(layer.input.shape[-1], layer.units, bias=layer.use_bias)


IN_PYTORCH = {
    "GroupNormalization": group_normalization,
    "LayerNormalization": lambda layer: FilterNorm(layer.input.shape[-1], layer.epsilon),
    "Conv2D": convolution,
    "MaxPooling2D": pooling,
    "BatchNormalization": batch_normalization,
    "ReLU": lambda layer: nn.ReLU(),
    "SpatialDropout2D": lambda layer: nn.Dropout2d(layer.rate),
    "Dropout": lambda layer: nn.Dropout(layer.rate),
    "Flatten": lambda layer: nn.Flatten(),
    "Dense": dense,
}


def in_pytorch(model):
    """Translate the layers of the script's network into PyTorch modules."""
    return nn.Sequential(*[IN_PYTORCH[type(layer).__name__](layer) for layer in model.layers])


# --- Data -----------------------------------------------------------------------------------------
class AugmentedImages(torch.utils.data.Dataset):
    """Labelled images (float32, 1 x 48 x 48), augmented by the script's ImageDataGenerator."""

    def __init__(self, data):
        self.images, self.labels, _ = data.training
        self.generator = data.augmentation

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.generator.random_transform(self.images[index].astype("float32"))
        # A flipped array has negative strides, which PyTorch does not support.
        return np.ascontiguousarray(np.moveaxis(image, 2, 0)), self.labels[index]


def augmented_batches(data):
    """Return a function that returns batches, which two processes augment during training."""
    # A forked process could deadlock because of TensorFlow's threads, so "spawn" is used.  PyTorch
    # seeds NumPy's global random state, which random_transform uses, in each process.
    loader = torch.utils.data.DataLoader(
        AugmentedImages(data), script.BATCH_SIZE, shuffle=True, drop_last=True,
        num_workers=2, multiprocessing_context="spawn", persistent_workers=True)
    return lambda steps: itertools.islice(loader, steps)


def batches_from_memory(training, memory_format):
    """Return a function that returns batches without augmentation."""
    images = torch.from_numpy(training.images).permute(0, 3, 1, 2).float()
    images = images.to(memory_format=memory_format)
    labels = torch.from_numpy(training.labels)

    def batches(steps):
        order = torch.randperm(len(labels))[: steps * script.BATCH_SIZE]
        for chosen in order.split(script.BATCH_SIZE):
            yield images[chosen], labels[chosen]

    return batches


# --- Training -------------------------------------------------------------------------------------
def pytorch_contender(name, data_dir, precision):
    """Like `keras_contender` in benchmark.py."""
    torch.manual_seed(0)
    data = script.load_data(data_dir)
    tuned = name != "PyTorch eager"
    memory_format = torch.channels_last if tuned else torch.contiguous_format
    model = in_pytorch(script.create_CNN(len(data.emotions)))
    model = model.to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), script.LEARNING_RATE, fused=tuned)
    bfloat16 = tuned and precision == "mixed_bfloat16"
    if name == "PyTorch augmented":
        batches = augmented_batches(data)
    else:
        batches = batches_from_memory(data.training, memory_format)

    def train(steps):
        times = []
        for images, labels in batches(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            times.append(time.time())
        return times

    return train, len(data.training.labels) // script.BATCH_SIZE
