"""Back ends as data: how each compiler picks its grids (policy) and how each device computes (arithmetic).

A profile is one row of `PROFILES`, or a TOML file with the same fields (`read_profile`). Nothing here computes:
`onnxqt.compiler` follows the policy, `onnxqt.emulate` the arithmetic.

A profile is `validated` where the emulator was compared with that runtime, code by code (VALIDATION.md), and
`modelled` where only documents say how the device computes; then `assumed` names what they leave open.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import onnx

from onnxqt.errors import UsageError, first_line
from onnxqt.numerics import Rounding

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10 has no parser of its own
    import tomli as tomllib

ProductRule = Literal[
    "float32_even",
    "float32_away",
    "float64_away",
    "gemmlowp_double",
    "ruy_double",
    "ruy_vectors",
    "fixed31_single",
    "fixed15_single",
    "fixed16_away",
    "shift_up",
    "ncnn",
    "float32_bias",
    "openvino",
]
ElementwiseRule = Literal["ort", "tflite", "xnnpack", "tosa", "float", "none"]  # "none": in float between codes
Overflow = Literal["wrap", "saturate", "error"]


@dataclass(frozen=True, slots=True)
class Precision:
    """Widths that a back end takes, and when activation scales are known; `str(precision)` is its name.

    Attributes:
        weight_bits: of the weights.
        activation_bits: of the activations.
        dynamic: whether activation scales are computed at run time, from each input.
    """

    weight_bits: int
    activation_bits: int
    dynamic: bool = False

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}{'-dyn' if self.dynamic else ''}"


_PRECISION = re.compile(r"w([2-8])a(4|8|16)(-dyn)?")


def parse_precision(name: str) -> Precision:
    """The precision called `name`, such as w8a8, w4a8, w8a16 or w8a8-dyn.

    Raises:
        UsageError: if `name` is not of the form `w{2..8}a{4,8,16}[-dyn]`.
    """
    match = _PRECISION.fullmatch(name)
    if match is None:
        raise UsageError(f"unknown precision '{name}': expected w{{2..8}}a{{4,8,16}}[-dyn], such as w8a8 or w8a8-dyn")
    weight_bits, activation_bits, dynamic = match.groups()
    return Precision(int(weight_bits), int(activation_bits), dynamic is not None)


@dataclass(frozen=True, slots=True)
class Policy:
    """How a compiler quantizes a float model that it is given with calibration data.

    Attributes:
        precisions: what it can be asked for, its own default first.
        ranges: how it clips activations.
        signed: whether activation codes are signed.
        symmetric: whether activations have zero point 0 (signed) in the middle of the grid.
        narrow: whether activation codes leave out the most negative one ([-127, 127]).
        per_channel: whether weights have one scale per output channel.
        weights_symmetric: whether weights have zero point 0.
        weights_narrow: whether weight codes leave out the most negative one.
        power_of_two: which scales are rounded up to a power of two.
        operators: ONNX operators that it runs on integers, besides those that only move codes.
        fallback: what happens to the others: "float" alone, or "float_tail": the first of them and everything
            behind it.
        fixed_outputs: (scale, zero point) of operators whose output grid is prescribed at 8 bits.
        weights_float: whether the file keeps float weights, which the device rounds by itself.
        pools_share_grid: whether pooling and mean keep the grid of their input.
    """

    precisions: tuple[str, ...] = ("w8a8",)
    ranges: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    signed: bool = True
    symmetric: bool = False
    narrow: bool = False
    per_channel: bool = True
    weights_symmetric: bool = True
    weights_narrow: bool = True
    power_of_two: Literal["none", "activations", "all"] = "none"
    operators: tuple[str, ...] = ()
    fallback: Literal["float", "float_tail"] = "float"
    fixed_outputs: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    weights_float: bool = False
    pools_share_grid: bool = False


@dataclass(frozen=True, slots=True)
class Accumulator:
    """The register that sums products.

    Attributes:
        bits: its width.
        overflow: what it does beyond: "wrap" (two's complement), "saturate" or "error" (the run ends).
        pair_bits: where not 0, the sum of two products of adjacent input channels saturates to this width before
            it is added (x86 without VNNI).
    """

    bits: int = 32
    overflow: Overflow = "wrap"
    pair_bits: int = 0


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a device computes, one rule per kind of operator. The rules are defined where they are computed.

    Attributes:
        product: accumulators to codes, for Conv, ConvTranspose and MatMul (`onnxqt.requantize`).
        dense: the same for a product with a constant matrix (Gemm, MatMul); empty: as `product`.
        depthwise: the same for depthwise and transposed convolutions; empty: as `product`.
        grouped: the same for other grouped convolutions; empty: as `product`.
        batched: the same for a product of two activations; empty: as `product`; "none": in float between codes;
            "xnnpack": float32_even where the zero point of the second is 0, which XNNPACK asks for, else
            gemmlowp_double.
        product16: the same for 16-bit activations; empty: as for 8 bits.
        dense16: the same for 16-bit activations and a constant matrix; empty: as `product16`.
        accumulator: what sums the products.
        add: Add and Sub (`onnxqt.emulate.kernels.add`).
        multiply: Mul (`onnxqt.emulate.kernels.multiply`).
        average: AveragePool (`onnxqt.emulate.kernels.pooling`).
        mean: GlobalAveragePool and ReduceMean (`onnxqt.emulate.kernels.pooling`).
        leaky: LeakyRelu and PRelu (`onnxqt.emulate.kernels.leaky`); "ort": a table.
        hard_swish: HardSwish; "table": a table of the exact function.
        softmax: Softmax (`onnxqt.emulate.kernels.softmax`); "float": in float between codes.
        resize: Resize that interpolates linearly (`onnxqt.emulate.kernels.resize`); "float": in float between codes.
        transfer: codes from one grid to another: a rule of `onnxqt.requantize`, or one of
            `onnxqt.emulate.kernels.tables`.
        table: rounding of the entries of activation tables; "tflite": away from zero, of the value times the float32
            reciprocal of the scale; "xnnpack": the same with its zero point, to even; "float": activation functions are computed in float between codes.
        quantize: rounding of floats to codes.
        levels: "uniform" grids, or "log16": a sign and a power of two with 4 fractional bits of exponent.
        dynamic: how float activations meet quantized weights: "float", in float; "tensor", rounded at run time to
            unsigned codes per tensor (ONNX DynamicQuantizeLinear); "row", to symmetric codes per row of a matrix or
            sample of a convolution (TensorFlow Lite's hybrid kernels).
    """

    product: ProductRule = "float32_even"
    dense: ProductRule | Literal[""] = ""
    depthwise: ProductRule | Literal[""] = ""
    grouped: ProductRule | Literal[""] = ""
    batched: ProductRule | Literal["", "none", "xnnpack"] = ""
    product16: ProductRule | Literal[""] = ""
    dense16: ProductRule | Literal[""] = ""
    accumulator: Accumulator = Accumulator()
    add: ElementwiseRule = "ort"
    multiply: ElementwiseRule = "ort"
    average: Literal["ort", "tflite", "tosa", "dpu", "float"] = "ort"
    mean: Literal["ort", "tflite", "ruy", "xnnpack", "tosa", "float"] = "ort"
    leaky: Literal["ort", "tflite", "xnnpack", "tosa", "float"] = "ort"
    hard_swish: Literal["table", "tflite"] = "table"
    softmax: Literal["tflite", "ruy", "float"] = "float"
    resize: Literal["tflite", "xnnpack", "float"] = "float"
    transfer: Literal["ort", "xnnpack", "affine"] | ProductRule = "ort"
    table: Literal["even", "away", "up", "tflite", "xnnpack", "float"] = "even"
    quantize: Rounding = "even"
    levels: Literal["uniform", "log16"] = "uniform"
    dynamic: Literal["float", "tensor", "row"] = "float"


@dataclass(frozen=True, slots=True)
class Profile:
    """One back end.

    Attributes:
        name: how it is asked for.
        title: what it stands for, for people.
        evidence: "validated" against the runtime itself, or "modelled" from documents.
        source: where its rules are documented.
        assumed: what the documents leave open and was decided here, else empty.
        policy: how its compiler quantizes.
        arithmetic: how it computes.
    """

    name: str
    title: str
    evidence: Literal["validated", "modelled"]
    source: str
    policy: Policy
    arithmetic: Arithmetic
    assumed: str = ""


_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_POOLS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
_SUMS = ("Add", "Sub", "Mul", "Concat")
_CLAMPS = ("Relu", "Clip")
_TABLES = ("LeakyRelu", "PRelu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Gelu", "Elu", "Mish", "Softplus")
_ALL = (*_PRODUCTS, *_POOLS, *_SUMS, *_CLAMPS, *_TABLES, "Softmax", "Resize")

_LITERT = "TensorFlow Lite 8-bit quantization specification; LiteRT kernels (ai-edge-litert 2.3.0)"
_TFLITE_OPERATORS = (
    *(*_PRODUCTS, *_POOLS, *_SUMS, *_CLAMPS),
    *("LeakyRelu", "PRelu", "Sigmoid", "Tanh", "HardSwish", "Gelu", "Softmax", "Resize"),
)
_TFLITE_OUTPUTS = {"Sigmoid": (2.0**-8, -128), "Tanh": (2.0**-7, 0), "Softmax": (2.0**-8, -128)}
_TFLITE_POLICY = Policy(
    precisions=("w8a8", "w4a8", "w8a16", "w8a8-dyn"),
    operators=_TFLITE_OPERATORS,
    fixed_outputs=_TFLITE_OUTPUTS,
    pools_share_grid=True,
)
_TFLITE = Arithmetic(
    product="gemmlowp_double",
    dense="float64_away",
    product16="fixed15_single",
    dense16="float64_away",
    add="tflite",
    multiply="tflite",
    average="tflite",
    mean="tflite",
    leaky="tflite",
    hard_swish="tflite",
    softmax="tflite",
    resize="tflite",
    transfer="gemmlowp_double",
    table="tflite",
    quantize="away",
    dynamic="row",
)
_RUY = dataclasses.replace(
    _TFLITE,
    product="ruy_double",
    dense="ruy_double",
    depthwise="ruy_vectors",
    grouped="gemmlowp_double",
    batched="gemmlowp_double",
    mean="ruy",
    softmax="ruy",
)
_OPENVINO_OPERATORS = ("Conv", "Gemm", "MatMul", *_POOLS, "Concat", *_CLAMPS)
_OPENVINO = Arithmetic(
    product="openvino",
    batched="none",
    average="float",
    mean="float",
    add="none",
    multiply="none",
    leaky="float",
    transfer="affine",
    table="float",
    quantize="affine",
)

_ROWS = (
    Profile(
        "tflite_ref",
        "TensorFlow Lite, reference kernels",
        "validated",
        _LITERT,
        _TFLITE_POLICY,
        _TFLITE,
    ),
    Profile(
        "tflite_ruy",
        "TensorFlow Lite, optimized kernels (ruy)",
        "validated",
        _LITERT,
        _TFLITE_POLICY,
        _RUY,
    ),
    Profile(
        "xnnpack",
        "TensorFlow Lite with XNNPACK, its default on x86 and ARM",
        "validated",
        _LITERT,
        dataclasses.replace(_TFLITE_POLICY, precisions=("w8a8",)),
        dataclasses.replace(
            _RUY,
            product="float32_even",
            dense="float32_even",
            depthwise="",
            grouped="",
            batched="xnnpack",
            add="xnnpack",
            multiply="xnnpack",
            mean="xnnpack",
            leaky="xnnpack",
            resize="xnnpack",
            transfer="xnnpack",
            table="xnnpack",
        ),
    ),
    Profile(
        "cmsis_nn",
        "CMSIS-NN on Arm Cortex-M, double rounding",
        "modelled",
        "CMSIS-NN git 99f736a, arm_nnsupportfunctions.h",
        dataclasses.replace(_TFLITE_POLICY, precisions=("w8a8", "w4a8", "w8a16")),
        dataclasses.replace(_TFLITE, dense="gemmlowp_double"),
        "the same formulas as the TensorFlow Lite kernels that validate `tflite_ref`; the library itself does not run "
        "on this kind of machine",
    ),
    Profile(
        "tosa_int",
        "TOSA integer profile (Arm Ethos-U and others), single rounding",
        "validated",
        "TOSA specification git cd5acdd, scale_helpers.tosac; tosa-tools 2026.8.0",
        dataclasses.replace(_TFLITE_POLICY, precisions=("w8a8", "w4a8"), operators=_ALL),
        Arithmetic(
            product="fixed31_single",
            accumulator=Accumulator(32, "error"),
            add="tosa",
            multiply="tosa",
            average="tosa",
            mean="tosa",
            leaky="tosa",
            transfer="fixed31_single",
            table="away",
            quantize="away",
        ),
    ),
    Profile(
        "ort_cpu",
        "ONNX Runtime on x86 CPUs with VNNI",
        "validated",
        "ONNX Runtime 1.32.0, QLinear kernels of its CPU provider",
        Policy(
            precisions=("w8a8", "w8a8-dyn"),
            signed=False,
            operators=(
                *("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Relu", "Clip"),
                *("LeakyRelu", "Sigmoid", "Resize"),
            ),
        ),
        Arithmetic(dynamic="tensor"),
    ),
    Profile(
        "openvino_vnni",
        "OpenVINO on x86 CPUs with VNNI",
        "validated",
        "OpenVINO 2026.4.1, CPU plugin",
        Policy(signed=False, operators=_OPENVINO_OPERATORS),
        _OPENVINO,
    ),
    Profile(
        "x86_sat16",
        "x86 CPUs without VNNI: pairs of products saturate at 16 bits",
        "validated",
        "OpenVINO 2026.4.1 with ONEDNN_MAX_CPU_ISA=AVX512_CORE",
        Policy(signed=False, operators=_OPENVINO_OPERATORS),
        dataclasses.replace(_OPENVINO, accumulator=Accumulator(32, "wrap", 16)),
    ),
    Profile(
        "ncnn_sym",
        "ncnn: symmetric int8 with [-127, 127]",
        "validated",
        "ncnn 1.0.20261020",
        Policy(symmetric=True, narrow=True, operators=("Conv", "Gemm", "MatMul", *_CLAMPS)),
        Arithmetic(
            product="ncnn", batched="none", add="none", multiply="none", leaky="float", table="float", quantize="away"
        ),
    ),
    Profile(
        "trt_sym",
        "NVIDIA TensorRT: symmetric int8",
        "modelled",
        "TensorRT documentation, Working with Quantized Types",
        Policy(precisions=("w8a8", "w4a8"), ranges="entropy", symmetric=True, operators=_ALL),
        Arithmetic(product="float32_bias", add="float", multiply="float", average="float", mean="float"),
        "accumulators scaled in float32, half to even, bias added in float32",
    ),
    Profile(
        "dpu_pow2",
        "AMD/Xilinx DPU: powers of two, per tensor",
        "modelled",
        "Vitis-AI git b2b2279, Quant_Config.md and pooling.py",
        Policy(
            ranges="mse",
            symmetric=True,
            per_channel=False,
            weights_narrow=False,
            power_of_two="all",
            operators=(*_PRODUCTS, *_POOLS, *_SUMS, *_CLAMPS, "LeakyRelu", "HardSigmoid", "HardSwish", "Resize"),
        ),
        Arithmetic(
            product="shift_up",
            add="float",
            multiply="float",
            average="dpu",
            mean="float",
            leaky="float",
            transfer="shift_up",
            table="up",
            quantize="up",
        ),
        "sums and products of activations are rounded once; range search by least squared error for `diffs`",
    ),
    Profile(
        "tidl_pow2",
        "TI TIDL: powers of two for feature maps",
        "modelled",
        "edgeai-tidl-tools, tidl_fsg_quantization.md",
        Policy(
            precisions=("w8a8", "w8a16"),
            symmetric=True,
            per_channel=False,
            power_of_two="activations",
            operators=(*_PRODUCTS, *_POOLS, *_SUMS, *_CLAMPS, *_TABLES, "Softmax", "Resize"),
        ),
        Arithmetic(product="fixed16_away", add="float", multiply="float", average="float", mean="float"),
        "16-bit multiplier, half away from zero: the documents give no rounding",
    ),
    Profile(
        "nvdla",
        "NVDLA: 16-bit multiplier and 5-bit shifter",
        "modelled",
        "nvdla/doc, hw/v1/ias/precision.rst and unit_description.rst",
        Policy(
            symmetric=True, operators=(*_PRODUCTS, *_POOLS, *_SUMS, *_CLAMPS, "LeakyRelu", "PRelu", "Sigmoid", "Tanh")
        ),
        Arithmetic(
            product="fixed16_away",
            accumulator=Accumulator(34, "saturate"),
            add="float",
            multiply="float",
            average="float",
            mean="float",
            table="away",
            quantize="away",
        ),
        "tables exact where the device interpolates between entries",
    ),
    Profile(
        "rknn_w8a8",
        "Rockchip RKNN w8a8",
        "modelled",
        "RKNN API reference 2.3.2 (public)",
        Policy(weights_symmetric=False, weights_narrow=False, operators=(*_ALL, "LayerNormalization")),
        Arithmetic(),
        "float32 multiplier, half to even",
    ),
    Profile(
        "hailo_a8w4",
        "Hailo with 8-bit activations, 4 or 8-bit weights",
        "modelled",
        "hailo.ai, Hailo quantization scheme; Hailo Model Zoo scripts",
        Policy(
            precisions=("w8a8", "w4a8", "w8a16"), ranges="percentile", signed=False, per_channel=False, operators=_ALL
        ),
        Arithmetic(product="float64_away", add="float", multiply="float", average="float", mean="float", table="away"),
        "exact multipliers, half away from zero: no public source for rounding or bias",
    ),
    Profile(
        "htp",
        "Qualcomm Hexagon HTP",
        "modelled",
        "QNN HTP documentation; MQBench (SNPE: asymmetric, per tensor)",
        Policy(
            precisions=("w8a8", "w4a8", "w8a16"),
            signed=False,
            per_channel=False,
            operators=(*_ALL, "LayerNormalization"),
        ),
        Arithmetic(product="fixed31_single", add="float", multiply="float", average="float", mean="float"),
        "31-bit multipliers, half up: no public source for rounding",
    ),
    Profile(
        "edgetpu",
        "Coral Edge TPU: all behind the first unsupported operator runs on the host",
        "modelled",
        "coral.ai, TensorFlow models on the Edge TPU",
        dataclasses.replace(
            _TFLITE_POLICY,
            precisions=("w8a8",),
            operators=(*_PRODUCTS[:3], *_POOLS, *_SUMS, *_CLAMPS, "Sigmoid", "Tanh", "Softmax", "Resize"),
            fallback="float_tail",
        ),
        dataclasses.replace(_TFLITE, dense="gemmlowp_double"),
        "rounds as TensorFlow Lite does",
    ),
    Profile(
        "nnie_log",
        "HiSilicon NNIE: a logarithmic grid",
        "modelled",
        "MQBench, hardware table and fake_quantize/nnie.py",
        Policy(symmetric=True, per_channel=False, weights_float=True, operators=(*_PRODUCTS, *_POOLS)),
        Arithmetic(levels="log16"),
        "products and sums of levels in float32; activations clipped at their extremes",
    ),
)
PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in _ROWS}

