"""Sophgo and CVITEK (TPU-MLIR): the calibration table of `model_deploy.py`, and a table of what stays float.

Read in lib/Dialect/Top/Transforms/ImportCalibration.cpp and python/calibration/{utils,kld_calibrator}.py. A row is

    name threshold min max

where the name is `<output>_<operator>` after fusion, and bare for inputs of the model. Symmetric quantization takes
the threshold, asymmetric the ends. The reader's pattern for numbers is `[-0-9.e]+`: what has a '+' or 'E' is ignored
without a word, so numbers have decimals and no exponent. Comments come first, as the section that a line belongs to is
that of the last line that begins with '#'. The reader in Python stops at `#int4_th` and `#asym_op` but not at
`#weight_scale`, so that section is the last and never the only one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from onnxqt.errors import ExportError
from onnxqt.numerics import QParams
from onnxqt.table.form import Entry
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.layers import Layer, layers, part_of, weight_problem
from onnxqt.vendors.lost import activations, float_tensors, named, other_widths, where
from onnxqt.vendors.names import CONTROL, HASH, SPACE, check_names
from onnxqt.vendors.ranges import ACTIVATIONS, is_asymmetric, is_centred, magnitude, per_tensor
from onnxqt.vendors.wide import wide_ends

ALIAS = "sophgo"

_TRAPS = (CONTROL, SPACE, HASH)
_DECIMALS = 7  # at least, as the tool itself writes them
_HEADER = ("# onnxqt", "# op_name    threshold    min    max")


@dataclass(frozen=True, eq=False, slots=True)
class _Row:
    entry: Entry
    params: QParams
    name: str


def write_table(request: Request) -> Written:
    """`<stem>_cali_table`, and `<stem>_qtable` if activations stay float.

    Sections: `#int4_th` with the ranges of 4-bit activations, which replace those above; `#asym_op` with the operators
    that read or give out an asymmetric activation, where others are symmetric; `#weight_scale` with the scales of
    weights.

    Raises:
        ExportError: if no activation is quantized, one has scales per channel, or a name cannot be in a row.
    """
    table, scheme = request.table, request.scheme
    rows = [_Row(entry, params, tensor_name(entry)) for entry, params in per_tensor(table, scheme)]
    if not rows:
        raise ExportError(f"{scheme} quantizes no activation, and a calibration table has nothing else: choose another")
    floats = [entry for entry in activations(table) if entry.params(scheme) is None]
    check_names(
        [*((row.entry.name, row.name) for row in rows), *((e.name, tensor_name(e)) for e in floats)], ALIAS, _TRAPS
    )
    weights, skipped = _weights(layers(table, scheme))
    sections = [
        *_HEADER,
        *(_range_line(row, row.params) for row in rows),
        *_section("#int4_th", [_range_line(row, row.params) for row in rows if row.params.grid.bits == 4]),
        *_section("#asym_op", _asymmetric(rows), always=bool(weights)),
        *_section("#weight_scale", weights),
    ]
    files = {f"{request.stem}_cali_table": _text(sections)}
    kept = [entry for entry in floats if entry.producer]
    if kept:
        files[f"{request.stem}_qtable"] = _text(
            ["# op_name quantize_mode", *(f"{tensor_name(entry)} F32" for entry in kept)]
        )
    fewer = part_of(table, {row.entry.name for row in rows if row.params.grid.bits not in (4, 8)})
    cv18xx = "CV18xx chips are symmetric: there the ranges of {} are widened to their largest magnitude"
    bounded = part_of(
        table, {entry.name for entry in table.entries if entry.producer and entry.producer.op in ("Softmax", "Sigmoid")}
    )
    fixed = "the tool sets the range of Softmax and Sigmoid to [0, 1], whatever the table has for {}"
    products = part_of(table, {entry.name for entry in table.entries if entry.producer and entry.producer.op == "Mul"})
    symmetric = "the tool keeps products symmetric: the ranges of {} are widened to their largest magnitude"
    lost = (
        *where(table, scheme, ACTIVATIONS, is_asymmetric, cv18xx),
        *where(products, scheme, ACTIVATIONS, is_asymmetric, symmetric),
        *where(bounded, scheme, ACTIVATIONS, lambda params: True, fixed),
        *other_widths(fewer, scheme, 8),
        *_weight_loss(skipped),
    )
    return Written(files, lost, {**float_tensors(table, scheme), **skipped})


def tensor_name(entry: Entry) -> str:
    """What TPU-MLIR calls a tensor: its alias, else `<output>_<operator>`, for a model's input its name alone."""
    if ALIAS in entry.aliases or entry.producer is None:
        return entry.aliases.get(ALIAS, entry.name)
    return f"{entry.name}_{entry.producer.op}"


