"""The models that `coverage.py` judges, with their inputs, and samples made of these."""

from __future__ import annotations

import math
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

PACKAGED_SETS = ("simple", "pytorch-converted", "pytorch-operator", "light")
SETS = ("node", "zoo", *PACKAGED_SETS)

BATCH = 4
SAMPLES = 8  # at least
SEQUENCE = 16  # length of axes of free size other than the first
IDS = 10  # integer inputs of unknown use are drawn from 0..9

Feeds = dict[str, Any]  # by input name: arrays, lists of arrays for sequences, None for an absent optional


class Case(NamedTuple):
    """One model, in a folder of its own with its test inputs; `model.onnx` and perhaps `inputs/<number>.pb`."""

    group: str
    name: str
    folder: Path

    @property
    def model(self) -> Path:
        """The model's file."""
        return self.folder / "model.onnx"


def collect(group: str, folder: Path, zoo: Path | None) -> list[Case]:
    """Put the models of a set with their inputs into `folder`, one folder each.

    Args:
        group: one of `SETS`.
        folder: where they go.
        zoo: the folder of the zoo's files.
    """
    if group == "node":
        return _collect_nodes(folder)
    if group == "zoo":
        files = sorted(zoo.glob("*.onnx")) if zoo else []
        return [_copied(group, file.stem, file, folder) for file in files]
    data = Path(onnx.__file__).parent / "backend" / "test" / "data" / group
    if group == "light":
        return [_copied(group, file.stem, file, folder) for file in sorted(data.glob("*.onnx"))]
    return [_copied(group, model.parent.name, model, folder) for model in sorted(data.glob("*/model.onnx"))]


def _collect_nodes(folder: Path) -> list[Case]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # some cases overflow on purpose
        tests = collect_testcases()
    cases = []
    for test in sorted(tests, key=lambda test: test.name):
        case = Case("node", test.name, folder / test.name)
        (case.folder / "inputs").mkdir(parents=True, exist_ok=True)
        assert test.model is not None
        onnx.save(test.model, case.model)
        kinds = [value.type for value in graph_inputs(test.model)]
        for index, value in enumerate(test.data_sets[0][0] if test.data_sets else ()):
            (case.folder / "inputs" / f"{index}.pb").write_bytes(_encoded(value, kinds[index]))
        cases.append(case)
    return cases


def _copied(group: str, name: str, model: Path, folder: Path) -> Case:
    case = Case(group, name, folder / name)
    (case.folder / "inputs").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, case.model)
    for file in model.parent.glob(f"{model.name}.data"):
        shutil.copyfile(file, case.folder / file.name)
    for file in (model.parent / "test_data_set_0").glob("input_*.pb"):
        shutil.copyfile(file, case.folder / "inputs" / f"{file.stem.removeprefix('input_')}.pb")
    return case


def _encoded(value: Any, kind: onnx.TypeProto) -> bytes:
    if isinstance(value, TensorProto):
        message: Any = value
    elif kind.HasField("optional_type"):
        message = numpy_helper.from_optional(value)
    elif kind.HasField("sequence_type"):
        message = numpy_helper.from_list(value)
    else:
        message = numpy_helper.from_array(np.asarray(value))
    return bytes(message.SerializeToString())


# --- inputs and samples ---------------------------------------------------------------------------------


def graph_inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs of a model that have to be fed."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    return [value for value in proto.graph.input if value.name not in constants]


def read_feeds(case: Case, proto: onnx.ModelProto) -> Feeds:
    """The model's own test inputs, or random ones of the right type where it has none."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    feeds = {}
    for index, value in enumerate(graph_inputs(proto)):
        file = case.folder / "inputs" / f"{index}.pb"
        feeds[value.name] = _decoded(file, value.type) if file.exists() else _random(proto, value, rng)
    return feeds


def _decoded(file: Path, kind: onnx.TypeProto) -> Any:
    which = kind.WhichOneof("value")
    if which == "sequence_type":
        return numpy_helper.to_list(onnx.SequenceProto.FromString(file.read_bytes()))
    if which == "optional_type":
        optional = onnx.OptionalProto.FromString(file.read_bytes())
        return numpy_helper.to_optional(optional)
    return numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))


def _random(proto: onnx.ModelProto, value: onnx.ValueInfoProto, rng: np.random.Generator) -> np.ndarray:
    """Standard normal floats, masks of ones, token ids within the table that they index."""
    kind = value.type.tensor_type
    sizes = [BATCH, *[SEQUENCE] * len(kind.shape.dim)]
    shape = [d.dim_value or size for d, size in zip(kind.shape.dim, sizes, strict=False)]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if dtype.kind in "iu":
        limit = _table_rows(proto, value.name) or IDS
        return np.ones(shape, dtype) if "mask" in value.name else rng.integers(0, limit, shape).astype(dtype)
    if dtype.kind == "b":
        return np.ones(shape, dtype)
    return rng.standard_normal(shape).astype(dtype)


def _table_rows(proto: onnx.ModelProto, name: str) -> int | None:
    """How many rows the constant table has that an input indexes."""
    dims = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Gather" and node.input[1] == name and node.input[0] in dims:
            return int(dims[node.input[0]][0])
    return None


def make_samples(feeds: Feeds, batched: bool, seed: int) -> dict[str, np.ndarray]:
    """Several samples like the feeds: floats vary a little, everything else is repeated.

    `batched`: the feeds have the samples along their first axis; if not, they are stacked along a new one.
    Values that are not finite become finite, since samples have to be. What is no array is left out.
    """
    rng = np.random.default_rng(seed)
    arrays = {name: np.asarray(feed) for name, feed in feeds.items() if isinstance(feed, np.ndarray | np.generic)}
    length = len(next(iter(arrays.values()))) if batched and arrays else 1
    copies = max(3, math.ceil(SAMPLES / max(1, length)))
    varied = _varied(arrays)
    samples = {}
    for name, array in arrays.items():
        parts = [_perturbed(array, rng if name in varied and index else None) for index in range(copies)]
        samples[name] = np.concatenate(parts) if batched else np.stack(parts)
    return samples


def _varied(arrays: Mapping[str, np.ndarray]) -> set[str]:
    """The float inputs that are data; vectors and scalars beside them are parameters such as scales or bounds."""
    ranks = {name: array.ndim for name, array in arrays.items() if array.dtype.kind == "f"}
    return {name for name, rank in ranks.items() if rank > 1 or (rank == 1 and max(ranks.values()) == 1)}


def _perturbed(array: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    if array.dtype.kind == "O":
        return array.astype(str)
    if array.dtype.kind != "f":
        return array
    finite: np.ndarray = np.nan_to_num(array, nan=0.0, posinf=1.0, neginf=-1.0)
    if rng is None:
        return finite
    with np.errstate(over="ignore"):
        varied: np.ndarray = (finite * rng.uniform(1.0, 1.02, array.shape)).astype(array.dtype)  # keeps zeros and signs
    varied[~np.isfinite(varied)] = finite[~np.isfinite(varied)]
    return varied
