"""From a path, arrays in memory, or both with a preprocessing, to checked samples: what kind of source is it?"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from onnxqt.data import images, tensor_files, text_files
from onnxqt.data.content import Content, check_file, fit, in_memory, reading
from onnxqt.data.form import InputSpec, fixed_batch, has_batch_axis, is_label, listed
from onnxqt.data.numpy_files import open_npy, open_npz
from onnxqt.data.preprocessing import Preprocessing, from_plain
from onnxqt.data.samples import Samples, join
from onnxqt.errors import DataError, UsageError
from onnxqt.numerics import Array

Kind = Literal["npz", "npy", "tests", "table", "image"]


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where samples are, as plain data: another process opens the same samples from it.

    Attributes:
        path: a file or a folder.
        preprocessing: what is done to images; None for every other kind of source.
    """

    path: str
    preprocessing: Preprocessing | None = None

    def plain(self) -> dict[str, Any]:
        """The same as JSON has it; `DataSource.from_plain` takes it back."""
        return {"path": self.path, "preprocessing": self.preprocessing.plain() if self.preprocessing else None}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "DataSource":
        """What `plain` took apart.

        Raises:
            UsageError: if a field of the preprocessing is not what it must be.
        """
        steps = plain.get("preprocessing")
        return cls(str(plain["path"]), None if steps is None else from_plain(steps))


