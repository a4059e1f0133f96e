"""TI TIDL: the quantization proto that replaces calibration (`advanced_options:quant_params_proto_path`).

Documented in docs/tidl_quantParams.md of edgeai-tidl-tools. TIDL writes the file where it does not exist, with every
layer and tensor under its own names; reading it takes `min` and `max` alone, and only for symmetric quantization. So
the template is that file, and nothing but these numbers changes in it.
"""

from collections.abc import Iterator

import numpy as np

from onnxqt.errors import ExportError
from onnxqt.numerics import FloatArray, QParams
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.layers import Layer, layers, left_out, part_of
from onnxqt.vendors.lost import activations, float_tensors, named, where
from onnxqt.vendors.names import names_of
from onnxqt.vendors.patch import Edit, check_matches, edited, kept, template_text
from onnxqt.vendors.prototext import Field, parse
from onnxqt.vendors.ranges import ACTIVATIONS, is_asymmetric, is_centred, magnitude

ALIAS = "tidl"
LARGEST = float(np.finfo(np.float32).max)  # FLT_MAX, which TIDL takes for "no range"

Range = tuple[float, float]


def write_proto(request: Request) -> Written:
    """`<stem>.prototxt`: the template with the ranges of the table.

    Raises:
        UsageError: without a template.
        ExportError: if the template is not such a file, or has no layer of the table.
    """
    table, scheme = request.table, request.scheme
    text = template_text(request, "TIDL")
    proto = parse(text)
    found = proto.all("layers")
    names = [layer.value("layer_name") or "" for layer in found]
    _check_count(proto, len(found))
    called_so = names_of(activations(table), ALIAS)
    by_name = {name: tensor for tensor, name in called_so.items()}
    weights = {layer.output.name: layer for layer in layers(table, scheme) if layer.output}
    edits: list[Edit] = []
    matched, inside, incomplete = [], set(), []
    for block, name in zip(found, names, strict=True):
        tensor = by_name.get(name, "")
        entry = table.entry(tensor) if tensor else None
        params = entry.params(scheme) if entry else None
        done = False
        if params is not None:
            done = _patch(block.all("outputs"), [activation_range(params)], edits)
            inside |= {tensor} if done else set()
        if tensor in weights:
            done = _patch(block.all("weights"), _weight_ranges(weights[tensor], block), edits) or done
        matched += [name] if done else []
        incomplete += [name] if not done and _unfinished(block) else []
    check_matches(matched, names, ALIAS)
    lost = [*kept(names, matched), *_losses(request, inside), *_quant_type(proto)]
    if incomplete:
        lost.append(f"TIDL calibrates all layers again, as the template lacks ranges or values in {named(incomplete)}")
    skipped = {
        **float_tensors(table, scheme),
        **left_out(table, scheme, inside, "the template has no layer of this name"),
    }
    return Written({f"{request.stem}.prototxt": edited(text, edits).encode()}, tuple(lost), skipped)


def activation_range(params: QParams) -> Range:
    """The min and max of an activation, from which TIDL finds the scale; without a negative end it is unsigned.

    Raises:
        ExportError: if an end is not smaller than FLT_MAX.
    """
    low, high = params.range
    return _bounded(-high if is_centred(params) else low, high)


def _weight_ranges(layer: Layer, block: Field) -> list[Range]:
    """The min and max of a weight: one for the tensor, or one per channel where the template has as many."""
    wide, places = np.ravel(magnitude(layer.weight_params)), len(block.all("weights"))
    if places == wide.size:
        return [_bounded(-each, each) for each in wide]
    return [_bounded(-wide.max(), wide.max())] * (1 if wide.size > 1 else places)


def _bounded(low: FloatArray | np.float32, high: FloatArray | np.float32) -> Range:
    ends = float(low), float(high)
    if not all(abs(end) < LARGEST for end in ends):
        raise ExportError(f"the range [{low}, {high}] reaches FLT_MAX, which TIDL takes for no range: scale the model")
    return ends


def _patch(tensors: list[Field], ranges: list[Range], edits: list[Edit]) -> bool:
    """Put ranges into as many tensors; whether they were there, each with a min and a max."""
    places = [[tensor.all(end) for end in ("min", "max")] for tensor in tensors]
    if len(places) != len(ranges) or any(len(ends) != 1 for place in places for ends in place):
        return False
    for place, values in zip(places, ranges, strict=True):
        edits += [Edit(ends[0].start, ends[0].end, f"{value:.9g}") for ends, value in zip(place, values, strict=True)]
    return True


def _unfinished(block: Field) -> bool:
    """Whether TIDL would calibrate for want of a range, or of a value of a bias."""
    for kind in ("outputs", "weights", "bias", "slope"):
        for tensor in block.all(kind):
            if any(_number(tensor.value(end)) >= LARGEST for end in ("min", "max")):
                return True
            if kind == "bias" and len(tensor.all("value")) != _number(tensor.value("size")):
                return True
    return False


def _number(text: str | None) -> float:
    """The magnitude of a number; FLT_MAX where it is none or absent, as the field's default is."""
    try:
        return abs(float(text)) if text is not None else LARGEST
    except ValueError:
        return LARGEST


def _check_count(proto: Field, layers_found: int) -> None:
    told = proto.value("num_layers")
    if told is not None and told != str(layers_found):
        raise ExportError(f"the template says num_layers {told} but has {layers_found}: have TIDL write it again")


def _quant_type(proto: Field) -> Iterator[str]:
    if proto.value("quant_type") not in (None, "SYMMETRIC", "1"):
        yield "TIDL reads such a file for symmetric quantization only, and the template is of another kind"


def _losses(request: Request, inside: set[str]) -> tuple[str, ...]:
    used, scheme = part_of(request.table, inside), request.scheme

    def widened(params: QParams) -> bool:
        return is_asymmetric(params) and bool(np.any(params.range[0] < 0))

    sentence = "TIDL is symmetric: the ranges of {} are widened to their largest magnitude"
    widths = "the file leaves the bit depth to the template: {} keep their ranges with its steps"
    per_channel = "scales per channel of {} become one range, unless the template has one for each channel"
    return (
        *where(used, scheme, ACTIVATIONS, widened, sentence),
        *where(used, scheme, ACTIVATIONS, lambda params: params.grid.bits != 8, widths),
        *where(request.table, scheme, ["weight"], lambda params: params.scale.ndim > 0, per_channel),
    )


FORMATS = (
    Vendor(
        "tidl",
        "TI TIDL, quantization proto",
        write_proto,
        baked=True,
        patches=True,
        usage="compile once with advanced_options:quant_params_proto_path=FILE, which TIDL writes; patch that file; "
        "compile BAKED again with the path of STEM.prototxt",
    ),
)
