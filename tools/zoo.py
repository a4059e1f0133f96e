"""Export small but real architectures to ONNX, as the frameworks' own exporters write them.

    python tools/zoo.py --out zoo/ [--only NAME]

PyTorch architectures go through both of its exporters (`resnet-torchscript.onnx`, `resnet-dynamo.onnx`), Keras and
scikit-learn models through the usual one. An export that fails is no part of the zoo; `failed.json` says why.
Weights are random but seeded; the scikit-learn models are trained on handwritten digits.

The frameworks are needed for this script alone (Python 3.11, CPU only):

    pip install torch==2.13.0 onnxscript==0.7.2 tensorflow-cpu==2.21.0 keras==3.15.1 tf2onnx==1.17.0 \
        scikit-learn==1.9.1 skl2onnx==1.20.0 onnx==1.23.2 onnxruntime==1.19.2 numpy==2.4.6
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="-1", KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="2")

import numpy as np
import onnx

SEED = 2024
BATCH = 4
MAX_PARAMETERS = 300_000

Maker = Callable[[Path], None]  # writes one file


# --- PyTorch --------------------------------------------------------------------------------------------


def torch_makers() -> dict[str, Maker]:
    """Every PyTorch architecture with every exporter."""
    import torch
    import zoo_torch as zoo
    from torch import nn

    def image() -> Any:
        return torch.randn(BATCH, 3, 32, 32)

    def ids() -> Any:
        return torch.randint(0, zoo.VOCABULARY, (BATCH, zoo.LENGTH))

    def mask() -> Any:
        return torch.ones(BATCH, zoo.LENGTH, dtype=torch.int64)

    def steps() -> Any:
        return torch.randn(BATCH, zoo.LENGTH, 12)

    def row() -> Any:
        return torch.randn(BATCH, 12)

    images = {"image": image}
    architectures: dict[str, tuple[Callable[[], Any], dict[str, Callable[[], Any]]]] = {
        "resnet": (zoo.resnet, images),
        "mobilenet": (zoo.mobilenet, images),
        "efficientnet": (zoo.efficientnet, images),
        "convnext": (zoo.convnext, images),
        "vit": (zoo.VisionTransformer, images),
        "swin": (zoo.Swin, images),
        "segformer": (zoo.SegFormer, images),
        "unet": (zoo.UNet, images),
        "yolo": (zoo.Yolo, images),
        "groupnorm": (zoo.group_norm, images),
        "prelu-elu": (zoo.prelu_elu, images),
        "gru": (lambda: zoo.Recurrent(nn.GRU), {"steps": steps}),
        "lstm": (lambda: zoo.Recurrent(nn.LSTM), {"steps": steps}),
        "bert": (zoo.Bert, {"input_ids": ids, "attention_mask": mask}),
        "language-model": (zoo.LanguageModel, {"input_ids": ids}),
        "half-resnet": (zoo.resnet, images),
    }
    makers = {}
    for name, (build, inputs) in architectures.items():
        for exporter in ("torchscript", "dynamo"):
            makers[f"{name}-{exporter}"] = _torch_maker(build, inputs, exporter, half=name.startswith("half"))
    makers["batchnorm-torchscript"] = _torch_maker(zoo.resnet, images, "torchscript", fold=False)
    makers["if-torchscript"] = _torch_maker(lambda: zoo.Branching(scripted=True), images, "torchscript")
    makers["if-dynamo"] = _torch_maker(lambda: zoo.Branching(scripted=False), images, "dynamo")
    makers["loop-torchscript"] = _torch_maker(zoo.Looping, {"row": row}, "torchscript")
    return makers


def _torch_maker(
    build: Callable[[], Any], inputs: dict[str, Callable[[], Any]], exporter: str, half: bool = False, fold: bool = True
) -> Maker:
    def make(path: Path) -> None:
        import torch
        import zoo_torch as zoo

        torch.manual_seed(SEED)
        torch.set_num_threads(1)
        model = build()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if parameters > MAX_PARAMETERS:
            raise ValueError(f"{parameters} parameters are too many for the zoo")
        examples = tuple(make_input() for make_input in inputs.values())
        zoo.randomise_norms(model)
        zoo.settle(model, examples)
        if half:
            model, examples = copy.deepcopy(model).half(), tuple(example.half() for example in examples)
        _export_torch(model, dict(zip(inputs, examples, strict=True)), path, exporter, fold)

    return make


def _export_torch(model: Any, examples: dict[str, Any], path: Path, exporter: str, fold: bool) -> None:
    """Export with a free batch size, as each exporter does by default otherwise; perhaps with its batch norms."""
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names = {"input_names": list(examples), "output_names": ["output"]}
    if exporter == "torchscript":
        axes = {name: {0: "batch"} for name in [*examples, "output"]}
        unfolded = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
        rest = {**names, **({} if fold else unfolded)}
        torch.onnx.export(model, tuple(examples.values()), path, dynamic_axes=axes, dynamo=False, **rest)
        return
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = tuple({0: batch} for _ in examples)
    torch.onnx.export(
        model,
        tuple(examples.values()),
        path,
        dynamic_shapes=shapes,
        dynamo=True,
        external_data=False,
        verbose=False,
        **names,
    )


# --- Keras and scikit-learn -----------------------------------------------------------------------------


def keras_makers() -> dict[str, Maker]:
    """Small Keras models, by Keras's own exporter."""
    import keras
    from keras import layers

    def cnn() -> Any:
        image = keras.Input((32, 32, 3), name="image")
        x = layers.Conv2D(24, 3, strides=2, padding="same", use_bias=False)(image)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.SeparableConv2D(48, 3, padding="same", use_bias=False)(x)
        x = layers.Activation("swish")(layers.BatchNormalization()(x))
        x = layers.GlobalAveragePooling2D()(layers.MaxPooling2D(2)(x))
        return keras.Model(image, layers.Dense(10, activation="softmax")(x))

    def lstm() -> Any:
        steps = keras.Input((16, 12), name="steps")
        x = layers.LSTM(32)(layers.Dense(24, activation="relu")(steps))
        return keras.Model(steps, layers.Dense(10)(x))

    def mlp() -> Any:
        row = keras.Input((12,), name="row")
        x = layers.LayerNormalization()(layers.Dense(64, activation="elu")(row))
        return keras.Model(row, layers.Dense(10)(layers.Dense(32, activation="relu")(x)))

    def gelu() -> Any:
        row = keras.Input((12,), name="row")
        return keras.Model(row, layers.Dense(10)(layers.Dense(32, activation="gelu")(row)))

    builds = {"keras-cnn": cnn, "keras-lstm": lstm, "keras-mlp": mlp, "keras-gelu": gelu}
    return {name: _keras_maker(build) for name, build in builds.items()}


