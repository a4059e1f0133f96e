"""Ranges for consumers that lay all codes of their width over them."""

from dataclasses import replace

import numpy as np

from onnxqt.numerics import QParams
from onnxqt.vendors.ranges import ends


def wide_ends(params: QParams) -> tuple[np.float32, np.float32]:
    """(lo, hi) of a grid per tensor for a consumer with `s = (hi - lo) / (2^bits - 1)`.

    A narrow grid is widened by the code that it leaves out, so that such a consumer finds the same scale.
    """
    return ends(replace(params, grid=replace(params.grid, narrow=False)))
