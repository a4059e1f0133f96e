"""Folders of images, decoded with Pillow when they are asked for.

Images are opened in a few formats only, whatever their files are called; their size is read and compared with a limit
before a pixel is decoded.
"""

import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxqt.data.content import Access, Stored, Take, Update, check_file, reading
from onnxqt.data.form import LABELS, Arrays, Index, InputSpec, shown_shape
from onnxqt.data.numpy_files import digest_file
from onnxqt.data.preprocessing import PRESETS, Colour, Layout, Preprocessing
from onnxqt.errors import DataError, InstallationError
from onnxqt.numerics import Array

if TYPE_CHECKING:
    from PIL.Image import Image

# The kinds of files that are images by their names, and the decoders that may see them.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_DECODERS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")

PIXEL_LIMIT = (256 << 20) // 3  # of one image, decoded or resized: a quarter of a GiB in three colours
CACHE_LIMIT = 256 << 20  # bytes of decoded images that are kept

_MODES: Mapping[Colour, str] = {"rgb": "RGB", "bgr": "RGB", "grey": "L"}  # as Pillow calls them
_CHANNELS: Mapping[Colour, int] = {"rgb": 3, "bgr": 3, "grey": 1}
_DEEP = ("I", "F")  # how the names of Pillow's modes with more than 8 bits per channel begin


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Where images are, and what class each has.

    Attributes:
        folder: what their names are relative to.
        names: with the class folder, if there is one.
        labels: class numbers; None for a flat folder.
    """

    folder: Path
    names: tuple[str, ...]
    labels: tuple[int, ...] | None


class _Cache:
    """Decoded images by number; the first ones stay, which in passes over all images beats keeping the last ones."""

    def __init__(self, limit: int) -> None:
        self._room = limit
        self._kept: dict[int, Array] = {}

    def get(self, number: int) -> Array | None:
        return self._kept.get(number)

    def put(self, number: int, pixels: Array) -> None:
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._kept[number] = pixels


@dataclass(frozen=True, eq=False, slots=True)
class ImageContent:
    """Preprocessed images, and their class numbers.

    Attributes:
        name: the folder.
        files: where the images are.
        spec: the input that they feed.
        preprocessing: what is done to them.
        arrays: the input, and `labels` where folders are classes.
        colour: of the preprocessing, or what fits the model.
        layout: likewise.
        values: what each of the 256 pixels becomes, (channels, 256): computed in float64 and rounded once.
        cache: decoded images, before their pixels become values.
        access: see `Content`.
    """

    name: str
    files: ImageFiles
    spec: InputSpec
    preprocessing: Preprocessing
    arrays: Mapping[str, Stored]
    colour: Colour
    layout: Layout
    values: Array
    cache: _Cache
    access: Access = "memory"

    @contextmanager
    def open(self, names: Sequence[str]) -> Iterator[Take]:
        """See `Content.open`."""
        yield lambda rows: self._take(rows, names)

    def digest(self, update: Update) -> None:
        """Hash the preprocessing without its name, and names and bytes of the files."""
        steps = {key: value for key, value in self.preprocessing.plain().items() if key != "name"}
        update(f"{steps}\0".encode())
        for name in self.files.names:
            digest_file(self.files.folder / name, name, update)

    def _take(self, rows: Index, names: Sequence[str]) -> Arrays:
        arrays: Arrays = {}
        if LABELS in names and self.files.labels is not None and self.spec.name != LABELS:
            arrays[LABELS] = np.array([self.files.labels[row] for row in rows], np.int64)
        if self.spec.name in names:
            arrays[self.spec.name] = self._images(rows)
        return arrays

    def _images(self, rows: Index) -> Array:
        images: Array | None = None
        for place, row in enumerate(rows.tolist()):
            image = self._image(row)
            if images is None:
                images = np.empty((len(rows), *image.shape), image.dtype)
            if image.shape != images.shape[1:]:
                raise DataError(
                    f"{self._path(row)} gives a sample of shape {image.shape}, but another image of the same batch "
                    f"{images.shape[1:]}; resize them with --preprocess FILE.toml or pass --batch-size 1"
                )
            images[place] = image
        return np.empty((0, *self.arrays[self.spec.name].shape[1:]), self.values.dtype) if images is None else images

    def _image(self, row: int) -> Array:
        pixels = self.cache.get(row)
        if pixels is None:
            pixels = decoded(self._path(row), self.preprocessing, self.colour)
            self.cache.put(row, pixels)
        image = arranged(pixels, self.values, self.layout)
        check_shape(self._path(row), image.shape, self.spec, self.preprocessing)
        return image

    def _path(self, row: int) -> Path:
        return self.files.folder / self.files.names[row]


def open_images(files: ImageFiles, specs: Sequence[InputSpec], preprocessing: Preprocessing | None) -> ImageContent:
    """Decode the first image, and see that it fits the model; the others are decoded when they are asked for.

    Raises:
        DataError: naming the image, its shape and what the model wants.
        InstallationError: if Pillow is missing.
    """
    folder = str(files.folder)
    if len(specs) != 1:
        raise DataError(
            f"{folder} holds images, which feed one input, but the model has the inputs "
            f"{[spec.name for spec in specs]}; save .npz files with arrays of these names"
        )
    if preprocessing is None:
        raise DataError(
            f"{folder} holds images, and how the model wants them is not said; "
            f"pass --preprocess with one of {', '.join(PRESETS)} or a TOML file"
        )
    (spec,) = specs
    layout = preprocessing.layout or _layout(folder, spec)
    colour = preprocessing.colour or _colour(spec, layout)
    if layout == "hw" and colour != "grey":
        raise DataError(
            f"{folder}: images in {colour} have channels, but samples in the layout hw have no axis for them; "
            'set colour = "grey" in a TOML file for --preprocess'
        )
    values = _values(folder, preprocessing, colour, spec)
    first = files.folder / files.names[0]
    pixels = decoded(first, preprocessing, colour)
    shape = arranged(pixels, values, layout).shape
    check_shape(first, shape, spec, preprocessing)
    arrays = {spec.name: Stored((len(files.names), *shape), np.dtype(preprocessing.dtype or spec.dtype))}
    if files.labels is not None:
        if spec.name == LABELS:
            raise DataError(f"{folder} gives the array 'labels', but so is the model's input called; rename the input")
        arrays[LABELS] = Stored((len(files.names),), np.dtype(np.int64))
    cache = _Cache(CACHE_LIMIT)
    cache.put(0, pixels)
    return ImageContent(folder, files, spec, preprocessing, arrays, colour, layout, values, cache)


def decoded(path: Path, preprocessing: Preprocessing, colour: Colour) -> Array:
    """The pixels of an image after resizing and cutting, uint8 (height, width, channels).

    An orientation that a camera noted in the file is not applied. Of several images in a file the first is taken.

    Raises:
        DataError: if it is no image, damaged, has more than `PIXEL_LIMIT` pixels or more than 8 bits per channel, or
            is smaller than the part to cut out.
        InstallationError: if Pillow is missing.
    """
    pillow = _pillow()
    damaged = (struct.error, OverflowError, pillow.DecompressionBombError)
    with reading(str(path), *damaged), warnings.catch_warnings(), path.open("rb") as stream:
        warnings.simplefilter("ignore")  # of Pillow's own limit, and of damage that does not matter
        with pillow.open(stream, formats=_DECODERS) as image:
            _check_size(path, image.size, "has")
            if image.mode.startswith(_DEEP):
                raise DataError(
                    f"{path} has more than 8 bits per channel (mode {image.mode}); "
                    "save it with 8, or save .npz files of what the model wants"
                )
            made = _cut(path, _resized(path, image.convert(_MODES[colour]), preprocessing), preprocessing.crop)
            pixels: Array = np.asarray(made, np.uint8)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if colour == "bgr" else pixels


def arranged(pixels: Array, values: Array, layout: Layout) -> Array:
    """The values of an image's pixels with the axes in order.

    Args:
        pixels: uint8 (height, width, channels).
        values: what each pixel becomes, (channels, 256).
        layout: of what comes out.
    """
    planes = np.stack([table[pixels[:, :, channel]] for channel, table in enumerate(values)])
    if layout == "hw":
        plane: Array = planes[0]
        return plane
    return planes if layout == "chw" else planes.transpose(1, 2, 0)


def check_shape(path: Path, shape: tuple[int, ...], spec: InputSpec, preprocessing: Preprocessing) -> None:
    """Check that a preprocessed image has the shape that the model wants.

    Raises:
        DataError: naming the image and both shapes.
    """
    wanted = spec.shape[1:]
    if len(shape) != len(wanted) or any(want not in (None, have) for have, want in zip(shape, wanted, strict=True)):
        raise DataError(
            f"{path} becomes a sample of shape {shape} by the preprocessing {preprocessing.name!r}, but the model "
            f"wants {shown_shape(spec)}; set resize, crop, colour and layout in a TOML file for --preprocess"
        )


def _pillow() -> Any:
    try:
        from PIL import Image  # only where it is needed: it is an optional package
    except ImportError as error:
        raise InstallationError("reading images needs Pillow: pip install 'onnxqt[images]'") from error
    return Image


def _check_size(path: Path, size: tuple[int, int], verb: str) -> None:
    width, height = size
    if width * height > PIXEL_LIMIT:
        raise DataError(f"{path} {verb} {width} x {height} pixels, more than {PIXEL_LIMIT} allowed; make it smaller")


def _resized(path: Path, image: "Image", preprocessing: Preprocessing) -> "Image":
    """The image at its new size; where one side is given, the other is int(side * long / short)."""
    if not preprocessing.resize:
        return image
    width, height = image.size
    if len(preprocessing.resize) == 2:
        new_height, new_width = preprocessing.resize
    else:
        (side,) = preprocessing.resize
        short, long = sorted((width, height))
        other = int(side * long / short)
        new_width, new_height = (side, other) if width <= height else (other, side)
    _check_size(path, (new_width, new_height), "is resized to")
    return image.resize((new_width, new_height), getattr(_pillow().Resampling, preprocessing.filter.upper()))


def _cut(path: Path, image: "Image", crop: tuple[int, ...]) -> "Image":
    """The centre of the image: it begins at round((side - crop) / 2), ties to even."""
    if not crop:
        return image
    (width, height), (crop_height, crop_width) = image.size, crop
    if width < crop_width or height < crop_height:
        raise DataError(
            f"{path} has {width} x {height} pixels, too few to cut {crop_width} x {crop_height} out; "
            "set resize in a TOML file for --preprocess"
        )
    left, top = round((width - crop_width) / 2), round((height - crop_height) / 2)
    return image.crop((left, top, left + crop_width, top + crop_height))


def _layout(folder: str, spec: InputSpec) -> Layout:
    """The layout that a model's input has by its shape."""
    if len(spec.shape) == 3:
        return "hw"
    if len(spec.shape) != 4:
        raise DataError(
            f"{folder} holds images, but the model's input {spec.name!r} has shape {shown_shape(spec)}, which has no "
            "axes for height, width and channels; save .npz files of what the model wants"
        )
    channels = tuple(_CHANNELS.values())
    first, last = spec.shape[1] in channels, spec.shape[3] in channels
    return "hwc" if not first and (last or spec.shape[1] is not None) else "chw"


