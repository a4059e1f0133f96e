"""The float model that goes with tables: weights on their grids, so that a tool that rounds them again changes none.

A tool that takes float weights and derives their scales from the largest magnitude of a channel finds the table's
scales in this model, and each code again, where the largest code occurs. `Baked.unreached` says where it does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxqt.calibrate import Quantizers
from onnxqt.errors import ExportError
from onnxqt.model import Model
from onnxqt.numerics import Array, FloatArray, QParams, dequantize, quantize
from onnxqt.plan import QuantPlan
from onnxqt.tensors import is_external, set_external, values_of
from onnxqt.vendors.ranges import is_centred

_ALIGNMENT = 4096  # of external values, so that they can be mapped into memory


@dataclass(frozen=True, eq=False, slots=True)
class Baked:
    """A float model with its weights on their grids.

    Attributes:
        proto: the model.
        unreached: for each weight in which some scale does not follow from the values, the indices of such scales in
            the flattened scales: there no code has the largest magnitude (or, on asymmetric grids, an end is missing),
            and a tool that derives the scale finds another.
    """

    proto: onnx.ModelProto
    unreached: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def baked_model(model: Model, plan: QuantPlan, quantizers: Quantizers, scratch: Path | None = None) -> Baked:
    """The float model whose quantized weights are the reals of their codes; biases stay as they are.

        w' = s (q - zp),   max |w'| = qmax s in each channel whose codes reach qmax

    Args:
        model: the float model.
        plan: its quantizer sites.
        quantizers: the parameters of one scheme.
        scratch: a file for the weights of a model that is too large for one message; the result reads them from
            there, one at a time, until `files.write_model` has copied them.

    Raises:
        ExportError: if such a model comes without `scratch`, or the file cannot be written.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    sites = {site.tensor for site in plan.weights}
    unreached = {}
    end = 0
    for tensor in proto.graph.initializer:
        if tensor.name not in sites:
            continue
        params = quantizers.weights[tensor.name]
        codes = quantize(values_of(tensor), params)
        missing = unreached_scales(codes, params)
        if missing:
            unreached[tensor.name] = missing
        values = dequantize(codes, params)
        if is_external(tensor):
            end = _append(tensor, values, scratch, end)
        else:
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return Baked(proto, unreached)


def unreached_scales(codes: Array, params: QParams) -> tuple[int, ...]:
    """Indices of the flattened scales that do not follow from the extremes of the codes they belong to.

    Codes about zero: the largest magnitude must be qmax. Others: both qmin and qmax must occur.
    """
    low, high = _extremes(codes, params)
    if is_centred(params):
        reached = np.maximum(-low, high) == params.grid.qmax
    else:
        reached = (low == params.grid.qmin) & (high == params.grid.qmax)
    return tuple(int(index) for index in np.flatnonzero(~reached.ravel()))


def _extremes(codes: Array, params: QParams) -> tuple[Array, Array]:
    """The least and the largest code of each scale, of the scale's shape."""
    if params.axis is None:
        return np.asarray(codes.min()), np.asarray(codes.max())
    axis = params.axis % codes.ndim
    if params.block_size:
        starts = np.arange(0, codes.shape[axis], params.block_size)
        return np.minimum.reduceat(codes, starts, axis), np.maximum.reduceat(codes, starts, axis)
    others = tuple(each for each in range(codes.ndim) if each != axis)
    return codes.min(axis=others), codes.max(axis=others)


def _append(tensor: TensorProto, values: FloatArray, scratch: Path | None, end: int) -> int:
    """Let a tensor have its values in `scratch`, from the next boundary behind `end` on; returns the new end."""
    if scratch is None:
        raise ExportError(
            f"weight '{tensor.name}' lies outside of the model: give a scratch file for the baked weights"
        )
    start = end + -end % _ALIGNMENT
    try:
        with scratch.open("r+b" if end else "wb") as file:
            file.seek(start)
            values.astype("<f4", copy=False).tofile(file)
    except OSError as error:
        raise ExportError(f"cannot write '{scratch}' ({error.strerror}): free the disk") from error
    tensor.data_type = TensorProto.FLOAT
    set_external(tensor, str(scratch.absolute()), start)
    return start + values.nbytes