_FILE_LIMIT = 1 << 20  # bytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LIMITS = {"bits": (16, 64), "pair_bits": (0, 32)}  # of an accumulator
_DERIVED = "evidence"  # of a profile from a file, always "modelled"


def read_profile(path: str | Path) -> Profile:
    """The profile that a TOML file describes: the fields of `Profile`, those of its parts in tables of their names.

        base = "tflite_ref"            # start from this profile; without it, from the defaults of each field
        name = "my_npu"                # by default the name of the file

        [policy]
        operators = ["Conv", "Relu"]
        [policy.fixed_outputs]
        Sigmoid = [0.00390625, -128]   # scale, zero point

        [arithmetic]
        product = "fixed16_away"
        [arithmetic.accumulator]
        bits = 24

    Its evidence is "modelled", whatever the base is.

    Raises:
        UsageError: naming the file, the key, its value and what is allowed.
    """
    path = Path(path)
    content = _parsed(path)
    base = content.pop("base", "")
    if base and base not in PROFILES:
        raise UsageError(f"'{path}': base is {_shown(base)}, which is no profile: name one of {', '.join(PROFILES)}")
    defaults = Profile(path.stem, path.stem, "modelled", path.name, Policy(), Arithmetic())
    start = dataclasses.replace(PROFILES[base], name=path.stem, assumed="") if base else defaults
    profile: Profile = dataclasses.replace(_filled(path, start, content, ()), evidence="modelled")
    _check_profile(path, profile)
    return profile


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_FILE_LIMIT + 1)
        if len(raw) > _FILE_LIMIT:
            raise UsageError(f"'{path}' has more than {_FILE_LIMIT >> 20} MiB: give the TOML file of a profile")
        return tomllib.loads(raw.decode())
    except OSError as error:
        raise UsageError(f"cannot read the profile '{path}' ({error.strerror}): give a TOML file") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, or nested without end
        raise UsageError(f"'{path}' is not TOML: {first_line(error)}; see 'onnxqt profiles NAME' for one") from error


