"""A table from JSON and arrays that somebody may have edited."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from onnxqt.calibrate import range_params
from onnxqt.errors import ExportError, first_line
from onnxqt.numerics import Array, FloatArray, Grid, QParams
from onnxqt.schemes import Placement
from onnxqt.table.encode import FORMAT, NUMERICS, VERSION, WIDEST, exponents, float32_hex, granularity, is_symmetric
from onnxqt.table.form import Entry, NodeRef, Stats, Table, View
from onnxqt.table.reading import (
    COUNT,
    FLAG,
    INTEGER,
    NAME,
    NAMES,
    NUMBER,
    OBJECT,
    OBJECTS,
    SHA256,
    TEXT,
    Json,
    Kind,
    Part,
    mapping_of,
    one_of,
    optional,
)
from onnxqt.table.views import key_of, misfit, with_biases

_SHARE = re.compile(r"0\.[0-9]{1,17}|[1-9](\.[0-9]{1,16})?e-[0-9]{1,3}")
_AGREEMENT = 0.01  # of a step of the grid, by which the ends of a clip may miss those of the scale

_SHAPE = Kind(
    "null or a list of lengths, null where free",
    lambda value: value is None
    or (isinstance(value, list) and all(length is None or COUNT.fits(length) for length in value)),
)
_ARRAY = Kind("a list of numbers or {'$ref': name}", lambda value: isinstance(value, list | dict))

_TABLE: dict[str, Kind] = {
    "format": TEXT,
    "version": TEXT,
    "producer": OBJECT,
    "model": OBJECT,
    "calibration": OBJECT,
    "numerics": OBJECT,
    "schemes": NAMES,
    "arrays_sha256": optional(SHA256),
    "tensors": OBJECTS,
}
_PRODUCER = {"name": TEXT, "version": TEXT}
_MODEL = {"file": TEXT, "sha256": TEXT, "graph_sha256": TEXT, "opset": COUNT}
_CALIBRATION = {"samples": COUNT, "ranges": TEXT}
_ENTRY: dict[str, Kind] = {
    "name": NAME,
    "role": one_of("input", "activation", "output", "weight", "bias"),
    "shape": _SHAPE,
    "producer": optional(OBJECT),
    "computed_by": optional(OBJECT),
    "consumers": OBJECTS,
    "fused_from": NAMES,
    "group": optional(NAME),
    "product_of": NAMES,
    "aliases": mapping_of(NAME),
    "quantize": FLAG,
    "reason": optional(TEXT),
    "source": one_of("observed", "derived", "user", "imported"),
    "sha256": optional(SHA256),
    "rounding": NAME,
    "stats": optional(OBJECT),
    "qparams": OBJECTS,
}
_NODE = {"node": TEXT, "op": TEXT, "index": INTEGER}
_STATS = {
    "count": COUNT,
    "min": NUMBER,
    "max": NUMBER,
    "absmax": NUMBER,
    "quantiles": mapping_of(NUMBER),
    "hist": optional(OBJECT),
}
_HIST = {"lo": NUMBER, "hi": NUMBER, "bins": COUNT, "counts": _ARRAY}
_VIEW: dict[str, Kind] = {
    "schemes": NAMES,
    "bits": Kind(f"a whole number from 2 to {WIDEST}", lambda value: COUNT.fits(value) and 2 <= value <= WIDEST),
    "signed": FLAG,
    "narrow": FLAG,
    "qmin": INTEGER,
    "qmax": INTEGER,
    "symmetric": FLAG,
    "granularity": one_of("tensor", "channel", "block"),
    "axis": optional(INTEGER),
    "block_size": optional(COUNT),
    "scale": _ARRAY,
    "scale_f32_hex": NAMES,
    "zero_point": _ARRAY,
    "pow2_exponent": optional(_ARRAY),
    "clip": optional(OBJECT),
}
_CLIP = {"min": _ARRAY, "max": _ARRAY}


class Arrays(Protocol):
    """The arrays outside of the JSON file."""

    @property
    def digest(self) -> str:
        """SHA-256 of their file."""

    def __getitem__(self, key: str) -> Array:
        """An array by its name."""


def decode_table(path: Path, content: Json, arrays: Arrays) -> Table:
    """A table from what its JSON file holds and the arrays beside it.

    Raises:
        ExportError: naming the file, the tensor and the field that is wrong.
    """
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ExportError(f"'{path}' is not a table of version {VERSION} of {FORMAT}: give a table that onnxqt wrote")
    top = Part(f"'{path}'", content)
    top.check(_TABLE, ("schemes", "tensors"))
    producer, model, calibration = (top.inner(name) for name in ("producer", "model", "calibration"))
    for part, kinds in ((producer, _PRODUCER), (model, _MODEL), (calibration, _CALIBRATION)):
        part.check(kinds)
    if content.get("numerics", NUMERICS) != NUMERICS:
        raise top.wrong(f"'numerics' must be {NUMERICS}")
    schemes = tuple(content["schemes"])
    if len(set(schemes)) < len(schemes):
        raise top.wrong("'schemes' has one twice")
    digest = content.get("arrays_sha256")
    if digest is not None and arrays.digest != digest:
        raise top.wrong("the file of arrays beside it is not the one that 'arrays_sha256' names")
    decoder = _Decoder(schemes, arrays if digest is not None else None)
    entries = [decoder.entry(Part(_where(path, entry, index), entry)) for index, entry in enumerate(content["tensors"])]
    twice = [key for key, count in Counter(key_of(entry) for entry in entries).items() if count > 1]
    if twice:
        raise top.wrong(f"{' '.join(twice[0][:2])} is listed twice")
    return Table(
        entries=with_biases(entries),
        schemes=schemes,
        model_file=model.content.get("file", ""),
        model_sha256=model.content.get("sha256", ""),
        graph_sha256=model.content.get("graph_sha256", ""),
        opset=model.content.get("opset", 0),
        samples=calibration.content.get("samples", 0),
        ranges=calibration.content.get("ranges", ""),
        producer=" ".join(producer.content[key] for key in ("name", "version") if producer.content.get(key)),
    )


def _where(path: Path, entry: Json, index: int) -> str:
    name = entry.get("name")
    return f"'{path}', tensor '{name[:200]}'" if isinstance(name, str) else f"'{path}', tensor {index}"


@dataclass(frozen=True, slots=True)
class _Decoder:
    """What entries are read with: the schemes of the table, and its arrays if it has any."""

    schemes: tuple[str, ...]
    arrays: Arrays | None

    def entry(self, part: Part) -> Entry:
        part.check(_ENTRY, ("name", "role", "qparams"))
        found = part.content
        views = tuple(
            self._view(Part(f"{part.where}, qparams {index}", view)) for index, view in enumerate(found["qparams"])
        )
        if found.get("quantize", bool(views)) != bool(views):
            raise part.wrong("'quantize' contradicts 'qparams', which is empty where a tensor stays float")
        entry = Entry(
            name=found["name"],
            role=found["role"],
            shape=None if found.get("shape") is None else tuple(found["shape"]),
            producer=None if found.get("producer") is None else _node(part.inner("producer")),
            consumers=tuple(_node(Part(f"{part.where}, consumers", node)) for node in found.get("consumers", ())),
            fused_from=tuple(found.get("fused_from", ())),
            aliases=found.get("aliases", {}),
            views=views,
            reason=found.get("reason"),
            stats=None if found.get("stats") is None else self._stats(part.inner("stats")),
            source=found.get("source", "user"),
            sha256=found.get("sha256"),
            rounding=found.get("rounding", "nearest"),
            group=found.get("group"),
            product_of=tuple(found.get("product_of", ())),
            computed_by=None if found.get("computed_by") is None else _node(part.inner("computed_by")),
        )
        self._check_views(part, entry)
        return entry

    def _check_views(self, part: Part, entry: Entry) -> None:
        named = [scheme for view in entry.views for scheme in view.schemes]
        for scheme in named:
            if scheme not in self.schemes:
                raise part.wrong(f"scheme '{scheme}' is not among the table's 'schemes'")
        if len(set(named)) < len(named):
            raise part.wrong("two of its qparams are for one scheme")
        if len(entry.product_of) not in (0, 2):
            raise part.wrong("'product_of' must name an activation and a weight")
        for view in entry.views:
            if problem := misfit(view.params, entry):
                raise part.wrong(problem)

    def _stats(self, part: Part) -> Stats:
        part.check(_STATS, ("count", "min", "max"))
        count, low, high = part.content["count"], float(part.content["min"]), float(part.content["max"])
        if low > high:
            raise part.wrong("'min' is larger than 'max'")
        if part.content.get("absmax", max(-low, high)) != max(-low, high):
            raise part.wrong("'absmax' contradicts 'min' and 'max'")
        shown = part.content.get("quantiles", {})
        if not all(_SHARE.fullmatch(share) for share in shown):
            raise part.wrong("'quantiles' must have shares such as 0.999 as names")
        quantiles = {float(share): float(value) for share, value in shown.items()}
        if part.content.get("hist") is None:
            return Stats(count, low, high, quantiles)
        hist = part.inner("hist")
        hist.check(_HIST, _HIST)
        counts, limit = self._array(hist, "counts", np.float64), float(hist.content["hi"])
        if counts.shape != (hist.content["bins"],) or (counts < 0).any():
            raise hist.wrong("'counts' must be as many numbers of at least 0 as 'bins' says")
        if limit <= 0 or hist.content["lo"] != -limit:
            raise hist.wrong("'lo' must be minus 'hi', and 'hi' more than 0")
        return Stats(count, low, high, quantiles, counts, limit)

    def _view(self, part: Part) -> View:
        part.check(_VIEW, ("schemes", "bits", "signed"))
        found = part.content
        grid = Grid(found["bits"], found["signed"])
        grid = Grid(grid.bits, grid.signed, found.get("narrow", found.get("qmin") == grid.qmin + 1))
        if (found.get("qmin", grid.qmin), found.get("qmax", grid.qmax)) != (grid.qmin, grid.qmax):
            raise part.wrong(f"'qmin' and 'qmax' must be {grid.qmin} and {grid.qmax}, those of its bits")
        scale, zero_point = self._scale(part, grid) if "scale" in found else self._scale_of_clip(part, grid)
        axis, block_size = found.get("axis"), found.get("block_size")
        if zero_point.shape != scale.shape:
            raise part.wrong("'scale' and 'zero_point' must have one shape")
        if axis is None and scale.shape != (1,):
            raise part.wrong("without an axis there must be one scale")
        if axis is not None and block_size is None and scale.ndim != 1:
            raise part.wrong("without a block_size 'scale' must be a list of numbers")
        if (zero_point < grid.qmin).any() or (zero_point > grid.qmax).any():
            raise part.wrong(f"'zero_point' must lie between {grid.qmin} and {grid.qmax}")
        if axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        try:
            view = View(tuple(found["schemes"]), QParams(scale, zero_point, grid, axis, block_size))
        except ValueError as error:
            raise part.wrong(first_line(error)) from error
        self._check_derived(part, view)
        return view

    def _scale(self, part: Part, grid: Grid) -> tuple[FloatArray, Array]:
        scale = self._array(part, "scale", np.float32)
        if "zero_point" not in part.content:
            return scale, np.zeros(scale.shape, np.int32)
        return scale, self._array(part, "zero_point", np.int32)

    def _scale_of_clip(self, part: Part, grid: Grid) -> tuple[FloatArray, Array]:
        """Scale and zero point of a view that gives its clip instead."""
        if part.content.get("clip") is None:
            raise part.wrong("'scale' is missing, and so is 'clip', which it could follow from")
        low, high = self._clip(part)
        if low.shape != high.shape or not (high > low).all():
            raise part.wrong("'clip' must have as many values of 'min' as of 'max', and each less than its 'max'")
        symmetric = part.content.get("symmetric", grid.signed and bool((low == -high).all()))
        laid = [
            range_params(float(lo), float(hi), grid, Placement(symmetric))
            for lo, hi in zip(low.ravel(), high.ravel(), strict=True)
        ]
        scale = np.array([params.scale for params in laid], np.float32).reshape(low.shape)
        return scale, np.array([params.zero_point for params in laid], np.int32).reshape(low.shape)

    def _clip(self, part: Part) -> tuple[FloatArray, FloatArray]:
        clip = part.inner("clip")
        clip.check(_CLIP, _CLIP)
        return self._array(clip, "min", np.float32), self._array(clip, "max", np.float32)

    def _check_derived(self, part: Part, view: View) -> None:
        """Make sure that what follows from scale, zero point and grid agrees with them, where it is there."""
        found, params = part.content, view.params
        scale = np.atleast_1d(params.scale)
        if found.get("granularity", granularity(params)) != granularity(params):
            raise part.wrong(f"'granularity' must be '{granularity(params)}', by its axis and block_size")
        if found.get("symmetric", is_symmetric(params)) != is_symmetric(params):
            raise part.wrong("'symmetric' contradicts 'signed' and 'zero_point'")
        if found.get("scale_f32_hex") not in (None, [float32_hex(value) for value in scale.ravel()]):
            raise part.wrong("'scale' and 'scale_f32_hex' disagree; delete scale_f32_hex to keep the scale")
        exponent = exponents(scale)
        if found.get("pow2_exponent") not in (None, None if exponent is None else exponent.tolist()):
            raise part.wrong("'scale' and 'pow2_exponent' disagree; delete pow2_exponent to keep the scale")
        if found.get("clip") is None or "scale" not in found:
            return
        for ours, theirs in zip(view.clip, self._clip(part), strict=True):
            ends = np.atleast_1d(ours)
            if theirs.shape != ends.shape or (np.abs(theirs - ends) > _AGREEMENT * scale).any():
                raise part.wrong("'scale' and 'clip' disagree; delete the one that is not to count")

    def _array(self, part: Part, name: str, dtype: type[np.generic]) -> Array:
        """A field as an array of at least one number, each of which `dtype` can hold."""
        value = part.content[name]
        if isinstance(value, dict):
            return self._referred(part, name, dtype)
        leaves = np.array(value, object)
        whole = dtype is np.int32
        kind = INTEGER if whole else NUMBER
        if not leaves.size or not all(kind.fits(leaf) for leaf in leaves.flat):
            raise part.wrong(f"'{name}' must be a list, each {kind.text}")
        numbers = leaves.astype(np.float64)
        with np.errstate(over="ignore"):
            array = numbers.astype(dtype) if not whole or (np.abs(numbers) < 2**31).all() else np.array(np.inf)
        if not np.isfinite(array).all():
            raise part.wrong(f"'{name}' has a number that is too large for {np.dtype(dtype)}")
        return array

    def _referred(self, part: Part, name: str, dtype: type[np.generic]) -> Array:
        value = part.content[name]
        key = value.get("$ref")
        if set(value) != {"$ref"} or not isinstance(key, str):
            raise part.wrong(f"'{name}' must be {_ARRAY.text}")
        if self.arrays is None:
            raise part.wrong(f"'{name}' refers to an array, but the table has no 'arrays_sha256'")
        array = self.arrays[key]
        if not array.size or not np.can_cast(array.dtype, dtype, "safe") or not np.isfinite(array).all():
            raise part.wrong(
                f"'{name}' refers to {array.dtype} of shape {array.shape}, not to finite {np.dtype(dtype)}"
            )
        return array.astype(dtype)


def _node(part: Part) -> NodeRef:
    part.check(_NODE, _NODE)
    return NodeRef(part.content["node"], part.content["op"], part.content["index"])
