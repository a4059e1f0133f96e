"""Samples that a program makes: iterables of arrays by input name, which are written to `.npz` files first."""

import importlib
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from onnxqt.data.content import fit, in_memory, reading
from onnxqt.data.form import Arrays, InputSpec, fixed_batch, has_batch_axis, is_label
from onnxqt.data.preprocessing import Preprocessing
from onnxqt.data.source import DataSource
from onnxqt.errors import DataError, UsageError, first_line
from onnxqt.numerics import Array

Items = Iterable[Mapping[str, Array]]
Data = str | os.PathLike[str] | DataSource | Mapping[str, Array] | Items | Callable[[], Items]

SHARD_LIMIT = 64 << 20  # bytes of one file that is written
TOTAL_LIMIT = 64 << 30  # bytes of all of them: an iterable may have no end

_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_WRITTEN = re.compile(r"samples-\d{6}\.npz")


def is_function(text: str) -> bool:
    """Whether a text is `module:function` and not the path of something that is there; nothing is imported."""
    return _FUNCTION.fullmatch(text) is not None and not os.path.exists(text)


def is_located(data: Data) -> bool:
    """Whether `locate` writes nothing for this: it is a path, or a `DataSource`."""
    return isinstance(data, DataSource) or (isinstance(data, str | os.PathLike) and not is_function(os.fspath(data)))


def locate(
    data: Data, specs: Sequence[InputSpec], folder: Path, preprocessing: Preprocessing | None = None
) -> DataSource:
    """Where samples are, as plain data; what is in no file yet is written to `.npz` files in `folder`.

    `data` is a path; arrays in memory by name; an iterable of such arrays, each one sample (without an axis of samples)
    or several (along a first axis), with labels as `open_samples` takes them; a function without arguments that gives
    an iterable; or the text `module:function`, which names one and is imported here, from the current directory too.
    At most `SHARD_LIMIT` bytes are in memory, or one item of the iterable.

    Args:
        data: the samples.
        specs: the inputs of the model.
        folder: for the files, is created if it does not exist; earlier ones of this function are replaced when all is
            written, and stay if it fails.
        preprocessing: of images.

    Raises:
        DataError: if an item does not fit the model, the iterable gives none or more than `TOTAL_LIMIT` bytes, its
            code raises, or the files cannot be written.
        UsageError: if there is no such function, or a preprocessing is given for what are no files.
    """
    if isinstance(data, DataSource):
        return data if preprocessing is None else replace(data, preprocessing=preprocessing)
    name, items = "the samples in memory", cast(Any, data)
    if isinstance(data, str | os.PathLike):
        path = os.fspath(data)
        if not is_function(path):
            return DataSource(os.path.abspath(path), preprocessing)
        name, items = path, function_named(path)
    elif isinstance(data, Mapping):
        items = [data]
    else:
        name = f"'{getattr(data, '__name__', type(data).__name__)}'"
    if preprocessing is not None:
        raise UsageError(
            f"--preprocess {preprocessing.name} is for files of images, but {name} gives arrays, which are taken as "
            "they are; leave it out"
        )
    _write(name, _checked(name, items, specs), folder)
    return DataSource(os.path.abspath(folder))


def function_named(text: str) -> Callable[[], Items]:
    """Import the function that `module:function` names; the current directory is searched last, and only now.

    Raises:
        UsageError: if there is none.
    """
    match = _FUNCTION.fullmatch(text)
    if not match:
        raise UsageError(f"'{text}' names no function: write module:function")
    module, name = match.groups()
    here = os.getcwd()
    added = [] if here in sys.path else [here]
    sys.path += added
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a user's module may raise anything
        raise UsageError(
            f"cannot import '{module}' of '{text}' ({type(error).__name__}: {first_line(error)}): correct it, or run "
            "from its directory"
        ) from error
    finally:
        for place in added:
            with suppress(ValueError):  # the module may have removed it
                sys.path.remove(place)
    if not callable(function):
        raise UsageError(f"'{module}' has no function '{name}': define one that gives dicts of arrays by input name")
    found: Callable[[], Items] = function
    return found


def _checked(name: str, items: Any, specs: Sequence[InputSpec]) -> Iterator[Arrays]:
    """Samples by input name, converted and checked, in pieces of at most `SHARD_LIMIT` bytes, or one sample."""
    fixed_batch(specs)
    stacked = not has_batch_axis(specs)
    wanted = [replace(spec, shape=(None, *spec.shape)) for spec in specs] if stacked else specs
    ranks = sorted(len(spec.shape) for spec in wanted)
    for number, item in enumerate(_guarded(name, items)):
        where = f"{name}, item {number}"
        if not isinstance(item, Mapping):
            raise DataError(f"{where}, is a {type(item).__name__}; give a dict of arrays by input name")
        with reading(where):
            arrays = {str(key): np.asarray(value) for key, value in item.items()}
        if sorted(array.ndim + 1 for key, array in arrays.items() if not is_label(key)) == ranks:  # one sample
            arrays = {key: array[None] for key, array in arrays.items()}
        shard = fit(in_memory(where, arrays), wanted)
        rows = max(1, SHARD_LIMIT // max(1, shard.sample_bytes))
        with shard.open() as take:
            for start in range(0, shard.count, rows):
                yield take(np.arange(start, min(start + rows, shard.count)))


def _guarded(name: str, items: Any) -> Iterator[Any]:
    """The items of a user's iterable, or of the one that a user's function gives; what they raise becomes one line."""
    try:
        yield from items if isinstance(items, Iterable) else items()
    except Exception as error:  # a user's code may raise anything
        raise DataError(f"{name} raised {type(error).__name__}: {first_line(error)}; correct it") from error


def _write(name: str, pieces: Iterator[Arrays], folder: Path) -> None:
    """Write files of at most `SHARD_LIMIT` bytes, which take the place of earlier ones when all is written."""
    hidden: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, arrays in enumerate(_joined(name, pieces)):
            hidden.append(folder / f".samples-{number:06}.npz.tmp")
            _write_arrays(hidden[-1], arrays)
        if not hidden:
            raise DataError(f"{name} gives no samples; give at least one dict of arrays")
        for old in [path for path in folder.iterdir() if _WRITTEN.fullmatch(path.name)]:
            old.unlink()
        for path in hidden:
            path.replace(folder / path.name[1:].removesuffix(".tmp"))
    except OSError as error:
        raise DataError(
            f"cannot write samples into {folder} ({error.strerror}); free the disk or choose another --out"
        ) from error
    finally:
        for path in hidden:
            path.unlink(missing_ok=True)


def _write_arrays(path: Path, arrays: Arrays) -> None:
    """Write a `.npz` file; equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _joined(name: str, pieces: Iterator[Arrays]) -> Iterator[Arrays]:
    """Pieces of equal shapes and types put together until they are large enough for a file."""
    kept: list[Arrays] = []
    form: Any = None
    size = total = 0
    for arrays in pieces:
        own = sum(array.nbytes for array in arrays.values())
        total += own
        if total > TOTAL_LIMIT:
            raise DataError(f"{name} gives more than {TOTAL_LIMIT} bytes; let it end earlier")
        new = {key: (array.dtype, array.shape[1:]) for key, array in arrays.items()}
        if kept and (new != form or size + own > SHARD_LIMIT):
            yield _together(kept)
            kept, size = [], 0
        kept.append(arrays)
        form, size = new, size + own
    if kept:
        yield _together(kept)


def _together(pieces: Sequence[Arrays]) -> Arrays:
    return {key: np.concatenate([arrays[key] for arrays in pieces]) for key in pieces[0]}