def _filled(path: Path, start: Any, content: Mapping[str, Any], above: tuple[str, ...]) -> Any:
    """A dataclass with the fields that `content` gives, after checking them."""
    kinds = {name: kind for name, kind in get_type_hints(type(start)).items() if name != _DERIVED}
    changed = {}
    for key, value in content.items():
        place = ".".join((*above, key))
        if key not in kinds:
            raise UsageError(f"'{path}': unknown key '{place}' = {_shown(value)}: allowed here is {', '.join(kinds)}")
        if dataclasses.is_dataclass(kinds[key]):
            if not isinstance(value, dict):
                raise UsageError(f"'{path}': {place} is {_shown(value)}: expected a table [{place}]")
            changed[key] = _filled(path, getattr(start, key), value, (*above, key))
        else:
            changed[key] = _checked(path, place, value, kinds[key])
    return dataclasses.replace(start, **changed)


def _checked(path: Path, place: str, value: Any, kind: Any) -> Any:
    """A value of the type `kind` of a field."""
    choices = _choices(kind)
    least, most = _LIMITS.get(place.split(".")[-1], (0, 0))
    if choices:
        allowed, right = f"one of {', '.join(map(_shown, choices))}", isinstance(value, str) and value in choices
    elif kind is bool:
        allowed, right = "true or false", isinstance(value, bool)
    elif kind is int:
        allowed, right = f"a whole number from {least} to {most}", type(value) is int and least <= value <= most
    elif kind is str:
        allowed, right = "text in one line", isinstance(value, str) and value.isprintable()
    elif get_origin(kind) is tuple:
        allowed, right = "a list of names", isinstance(value, list) and all(isinstance(item, str) for item in value)
    else:
        allowed, right = "a table of [scale, zero point] by operator", isinstance(value, dict)
        right = right and all(_is_grid(entry) for entry in value.values())
    if not right:
        raise UsageError(f"'{path}': {place} is {_shown(value)}: expected {allowed}")
    if isinstance(value, dict):
        return {name: (float(scale), zero_point) for name, (scale, zero_point) in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _choices(kind: Any) -> tuple[str, ...]:
    """What a Literal, or a union of them, allows; empty for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    parts = [_choices(part) for part in get_args(kind)] if get_origin(kind) is not tuple else []
    return tuple(dict.fromkeys(choice for part in parts for choice in part))


def _is_grid(entry: Any) -> bool:
    """Whether `entry` is the scale and the zero point of 8-bit codes."""
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    scale, zero_point = entry
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    return number and math.isfinite(scale) and scale > 0 and type(zero_point) is int and -128 <= zero_point <= 255


def _check_profile(path: Path, profile: Profile) -> None:
    """Check what the type of a field does not say."""
    if not _NAME.fullmatch(profile.name):
        raise UsageError(
            f"'{path}': name is {_shown(profile.name)}: expected up to 64 letters, digits, '_', '.' and '-'"
        )
    if not profile.policy.precisions:
        raise UsageError(f"'{path}': policy.precisions is []: expected at least one, such as w8a8")
    for name in profile.policy.precisions:
        try:
            parse_precision(name)
        except UsageError as error:
            raise UsageError(f"'{path}': policy.precisions: {error}") from error
    for place, operators in (("operators", profile.policy.operators), ("fixed_outputs", profile.policy.fixed_outputs)):
        for operator in operators:
            if not onnx.defs.has(operator):
                raise UsageError(
                    f"'{path}': policy.{place} has {_shown(operator)}: expected names of ONNX operators, such as Conv"
                )


def _shown(value: Any) -> str:
    """A value of a file in a message, on one line and not without end."""
    text = f"'{value}'" if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def profile_text(profile: Profile) -> str:
    """The TOML file of a profile, which `read_profile` takes back; what is as by default is in it too."""
    return "\n".join(_lines(profile, ())).strip() + "\n"


def _lines(part: Any, above: tuple[str, ...]) -> list[str]:
    """The keys of a dataclass or a mapping, then its tables."""
    items = part.items() if isinstance(part, Mapping) else [(f.name, getattr(part, f.name)) for f in fields(part)]
    plain, tables = [], []
    for name, value in items:
        if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
            place = (*above, name)
            tables += ["", f"[{'.'.join(place)}]", *_lines(value, place)]
        elif name != _DERIVED:
            plain.append(f"{name} = {_literal(value)}")
    return plain + tables


def _literal(value: Any) -> str:
    """A value in TOML; JSON writes text, numbers and truth as TOML does."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
