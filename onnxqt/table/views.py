"""How the views of entries are made: equal ones are kept once, and those of biases follow from their operands."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from onnxqt.calibrate import bias_scale, has_integer_bias
from onnxqt.numerics import Grid, QParams
from onnxqt.table.form import Entry, View

_BIAS_GRID = Grid(32, signed=True)


def merged_views(params: Mapping[str, QParams]) -> tuple[View, ...]:
    """Each different set of parameters once, with the schemes that share it, in the order of `params`."""
    views: list[View] = []
    for scheme, found in params.items():
        for index, view in enumerate(views):
            if same_params(view.params, found):
                views[index] = replace(view, schemes=(*view.schemes, scheme))
                break
        else:
            views.append(View((scheme,), found))
    return tuple(views)


def by_scheme(entry: Entry) -> dict[str, QParams]:
    """The parameters of an entry by scheme."""
    return {scheme: view.params for view in entry.views for scheme in view.schemes}


def same_params(one: QParams, other: QParams) -> bool:
    """Whether two sets of parameters are equal, bit by bit."""
    return (
        (one.grid, one.axis, one.block_size) == (other.grid, other.axis, other.block_size)
        and np.array_equal(one.scale, other.scale)
        and np.array_equal(one.zero_point, other.zero_point)
    )


def key_of(entry: Entry) -> tuple[str, str, str]:
    """What tells an entry from all others: "weight", "bias" or "activation", its name, and the node of a bias.

    One bias may serve several nodes; it has an entry for each.
    """
    if entry.role == "bias":
        return "bias", entry.name, entry.consumers[0].node if entry.consumers else ""
    return ("weight" if entry.role == "weight" else "activation"), entry.name, ""


def misfit(params: QParams, entry: Entry) -> str | None:
    """Why parameters cannot be those of a tensor; None where they can, or where too little is known of it."""
    axis, shape = params.axis, entry.shape
    if axis is None or shape is None or entry.role == "bias":  # a bias of one value may serve many channels
        return None
    if not -len(shape) <= axis < len(shape):
        return f"axis {axis} is none of its {len(shape)} axes"
    size = shape[axis]
    if size is None:
        return None
    expected: list[int | None] = [size]
    if params.block_size:
        expected = list(shape)
        expected[axis] = -(-size // params.block_size)
    if list(params.scale.shape) != expected:
        return f"scale has the shape {list(params.scale.shape)}, but {expected} is needed"
    return None


def with_biases(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The same entries, with the views of biases made anew.

        s_bias = s_activation * s_weight,   zero point 0,   32 bits

    Under schemes that leave the activation float, or give the weight scales of blocks, a bias stays float.
    """
    entries = tuple(entries)
    known = {key_of(entry): entry for entry in entries}
    return tuple(_with_product(entry, known) if entry.product_of else entry for entry in entries)


def _with_product(bias: Entry, known: Mapping[tuple[str, str, str], Entry]) -> Entry:
    data, weight = bias.product_of
    source, factor = known.get(("activation", data, "")), known.get(("weight", weight, ""))
    inputs = by_scheme(source) if source else {}
    weights = by_scheme(factor) if factor else {}
    views = {}
    for scheme in inputs:
        if scheme in weights and has_integer_bias(weights[scheme]):
            size = math.prod(length or 1 for length in bias.shape or ())
            scale = bias_scale(weights[scheme], inputs[scheme].scale, size)
            views[scheme] = QParams(scale, np.zeros(scale.shape, np.int32), _BIAS_GRID, 0 if scale.ndim else None)
    merged = merged_views(views)
    return replace(bias, views=merged, reason=None if merged else "no scheme gives it an integer product")
