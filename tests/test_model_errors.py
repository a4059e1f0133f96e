"""Files that ingest refuses: one line each, with the file, what is wrong, and what to do."""

import errno
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import batch_norm, build, ingested, normal, save
from onnx import helper

from onnxqt.errors import ModelError
from onnxqt.ingest import ingest

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "torch" / "model.onnx"
GEMM = "(float[n,4] x) => (float[] y) { y = Gemm(x, w) }"


def refused(path: Path, what: str, remedy: str) -> None:
    """`ingest` raises a single line that names the file, what is wrong and the remedy."""
    with pytest.raises(ModelError, match=what) as error:
        ingest(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert re.search(remedy, message)


# --- files that are no models -------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "absent.onnx", "is not a file", "give the path of an ONNX model")


def test_directory(tmp_path: Path) -> None:
    refused(tmp_path, "is not a file", "give the path of an ONNX model")


@pytest.mark.parametrize("name", ["model.onnx", "model.json", "model.textproto"])
@pytest.mark.parametrize(
    "content",
    [np.random.default_rng(0).bytes(1000), b"[1]", b"PK\x03\x04 a zip file"],
    ids=["noise", "json", "zip"],
)
def test_garbage(tmp_path: Path, name: str, content: bytes) -> None:
    """Whatever its name says: the file is read as what ONNX calls a model."""
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, "is not an ONNX model", "export it again")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.5, 0.9, 0.9999])
def test_truncated_file(tmp_path: Path, share: float) -> None:
    content = FIXTURE.read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, "is not an ONNX model or is truncated", "export it again")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.touch()
    refused(path, "is not an ONNX model", "export it again")


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin"])
def test_file_without_permission(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: root may read everything."""
    path = save_external(tmp_path)
    read = open

    def deny(file: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(file, int) and os.path.basename(file) == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", deny)
    monkeypatch.setattr("io.open", deny)
    monkeypatch.setattr(Path, "open", deny)  # Python 3.10 keeps its own reference
    refused(path, r"cannot be read \(Permission denied\)", "check its permissions")


# --- external data ------------------------------------------------------------------------------------------


def save_external(
    folder: Path, location: str = "weights.bin", in_node: bool = False, length: int | None = None
) -> Path:
    """A model whose weight, an initializer or a Constant node, lies in `location`; writes `weights.bin`."""
    folder.mkdir(exist_ok=True)
    model = build(GEMM, {"w": normal(4, 3)})
    (folder / "weights.bin").write_bytes(normal(4, 3).tobytes())
    (tensor,) = model.graph.initializer
    onnx.external_data_helper.set_external_data(tensor, location, length=length)
    tensor.ClearField("raw_data")
    if in_node:
        constant = helper.make_node("Constant", [], ["w"], value=tensor)
        nodes = [constant, *model.graph.node]
        del model.graph.initializer[:], model.graph.node[:]
        model.graph.node.extend(nodes)
    return save(model, folder)


EACH_PLACE = pytest.mark.parametrize("in_node", [False, True], ids=["initializer", "constant-node"])


@EACH_PLACE
def test_external_data_in_the_folder_is_read(tmp_path: Path, in_node: bool) -> None:
    model = ingest(save_external(tmp_path, in_node=in_node))
    np.testing.assert_array_equal(model.graph.constant("w"), normal(4, 3))


@EACH_PLACE
def test_missing_external_data(tmp_path: Path, in_node: bool) -> None:
    path = save_external(tmp_path, in_node=in_node)
    (tmp_path / "weights.bin").unlink()
    refused(path, "weight 'w' of .* is in the file 'weights.bin', which is missing", "put it back next to the model")


@EACH_PLACE
@pytest.mark.parametrize("kind", ["parent", "absolute"])
def test_external_data_outside_the_folder(tmp_path: Path, kind: str, in_node: bool) -> None:
    (tmp_path / "secret.bin").write_bytes(normal(4, 3).tobytes())
    location = "../secret.bin" if kind == "parent" else str(tmp_path / "secret.bin")
    path = save_external(tmp_path / "model", location, in_node)
    refused(path, f"'w' of .* points to '{location}', outside the model's folder", "move the data file next to")


def test_external_data_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(normal(4, 3).tobytes())
    path = save_external(tmp_path / "model", "link.bin")
    os.symlink(tmp_path / "secret.bin", path.parent / "link.bin")
    refused(path, "points to 'link.bin', outside the model's folder", "move the data file next to the model")


@pytest.mark.parametrize("length", [48, None])
def test_external_data_too_short(tmp_path: Path, length: int | None) -> None:
    path = save_external(tmp_path, length=length)
    (tmp_path / "weights.bin").write_bytes(b"12345")
    refused(path, "'w' of .* needs 48 bytes by its shape, .* 'weights.bin', which has 5", "save the model again")


def test_external_data_of_another_length_than_the_shape(tmp_path: Path) -> None:
    path = save_external(tmp_path, length=44)
    refused(path, "'w' of .* needs 48 bytes by its shape, .* claims 44", "save the model again")


# --- models that cannot be handled -----------------------------------------------------------------------------


INFERENCE = "export the model in inference mode"
REFUSED = {
    "batch-norm-in-training": (
        "(float[n,3] x) => (float[n,3] y) "
        "{ y, m, v = BatchNormalization<training_mode = 1>(x, gamma, beta, mean, var) }",
        "BatchNormalization 'BatchNormalization_0' is in training mode",
        INFERENCE,
    ),
    "dropout-in-training": (
        "(float[n,3] x) => (float[n,3] y) { d = Dropout(x, ratio, yes) y = Relu(d) }",
        "Dropout 'Dropout_0' is in training mode",
        INFERENCE,
    ),
    "dropout-that-could-train": (
        "(float[n,3] x, bool train) => (float[n,3] y) { d = Dropout(x, ratio, train) y = Relu(d) }",
        "Dropout 'Dropout_0' is in training mode",
        INFERENCE,
    ),
}


@pytest.mark.parametrize(("text", "what", "remedy"), REFUSED.values(), ids=REFUSED)
def test_models_in_training_mode(tmp_path: Path, text: str, what: str, remedy: str) -> None:
    constants = {**batch_norm(3), "ratio": np.array(0.5, np.float32), "yes": np.array(True)}
    refused(save(build(text, constants), tmp_path), what, remedy)


def test_quantized_model(tmp_path: Path) -> None:
    text = "(float[n,4] x) => (float[n,4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    model = build(text, {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)})
    refused(save(model, tmp_path), "QuantizeLinear .* is already quantized", "give the float model instead")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("(float[n,4] x) => (float[n,4] y) { y = Relu(absent) }", "topologically sorted"),
        ("(float[n,4] x) => (float[n,4] y) { y = Nonsense(x) }", "No Op registered for Nonsense"),
        ("(float[n,4] x) => (float[n,4] y) { y = Relu<slope = 1>(x) }", "Unrecognized attribute: slope"),
        ("(float[n,4] x) => (float[n,4] y) { y = Relu(x) y = Neg(x) }", "must be in single static assignment"),
    ],
)
def test_invalid_model(tmp_path: Path, text: str, what: str) -> None:
    refused(save(build(text), tmp_path), f"is not a valid ONNX model .*{what}", "export it again")


def test_operator_without_an_older_form(tmp_path: Path) -> None:
    model = build("(float[n,4] x) => (int32[n,4] y) { y = BitCast<to = 6>(x) }", opset=26)
    refused(save(model, tmp_path), "opset 26 cannot be converted to 21 .*BitCast", "export the model with opset 21")


def test_a_pass_that_breaks_the_graph_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_a_node(graph: gs.Graph) -> list[str]:
        graph.nodes[0].outputs[0].outputs[0].inputs = [gs.Variable("lost", np.float32)]
        return []

    monkeypatch.setattr(sys.modules["onnxqt.ingest"], "PASSES", (lose_a_node,))
    with pytest.raises(ModelError, match=r"a pass broke the graph .*: report the model"):
        ingested(build("(float[n,4] x) => (float[n,4] y) { a = Relu(x) y = Neg(a) }"))
