"""The back ends that are known, one row each."""

import dataclasses
from collections.abc import Mapping

from onnxqt.profiles.fields import Accumulator, Arithmetic, Policy, Profile

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
    average="openvino",
    mean="openvino",
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
            operators=_ALL,
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
        Policy(symmetric=True, per_channel=False, weights_float=True, operators=(*_PRODUCTS, *_POOLS, *_CLAMPS)),
        Arithmetic(levels="log16"),
        "products and sums of levels in float32; activations clipped at their extremes",
    ),
)
PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in _ROWS}