def _colour(spec: InputSpec, layout: Layout) -> Colour:
    """The colours that a model's input has by its number of channels."""
    axis = {"chw": 1, "hwc": 3}.get(layout, 0)
    channels = spec.shape[axis] if axis and len(spec.shape) == 4 else None
    return "grey" if layout == "hw" or channels == 1 else "rgb"


def _values(folder: str, preprocessing: Preprocessing, colour: Colour, spec: InputSpec) -> Array:
    """What each pixel becomes, by channel: (channels, 256), of the element type that images have."""
    channels = _CHANNELS[colour]
    for key in ("mean", "std"):
        given = len(getattr(preprocessing, key))
        if given not in (1, channels):
            raise DataError(
                f"{folder}: {key} of the preprocessing {preprocessing.name!r} has {given} values, but images in "
                f"{colour} have {channels} channel(s); give one number or {channels}"
            )
    mean, std = (np.array(part, np.float64).reshape(-1, 1) for part in (preprocessing.mean, preprocessing.std))
    exact = np.broadcast_to((np.arange(256) * preprocessing.scale - mean) / std, (channels, 256))
    dtype = np.dtype(preprocessing.dtype or spec.dtype).newbyteorder("=")
    with np.errstate(all="ignore"):  # what does not fit is found below
        values = exact.astype(dtype)
    whole = dtype.kind == "f" or np.array_equal(values.astype(np.float64), exact)
    if dtype.kind not in "fiu" or not whole or not np.isfinite(values.astype(np.float64)).all():
        raise DataError(
            f"{folder}: the preprocessing {preprocessing.name!r} gives values from {exact.min():g} to {exact.max():g}, "
            f"which are not all {dtype}; change scale, mean, std or dtype in a TOML file for --preprocess"
        )
    return values


