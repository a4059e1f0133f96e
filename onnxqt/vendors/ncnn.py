"""ncnn: the table of `ncnn2int8`, and the table of weights in blocks of `ncnnllm2int`.

Read in tools/quantize/ncnn2int8.cpp and ncnnllm2int.cpp. A row is the name of a layer (the second column of the
.param file) and reciprocal scales:

    conv0_param_0 127/absmax(w) per output channel, or per group of a grouped convolution
    conv0         127/absmax of the layer's input

The reader stops at the first empty line, takes `_param_` in a name for the end of a layer's name, and leaves a layer
float whose weight row is missing, with exit code 0.
"""

from collections.abc import Iterable

import numpy as np

from onnxqt.errors import ExportError
from onnxqt.numerics import FloatArray
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.layers import Layer, layers, left_out, part_of, stored_wider, weight_problem
from onnxqt.vendors.lost import asymmetry, float_tensors, named, other_widths
from onnxqt.vendors.names import CONTROL, FOREIGN, HASH, LONGEST, PARAM, SPACE, Trap, check_names
from onnxqt.vendors.ranges import symmetric_scale

ALIAS = "ncnn"
LLM_BITS = (4, 6, 8)
LLM_BLOCKS = (32, 64, 128)

_OPERATORS = ("Conv", "Gemm", "MatMul")
_KEY = 9  # bytes of "_param_0" and the end of a string
_TRAPS = (
    CONTROL,
    SPACE,
    FOREIGN,
    HASH,
    PARAM,
    Trap(f"more than {LONGEST - _KEY} bytes", lambda name: len(name.encode()) > LONGEST - _KEY),
)


def write_table(request: Request) -> Written:
    """`<stem>.table` for `ncnn2int8`: the rows of weights, then those of inputs.

    A weight's row is `1 / s`, which is 127/absmax of a weight that uses all 8 bits, and keeps the codes of a weight
    of fewer bits as they are.

    Raises:
        ExportError: if no layer can have a row, or a name cannot be a key.
    """
    table, scheme = request.table, request.scheme
    skipped = float_tensors(table, scheme)
    rows: list[tuple[str, FloatArray, np.float32]] = []
    written: list[Layer] = []
    for layer in layers(table, scheme):
        problem = _table_problem(layer)
        if problem is not None or layer.input_params is None:
            skipped[layer.weight.name] = problem or "its input stays float"
            continue
        scale = _reciprocal(symmetric_scale(layer.input_params, 127))
        rows.append((layer.called(ALIAS), _reciprocal(_grouped(layer)), np.float32(scale)))
        written.append(layer)
    if not rows:
        raise ExportError(f"ncnn has no int8 form for any weight that {scheme} quantizes: choose another scheme")
    check_names([(layer.node.node, name) for layer, (name, _, _) in zip(written, rows, strict=True)], ALIAS, _TRAPS)
    lines = [f"{name}_param_0 {_numbers(weights)}" for name, weights, _ in rows]
    lines += [f"{name} {_numbers([scale])}" for name, _, scale in rows]
    inputs = {layer.input.name for layer in written if layer.input}
    used = part_of(table, inputs)
    lost = (
        *asymmetry(used, scheme),
        *other_widths(used, scheme, 8),
        *_grouped_loss(written),
        *stored_wider(written, 8),
    )
    return Written(
        {f"{request.stem}.table": _text(lines)},
        lost,
        {**skipped, **left_out(table, scheme, inputs, "no int8 layer of ncnn reads it")},
    )


def write_llm_table(request: Request) -> Written:
    """`<stem>.llm.table` for `ncnnllm2int`: weights of Gemm in blocks along what they sum over, [outputs][blocks].

    `<layer>_param_1 bits=4 block=32 method=minmax qmax/absmax ...`, here `1 / s`: codes in between the widths of 4, 6
    and 8 bits stay as they are. Weights with one scale per output channel repeat it for blocks of 128.

    Raises:
        ExportError: if no layer can have a row, or a name cannot be a key.
    """
    table, scheme = request.table, request.scheme
    skipped: dict[str, str] = {}
    lines, written = [], []
    for layer in layers(table, scheme):
        scales = _blocks(layer)
        if isinstance(scales, str):
            skipped[layer.weight.name] = scales
            continue
        grid, size = layer.weight_params.grid, layer.weight_params.block_size or LLM_BLOCKS[-1]
        bits = next(width for width in LLM_BITS if width >= grid.bits)
        row = f"{layer.called(ALIAS)}_param_1 bits={bits} block={size} method=minmax"
        lines.append(f"{row} {_numbers(_reciprocal(scales).ravel())}")
        written.append(layer)
    if not lines:
        raise ExportError(f"ncnn has no form in blocks for any weight that {scheme} quantizes: choose another scheme")
    check_names([(layer.node.node, layer.called(ALIAS)) for layer in written], ALIAS, _TRAPS)
    odd = [layer.weight.name for layer in written if layer.weight_params.grid.bits not in LLM_BITS]
    quantized = [entry.name for entry, _ in table.quantized(scheme, "input", "activation", "output")]
    lost = []
    if quantized:
        lost.append(
            f"ncnn keeps activations float in such layers: the ranges of {named(quantized)} are not in the file"
        )
    if odd:
        lost.append(f"ncnn stores 4, 6 or 8 bits: {named(odd)} keep their codes in the next of these")
    return Written({f"{request.stem}.llm.table": _text(lines)}, tuple(lost), skipped)


