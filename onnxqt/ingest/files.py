"""Reading a model's file and the files beside it that hold its weights."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from onnxqt.errors import ModelError, first_line
from onnxqt.model import graphs_of
from onnxqt.tensors import check_model, external_field, is_external, nbytes, raw_bytes, set_external

EMBED_LIMIT = 7 << 28  # 1.75 GiB of external data: up to there a model fits into one protobuf message of 2 GiB
_LARGE = 1 << 20  # bytes of a weight that stays in its file


def read(path: Path) -> tuple[onnx.ModelProto, str]:
    """The model in a file, checked, and the SHA-256 digest of the file with its external data.

    The weights of a model of at least `EMBED_LIMIT` bytes stay in their files, see `onnxqt.tensors`.

    Raises:
        ModelError: for a file that cannot be read, is no valid ONNX model, or reaches out of its folder.
    """
    proto = _load(path)
    external = [tensor for tensor in _tensors(proto.graph) if is_external(tensor)]
    files = dict.fromkeys(_find_file(path, tensor) for tensor in external)
    digest = _sha256(path, [path, *files])
    _embed(path, _staying(path, proto, external), external)
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


def _find_file(path: Path, tensor: TensorProto) -> Path:
    """The file beside the model that holds a weight.

    Raises:
        ModelError: if it is missing, lies elsewhere, or is smaller than the weight.
    """
    folder = path.parent.resolve()
    location = external_field(tensor, "location")
    label = f"weight '{tensor.name}' of '{path}'"
    file = (folder / location).resolve()
    if not file.is_relative_to(folder):
        raise ModelError(
            f"{label} points to '{location}', outside the model's folder: "
            "move the data file next to the model and save the model again"
        )
    if not file.is_file():
        raise ModelError(f"{label} is in the file '{location}', which is missing: put it back next to the model")
    offset, size = (_whole_number(label, tensor, key) for key in ("offset", "length"))
    needed = nbytes(tensor)
    if size not in (None, needed) or (offset or 0) + needed > file.stat().st_size:
        raise ModelError(
            f"{label} needs {needed} bytes by its shape, from byte {offset or 0} of '{location}', which has "
            f"{file.stat().st_size}{'' if size is None else f', and claims {size}'}: save the model again"
        )
    return file


def _whole_number(label: str, tensor: TensorProto, key: str) -> int | None:
    text = external_field(tensor, key)
    if text and not text.isdecimal():
        raise ModelError(f"{label} has the external {key} '{text}', not a number of bytes: save the model again")
    return int(text) if text else None


def _staying(path: Path, proto: onnx.ModelProto, external: list[TensorProto]) -> set[str]:
    """Names of the initializers that stay in their files: the large ones of a large model."""
    if sum(map(nbytes, external)) < EMBED_LIMIT:
        return set()
    outer = {tensor.name for tensor in proto.graph.initializer if is_external(tensor) and nbytes(tensor) >= _LARGE}
    rest = sum(nbytes(tensor) for tensor in external if tensor.name not in outer)
    if rest >= EMBED_LIMIT:
        raise ModelError(
            f"'{path}' has {rest / 2**30:.1f} GiB of weights that are not initializers of its main graph, or small: "
            "make them initializers of the main graph"
        )
    return outer


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every constant of a graph and its subgraphs: initializers, and tensors in attributes."""
    for part in graphs_of(graph):
        yield from part.initializer
        for sparse in part.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for attribute in (attribute for node in part.node for attribute in node.attribute):
            yield from ((attribute.t,) if attribute.HasField("t") else attribute.tensors)
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)


def _embed(path: Path, staying: set[str], external: list[TensorProto]) -> None:
    """Load external data into the model, in place; what stays in its file gets the file's absolute path."""
    for tensor in external:
        set_external(tensor, str(_find_file(path, tensor)), int(external_field(tensor, "offset") or 0))
        if tensor.name not in staying:
            tensor.raw_data = _raw_bytes(path, tensor)
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT


def _raw_bytes(path: Path, tensor: TensorProto) -> bytes:
    try:
        return raw_bytes(tensor)
    except OSError as error:
        raise ModelError(
            f"the external data of '{path}' cannot be read ({error.strerror}): check its permissions"
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
    try:
        check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"'{path}' is not a valid ONNX model ({first_line(error)}): export it again") from error
