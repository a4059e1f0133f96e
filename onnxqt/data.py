"""Samples: opening, checking and streaming `.npz` and `.npy` files and arrays in memory.

Opened means checked, not loaded: `open_samples` reads the headers of every file and compares them with the
model's inputs; the values are read, converted and checked as they are streamed. Nothing is ever unpickled,
and the size that a header claims is compared with the file before anything is allocated.
"""

import hashlib
import io
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from onnxqt.errors import DataError, UsageError
from onnxqt.numerics import Array

LABELS = "labels"
ARRAY_LIMIT = 4 << 30  # bytes of one array in a file
WINDOW_LIMIT = 256 << 20  # bytes of the shards that `Samples.shuffled` holds
_HEADER_LIMIT = 1 << 16
_CHUNK = 1 << 20
# What labels become, by the kind of their element type.
_LABEL_TYPES: Mapping[str, np.dtype[Any]] = {**dict.fromkeys("iub", np.dtype("i8")), "f": np.dtype("f4")}
_READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What zipfile, zlib and numpy's header parser raise on damaged or hostile files.
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, EOFError, OSError, MemoryError),
    *(ValueError, TypeError, LookupError, SyntaxError, RuntimeError),
)

Index = npt.NDArray[np.int64]
_Arrays = dict[str, Array]
_Take = Callable[[Index], _Arrays]  # rows of a shard -> its arrays
_Read = Callable[[Index], Array]  # rows of an array


@dataclass(frozen=True)
class InputSpec:
    """What the model wants for one input.

    Attributes:
        name: the input's name.
        dtype: the element type.
        shape: the batch axis first; None where the model accepts any length.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples, ready for the model.

    Attributes:
        inputs: by input name, the batch axis first, in the model's element type.
        labels: int64 class numbers, (samples,); None where the source has none.
        targets: every array of labels by its name, one row per sample; int64 or float32.
        index: int64 sample numbers in the whole source (also when read from a subset of it), (samples,).
        fed: samples that the inputs hold, those repeated to fill a fixed batch included; 0 without a batch axis.
    """

    inputs: _Arrays
    labels: Array | None
    index: Index
    fed: int
    targets: Mapping[str, Array] = field(default_factory=dict)

    def real(self, output: Array) -> Array:
        """An output of the model without the rows of repeated samples."""
        rows = len(self.index)
        return output[:rows] if 0 < rows < self.fed and output.ndim and len(output) == self.fed else output


def has_classes(targets: Iterable["InputSpec"]) -> bool:
    """Whether arrays of labels hold class numbers of the samples: `labels`, integers (samples,)."""
    return any(t.name == LABELS and t.dtype.kind == "i" and len(t.shape) == 1 for t in targets)


