"""Tables of other tools, laid over a neutral table: the scales that they give, or the ranges.

| file | of | gives |
|---|---|---|
| `{"format": "onnxqt.quant_table", ...}` | onnxqt | everything |
| `{"CLS": "TensorsData", ...}` | ONNX Runtime, `quantize_static(calibration_cache_path=)` | ranges of activations |
| `{"tensors_range": {...}}` | AMD Quark, `SaveAndRestore` | ranges of activations |
| `{"x": [-1.0, 1.0], ...}` | anybody | ranges of activations |
| `{"version": "0.6.1", ...}`, 1.0.0, 2.0.0 | Qualcomm encodings (AIMET encoding specification) | scales |
| `TRT-8601-EntropyCalibration2` | TensorRT calibration cache | symmetric scales of activations |

A range is laid over the grid that the neutral table has for the tensor, as `calibrate.range_params` does it. Scales are
taken over exactly; where a file counts codes from 0 and the grid is signed, or the other way round, the zero point
moves by half of the codes.
"""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnxqt.calibrate import range_params
from onnxqt.errors import ExportError
from onnxqt.numerics import Array, FloatArray, Grid, QParams
from onnxqt.schemes import Placement
from onnxqt.table.encode import FORMAT, exponents, is_symmetric
from onnxqt.table.files import read_table
from onnxqt.table.form import Entry, Table
from onnxqt.table.merge import merge_tables
from onnxqt.table.reading import INTEGER, NAME, NUMBER, OBJECT, OBJECTS, Json, Kind, Part, parse_json, read_text

_LARGEST = float(np.finfo(np.float32).max)
_ALL_CODES = 2.0**-20  # of an end, by which a range may miss that of all codes of a grid
_KNOWN = (
    "give a calibration cache of ONNX Runtime or TensorRT, ranges of Quark, encodings of Qualcomm of version 0.6.1, "
    "1.0.0 or 2.0.0, or a table of onnxqt"
)


