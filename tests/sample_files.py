"""Sample files for the tests of onnxqt.data."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from onnxqt.data import Batch, InputSpec
from onnxqt.numerics import Array

F32 = np.dtype(np.float32)
I32 = np.dtype(np.int32)
I64 = np.dtype(np.int64)
X = InputSpec("x", F32, (None, 3, 2))
IDS = InputSpec("ids", I64, (None, 4))


def numbered(first: int, count: int, dtype: Any = np.float32) -> Array:
    """Samples of shape (3, 2); the first element of each is its number."""
    return (first + np.arange(count * 6, dtype=np.float64).reshape(count, 3, 2) / 6).astype(dtype)


def numbers(batch: Batch) -> list[int]:
    return [int(value) for value in batch.inputs["x"][:, 0, 0]]


def write_shards(directory: Path, counts: list[int]) -> Path:
    """`.npz` files whose samples and labels are numbered throughout."""
    directory.mkdir(exist_ok=True)
    first = 0
    for shard, count in enumerate(counts):
        labels = np.arange(first, first + count)
        np.savez(directory / f"shard{shard:02}.npz", x=numbered(first, count), labels=labels)
        first += count
    return directory


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def npy_bytes(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def header_bytes(header: str, version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode() + b"\n"
    length = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    return np.lib.format.magic(*version) + length + text


def same(a: Batch, b: Batch) -> bool:
    labels = (a.labels is None) == (b.labels is None) and (
        a.labels is None or b.labels is None or np.array_equal(a.labels, b.labels)
    )
    inputs = a.inputs.keys() == b.inputs.keys() and all(
        np.array_equal(a.inputs[name], b.inputs[name]) for name in a.inputs
    )
    return labels and inputs and np.array_equal(a.index, b.index)