def _keras_maker(build: Callable[[], Any]) -> Maker:
    def make(path: Path) -> None:
        import keras

        keras.utils.set_random_seed(SEED)
        model = build()
        rng = np.random.default_rng(SEED)
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization | keras.layers.LayerNormalization):
                layer.set_weights([0.5 + rng.random(weight.shape) for weight in layer.get_weights()])
        model(np.zeros((1, *model.inputs[0].shape[1:]), np.float32))  # the exporter wants a model that was called
        model.export(path, format="onnx", verbose=False)

    return make


def sklearn_makers() -> dict[str, Maker]:
    """Multi-layer perceptrons of scikit-learn, by skl2onnx."""
    from skl2onnx import to_onnx
    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def maker(network: Any) -> Maker:
        def make(path: Path) -> None:
            digits = load_digits()
            images = digits.data.astype(np.float32)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                fitted = make_pipeline(StandardScaler(), network).fit(images, digits.target)
            options = {"zipmap": False} if isinstance(network, MLPClassifier) else {}
            onnx.save(to_onnx(fitted, images[:1], options={id(fitted): options} if options else None), path)

        return make

    settings: dict[str, Any] = {"hidden_layer_sizes": (48, 24), "max_iter": 20, "random_state": SEED}
    return {
        "sklearn-classifier": maker(MLPClassifier(**settings)),
        "sklearn-regressor": maker(MLPRegressor(activation="tanh", **settings)),
    }


# --- the command line -----------------------------------------------------------------------------------


def make_all(makers: dict[str, Maker], folder: Path) -> dict[str, str]:
    """Write every model; which failed, and why."""
    failed = {}
    for name, make in makers.items():
        path = folder / f"{name}.onnx"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make(path)
            forget_sources(path)
            onnx.checker.check_model(path, full_check=True)
            print(f"{name}: {path.stat().st_size:,} bytes, {_facts(path)}", file=sys.stderr)
        except Exception as error:  # noqa: BLE001 (whatever an exporter raises is the finding)
            path.unlink(missing_ok=True)
            lines = str(error).strip().splitlines() or [""]
            failed[name] = f"{type(error).__name__}: {lines[0]}"
            print(f"{name}: {failed[name]}", file=sys.stderr)
    return failed


def forget_sources(path: Path) -> None:
    """Take the stack traces out that an exporter leaves in a model: they name the files of whoever exported it."""
    model = onnx.load(path)
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
        for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
    for function in model.functions:
        for part in (function, *function.node):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
    model.ClearField("metadata_props")
    onnx.save(model, path)


def _facts(path: Path) -> str:
    model = onnx.load(path)
    opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
    return f"IR {model.ir_version}, {opsets}, {len(model.graph.node)} nodes"


def main() -> None:
    """Export what the command line asks for."""
    parser = argparse.ArgumentParser(description="Export small architectures to ONNX.")
    parser.add_argument("--out", type=Path, default=Path("zoo"))
    parser.add_argument("--only", help="part of a name")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    makers = {**torch_makers(), **keras_makers(), **sklearn_makers()}
    chosen = {name: make for name, make in makers.items() if not arguments.only or arguments.only in name}
    failed = make_all(chosen, arguments.out)
    (arguments.out / "failed.json").write_text(json.dumps(failed, indent=1) + "\n")
    print(f"{len(chosen) - len(failed)} models in {arguments.out}, {len(failed)} exports failed")


if __name__ == "__main__":
    main()
