"""Files appear whole or not at all."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from helpers import build

from onnxqt.errors import ExportError
from onnxqt.files import file_sha256, make_folder, write_json, write_model

MODEL = build("(float[n,4] x) => (float[] y) { y = Relu(x) }")
WRITERS: dict[str, Callable[[Path], None]] = {
    "model": lambda path: write_model(path, MODEL),
    "json": lambda path: write_json(path, {"a": [1.5, None]}),
}
EACH_WRITER = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@EACH_WRITER
def test_nothing_but_the_file_is_left(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    write(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() != b"old"


def test_contents(tmp_path: Path) -> None:
    write_model(tmp_path / "model.onnx", MODEL)
    write_json(tmp_path / "file.json", {"a": [1.5, None]})
    assert onnx.load(tmp_path / "model.onnx") == MODEL
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": [1.5, None]}
    expected = hashlib.sha256((tmp_path / "file.json").read_bytes()).hexdigest()
    assert file_sha256(tmp_path / "file.json") == expected


@EACH_WRITER
@pytest.mark.parametrize("place", ["absent", "file"])
def test_a_folder_that_cannot_be_written_to(write: Callable[[Path], None], place: str, tmp_path: Path) -> None:
    """A path below a regular file, because root may write everywhere else."""
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"^cannot write '.*out' \(.*\): free the disk or choose another --out$"):
        write(tmp_path / place / "out")


@EACH_WRITER
def test_a_file_that_cannot_be_replaced(write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "out" / "full").mkdir(parents=True)
    with pytest.raises(ExportError, match="cannot write"):
        write(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_make_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert make_folder(folder) == folder
    assert make_folder(folder).is_dir()
    assert not list(folder.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"^cannot write into '.*' \(.*\): choose another --out$"):
        make_folder(tmp_path / "file" / "b")
