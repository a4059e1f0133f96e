"""What every kind of source gives: arrays of samples, fitted to the inputs of a model and checked as they are read."""

import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from onnxqt.data.form import Arrays, Index, InputSpec, is_label, listed, shown_shape
from onnxqt.errors import DataError
from onnxqt.numerics import Array

ARRAY_LIMIT = 4 << 30  # bytes of one array in a file
# What labels become, by the kind of their element type.
_LABEL_TYPES: Mapping[str, np.dtype[Any]] = {**dict.fromkeys("iub", np.dtype("i8")), "f": np.dtype("f4")}
# What zipfile, zlib and numpy's header parser raise on damaged or hostile files.
_UNREADABLE: tuple[type[Exception], ...] = (
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, EOFError, OSError, MemoryError),
    *(ValueError, TypeError, LookupError, SyntaxError, RuntimeError),
)

Take = Callable[[Index], Arrays]  # rows -> arrays
Update = Callable[[bytes | memoryview], None]  # of a hash
Access = Literal["memory", "seek", "stream"]


@dataclass(frozen=True, slots=True)
class Stored:
    """What is known of an array before its values are read; the first axis counts samples."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Content(Protocol):
    """Samples in a file, in a folder, or in memory."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def arrays(self) -> Mapping[str, Stored]:
        """Its arrays by name."""

    @property
    def access(self) -> Access:
        """How rows can be read.

        "memory": in any order, and each costs the same. "seek": in any order, but best in one go.
        "stream": only in ascending order.
        """

    def open(self, names: Sequence[str]) -> AbstractContextManager[Take]:
        """Begin to read some of the arrays; their values come as they are stored."""

    def digest(self, update: Update) -> None:
        """Feed a hash with everything that the samples depend on, but not with the folders on the way to it."""


@dataclass(frozen=True, eq=False, slots=True)
class MemoryContent:
    """Arrays in memory.

    Attributes:
        name: what messages call them.
        arrays: their shapes and element types.
        values: themselves.
        access: see `Content`.
    """

    name: str
    arrays: Mapping[str, Stored]
    values: Mapping[str, Array]
    access: Access = "memory"

    @contextmanager
    def open(self, names: Sequence[str]) -> Iterator[Take]:
        """See `Content.open`."""
        yield lambda rows: {name: self.values[name][rows] for name in names}

    def digest(self, update: Update) -> None:
        """Hash names, element types, shapes and values."""
        for name in sorted(self.values):
            array = np.ascontiguousarray(self.values[name])
            update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            update(array.reshape(-1).view(np.uint8).data)


def in_memory(name: str, arrays: Mapping[str, Any]) -> MemoryContent:
    """Arrays, or what numpy makes arrays of, by name; they are not copied.

    Raises:
        DataError: if numpy makes no array of them.
    """
    with reading(name):
        values = {key: np.asarray(value) for key, value in arrays.items()}
    return MemoryContent(name, {key: Stored(value.shape, value.dtype) for key, value in values.items()}, values)


@dataclass(frozen=True, eq=False, slots=True)
class Shard:
    """Content that fits a model.

    Attributes:
        content: where the values are.
        arrays: by input of the model, and by array of labels, which array of the content feeds it.
        dtypes: what each becomes.
    """

    content: Content
    arrays: Mapping[str, str]
    dtypes: Mapping[str, np.dtype[Any]]

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.content.name

    @property
    def count(self) -> int:
        """Number of samples."""
        return next(iter(self.content.arrays.values())).shape[0]

    def sample_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one sample of an input or of labels."""
        return self.content.arrays[self.arrays[name]].shape[1:]

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample in memory."""
        return sum(math.prod(self.sample_shape(name)) * self.dtypes[name].itemsize for name in self.arrays)

    @contextmanager
    def open(self, only: Sequence[str] = ()) -> Iterator[Take]:
        """Begin to read, by default all; values come by name of the input, converted and checked.

        Raises:
            DataError: here or from what is yielded, if the file is damaged or a value does not fit.
        """
        names = {name: self.arrays[name] for name in only or self.arrays}
        with ExitStack() as stack:
            with reading(self.name):
                stored = stack.enter_context(self.content.open(list(names.values())))

            def take(rows: Index) -> Arrays:
                with reading(self.name):
                    values = stored(rows)
                return {
                    name: _converted(f"{self.name}: array {array!r}", values[array], self.dtypes[name], rows)
                    for name, array in names.items()
                }

            yield take