def find_images(folder: Path) -> ImageFiles | None:
    """The images directly in a folder, or else in its subfolders, which are classes; None if there are none.

    Classes are numbered in the order of the names of their folders, empty ones included; where all these names are
    numbers, by them. Hidden files and folders are passed over.

    Raises:
        DataError: if there are both.
        OSError: if a folder cannot be listed.
    """
    flat = _image_names(folder)
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    found = {name: _image_names(folder / name) for name in classes}
    filled = [name for name in classes if found[name]]
    if flat and filled:
        raise DataError(
            f"{folder} has images directly in it, such as {flat[0]}, and in folders, such as {filled[0]}; keep either, "
            "the latter for classes"
        )
    if flat:
        return ImageFiles(folder, tuple(flat), None)
    if not filled:
        return None
    numbers = _class_numbers(classes)
    names = [f"{name}/{image}" for name in classes for image in found[name]]
    labels = [numbers[name] for name in classes for _ in found[name]]
    return ImageFiles(folder, tuple(names), tuple(labels))


def _image_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_file() for entry in entries if is_image(entry.name) and not entry.is_dir()}
    for name, is_file in found.items():
        if not is_file:
            check_file(folder / name)
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _class_numbers(names: Sequence[str]) -> dict[str, int]:
    digits = all(name.isascii() and name.isdigit() and len(name) < 10 for name in names)
    return {name: int(name) if digits else number for number, name in enumerate(names)}
