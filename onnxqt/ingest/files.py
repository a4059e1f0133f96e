"""Reading a model's file and the files beside it that hold its weights."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, external_data_helper

from onnxqt.errors import ModelError, first_line
from onnxqt.model import subgraphs_of

_QUANTIZED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
)


_MAX_BYTES = 2**31  # of a protobuf message


def read(path: Path) -> tuple[onnx.ModelProto, str]:
    """The model in a file with all its weights, checked, and the SHA-256 digest of the file with its external data.

    Raises:
        ModelError: for a file that cannot be read, is no valid ONNX model, or reaches out of its folder.
    """
    proto = _load(path)
    digest = _sha256(path, [path, *_external_files(path, proto)])
    _load_external_data(path, proto)
    _check(path, proto)
    return proto, digest


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"'{path}' is not a file: give the path of an ONNX model")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"'{path}' is not an ONNX model or is truncated: export it again") from error
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read ({error.strerror}): check its permissions") from error
    if not proto.ir_version or not proto.graph.output:
        raise ModelError(f"'{path}' is not an ONNX model (it has no graph with outputs): export it again")
    return proto


def _external_files(path: Path, proto: onnx.ModelProto) -> list[Path]:
    """The files beside the model that hold its weights.

    Raises:
        ModelError: if one is missing or lies elsewhere, or the model is larger than protobuf can handle.
    """
    folder = path.parent.resolve()
    found: dict[Path, None] = {}
    for tensor in _tensors(proto.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        file = (folder / location).resolve()
        if not file.is_relative_to(folder):
            raise ModelError(
                f"weight '{tensor.name}' of '{path}' points to '{location}', outside the model's folder: "
                "move the data file next to the model and save the model again"
            )
        if not file.is_file():
            raise ModelError(
                f"weight '{tensor.name}' of '{path}' is in the file '{location}', which is missing: "
                "put it back next to the model"
            )
        found[file] = None
    size = sum(file.stat().st_size for file in (path, *found))
    if size >= _MAX_BYTES:
        raise ModelError(f"'{path}' has {size / 2**30:.1f} GiB with its weights: models must be smaller than 2 GiB")
    return list(found)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every constant of a graph and its subgraphs: initializers, and tensors in attributes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from ((attribute.t,) if attribute.HasField("t") else attribute.tensors)
            for subgraph in subgraphs_of(attribute):
                yield from _tensors(subgraph)


def _load_external_data(path: Path, proto: onnx.ModelProto) -> None:
    try:
        external_data_helper.load_external_data_for_model(proto, str(path.parent))
    except Exception as error:  # the helper raises whatever numpy, the file system or its own checks raise
        raise ModelError(
            f"the external data of '{path}' cannot be read ({first_line(error)}): save the model again"
        ) from error


def _sha256(path: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
    except OSError as error:
        raise ModelError(
            f"the external data of '{path}' cannot be read ({error.strerror}): check its permissions"
        ) from error
    return digest.hexdigest()


def _check(path: Path, proto: onnx.ModelProto) -> None:
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise ModelError(f"weight '{name}' of '{path}' is sparse: export the model with dense weights")
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"'{path}' is not a valid ONNX model ({first_line(error)}): export it again") from error
    for node in proto.graph.node:
        if node.op_type in _QUANTIZED:
            raise ModelError(
                f"{node.op_type} '{node.name}' of '{path}' is already quantized: give the float model instead"
            )