@dataclass(frozen=True, eq=False)
class _Stored:
    """One array as it is stored, in a file from byte `offset` on."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool = False
    offset: int = 0


@dataclass(frozen=True, eq=False)
class _Shard:
    """One checked file, or the arrays `memory` if `path` is None; `dtypes` is what the arrays become."""

    name: str
    path: Path | None
    memory: _Arrays
    stored: dict[str, _Stored]
    dtypes: dict[str, np.dtype[Any]]

    @property
    def count(self) -> int:
        return next(iter(self.stored.values())).shape[0]

    @property
    def sample_bytes(self) -> int:
        return sum(math.prod(s.shape[1:]) * self.dtypes[name].itemsize for name, s in self.stored.items())


_Open = Callable[[_Shard, Index], AbstractContextManager[_Take]]


@dataclass(frozen=True, eq=False)
class Samples:
    """Checked samples of one source, or a subset of them; made by `open_samples`.

    Reading raises DataError where a file turns out to be damaged, a float is NaN or infinite in the
    model's element type, an integer does not fit it, or samples of unequal shapes meet in a batch.

    Attributes:
        source: what the user gave, for messages.
        targets: name, element type (int64 or float32) and shape of each array of labels; sizes that differ between
            files are None.
        stacked: whether the model has no batch axis, so that a batch is one sample without the axis of samples.
    """

    source: str
    targets: tuple[InputSpec, ...]
    stacked: bool
    _shards: tuple[_Shard, ...]
    _chosen: Index  # sample numbers, ascending

    @property
    def has_labels(self) -> bool:
        """Whether every batch has class numbers, one per sample: an array `labels` of integers, (samples,)."""
        return has_classes(self.targets)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self._chosen)

    def batches(self, size: int, pad: bool = False) -> Iterator[Batch]:
        """All samples in order, `size` at a time; the last batch may be smaller.

        With `pad` the inputs of the last batch are filled up to `size` by repeating its last sample, for
        models with a fixed batch axis; its `index` and `labels` stay those of the real samples.
        Files are read sequentially, so memory does not grow with their size (except for arrays in
        Fortran order, which are read whole).
        """
        _at_least(1, size, "batch size")
        batches = self._read(self._chosen, size, [[number] for number in self._used], _opened)
        return (_padded(batch, size) for batch in batches) if pad else batches

    def shuffled(self, size: int, seed: int, skip: int = 0) -> Iterator[Batch]:
        """Endless full batches; every epoch is a new permutation that depends on (seed, epoch) alone.

        An epoch permutes the shards, then the samples within windows of consecutive shards of at most
        `WINDOW_LIMIT` bytes (at least one shard); only one window is in memory. The `count % size` samples
        at the end of an epoch are dropped. `skip` batches are passed over without reading them; the stream
        from there on is the same as without `skip`.
        """
        _at_least(1, size, "batch size")
        _at_least(0, seed, "seed")
        _at_least(0, skip, "number of batches to skip")
        require(self, size, "one batch")
        return self._read_epochs(size, seed, skip)

    def _read_epochs(self, size: int, seed: int, skip: int) -> Iterator[Batch]:
        per_epoch = self.count // size
        epoch, first = divmod(skip, per_epoch)
        while True:
            rng = np.random.default_rng([seed, epoch])
            windows = self._windows(rng)
            order = np.concatenate(
                [rng.permutation(np.concatenate([self._of_shard(n) for n in window])) for window in windows]
            )
            yield from self._read(order[first * size : per_epoch * size], size, windows, _loaded)
            epoch, first = epoch + 1, 0

    def _windows(self, rng: np.random.Generator) -> list[list[int]]:
        """The numbers of all shards in random order, in groups that fit in memory."""
        windows: list[list[int]] = []
        room = 0
        for number in rng.permutation(self._used).tolist():
            size = len(self._of_shard(number)) * self._shards[number].sample_bytes
            if size > room or not windows:
                windows.append([])
                room = WINDOW_LIMIT
            windows[-1].append(number)
            room -= size
        return windows

    def _read(self, order: Index, size: int, windows: list[list[int]], open_shard: _Open) -> Iterator[Batch]:
        """The samples `order`, batch by batch; only the shards of one of the `windows` are open at a time."""
        window_of = {number: window for window in windows for number in window}
        takes: dict[int, _Take] = {}
        with ExitStack() as stack:

            def rows_of(number: int, rows: Index) -> _Arrays:
                if number not in takes:
                    takes.clear()
                    stack.close()
                    for n in window_of[number]:
                        opened = open_shard(self._shards[n], self._of_shard(n) - self._starts[n])
                        takes[n] = stack.enter_context(opened)
                return takes[number](rows)

            for start in range(0, len(order), size):
                yield self._gather(order[start : start + size], rows_of)

    def _gather(self, index: Index, rows_of: Callable[[int, Index], _Arrays]) -> Batch:
        """Put the samples `index` together; `rows_of` is asked once per shard, in order of appearance."""
        arrays: _Arrays = {}
        owner = self._owner(index)
        for number in dict.fromkeys(owner.tolist()):
            here = owner == number
            for name, rows in rows_of(number, index[here] - self._starts[number]).items():
                if name not in arrays:
                    arrays[name] = np.empty((len(index), *rows.shape[1:]), rows.dtype)
                if arrays[name].shape[1:] != rows.shape[1:]:
                    raise DataError(
                        f"{self._shards[number].name}: array {name!r} has samples of shape {rows.shape[1:]}, "
                        f"but another file of the same batch has {arrays[name].shape[1:]}; "
                        "bring all files to one shape or pass --batch-size 1"
                    )
                arrays[name][here] = rows
        if self.stacked:
            return Batch({name: rows[0, ...] for name, rows in arrays.items()}, None, index, 0)
        targets = {target.name: arrays.pop(target.name) for target in self.targets}
        return Batch(arrays, targets[LABELS] if self.has_labels else None, index, len(index), targets)

    def split(self, fraction: float, limit: int) -> tuple["Samples", "Samples"]:
        """Divide into (rest, held): disjoint, `held` evenly spaced over the whole set, both not empty.

        held.count = min(max(1, round(fraction * count)), limit, count - 1)

        Raises:
            DataError: if there are fewer than two samples.
        """
        if not 0 < fraction < 1:
            raise UsageError(f"the held-out fraction is {fraction}; pass a number between 0 and 1")
        _at_least(1, limit, "limit of held-out samples")
        if self.count < 2:
            raise DataError(f"{self.source} holds 1 sample, which cannot be split in two; add samples")
        held = _evenly(self.count, min(max(1, round(fraction * self.count)), limit, self.count - 1))
        rest = np.delete(self._chosen, held)
        return replace(self, _chosen=rest), replace(self, _chosen=self._chosen[held])

    def take(self, limit: int) -> "Samples":
        """At most `limit` samples, evenly spaced over the whole set."""
        _at_least(1, limit, "limit of samples")
        return replace(self, _chosen=self._chosen[_evenly(self.count, min(limit, self.count))])

    def sha256(self) -> str:
        """Hex digest of file names (without directories) and contents, and of the choice for a subset."""
        digest = hashlib.sha256()
        for shard in self._shards:
            _hash_shard(shard, digest.update)
        if self.count < self._starts[-1]:
            digest.update(self._chosen.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def _starts(self) -> Index:
        """Number of the first sample of each shard, then the total."""
        return np.cumsum([0, *(shard.count for shard in self._shards)], dtype=np.int64)

    @cached_property
    def _used(self) -> list[int]:
        """The shards that have chosen samples."""
        numbers: list[int] = np.unique(self._owner(self._chosen)).tolist()
        return numbers

    def _owner(self, index: Index) -> npt.NDArray[np.intp]:
        """The shard of each sample."""
        return np.searchsorted(self._starts, index, side="right") - 1

    def _of_shard(self, number: int) -> Index:
        """The chosen samples of one shard."""
        first, last = np.searchsorted(self._chosen, self._starts[number : number + 2])
        return self._chosen[first:last]


def open_samples(source: str | os.PathLike[str] | Mapping[str, Array], specs: Sequence[InputSpec]) -> Samples:
    """Open and check the samples for a model with the inputs `specs`.

    `source` is a directory of `.npz` files (arrays named as the inputs) or of `.npy` files (models with one
    input), read in the order of their names; or one such file; or arrays in memory by name. Subdirectories,
    hidden files and files of other kinds are passed over. Every array has the samples along its first axis; for a
    model without a batch axis (see `has_batch_axis`) that is an axis more than the input has.
    Arrays of labels may accompany the inputs, with one row per sample: `labels` for the model's first output,
    `labels:OUTPUT` for the output of that name. Integers become int64, floats float32.

    Floats of any width are converted to the model's float type, and int32 and int64 to each other; every
    other difference in element type is an error. The number of samples need not be a multiple of a batch
    axis that the model fixes, see `fixed_batch`.

    Raises:
        DataError: if the samples cannot be read or do not fit the model; the message names file and array.
    """
    fixed_batch(specs)
    stacked = not has_batch_axis(specs)
    if stacked:
        specs = [replace(spec, shape=(None, *spec.shape)) for spec in specs]
    if isinstance(source, Mapping):
        name = "the samples in memory"
        shards = [_open_arrays(name, source, specs)]
    else:
        name = os.fspath(source)
        with _reading(name):
            files = _find_files(Path(name))
        shards = [_open_file(path, specs) for path in files]
    targets = _targets(shards, {spec.name for spec in specs})
    count = sum(shard.count for shard in shards)
    if targets and stacked:
        raise DataError(
            f"{shards[0].name} has an array {targets[0].name!r}, but the model has no batch axis and so no scores per "
            "sample; remove it"
        )
    return Samples(name, targets, stacked, tuple(shards), np.arange(count, dtype=np.int64))


def has_batch_axis(specs: Sequence[InputSpec]) -> bool:
    """Whether the first axis of every input counts samples.

    It does not where an input is a scalar or empty, where fixed first dimensions differ between inputs, or where an
    input is a vector of integers of fixed length, which are parameters such as a shape.
    """
    fixed = {spec.shape[0] for spec in specs if spec.shape and spec.shape[0] is not None}
    vectors = [spec for spec in specs if len(spec.shape) == 1 and spec.dtype.kind in "iu"]
    return (
        all(spec.shape for spec in specs)
        and len(fixed) <= 1
        and 0 not in fixed
        and not any(spec.shape[0] not in (None, 1) for spec in vectors)
    )


def fixed_batch(specs: Sequence[InputSpec]) -> int | None:
    """The batch size that the model prescribes, for `batches(size, pad=True)`; None if it accepts any.

    A model without a batch axis takes one sample at a time.

    Raises:
        DataError: if there are no inputs.
    """
    if not specs:
        raise DataError("the model has no inputs, so it cannot be fed samples; give it at least one input")
    if not has_batch_axis(specs):
        return 1
    return next((spec.shape[0] for spec in specs if spec.shape[0] is not None), None)


def require(samples: Samples, minimum: int, what: str) -> None:
    """Check that there are at least `minimum` samples, which `what` needs.

    Raises:
        DataError: if there are fewer.
    """
    if samples.count < minimum:
        raise DataError(
            f"{samples.source}: the number of samples is {samples.count}, but {what} needs {minimum}; "
            f"add samples or pass --batch-size {samples.count}"
        )


def check_labels(samples: Samples, classes: int, array: str = LABELS) -> None:
    """Check that every class number in an array of labels lies in [0, classes - 1]; reads that array only.

    Raises:
        DataError: if one does not, or if there is no such array.
    """
    remedy = f"but the model has {classes} classes; number them from 0 to {classes - 1}"
    check_targets(samples, array, (0, classes - 1), remedy)


def check_targets(samples: Samples, array: str, limits: tuple[float, float], remedy: str) -> None:
    """Check that every value in an array of labels lies within limits; reads that array only.

    Args:
        samples: all of them are read.
        array: its name.
        limits: the least and the largest value allowed.
        remedy: completes "the label of sample N of the file is V, ...".

    Raises:
        DataError: if one does not, or if there is no such array.
    """
    if all(target.name != array for target in samples.targets):
        raise DataError(f"{samples.source} has no labels; add an array {array!r} to every file")
    low, high = limits
    for number in samples._used:
        shard = samples._shards[number]
        rows = samples._of_shard(number) - samples._starts[number]
        with _opened(shard, rows, [array]) as take:
            values = take(rows)[array]
        bad = np.argwhere((values < low) | (values > high))
        if len(bad):
            sample, value = rows[bad[0, 0]], values[tuple(bad[0])]
            raise DataError(f"{shard.name}: the label of sample {sample} of the file is {value}, {remedy}")


def _open_arrays(name: str, arrays: Mapping[str, Array], specs: Sequence[InputSpec]) -> _Shard:
    _check_names(name, arrays, specs)
    with _reading(name):
        memory = {key: np.asarray(value) for key, value in arrays.items()}
    stored = {key: _Stored(array.shape, array.dtype) for key, array in memory.items()}
    return _Shard(name, None, memory, stored, _check_arrays(name, stored, specs))


def _open_file(path: Path, specs: Sequence[InputSpec]) -> _Shard:
    name = str(path)
    stored = {}
    if _kind(path) == ".npy":
        if len(specs) > 1:
            raise DataError(
                f"{name} holds one array, but the model has the inputs {[spec.name for spec in specs]}; "
                "save .npz files with arrays of these names"
            )
        with _reading(name), path.open("rb") as stream:
            stored[specs[0].name] = _read_header(name, stream, os.fstat(stream.fileno()).st_size)
    else:
        with _reading(name), zipfile.ZipFile(path) as archive:
            members = _members(archive)
            _check_names(name, members, specs)
            for key, info in members.items():
                with archive.open(info) as member:
                    stored[key] = _read_header(f"{name}: array {key!r}", member, info.file_size)
    return _Shard(name, path, {}, stored, _check_arrays(name, stored, specs))


def _find_files(source: Path) -> list[Path]:
    if not source.exists():
        raise DataError(f"{source} does not exist; pass a directory of .npz or .npy files")
    files = [source]
    if source.is_dir():
        entries = sorted(source.iterdir(), key=lambda path: path.name)
        files = [path for path in entries if _kind(path) and not path.is_dir()]
    elif not _kind(source):
        raise DataError(f"{source} is neither a directory nor a .npz or .npy file; pass one of these")
    if not files:
        raise DataError(f"{source} has no .npz or .npy file directly in it; save some with numpy.savez")
    kinds = {_kind(path): path.name for path in files}
    if len(kinds) > 1:
        raise DataError(f"{source} has both .npz and .npy files: {', '.join(kinds.values())}; keep one kind")
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is not a file (a dangling link?); remove it")
    return files


def _kind(path: Path) -> str:
    """`.npz`, `.npy`, or nothing for other and hidden files."""
    suffix = path.suffix.lower()
    return suffix if suffix in (".npz", ".npy") and not path.name.startswith(".") else ""


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an `.npz` file by name."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in members:
            raise ValueError(f"array {name!r} is in it twice")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"array {name!r} has zip compression {info.compress_type}, not 0 or 8")
        members[name] = info
    return members


def _read_header(where: str, stream: IO[bytes], size: int) -> _Stored:
    """Read and check the header of an array of `size` bytes, header included (NPY format 1.0 and 2.0)."""
    head = io.BytesIO(stream.read(_HEADER_LIMIT))
    version = np.lib.format.read_magic(head)
    if version not in _READ_HEADER:
        raise ValueError(f"NPY format version {version}, expected 1.0 or 2.0")
    shape, fortran, dtype = _READ_HEADER[version](head)
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects, which are never unpickled; save numbers instead")
    needed, found = math.prod(shape) * dtype.itemsize, size - head.tell()
    if needed != found:
        raise DataError(
            f"{where} has {found} bytes of values, but {dtype} of shape {shape} by its header, which needs "
            f"{needed}; the file is damaged, write it again"
        )
    if needed > ARRAY_LIMIT:
        raise DataError(f"{where} has {needed} bytes, more than {ARRAY_LIMIT} allowed; split it into smaller files")
    return _Stored(shape, dtype, fortran, head.tell())


def _at_least(minimum: int, value: int, what: str) -> None:
    if value < minimum:
        raise UsageError(f"the {what} is {value}; pass a number of at least {minimum}")


def _check_names(where: str, found: Collection[str], specs: Sequence[InputSpec]) -> None:
    names = [spec.name for spec in specs]
    both = f"it has {sorted(found)}, the model wants {sorted(names)}"
    for name in names:
        if name not in found:
            raise DataError(
                f"{where} has no array for the model's input {name!r}: {both}; "
                f"name arrays as the inputs: numpy.savez(file, **{{{name!r}: array}})"
            )
    for name in found:
        if name not in names and not _is_target(name):
            raise DataError(f"{where}: array {name!r} is no input of the model: {both}; remove or rename it")


def _is_target(name: str) -> bool:
    """Whether an array that is no input of the model holds labels."""
    return name == LABELS or name.startswith(f"{LABELS}:")


def _targets(shards: Sequence[_Shard], inputs: Collection[str]) -> tuple[InputSpec, ...]:
    """The arrays of labels, which every file must have."""
    names = dict.fromkeys(name for shard in shards for name in shard.stored if name not in inputs)
    return tuple(_target(name, shards) for name in names)


def _target(name: str, shards: Sequence[_Shard]) -> InputSpec:
    """What all files have in common of one array of labels."""
    owner = next(shard for shard in shards if name in shard.stored)
    dtype, shape = owner.dtypes[name], owner.stored[name].shape[1:]
    sizes: list[int | None] = list(shape)
    for shard in shards:
        if name not in shard.stored:
            raise DataError(
                f"{shard.name} has no array {name!r}, but {owner.name} has one; "
                "add it to every file or remove it from all"
            )
        other = shard.stored[name].shape[1:]
        if shard.dtypes[name] != dtype or len(other) != len(shape):
            raise DataError(
                f"{shard.name}: array {name!r} is {shard.dtypes[name]} with samples of shape {other}, but in "
                f"{owner.name} {dtype} with samples of shape {shape}; save the same kind of labels in every file"
            )
        sizes = [have if have == size else None for have, size in zip(sizes, other, strict=True)]
    return InputSpec(name, dtype, (None, *sizes))


def _check_arrays(name: str, stored: dict[str, _Stored], specs: Sequence[InputSpec]) -> dict[str, np.dtype[Any]]:
    """Compare the arrays of one shard with the model's inputs; what each array is to be converted to."""
    dtypes = {spec.name: spec.dtype.newbyteorder("=") for spec in specs}
    for spec in specs:
        _check_input(f"{name}: array {spec.name!r}", stored[spec.name], spec)
    for key in stored.keys() - dtypes.keys():
        labels = stored[key]
        if labels.dtype.kind not in _LABEL_TYPES or not labels.shape:
            raise DataError(
                f"{name}: array {key!r} is {labels.dtype} of shape {labels.shape}, but labels are numbers, with one "
                "row per sample; save class numbers as a 1-D integer array, real values as floats"
            )
        dtypes[key] = _LABEL_TYPES[labels.dtype.kind]
    count = stored[specs[0].name].shape[0]
    for key, array in stored.items():
        if array.shape[0] != count:
            raise DataError(
                f"{name}: array {key!r} has {array.shape[0]} samples, but {specs[0].name!r} has {count}; "
                "give all arrays of the file the same first axis"
            )
    return dtypes