@dataclass(frozen=True, slots=True)
class _Range:
    """The ends of what an activation takes."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class _Symmetric:
    """The scale of an activation on [-127, 127]."""

    scale: float


@dataclass(frozen=True, eq=False, slots=True)
class _Encoding:
    """Scales as a file has them, before they are fitted to a tensor."""

    scale: FloatArray
    zero_point: Array
    bits: int
    signed: bool
    axis: int | None = None
    block_size: int | None = None


_Found = _Range | _Symmetric | _Encoding | None  # None: the file keeps the tensor float


def import_table(path: Path, base: Table, scheme: str) -> tuple[Table, list[str]]:
    """A table with the scales or ranges that another tool's file has; the format is told by the content.

    Args:
        path: of one of the formats above.
        base: the table of the model at hand, as `build_table` makes it.
        scheme: the scheme whose views are replaced; ranges are laid over its grids. What bits a file of scales has
            for a tensor counts more than what the scheme has.

    Returns:
        The table, and the names in the file that could not be used: the model has no such tensor, or the file keeps
        it float while the table quantizes it. A tensor that is fused into another one, or that the table keeps float,
        is passed over.

    Raises:
        ExportError: naming the file and what is wrong in it.
    """
    if scheme not in base.schemes:
        raise ExportError(f"the table has no scheme {scheme}: name one of {', '.join(base.schemes)}")
    text = read_text(path)
    if text.startswith("TRT-"):
        found: Mapping[str, _Found] = _tensorrt(path, text)
    else:
        content = parse_json(path, text)
        if content.get("format") == FORMAT:
            return _own(read_table(path), base, scheme)
        found = _json_ranges(path, content)
    return _laid_over(path, found, base, scheme)


def _own(table: Table, base: Table, scheme: str) -> tuple[Table, list[str]]:
    """The views that a table of ours has under one scheme."""
    if scheme not in table.schemes:
        raise ExportError(f"the table to import has no scheme {scheme}: name one of {', '.join(table.schemes)}")
    entries = [
        replace(entry, views=tuple(replace(view, schemes=(scheme,)) for view in entry.views if scheme in view.schemes))
        for entry in table.entries
    ]
    known = {entry.name for entry in base.entries}
    lacking = [entry.name for entry in table.entries if entry.name not in known]
    return merge_tables(base, replace(table, entries=tuple(entries), schemes=(scheme,))), lacking


def _laid_over(path: Path, found: Mapping[str, _Found], base: Table, scheme: str) -> tuple[Table, list[str]]:
    entries = {entry.name: entry for entry in base.entries if entry.role != "bias"}
    aliases = {alias: entry for entry in entries.values() for alias in entry.aliases.values()}
    passed = {name for entry in base.entries for name in (entry.name, *entry.fused_from)}
    power_of_two = _power_of_two(base, scheme)
    imported, unused = [], []
    for name, what in found.items():
        entry = entries.get(name) or aliases.get(name)
        ours = entry.params(scheme) if entry else None
        if entry is None or ours is None:
            unused += [name] if entry is None and name not in passed else []
        elif what is None:
            unused.append(name)
        elif entry.role != "weight" or isinstance(what, _Encoding):
            params = _fitted(f"'{path}', tensor '{name}'", what, entry, ours, power_of_two)
            imported.append(replace(entry, views=(replace(entry.views[0], schemes=(scheme,), params=params),)))
    taken = tuple(replace(entry, source="imported", sha256=None) for entry in imported)
    return merge_tables(base, Table(taken, (scheme,))), unused


def _power_of_two(base: Table, scheme: str) -> bool:
    """Whether all activations of a scheme have scales that are powers of two."""
    found = base.quantized(scheme, "input", "activation", "output")
    return bool(found) and all(exponents(params.scale) is not None for _, params in found)


def _fitted(
    where: str, what: _Range | _Symmetric | _Encoding, entry: Entry, ours: QParams, power_of_two: bool
) -> QParams:
    """What a file says of a tensor as parameters; `ours` are those that it replaces."""
    placement = Placement(is_symmetric(ours), power_of_two)
    if isinstance(what, _Range):
        return _laid(what, ours.grid, placement)
    if isinstance(what, _Symmetric):
        scale = np.asarray(what.scale, np.float32)
        if ours.grid.bits == 8 and placement.symmetric and not power_of_two:
            return QParams(scale, np.zeros((), np.int32), ours.grid)
        high = 127 * float(scale)
        low = 0.0 if entry.stats is not None and entry.stats.min >= 0 else -high
        return range_params(low, high, ours.grid, placement)
    shift = 0 if what.signed == ours.grid.signed else 1 << (what.bits - 1)
    zero_point = what.zero_point + (shift if what.signed else -shift)
    narrow = ours.grid.narrow and bool((zero_point > -(1 << (what.bits - 1))).all())
    grid = Grid(what.bits, ours.grid.signed, narrow)
    if (zero_point < grid.qmin).any() or (zero_point > grid.qmax).any():
        raise ExportError(f"{where}: its zero point lies outside of {what.bits} bits: correct the entry")
    axis = _axis(where, what, entry)
    scale = what.scale
    if axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    try:
        return QParams(scale.astype(np.float32), zero_point.astype(np.int32), grid, axis, what.block_size)
    except ValueError as error:
        raise ExportError(f"{where}: {error}: correct the entry") from error


def _laid(what: _Range, grid: Grid, placement: Placement) -> QParams:
    """The grid laid over a range; the range of all its codes gives back the scale that it came from.

    Of signed codes about zero that is [qmin s, qmax s], a step more below than above, as of an INT8 quantizer.
    """
    low, high = (end * what.high / grid.qmax for end in (grid.qmin, grid.qmax))
    if placement.symmetric and abs(what.low - low) <= -low * _ALL_CODES:
        return range_params(-high, high, grid, placement)
    return range_params(what.low, what.high, grid, placement)


def _axis(where: str, what: _Encoding, entry: Entry) -> int | None:
    """The axis along which scales lie; where a file does not say, that of the table, or the only one of its length."""
    if what.axis is not None or what.scale.size == 1:
        return what.axis
    known = [view.params.axis for view in entry.views if view.params.axis is not None and not view.params.block_size]
    fitting = known or [axis for axis, length in enumerate(entry.shape or ()) if length == what.scale.size]
    if len(set(fitting)) != 1:
        raise ExportError(
            f"{where}: the axis of its {what.scale.size} scales is unclear: import into a scheme per channel (-pc)"
        )
    return fitting[0]


# --- ranges ---------------------------------------------------------------------------------------------


def _json_ranges(path: Path, content: Json) -> Mapping[str, _Found]:
    """What a JSON file that is no table of ours says of each tensor."""
    top = Part(f"'{path}'", content)
    if content.get("CLS") == "TensorsData":
        return {name: _calibrated(Part(f"'{path}', tensor '{name}'", data)) for name, data in _objects(top, "data")}
    if "tensors_range" in content:
        return _pairs(path, top.get("tensors_range", OBJECT))
    if "version" in content and any(name.endswith("encodings") for name in content):
        return _encodings(path, content)
    if content and all(isinstance(value, list) for value in content.values()):
        return _pairs(path, content)
    raise ExportError(f"'{path}' is no table that can be read: {_KNOWN}")


def _objects(part: Part, name: str) -> list[tuple[str, Json]]:
    """The items of an object of objects."""
    found = part.get(name, OBJECT)
    return [(key, Part(f"{part.where}, {name}", found).get(key, OBJECT)) for key in found]


def _calibrated(part: Part) -> _Range:
    """A TensorData of ONNX Runtime: numbers, or arrays as `{"data": ..., "dtype": ...}`."""
    return _range(part, float(_ends(part, "lowest").min()), float(_ends(part, "highest").max()))


def _ends(part: Part, name: str) -> Array:
    if isinstance(part.content.get(name), dict):
        return _numbers(Part(f"{part.where}, {name}", part.content[name]), "data")
    return _numbers(part, name)


def _pairs(path: Path, content: Json) -> dict[str, _Found]:
    pair = Kind("a list of two numbers", lambda value: isinstance(value, list) and len(value) == 2)
    found: dict[str, _Found] = {}
    for name in content:
        low, high = Part(f"'{path}'", content).get(name, pair)
        part = Part(f"'{path}', tensor '{name}'", {"min": low, "max": high})
        found[name] = _range(part, part.get("min", NUMBER), part.get("max", NUMBER))
    return found


def _range(part: Part, low: float, high: float) -> _Range:
    if low > high:
        raise part.wrong(f"its least value {low} is larger than its largest {high}")
    if max(-low, high) > _LARGEST:
        raise part.wrong("its range is too large for float32")
    return _Range(float(np.float32(low)), float(np.float32(high)))  # tensors hold float32, decimal text need not


def _tensorrt(path: Path, text: str) -> dict[str, _Found]:
    """The lines `name: scale` of a calibration cache, the scale as the hexadecimal digits of a float32, absmax / 127.

    Tensors whose scale is 0 are passed over: nothing was seen of them.
    """
    found: dict[str, _Found] = {}
    for number, line in enumerate(text.splitlines()[1:], start=2):
        if not line.strip():
            continue
        name, _, digits = line.rpartition(":")
        digits = digits.strip()
        if not name or not re.fullmatch("[0-9a-fA-F]{1,8}", digits):
            raise ExportError(f"'{path}', line {number} is not 'name: scale' in hexadecimal digits: correct the line")
        (scale,) = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))
        if not 0 <= scale < np.inf:
            raise ExportError(f"'{path}', line {number}: scale {scale} is negative or not finite: correct the line")
        if name in found:
            raise ExportError(f"'{path}', line {number}: '{name}' is listed twice: delete one of the lines")
        if scale:
            found[name] = _Symmetric(scale)
    return found


# --- Qualcomm -------------------------------------------------------------------------------------------

_Sections = Callable[[Part], list[tuple[str, Part]]]
_TYPE = re.compile("(u?)int([0-9]{1,2})")
_CODES = Kind("a type of integers or floats", lambda value: isinstance(value, str) and _code_bits(value) is not None)
_WIDTH = Kind("a whole number of bits from 2 to 32", lambda value: INTEGER.fits(value) and 2 <= value <= 32)


def _encodings(path: Path, content: Json) -> dict[str, _Found]:
    """Encodings of Qualcomm, by their version."""
    version = Part(f"'{path}'", content).get("version", NAME)
    if version not in _VERSIONS:
        raise ExportError(f"'{path}' has encodings of version {version[:20]}: give one of {', '.join(_VERSIONS)}")
    sections, encoding = _VERSIONS[version]
    found: dict[str, _Found] = {}
    for name, part in sections(Part(f"'{path}'", content)):
        if name in found:
            raise part.wrong("it is listed twice")
        found[name] = encoding(part)
    return found


def _sections_0(top: Part) -> list[tuple[str, Part]]:
    """Version 0.6.1: in each section a list for each tensor, one object for each channel."""
    entries = []
    for section in ("activation_encodings", "param_encodings"):
        inner = Part(top.where, top.get(section, OBJECT) if section in top.content else {})
        for name in inner.content:
            entries.append((name, Part(f"{top.where}, tensor '{name}'", {"channels": inner.get(name, OBJECTS)})))
    return entries


def _sections_1(top: Part) -> list[tuple[str, Part]]:
    return _named(top, ("activation_encodings", "param_encodings"))


def _sections_2(top: Part) -> list[tuple[str, Part]]:
    return _named(top, ("encodings",))


def _named(top: Part, sections: tuple[str, ...]) -> list[tuple[str, Part]]:
    """Versions 1 and 2: lists of objects with a name."""
    entries = []
    for section in sections:
        for entry in top.get(section, OBJECTS):
            name = Part(f"{top.where}, {section}", entry).get("name", NAME)
            entries.append((name, Part(f"{top.where}, tensor '{name}'", entry)))
    return entries


def _encoding_0(part: Part) -> _Encoding | None:
    channels = [Part(part.where, channel) for channel in part.content["channels"]]
    if not channels:
        raise part.wrong("it has no encoding")
    if channels[0].get("dtype", NAME) == "float":
        return None
    widths = {channel.get("bitwidth", _WIDTH) for channel in channels}
    if len(widths) > 1:
        raise part.wrong("its channels have several bit widths")
    scale = [channel.get("scale", NUMBER) for channel in channels]
    offset = [channel.get("offset", INTEGER) for channel in channels]
    return _unsigned(part, np.array(scale), np.array(offset), widths.pop())


def _encoding_1(part: Part) -> _Encoding | None:
    if part.get("dtype", NAME).upper() == "FLOAT":
        return None
    kind = part.content.get("enc_type", "PER_TENSOR")
    if kind not in ("PER_TENSOR", "PER_CHANNEL"):
        raise part.wrong(f"enc_type {kind!s:.20} does not say how its blocks are ordered; export version 2.0.0")
    return _unsigned(part, _numbers(part, "scale"), _numbers(part, "offset"), part.get("bw", _WIDTH))


def _unsigned(part: Part, scale: Array, offset: Array, bits: int) -> _Encoding:
    """Codes from 0 to 2^bits - 1 with x = (code + offset) scale, offset = -zero_point."""
    if scale.shape != offset.shape or scale.ndim > 1:
        raise part.wrong("it must have one offset for each scale")
    return _checked(part, _Encoding(np.atleast_1d(scale), -np.atleast_1d(offset), bits, signed=False))


def _encoding_2(part: Part) -> _Encoding | None:
    width = _code_bits(part.get("output_dtype", _CODES))
    if not width:
        return None
    if "y_scale" not in part.content and "per_block_int_scale" in part.content:
        raise part.wrong("scales in two factors (LPBQ) are not read; export plain blocks")
    scale = np.atleast_1d(_numbers(part, "y_scale"))
    zero_point = np.zeros(scale.shape)
    if part.content.get("y_zero_point") is not None:
        zero_point = np.atleast_1d(_numbers(part, "y_zero_point"))
    if zero_point.shape != scale.shape:
        raise part.wrong("it must have one y_zero_point for each y_scale")
    signed = not part.content["output_dtype"].startswith("u")
    axis, block_size = (
        None if part.content.get(name) is None else part.get(name, INTEGER) for name in ("axis", "block_size")
    )
    return _checked(part, _Encoding(scale, zero_point, width, signed, axis, block_size))


def _code_bits(name: str) -> int | None:
    """Bits of an integer type, 0 for a type of floats, None for what is neither."""
    match = _TYPE.fullmatch(name)
    if match:
        return int(match[2]) if 2 <= int(match[2]) <= 32 else None
    return 0 if "float" in name else None


def _checked(part: Part, encoding: _Encoding) -> _Encoding:
    if not (np.isfinite(encoding.scale).all() and (encoding.scale > 0).all()):
        raise part.wrong("its scale must be finite and more than 0")
    if (encoding.zero_point != np.round(encoding.zero_point)).any() or (np.abs(encoding.zero_point) > 2**31).any():
        raise part.wrong("its zero point must be a whole number")
    return replace(encoding, scale=encoding.scale.astype(np.float32), zero_point=encoding.zero_point.astype(np.int64))


def _numbers(part: Part, name: str) -> Array:
    """A field that is a number or lists of numbers, float64."""
    value = np.array(part.get(name, _ARRAY), object)
    if not value.size or not all(NUMBER.fits(leaf) for leaf in value.flat):
        raise part.wrong(f"'{name}' must be numbers")
    return value.astype(np.float64)


_ARRAY = Kind("a number or a list of numbers", lambda value: isinstance(value, list) or NUMBER.fits(value))
_VERSIONS: Mapping[str, tuple[_Sections, Callable[[Part], _Encoding | None]]] = {
    "0.6.1": (_sections_0, _encoding_0),
    "1.0.0": (_sections_1, _encoding_1),
    "2.0.0": (_sections_2, _encoding_2),
}
