"""Checked samples: batches in order or shuffled, subsets, and a hash."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from onnxqt.data.content import Shard, Take
from onnxqt.data.form import LABELS, Arrays, Batch, Index, InputSpec, has_classes
from onnxqt.errors import DataError, UsageError

WINDOW_LIMIT = 256 << 20  # bytes of the shards that `Samples.shuffled` holds

_Open = Callable[[Shard, Index], AbstractContextManager[Take]]


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
    _shards: tuple[Shard, ...]
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
        takes: dict[int, Take] = {}
        with ExitStack() as stack:

            def rows_of(number: int, rows: Index) -> Arrays:
                if number not in takes:
                    takes.clear()
                    stack.close()
                    for n in window_of[number]:
                        opened = open_shard(self._shards[n], self._of_shard(n) - self._starts[n])
                        takes[n] = stack.enter_context(opened)
                return takes[number](rows)

            for start in range(0, len(order), size):
                yield self._gather(order[start : start + size], rows_of)

    def _gather(self, index: Index, rows_of: Callable[[int, Index], Arrays]) -> Batch:
        """Put the samples `index` together; `rows_of` is asked once per shard, in order of appearance."""
        arrays: Arrays = {}
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
            shard.content.digest(digest.update)
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


def join(source: str, shards: Sequence[Shard], specs: Sequence[InputSpec], stacked: bool) -> Samples:
    """All samples of some shards that fit `specs`; for `source` and `stacked` see `Samples`.

    Raises:
        DataError: if labels differ in kind between shards, or a model without a batch axis has any.
    """
    targets = _targets(shards, specs)
    if targets and stacked:
        raise DataError(
            f"{shards[0].name} has an array {targets[0].name!r}, but the model has no batch axis and so no scores per "
            "sample; remove it"
        )
    count = sum(shard.count for shard in shards)
    return Samples(source, targets, stacked, tuple(shards), np.arange(count, dtype=np.int64))


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
        with shard.open([array]) as take:
            values = take(rows)[array]
        bad = np.argwhere((values < low) | (values > high))
        if len(bad):
            sample, value = rows[bad[0, 0]], values[tuple(bad[0])]
            raise DataError(f"{shard.name}: the label of sample {sample} of the file is {value}, {remedy}")


def _targets(shards: Sequence[Shard], inputs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """The arrays of labels, which every file must have."""
    wanted = {spec.name for spec in inputs}
    names = dict.fromkeys(name for shard in shards for name in shard.arrays if name not in wanted)
    return tuple(_target(name, shards) for name in names)


def _target(name: str, shards: Sequence[Shard]) -> InputSpec:
    """What all files have in common of one array of labels."""
    owner = next(shard for shard in shards if name in shard.arrays)
    dtype, shape = owner.dtypes[name], owner.sample_shape(name)
    sizes: list[int | None] = list(shape)
    for shard in shards:
        if name not in shard.arrays:
            raise DataError(
                f"{shard.name} has no array {name!r}, but {owner.name} has one; "
                "add it to every file or remove it from all"
            )
        other = shard.sample_shape(name)
        if shard.dtypes[name] != dtype or len(other) != len(shape):
            raise DataError(
                f"{shard.name}: array {name!r} is {shard.dtypes[name]} with samples of shape {other}, but in "
                f"{owner.name} {dtype} with samples of shape {shape}; save the same kind of labels in every file"
            )
        sizes = [have if have == size else None for have, size in zip(sizes, other, strict=True)]
    return InputSpec(name, dtype, (None, *sizes))


@contextmanager
def _opened(shard: Shard, _: Index) -> Iterator[Take]:
    """Open a shard for taking rows in ascending order."""
    with shard.open() as take:
        yield take


@contextmanager
def _loaded(shard: Shard, chosen: Index) -> Iterator[Take]:
    """Load the rows `chosen` (ascending) of a shard, to be taken in any order.

    What is in memory already is not copied; what can be sought and is too large for a window stays in its file.
    """
    large = len(chosen) * shard.sample_bytes > WINDOW_LIMIT
    with shard.open() as take:
        if shard.content.access == "memory" or (shard.content.access == "seek" and large):
            yield take
            return
        arrays = take(chosen)
    yield lambda rows: {name: array[np.searchsorted(chosen, rows)] for name, array in arrays.items()}


def _at_least(minimum: int, value: int, what: str) -> None:
    if value < minimum:
        raise UsageError(f"the {what} is {value}; pass a number of at least {minimum}")


def _evenly(count: int, number: int) -> Index:
    """`number` positions in the middle of equal parts of range(count)."""
    return ((2 * np.arange(number, dtype=np.int64) + 1) * count) // (2 * number)


def _padded(batch: Batch, size: int) -> Batch:
    missing = size - len(batch.index)
    if not missing or not batch.fed:
        return batch
    inputs = {name: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) for name, x in batch.inputs.items()}
    return replace(batch, inputs=inputs, fed=size)
