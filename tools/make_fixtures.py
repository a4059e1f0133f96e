"""Make the small, real classifiers and image sets under `fixtures/`.

Two networks learn scikit-learn's handwritten digits (1,797 real 8x8 images): one in PyTorch, exported with
`torch.onnx.export`, and one in Keras, exported with `model.export(format="onnx")`. Both are checked with
ONNX Runtime on the evaluation shards that are written beside them.

    python tools/make_fixtures.py [torch|keras|all] [--out fixtures]

The frameworks are needed for this script alone, not by the package (Python 3.11, CPU only):

    pip install torch==2.13.0 tensorflow-cpu==2.21.0 keras==3.15.1 tf2onnx==1.17.0 onnx==1.23.2 \
        onnxruntime==1.19.2 scikit-learn==1.9.1 numpy==2.4.6

The split, the weights and the batches are seeded and training runs on one thread: a second run with the same
versions on the same kind of processor writes the same bytes, except that tf2onnx may number some names inside
the Keras file differently; its operators and weights stay the same.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(CUDA_VISIBLE_DEVICES="-1", KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="2")

import numpy as np
import onnx
import onnxruntime as ort
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEED = 2024
EVAL_IMAGES = 597
SHARD_IMAGES = 400
EPOCHS = 40
BATCH = 64
LEARNING_RATE = 3e-3
OPSET = 17
INPUT = "image"
MAX_BYTES = 300_000
MIN_ACCURACY = 0.97


class Digits(NamedTuple):
    """One part of the data: images of shape (n, 8, 8) within 0..1, and the digit each shows."""

    images: np.ndarray
    labels: np.ndarray


def split_digits() -> tuple[Digits, Digits]:
    """Split the digits into a training (= calibration) and an evaluation part, shuffled and stratified."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    labels = digits.target.astype(np.int64)
    train_images, eval_images, train_labels, eval_labels = train_test_split(
        images, labels, test_size=EVAL_IMAGES, stratify=labels, random_state=SEED
    )
    return Digits(train_images, train_labels), Digits(eval_images, eval_labels)


def write_shards(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays with a common leading axis as `000.npz`, `001.npz`, ... in place of what was there.

    Args:
        folder: Where the shards go.
        arrays: The arrays by the names they get inside each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.npz"):
        stale.unlink()
    count = len(next(iter(arrays.values())))
    for shard, start in enumerate(range(0, count, SHARD_IMAGES)):
        part: dict[str, Any] = {name: array[start : start + SHARD_IMAGES] for name, array in arrays.items()}
        np.savez(folder / f"{shard:03d}.npz", **part)


def torch_network() -> Any:
    """Build the PyTorch network: input (n, 1, 8, 8), output the logits of the ten digits."""
    from torch import nn

    class Residual(nn.Module):
        """A depthwise-separable pair of convolutions with a shortcut around it."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            self.norm1 = nn.BatchNorm2d(width)
            self.pointwise = nn.Conv2d(width, width, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU()

        def forward(self, x: Any) -> Any:
            """Return `relu(x + branch(x))`."""
            branch = self.norm2(self.pointwise(self.relu(self.norm1(self.depthwise(x)))))
            return self.relu(x + branch)

    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU6(),
        Residual(24),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        Residual(48),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def make_torch(train: Digits, path: Path) -> None:
    """Train the PyTorch network and export it with its BatchNormalization nodes.

    Args:
        train: What it learns from, images as (n, 1, 8, 8).
        path: The ONNX file to write.
    """
    import torch

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model = torch_network()
    images, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            (images[:1],),
            path,
            input_names=[INPUT],
            output_names=["logits"],
            dynamic_axes={INPUT: {0: "batch"}, "logits": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
            do_constant_folding=False,
            # The default folds each BatchNormalization into its Conv. PRESERVE leaves the model in the mode
            # it has (eval, so each node keeps its inference form) and skips that folding.
            training=torch.onnx.TrainingMode.PRESERVE,
        )


def make_keras(train: Digits, path: Path) -> None:
    """Train the Keras network, channels last, and export it with Keras's own exporter (tf2onnx).

    Args:
        train: What it learns from, images as (n, 8, 8, 1).
        path: The ONNX file to write.
    """
    import keras
    import tensorflow as tf
    from keras import layers

    keras.utils.set_random_seed(SEED)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()

    def conv(x: Any, width: int, size: int) -> Any:
        x = layers.Conv2D(width, size, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    image = keras.Input((8, 8, 1), name=INPUT)
    x = layers.ReLU(max_value=6.0)(conv(image, 24, 3))
    branch = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    branch = layers.ReLU()(layers.BatchNormalization()(branch))
    x = layers.ReLU()(layers.Add()([x, conv(branch, 24, 1)]))
    x = layers.MaxPooling2D(2)(x)
    x = layers.ReLU()(conv(x, 48, 3))
    x = layers.AveragePooling2D(2)(x)
    x = layers.Flatten()(x)
    model = keras.Model(image, layers.Dense(10, name="logits")(x))

    steps = EPOCHS * -(-len(train.images) // BATCH)
    model.compile(
        keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(train.images, train.labels, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    model.export(path, format="onnx", opset_version=OPSET, verbose=False)


def check(folder: Path) -> None:
    """Run a finished fixture in ONNX Runtime over its evaluation shards and print what it is.

    Args:
        folder: The fixture: `model.onnx` and `eval/*.npz`.

    Raises:
        ValueError: The file is too big or the model not accurate enough.
    """
    path = folder / "model.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    shards = [np.load(shard) for shard in sorted((folder / "eval").glob("*.npz"))]
    predicted = np.concatenate([session.run(None, {INPUT: shard[INPUT]})[0].argmax(1) for shard in shards])
    accuracy = float((predicted == np.concatenate([shard["labels"] for shard in shards])).mean())
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes, IR {model.ir_version}, accuracy {accuracy:.2%} of {len(predicted)}")
    print("  opset:", {entry.domain or "ai.onnx": entry.version for entry in model.opset_import})
    for role, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        print(f"  {role}:", *(f"{value.name} {value.type} {value.shape}" for value in values))
    operators = Counter(node.op_type for node in model.graph.node)
    print("  operators:", ", ".join(f"{name} {count}" for name, count in sorted(operators.items())))
    if size >= MAX_BYTES or accuracy <= MIN_ACCURACY:
        raise ValueError(f"{path}: {size:,} bytes with accuracy {accuracy:.2%} do not meet the limits")


# Each maker, and the axis at which its layout holds the single channel.
MAKERS: dict[str, tuple[Callable[[Digits, Path], None], int]] = {
    "torch": (make_torch, 1),
    "keras": (make_keras, 3),
}


def main() -> None:
    """Make the fixtures that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make the classifiers and image sets under fixtures/.")
    parser.add_argument("which", nargs="?", choices=[*MAKERS, "all"], default="all")
    parser.add_argument("--out", type=Path, default=Path("fixtures"))
    arguments = parser.parse_args()
    names = list(MAKERS) if arguments.which == "all" else [arguments.which]
    for name in names:
        make, channel_axis = MAKERS[name]
        folder = arguments.out / name
        train, evaluation = (Digits(np.expand_dims(part.images, channel_axis), part.labels) for part in split_digits())
        write_shards(folder / "calib", {INPUT: train.images})
        write_shards(folder / "eval", {INPUT: evaluation.images, "labels": evaluation.labels})
        make(train, folder / "model.onnx")
        check(folder)


if __name__ == "__main__":
    main()