def open_samples(
    source: str | os.PathLike[str] | Mapping[str, Array] | DataSource, specs: Sequence[InputSpec]
) -> Samples:
    """Open and check the samples for a model with the inputs `specs`.

    `source` is one of these; several files of one kind are read in the order of their names:

    - a `.npz` file or a folder of them, arrays named as the inputs;
    - a `.npy` file or a folder of them, for models with one input; or a folder with one `.npy` file per input, named
      as the inputs (what is no letter, digit, `_`, `.` or `-` may be `_`);
    - a folder with ONNX's `test_data_set_N` folders, or one of these, with a file `input_N.pb` per input;
    - a `.csv` or `.tsv` file or a folder of them, see `text_files.open_table`;
    - a folder of images, or of folders of images, which are classes, see `images.find_images`; how the model wants
      them is said by a `DataSource` with a preprocessing;
    - arrays in memory by name.

    Hidden files, files of other kinds and other subfolders are passed over, images and tables also beside numpy files.
    Every array has the samples along its first axis; for a model without a batch axis (see `has_batch_axis`) that is an
    axis more than the input has. Arrays of labels may accompany the inputs, with one row per sample: `labels` for the
    model's first output, `labels:OUTPUT` for the output of that name. Integers become int64, floats float32.

    An array that has the name of no input feeds the one input that it fits by shape and element type.
    Floats of any width are converted to the model's float type, and int32 and int64 to each other; every
    other difference in element type is an error. The number of samples need not be a multiple of a batch
    axis that the model fixes, see `fixed_batch`.

    Raises:
        DataError: if the samples cannot be read or do not fit the model; the message names file and array.
        UsageError: if a preprocessing is given for what are no images.
        InstallationError: if images are to be read without Pillow.
    """
    fixed_batch(specs)
    stacked = not has_batch_axis(specs)
    if stacked:
        specs = [replace(spec, shape=(None, *spec.shape)) for spec in specs]
    if isinstance(source, Mapping):
        name = "the samples in memory"
        contents: Sequence[Content] = [in_memory(name, source)]
    else:
        located = source if isinstance(source, DataSource) else DataSource(os.fspath(source))
        name = located.path
        contents = _open(located, _Wanted(specs, stacked, located.preprocessing))
    return join(name, [fit(content, specs) for content in contents], specs, stacked)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the model takes: samples along a first axis, which `stacked` models do not have themselves."""

    specs: Sequence[InputSpec]
    stacked: bool
    preprocessing: Preprocessing | None


@dataclass(frozen=True, slots=True)
class _Found:
    """What a source is, with its files or folders; `folder` is None for a single file."""

    kind: Kind
    paths: Sequence[Path]
    folder: Path | None


_KINDS: Mapping[str, Kind] = {
    ".npz": "npz",
    ".npy": "npy",
    **dict.fromkeys(text_files.SUFFIXES, "table"),
    **dict.fromkeys(images.SUFFIXES, "image"),
}
_CALLED: Mapping[Kind, str] = {
    "npz": ".npz",
    "npy": ".npy",
    "tests": "test_data_set",
    "table": ".csv",
    "image": "image",
}
# Of kinds that meet in a folder, those of the first line count; two of one line are an error.
_PRECEDENCE: Sequence[Sequence[Kind]] = (("npz", "npy", "tests"), ("table", "image"))
_EVERYTHING = ".npz, .npy, .csv or image files, or test_data_set folders"


def _open(source: DataSource, wanted: _Wanted) -> Sequence[Content]:
    with reading(source.path):
        found = _find(Path(source.path))
    if source.preprocessing is not None and found.kind != "image":
        raise UsageError(
            f"--preprocess {source.preprocessing.name} is for images, but {source.path} has {_CALLED[found.kind]} "
            "files, whose values are taken as they are; leave it out"
        )
    return _OPEN[found.kind](found, wanted)


def _find(source: Path) -> _Found:
    if not source.exists():
        raise DataError(f"{source} does not exist; pass a directory of {_EVERYTHING}")
    if not source.is_dir():
        kind = _kind(source.name)
        if kind is None:
            raise DataError(
                f"{source} is neither a directory nor a .npz or .npy file, .csv or image; pass one of these"
            )
        check_file(source)
        return _Found(kind, [source], None)
    here: dict[Kind, list[str]] = {}
    with os.scandir(source) as entries:
        for entry in entries:
            kind = _kind(entry.name)
            if kind is not None and not entry.is_dir():
                here.setdefault(kind, []).append(entry.name)
    tests = tensor_files.find_tests(source)
    if tests:
        here["tests"] = [path.name for path in tests]
    kind = _chosen(source, here)
    paths = tests if kind == "tests" else [source / name for name in sorted(here.get(kind, [])) if kind != "image"]
    for path in paths:
        if kind != "tests":
            check_file(path)
    return _Found(kind, paths, source)


def _chosen(source: Path, here: Mapping[Kind, Sequence[str]]) -> Kind:
    """The kind of a folder; images if nothing lies directly in it."""
    for kinds in _PRECEDENCE:
        found = [kind for kind in kinds if kind in here]
        if len(found) > 1:
            called, files = (" and ".join(_CALLED[k] for k in found), ", ".join(min(here[k]) for k in found))
            raise DataError(f"{source} has both {called} files: {files}; keep one kind")
        if found:
            return found[0]
    return "image"


def _kind(name: str) -> Kind | None:
    """What a file is by its name; None for other and hidden files."""
    return None if name.startswith(".") else _KINDS.get(os.path.splitext(name)[1].lower())


def _open_npz(found: _Found, _: _Wanted) -> Sequence[Content]:
    return [open_npz(path) for path in found.paths]


def _open_npy(found: _Found, wanted: _Wanted) -> Sequence[Content]:
    """Files of one input each if they have the names of all inputs, else files of the samples of the only input."""
    names = {alias: spec.name for spec in wanted.specs for alias in (_file_name(spec.name), spec.name)}
    files = {names.get(path.stem, path.stem): path for path in found.paths}
    inputs = [spec.name for spec in wanted.specs]
    others = [name for name in files if name not in inputs]
    if found.folder and all(name in files for name in inputs) and all(is_label(name) for name in others):
        return [open_npy(str(found.folder), files)]
    if len(inputs) > 1:
        place, has = found.folder or found.paths[0].parent, listed([path.name for path in found.paths])
        raise DataError(
            f"{place}: a .npy file holds one array, but the model has the inputs {inputs}, and there is {has}; "
            "save .npz files with arrays of these names, or a .npy file of its name for each"
        )
    return [open_npy(str(path), {inputs[0]: path}) for path in found.paths]


def _file_name(name: str) -> str:
    """An input's name as a file may have it."""
    return "".join(c if (c.isascii() and c.isalnum()) or c in "_.-" else "_" for c in name)


def _open_tests(found: _Found, wanted: _Wanted) -> Sequence[Content]:
    specs = [replace(spec, shape=spec.shape[1:]) for spec in wanted.specs] if wanted.stacked else wanted.specs
    return [tensor_files.open_test(path, specs, wanted.stacked) for path in found.paths]


def _open_tables(found: _Found, wanted: _Wanted) -> Sequence[Content]:
    return [text_files.open_table(path, wanted.specs) for path in found.paths]


def _open_images(found: _Found, wanted: _Wanted) -> Sequence[Content]:
    if found.folder is None:
        (path,) = found.paths
        files: images.ImageFiles | None = images.ImageFiles(path.parent, (path.name,), None)
    else:
        with reading(str(found.folder)):
            files = images.find_images(found.folder)
    if files is None:
        raise DataError(
            f"{found.folder} has no .npz or .npy file directly in it, and no .csv files, images, folders of images or "
            "test_data_set folders; save some with numpy.savez"
        )
    return [images.open_images(files, wanted.specs, wanted.preprocessing)]


_OPEN: Mapping[Kind, Callable[[_Found, _Wanted], Sequence[Content]]] = {
    "npz": _open_npz,
    "npy": _open_npy,
    "tests": _open_tests,
    "table": _open_tables,
    "image": _open_images,
}