def _range_line(row: _Row, params: QParams) -> str:
    """A row: the threshold of symmetric quantization, then the ends of asymmetric quantization."""
    low, high = wide_ends(params)
    qmax, steps = params.grid.qmax, (1 << params.grid.bits) - 1
    if is_centred(params):
        threshold = decimals([float(params.scale) * qmax], lambda found: np.float32(found[0] / qmax) == params.scale)
    else:
        threshold = decimals([float(magnitude(params))], lambda found: np.float32(found[0]) == magnitude(params))
    span = decimals([float(low), float(high)], lambda found: np.float32((found[1] - found[0]) / steps) == params.scale)
    return " ".join([row.name, *threshold, *span])


def decimals(values: Sequence[float], accepted: Callable[[Sequence[float]], np.bool_ | bool]) -> list[str]:
    """Values with the fewest decimals, 7 or more, of which the reader's numbers are accepted; without exponents."""
    for number in count(_DECIMALS):
        texts = [f"{value:.{number}f}" for value in values]
        if accepted([float(text) for text in texts]) or number > 64:
            return texts
    raise AssertionError("unreachable")


def _asymmetric(rows: Sequence[_Row]) -> list[str]:
    """The operators to be quantized asymmetrically, where others are not: where all are, `--asymmetric` says so.

    As the tool's own writer has it: those that give out an asymmetric activation, and those that read one, which is
    what the importer marks (`input_asym`).
    """
    wide = [row for row in rows if is_asymmetric(row.params)]
    if not any(is_centred(row.params) for row in rows):
        return []
    readers = {ref.node for row in wide for ref in row.entry.consumers}
    chosen = {row.entry.name for row in wide}
    return [
        row.name
        for row in rows
        if row.entry.name in chosen or (row.entry.producer and row.entry.producer.node in readers)
    ]


def _weights(found: Iterable[Layer]) -> tuple[list[str], dict[str, str]]:
    """The rows of weights, and why others have none."""
    lines, skipped = [], {}
    for layer in found:
        problem = weight_problem(layer)
        scales = layer.channel_scales
        if problem is None and layer.output is None:
            problem = "the table does not tell which tensor its node computes"
        if problem is not None or layer.output is None or scales is None:
            skipped[layer.weight.name] = problem or ""
            continue
        texts = [decimals([float(scale)], _reads_back(scale))[0] for scale in scales]
        lines.append(" ".join([f"{tensor_name(layer.output)}_weight", str(len(texts)), *texts]))
    return lines, skipped


def _reads_back(scale: np.float32) -> Callable[[Sequence[float]], np.bool_ | bool]:
    return lambda found: np.float32(found[0]) == scale


def _weight_loss(skipped: dict[str, str]) -> tuple[str, ...]:
    if not skipped:
        return ()
    return (
        f"scales of {named(skipped)} are not in the file: the tool finds its own from the values of the baked model",
    )


def _section(title: str, lines: Sequence[str], always: bool = False) -> list[str]:
    return [title, *lines] if lines or always else []


def _text(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


FORMATS = (
    Vendor(
        "sophgo",
        "Sophgo TPU-MLIR, calibration table",
        write_table,
        baked=True,
        usage="model_deploy.py --mlir BAKED.mlir --quantize INT8 --calibration_table STEM_cali_table --model "
        "OUT.bmodel, with --asymmetric for an asym scheme and --quantize_table STEM_qtable where that file is written",
    ),
)