def _check_input(where: str, stored: _Stored, spec: InputSpec) -> None:
    dims = zip(stored.shape[1:], spec.shape[1:], strict=False)
    if len(stored.shape) != len(spec.shape) or any(want not in (None, have) for have, want in dims):
        wanted = ", ".join(["samples", *("any" if dim is None else str(dim) for dim in spec.shape[1:])])
        raise DataError(
            f"{where} has shape {stored.shape}, but the model wants ({wanted}); "
            "save it in that layout, with the samples along the first axis"
        )
    if stored.shape[0] < 1:
        raise DataError(f"{where} has shape {stored.shape} and so no samples; add some or remove it")
    have, want = stored.dtype.newbyteorder("="), spec.dtype.newbyteorder("=")
    if have == want or have.kind == want.kind == "f" or {have, want} == {np.dtype("i4"), np.dtype("i8")}:
        return
    remedy = f"save it as {want}"
    if have.kind in "iu" and want.kind == "f":
        remedy = f"apply the model's preprocessing (scaling, mean, deviation) and save the result as {want}"
    raise DataError(f"{where} is {have}, but the model wants {want}; {remedy}")


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn whatever a damaged file causes into one line."""
    try:
        yield
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where} cannot be read ({reason}); check it or write it again") from error


def _hash_shard(shard: _Shard, update: Callable[[bytes | memoryview], None]) -> None:
    if shard.path is not None:
        with _reading(shard.name), shard.path.open("rb") as stream:
            update(f"{shard.path.name}\0{os.fstat(stream.fileno()).st_size}\0".encode())
            while chunk := stream.read(_CHUNK):
                update(chunk)
        return
    for name in sorted(shard.memory):
        array = np.ascontiguousarray(shard.memory[name])
        update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        update(array.reshape(-1).view(np.uint8).data)


@contextmanager
def _opened(shard: _Shard, _: Index, only: Sequence[str] = ()) -> Iterator[_Take]:
    """Open a shard for taking rows in ascending order, converted and checked (of `only` some arrays)."""
    with ExitStack() as stack:
        with _reading(shard.name):
            readers = _open_readers(shard, only or list(shard.stored), stack)

        def take(rows: Index) -> _Arrays:
            arrays = {}
            for name, read in readers.items():
                with _reading(shard.name):
                    stored = read(rows)
                arrays[name] = _convert(f"{shard.name}: array {name!r}", stored, shard.dtypes[name], rows)
            return arrays

        yield take


@contextmanager
def _loaded(shard: _Shard, chosen: Index) -> Iterator[_Take]:
    """Load the rows `chosen` (ascending) of a shard; what is in memory already is not copied."""
    with _opened(shard, chosen) as take:
        if shard.memory:
            yield take
            return
        arrays = take(chosen)
    yield lambda rows: {name: array[np.searchsorted(chosen, rows)] for name, array in arrays.items()}


def _open_readers(shard: _Shard, names: Sequence[str], stack: ExitStack) -> dict[str, _Read]:
    if shard.path is None:
        return {name: shard.memory[name].__getitem__ for name in names}
    if _kind(shard.path) == ".npy":
        stream = stack.enter_context(shard.path.open("rb"))
        return {name: _reader(shard.stored[name], stream) for name in names}
    archive = stack.enter_context(zipfile.ZipFile(shard.path))
    members = _members(archive)
    streams = {name: stack.enter_context(archive.open(members[name])) for name in names}
    return {name: _reader(shard.stored[name], stream) for name, stream in streams.items()}


def _reader(stored: _Stored, stream: IO[bytes]) -> _Read:
    """Reads rows of one array, which must be asked for in ascending order."""
    _advance(stream, stored.offset)
    if stored.fortran:
        flat = np.empty(math.prod(stored.shape), stored.dtype)
        _advance(stream, flat.nbytes, flat.view(np.uint8))
        return flat.reshape(stored.shape, order="F").__getitem__
    position = 0

    def read(rows: Index) -> Array:
        nonlocal position
        out = np.empty((len(rows), *stored.shape[1:]), stored.dtype)
        if not out.size:
            return out
        raw = out.reshape(len(rows), -1).view(np.uint8)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for first, last in pairwise([0, *breaks.tolist(), len(rows)]):
            run = raw[first:last].reshape(-1)
            _advance(stream, int(rows[first] - position) * raw.shape[1])
            _advance(stream, run.nbytes, run)
            position = int(rows[last - 1]) + 1
        return out

    return read


def _advance(stream: IO[bytes], size: int, target: Array | None = None) -> None:
    """Read the next `size` bytes, into `target` if given."""
    done = 0
    while done < size:
        chunk = stream.read(min(size - done, _CHUNK))
        if not chunk:
            raise EOFError("it ends early")
        if target is not None:
            target[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)


def _convert(where: str, stored: Array, dtype: np.dtype[Any], rows: Index) -> Array:
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


def _evenly(count: int, number: int) -> Index:
    """`number` positions in the middle of equal parts of range(count)."""
    return ((2 * np.arange(number, dtype=np.int64) + 1) * count) // (2 * number)


def _padded(batch: Batch, size: int) -> Batch:
    missing = size - len(batch.index)
    if not missing or not batch.fed:
        return batch
    inputs = {name: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) for name, x in batch.inputs.items()}
    return replace(batch, inputs=inputs, fed=size)
