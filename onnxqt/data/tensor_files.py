"""Test data as ONNX ships it with models: folders `test_data_set_N` with a TensorProto `input_N.pb` per input.

No file is followed that another one names.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from onnxqt.data.content import Access, Stored, Take, Update, check_file, reading
from onnxqt.data.form import InputSpec, listed, shown_shape
from onnxqt.data.numpy_files import digest_file
from onnxqt.errors import DataError
from onnxqt.numerics import Array

TENSOR_LIMIT = 256 << 20  # bytes of one file: it is parsed as a whole, and integers in it may grow to eight times that

_FOLDER = re.compile(r"test_data_set_(\d{1,9})")
_FILE = re.compile(r"input_(\d{1,9})\.pb")


@dataclass(frozen=True, eq=False, slots=True)
class TensorContent:
    """The inputs of one test; all its files are read at once.

    Attributes:
        name: the folder.
        files: by input of the model.
        arrays: their tensors.
        single: whether the tensors are one sample, without an axis of samples.
        access: see `Content`.
    """

    name: str
    files: Mapping[str, Path]
    arrays: Mapping[str, Stored]
    single: bool
    access: Access = "stream"

    @contextmanager
    def open(self, names: Sequence[str]) -> Iterator[Take]:
        """See `Content.open`."""
        values = {name: _array(self.files[name], self.single) for name in names}
        for name, value in values.items():
            if value.shape != self.arrays[name].shape:
                raise ValueError(f"{self.files[name].name} has changed")
        yield lambda rows: {name: value[rows] for name, value in values.items()}

    def digest(self, update: Update) -> None:
        """Hash name, size and bytes of each file."""
        for path in self.files.values():
            digest_file(path, f"{path.parent.name}/{path.name}", update)


def find_tests(folder: Path) -> list[Path]:
    """The folders of tests in `folder`, in the order of their numbers; itself if it is one; empty if there are none.

    Raises:
        OSError: if the folder cannot be listed.
    """
    tests: dict[int, Path] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if _FILE.fullmatch(entry.name):
                return [folder]
            if (match := _FOLDER.fullmatch(entry.name)) and entry.is_dir():
                tests[int(match[1])] = folder / entry.name
    return [tests[number] for number in sorted(tests)]


def open_test(folder: Path, specs: Sequence[InputSpec], single: bool) -> TensorContent:
    """Read the tensors of a test once, to know their shapes.

    `input_N.pb` is the model's input number N; where all tensors have names of inputs, the names count.

    Args:
        folder: with a file `input_N.pb` for each input.
        specs: the model's inputs, in order.
        single: whether the tensors are one sample, without an axis of samples.

    Raises:
        DataError: if files are missing or too many, or one is damaged, larger than `TENSOR_LIMIT`, or no tensor of
            numbers.
    """
    with reading(str(folder)):
        numbered = {int(match[1]): path for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    if sorted(numbered) != list(range(len(specs))):
        has = [path.name for _, path in sorted(numbered.items())]
        wants = [
            f"input_{number}.pb for {spec.name!r} {spec.shape if single else shown_shape(spec)}"
            for number, spec in enumerate(specs)
        ]
        raise DataError(
            f"{folder} has {listed(has) or 'no input'}, the model wants {listed(wants)}; give one file per input"
        )
    paths = [numbered[number] for number in range(len(specs))]
    tensors = [_read(path) for path in paths]
    names = [tensor.name for tensor in tensors]
    if sorted(names) != sorted(spec.name for spec in specs):
        names = [spec.name for spec in specs]
    arrays = {}
    for name, path, tensor in zip(names, paths, tensors, strict=True):
        shape, dtype = tuple(tensor.dims), np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        arrays[name] = Stored((1, *shape) if single else shape, dtype)
        if not single and not shape:
            raise DataError(f"{path} holds a scalar, but the model wants samples along a first axis; give it one")
    return TensorContent(str(folder), dict(zip(names, paths, strict=True)), arrays, single)


def _read(path: Path) -> TensorProto:
    """The tensor in a file, if it is one of numbers whose values are in it."""
    check_file(path)
    with reading(str(path), DecodeError), path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > TENSOR_LIMIT:
            raise DataError(f"{path} has more than {TENSOR_LIMIT} bytes; save the samples as .npz files")
        tensor: TensorProto = TensorProto.FromString(stream.read(size))
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise DataError(f"{path} names another file for its values, which is not followed; save the values in it")
    if tensor.data_type in (TensorProto.UNDEFINED, TensorProto.STRING):
        raise DataError(f"{path} holds no tensor of numbers (sequences, maps and text cannot be samples)")
    if any(size < 0 for size in tensor.dims):
        raise DataError(f"{path} has a tensor of shape {tuple(tensor.dims)}; the file is damaged, write it again")
    with reading(str(path)):
        numpy_helper.to_array(tensor)  # the values have the size that the shape says
    return tensor


def _array(path: Path, single: bool) -> Array:
    values = numpy_helper.to_array(_read(path))
    return values[None] if single else values