def _table_problem(layer: Layer) -> str | None:
    """Why a layer has no row in the int8 table; None if it has one."""
    rank = len(layer.weight.shape or ())
    if layer.node.op not in _OPERATORS or (layer.node.op == "Conv" and rank != 4):
        return f"ncnn has no int8 layer for a {layer.node.op} whose weight has {rank} axes"
    if layer.node.op != "Conv" and rank != 2:
        return "ncnn has no int8 layer for stacked matrices"
    problem = weight_problem(layer)
    if problem is None and layer.node.op == "Conv" and layer.groups is None:
        return "the table does not tell how many groups the convolution has"
    return problem


def _grouped(layer: Layer) -> FloatArray:
    """The scales of a weight as ncnn has them: per output channel, per group of a grouped convolution."""
    scales = layer.channel_scales
    assert scales is not None
    groups = layer.groups if layer.node.op == "Conv" else None
    return scales.reshape(groups, -1).max(axis=1) if groups and groups > 1 else scales


def _grouped_loss(written: Iterable[Layer]) -> tuple[str, ...]:
    """What becomes of convolutions whose groups have several output channels with scales of their own."""
    names = []
    for layer in written:
        scales, groups = layer.channel_scales, layer.groups if layer.node.op == "Conv" else None
        if (
            scales is not None
            and groups
            and groups > 1
            and (scales.reshape(groups, -1) != _grouped(layer)[:, None]).any()
        ):
            names.append(layer.weight.name)
    sentence = "ncnn has one scale for each group of a convolution: the largest of the group for"
    return (f"{sentence} {named(names)}",) if names else ()


def _blocks(layer: Layer) -> FloatArray | str:
    """The scales of a weight by output and block, float32 (outputs, blocks), or why it cannot have them."""
    params, shape = layer.weight_params, layer.weight.shape or ()
    if layer.node.op not in ("Gemm", "MatMul") or len(shape) != 2 or layer.node.index != 1:
        return "ncnn has blocks only for a matrix that Gemm or MatMul multiplies by from the right"
    if layer.bias is not None:
        return "the tool takes a Gemm without a bias only"
    if params.grid.bits > LLM_BITS[-1] or not params.grid.signed or np.any(params.zero_point):
        return "the tool takes symmetric weights of at most 8 bits only"
    if params.block_size is None:
        rows = layer.channel_scales
        depth = _depth(layer, shape)
        if rows is None or depth is None:
            return "the table does not tell along which axis it is summed"
        return np.repeat(rows[:, None], -(-depth // LLM_BLOCKS[-1]), axis=1)
    if params.block_size not in LLM_BLOCKS:
        return f"the tool takes blocks of {', '.join(map(str, LLM_BLOCKS))} only"
    axis = params.axis or 0
    return params.scale if axis % 2 else params.scale.T


def _depth(layer: Layer, shape: tuple[int | None, ...]) -> int | None:
    """How many products each output of a matrix is the sum of."""
    axis = layer.weight_params.axis
    if axis is None and layer.node.op == "Gemm" and shape[0] != shape[1]:
        axis = shape.index(layer.channels) if layer.channels in shape else None
    elif axis is None:
        axis = 1
    return None if axis is None else shape[1 - axis % 2]


def _reciprocal(scale: FloatArray) -> FloatArray:
    """1 / s, rounded once."""
    return np.asarray(1 / np.asarray(scale, np.float64), np.float32)


def _numbers(values: Iterable[np.float32]) -> str:
    """Float32 values as text that reads back to the same; `sscanf` takes exponents."""
    return " ".join(f"{float(value):.9g}" for value in values)


def _text(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


FORMATS = (
    Vendor(
        "ncnn",
        "ncnn, ncnn2int8",
        write_table,
        baked=True,
        usage="ncnn2int8 BAKED.param BAKED.bin OUT.param OUT.bin STEM.table; then look for `8=2` in OUT.param, as the "
        "tool is silent about layers that it leaves out",
    ),
    Vendor(
        "ncnn-llm",
        "ncnn, ncnnllm2int (weights in blocks)",
        write_llm_table,
        baked=True,
        usage="ncnnllm2int BAKED.param BAKED.bin OUT.param OUT.bin STEM.llm.table",
    ),
)