def fit(content: Content, specs: Sequence[InputSpec]) -> Shard:
    """Compare content with the inputs of a model.

    An array feeds the input of its name. Where an input has none, the one array feeds it that has the right shape and
    element type, if just one array of those left has them.

    Raises:
        DataError: naming what is there and what the model wants.
    """
    arrays = _matched(content, specs)
    for spec in specs:
        if reason := _misfit(content.arrays[arrays[spec.name]], spec):
            raise DataError(f"{content.name}: array {arrays[spec.name]!r} {reason}")
    dtypes = {spec.name: spec.dtype.newbyteorder("=") for spec in specs}
    for name in content.arrays:
        if name not in arrays.values():
            arrays[name], dtypes[name] = name, _label_type(content, name)
    first = arrays[specs[0].name]
    count = content.arrays[first].shape[0]
    for name, array in content.arrays.items():
        if array.shape[0] != count:
            raise DataError(
                f"{content.name}: array {name!r} has {array.shape[0]} samples, but {first!r} has {count}; "
                "give all arrays of the file the same first axis"
            )
    in_order = {array: name for name, array in arrays.items()}
    return Shard(content, {in_order[array]: array for array in content.arrays}, dtypes)


def _matched(content: Content, specs: Sequence[InputSpec]) -> dict[str, str]:
    """The array of each input of the model."""
    found = {spec.name: spec.name for spec in specs if spec.name in content.arrays}
    spare = {name: array for name, array in content.arrays.items() if name not in found and not is_label(name)}
    for spec in specs:
        if spec.name not in found:
            fitting = [name for name, array in spare.items() if _misfit(array, spec) is None]
            found.update({spec.name: fitting[0]} if len(fitting) == 1 else {})
    missing = [spec.name for spec in specs if spec.name not in found]
    if missing or len(set(found.values())) < len(specs):
        name = missing[0] if missing else _shared(found)
        raise DataError(
            f"{content.name} has no array for the model's input {name!r}: {_both_sides(content, specs)}; "
            f"name arrays as the inputs: numpy.savez(file, **{{{name!r}: array}})"
        )
    for name in spare:
        if name not in found.values():
            raise DataError(
                f"{content.name}: array {name!r} is no input of the model: {_both_sides(content, specs)}; "
                "remove or rename it"
            )
    return found


def _shared(found: Mapping[str, str]) -> str:
    """An input that is not alone in fitting an array."""
    arrays = list(found.values())
    return next(name for name, array in found.items() if name != array and arrays.count(array) > 1)


def _both_sides(content: Content, specs: Sequence[InputSpec]) -> str:
    """The arrays that are there, and those that the model wants."""
    has = [f"{name!r} {array.dtype} {array.shape}" for name, array in sorted(content.arrays.items())]
    wants = [f"{spec.name!r} {spec.dtype} {shown_shape(spec)}" for spec in sorted(specs, key=lambda spec: spec.name)]
    return f"it has {listed(has)}, the model wants {listed(wants)}"


def _misfit(array: Stored, spec: InputSpec) -> str | None:
    """Why an array does not fit an input; None if it does."""
    dims = zip(array.shape[1:], spec.shape[1:], strict=False)
    if len(array.shape) != len(spec.shape) or any(want not in (None, have) for have, want in dims):
        return (
            f"has shape {array.shape}, but the model wants {shown_shape(spec)}; "
            "save it in that layout, with the samples along the first axis"
        )
    if array.shape[0] < 1:
        return f"has shape {array.shape} and so no samples; add some or remove it"
    have, want = array.dtype.newbyteorder("="), spec.dtype.newbyteorder("=")
    if have == want or have.kind == want.kind == "f" or {have, want} == {np.dtype("i4"), np.dtype("i8")}:
        return None
    remedy = f"save it as {want}"
    if have.kind in "iu" and want.kind == "f":
        remedy = f"apply the model's preprocessing (scaling, mean, deviation) and save the result as {want}"
    return f"is {have}, but the model wants {want}; {remedy}"


def _label_type(content: Content, name: str) -> np.dtype[Any]:
    """What an array of labels becomes."""
    labels = content.arrays[name]
    if labels.dtype.kind not in _LABEL_TYPES or not labels.shape:
        raise DataError(
            f"{content.name}: array {name!r} is {labels.dtype} of shape {labels.shape}, but labels are numbers, with "
            "one row per sample; save class numbers as a 1-D integer array, real values as floats"
        )
    return _LABEL_TYPES[labels.dtype.kind]


def _converted(where: str, stored: Array, dtype: np.dtype[Any], rows: Index) -> Array:
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which is found below
        array = stored.astype(dtype, copy=False)
    if dtype.kind == "f":
        bad, what = ~np.isfinite(array), "NaN, infinite or too large"
    else:
        bad, what = array != stored, "out of range"
    if bad.any():
        row = rows[np.flatnonzero(bad)[0] // math.prod(array.shape[1:])]
        raise DataError(f"{where} is {what} for {dtype} in sample {row} of the file; correct or remove it")
    return array


def check_file(path: Path) -> None:
    """Check that a path leads to a file; to open a pipe would wait for ever.

    Raises:
        DataError: if it does not.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file (a dangling link?); remove it")


@contextmanager
def reading(where: str, *others: type[Exception]) -> Iterator[None]:
    """Turn whatever a damaged file causes, `others` included, into one line."""
    try:
        yield
    except (*_UNREADABLE, *others) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where} cannot be read ({reason}); check it or write it again") from error
