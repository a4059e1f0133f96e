"""Files for the tools of edge vendors: exact bytes for one small table, and the rules of those who read them."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from onnxqt.errors import ExportError, OnnxqtError, UsageError
from onnxqt.numerics import Grid, QParams
from onnxqt.table.form import Entry, NodeRef, Table, View
from onnxqt.vendors import ascend, hailo, mnn, ncnn, nncase, prototext, rockchip, sophgo, tidl
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.layers import layers
from onnxqt.vendors.patch import Edit, edited

GOLDEN = Path(__file__).parent / "golden" / "vendors" / "edge"
FORMATS: dict[str, Vendor] = {
    vendor.name: vendor
    for module in (ascend, hailo, mnn, ncnn, nncase, rockchip, sophgo, tidl)
    for vendor in module.FORMATS
}
SYM, ASYM, LOW, BLOCKS = "w8a8-sym-pc", "w8a8-asym-pt", "w4a4-asym-pc", "w4af-sym-b32"
INT8, NARROW8, UINT8 = Grid(8, True), Grid(8, True, narrow=True), Grid(8, False)
NARROW4, UINT4 = Grid(4, True, narrow=True), Grid(4, False)


def params(grid: Grid, scale: Any, zero_point: int = 0, axis: int | None = None, block: int | None = None) -> QParams:
    scales = np.asarray(scale, np.float32)
    return QParams(scales, np.full(scales.shape, zero_point, np.int32), grid, axis, block)


def activation(name: str, shape: tuple[int, ...], steps: tuple[float, float, int], **facts: Any) -> Entry:
    """An entry with a view per scheme: the scale of the symmetric one, scale and zero point of the asymmetric one."""
    symmetric, asymmetric, zero_point = steps
    views = (
        View((SYM,), params(INT8, symmetric)),
        View((ASYM,), params(UINT8, asymmetric, zero_point)),
        View((LOW,), params(UINT4, asymmetric * 17, round(zero_point / 17))),
    )
    return Entry(name, facts.pop("role", "activation"), shape, views=views, **facts)


def weight(name: str, shape: tuple[int, ...], scales: list[float], node: NodeRef) -> Entry:
    views = (
        View((SYM,), params(NARROW8, scales, axis=0)),
        View((ASYM,), params(NARROW8, max(scales))),
        View((LOW,), params(NARROW4, [16 * scale for scale in scales], axis=0)),
    )
    return Entry(name, "weight", shape, consumers=(node,), views=views)


def small_table() -> Table:
    """x -> Conv c -> Relu r -> depthwise Conv d -> (float pooling p) -> Gemm y."""
    return Table(
        entries=(
            activation("x", (1, 3, 8, 8), (0.03, 0.025, 140), role="input", consumers=(NodeRef("conv0", "Conv", 0),)),
            activation(
                "r",
                (1, 4, 8, 8),
                (0.05, 0.0234375, 0),
                producer=NodeRef("relu0", "Relu", 0),
                consumers=(NodeRef("conv1", "Conv", 0),),
                fused_from=("c",),
            ),
            activation(
                "d",
                (1, 4, 8, 8),
                (0.1, 0.09, 100),
                producer=NodeRef("conv1", "Conv", 0),
                consumers=(NodeRef("gap0", "GlobalAveragePool", 0),),
            ),
            Entry(
                "p",
                "activation",
                (1, 4),
                NodeRef("gap0", "GlobalAveragePool", 0),
                (NodeRef("flat0", "Flatten", 0),),
                reason="no integer form",
            ),
            activation(
                "f",
                (1, 4),
                (0.1, 0.09, 100),
                producer=NodeRef("flat0", "Flatten", 0),
                consumers=(NodeRef("gemm0", "Gemm", 0),),
            ),
            activation("y", (1, 2), (0.2, 0.15, 77), role="output", producer=NodeRef("gemm0", "Gemm", 0)),
            Entry("c", "activation", (1, 4, 8, 8), NodeRef("conv0", "Conv", 0)),
            weight("w", (4, 3, 3, 3), [0.01, 0.02, 0.03, 0.04], NodeRef("conv0", "Conv", 1)),
            weight("dw", (4, 1, 3, 3), [0.1, 0.2, 0.3, 0.4], NodeRef("conv1", "Conv", 1)),
            weight("gw", (2, 4), [0.005, 0.0025], NodeRef("gemm0", "Gemm", 1)),
            Entry("b", "bias", (4,), consumers=(NodeRef("conv0", "Conv", 2),)),
            Entry("gb", "bias", (2,), consumers=(NodeRef("gemm0", "Gemm", 2),)),
        ),
        schemes=(SYM, ASYM, LOW),
    )


def matrices() -> Table:
    """Two products with matrices without a bias: one in blocks of 32 along its first axis, one per channel."""
    blocks = params(NARROW4, np.float32(2.0) ** -np.arange(1, 7).reshape(2, 3), axis=0, block=32)
    rows = params(Grid(5, True, narrow=True), [0.25, 0.5], axis=0)
    return Table(
        entries=(
            Entry("x", "input", (1, 40), consumers=(NodeRef("mm", "MatMul", 0), NodeRef("fc", "Gemm", 0))),
            Entry("y", "output", (1, 3), NodeRef("mm", "MatMul", 0)),
            Entry("z", "output", (1, 2), NodeRef("fc", "Gemm", 0)),
            Entry("mw", "weight", (40, 3), None, (NodeRef("mm", "MatMul", 1),), views=(View((BLOCKS,), blocks),)),
            Entry("fw", "weight", (2, 130), None, (NodeRef("fc", "Gemm", 1),), views=(View((BLOCKS,), rows),)),
        ),
        schemes=(BLOCKS,),
    )


def changed(table: Table, name: str, **facts: Any) -> Table:
    return replace(table, entries=tuple(replace(e, **facts) if e.name == name else e for e in table.entries))


def with_view(table: Table, name: str, own: QParams) -> Table:
    return changed(table, name, views=(View((SYM,), own),))


def write(name: str, scheme: str = SYM, table: Table | None = None, template: bytes | None = None) -> Written:
    written: Written = FORMATS[name].write(Request(table or small_table(), scheme, "m", template))
    return written


def template(name: str) -> bytes:
    return (GOLDEN / "templates" / name).read_bytes()


TEMPLATES = {"tidl": "tidl.prototxt", "rockchip": "rockchip.cfg", "hailo": "hailo.json"}


def text(name: str, scheme: str = SYM, table: Table | None = None) -> str:
    written = write(name, scheme, table, template(TEMPLATES[name]) if name in TEMPLATES else None)
    return next(iter(written.files.values())).decode()


# The bytes

CASES = [
    *(
        (name, scheme, None)
        for name in ("ncnn", "sophgo", "mnn", "nncase", "ascend", "hailo")
        for scheme in (SYM, ASYM)
    ),
    *((name, LOW, None) for name in ("ncnn", "sophgo", "mnn", "hailo")),
    *((name, SYM, file) for name, file in TEMPLATES.items()),
    *((name, ASYM, file) for name, file in TEMPLATES.items()),
    ("nncase", SYM, "nncase.json"),
    ("mnn", SYM, "mnn.json"),
]


@pytest.mark.parametrize(("name", "scheme", "file"), CASES)
def test_files_are_these_bytes(name: str, scheme: str, file: str | None) -> None:
    written = write(name, scheme, template=template(file) if file else None)
    folder = GOLDEN / f"{name}{'-patched' if file else ''}-{scheme}"
    assert sorted(written.files) == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        assert written.files[path.name] == path.read_bytes()


def test_matrices_in_blocks_are_these_bytes() -> None:
    """Blocks lie behind each other for each output; 5 bits are stored as 6, and one scale stands for every block."""
    written = write("ncnn-llm", BLOCKS, matrices())
    assert written.files["m.llm.table"] == (
        b"mm_param_1 bits=4 block=32 method=minmax 2 16 4 32 8 64\nfc_param_1 bits=6 block=128 method=minmax 4 4 2 2\n"
    )
    assert written.lost == ("ncnn stores 4, 6 or 8 bits: 'fw' keep their codes in the next of these",)


def test_writing_twice_gives_the_same_bytes() -> None:
    for name in FORMATS:
        if name != "ncnn-llm":
            assert text(name) == text(name)


@pytest.mark.parametrize("vendor", FORMATS.values(), ids=FORMATS)
def test_every_format_says_how_it_is_used(vendor: Vendor) -> None:
    assert vendor.baked
    assert vendor.title
    assert "BAKED" in vendor.usage or "STEM" in vendor.usage


# Layers


def test_a_layer_has_what_it_reads_and_what_is_fused_behind_it() -> None:
    found = {layer.node.node: layer for layer in layers(small_table(), SYM)}
    conv, depthwise, gemm = found["conv0"], found["conv1"], found["gemm0"]
    assert (conv.input and conv.input.name, conv.output and conv.output.name) == ("x", "r")
    assert (conv.bias and conv.bias.name, depthwise.bias) == ("b", None)
    assert (conv.groups, depthwise.groups, gemm.groups) == (1, 4, None)
    assert (conv.channels, depthwise.channels, gemm.channels) == (4, 4, 2)


@pytest.mark.parametrize("output", ["conv0_output_0", "conv0:0", "conv0"])
def test_a_fused_tensor_without_an_entry_is_known_by_how_exporters_call_it(output: str) -> None:
    table = small_table()
    table = replace(table, entries=tuple(entry for entry in table.entries if entry.name != "c"))
    assert layers(table, SYM)[0].output is None
    found = layers(changed(table, "r", fused_from=(output,)), SYM)[0].output
    assert found is not None
    assert found.name == "r"


def test_what_computes_a_tensor_goes_before_how_exporters_call_it() -> None:
    table = small_table()
    table = replace(table, entries=tuple(entry for entry in table.entries if entry.name != "c"))
    table = changed(table, "x", fused_from=("conv0",))  # a name that misleads
    found = layers(changed(table, "r", computed_by=NodeRef("conv0", "Conv", 0)), SYM)[0].output
    assert found is not None
    assert found.name == "r"


def test_scales_per_tensor_are_repeated_for_each_channel() -> None:
    found = {layer.node.node: layer for layer in layers(small_table(), ASYM)}
    for node, channels in (("conv0", 4), ("gemm0", 2)):
        scales = found[node].channel_scales
        assert scales is not None
        np.testing.assert_array_equal(scales, np.full(channels, found[node].weight_params.scale))


# ncnn


def ncnn_rows(content: str) -> dict[str, list[float]]:
    """A table as `read_int8scale_table` reads it: blanks part words, and an empty line ends it."""
    rows = {}
    for line in content.split("\n"):
        words = [word for word in line.split(" ") if word]
        if not words:
            break
        rows[words[0]] = [float(word) for word in words[1:]]
    return rows


def test_ncnn_scales_are_reciprocals_of_ours() -> None:
    rows = ncnn_rows(text("ncnn"))
    assert list(rows) == ["conv0_param_0", "conv1_param_0", "gemm0_param_0", "conv0", "conv1", "gemm0"]
    for layer in layers(small_table(), SYM):
        expected = (1 / layer.weight_params.scale.astype(np.float64)).astype(np.float32)
        np.testing.assert_array_equal(np.array(rows[f"{layer.node.node}_param_0"], np.float32), expected)
        assert layer.input_params is not None
        scale = layer.input_params.scale
        np.testing.assert_array_equal(np.array(rows[layer.node.node], np.float32), [np.float32(1 / np.float64(scale))])


def test_an_asymmetric_range_is_widened_for_ncnn() -> None:
    """x covers [-3.5, 2.875], so 127 / 3.5."""
    written = write("ncnn", ASYM)
    assert ncnn_rows(written.files["m.table"].decode())["conv0"] == [pytest.approx(127 / 3.5, rel=2**-23)]
    assert written.lost == (
        "the format is symmetric: the ranges of 'x', 'r', 'f' are widened to their largest magnitude",
    )
    assert write("ncnn", SYM).lost == ()


def test_ncnn_has_one_scale_for_each_group_of_a_convolution() -> None:
    """A grouped convolution with two outputs in each group: the largest scale of both, and that is said."""
    table = changed(small_table(), "w", shape=(4, 1, 3, 3))
    table = changed(table, "x", shape=(1, 2, 8, 8))
    written = write("ncnn", SYM, table)
    assert ncnn_rows(written.files["m.table"].decode())["conv0_param_0"] == [50.0, 25.0]
    assert "ncnn has one scale for each group of a convolution: the largest of the group for 'w'" in written.lost


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"consumers": (NodeRef("conv0", "ConvTranspose", 1),)}, "no int8 layer for a ConvTranspose"),
        ({"shape": (4, 3, 3)}, "no int8 layer for a Conv whose weight has 3 axes"),
        ({"views": (View((SYM,), params(UINT8, 0.1)),)}, "the format has no zero points of weights"),
        ({"views": (View((SYM,), params(NARROW8, np.ones((4, 1, 3, 3)), axis=1, block=32)),)}, "no scales per block"),
    ],
)
def test_what_ncnn_cannot_hold_is_skipped_with_a_reason(change: dict[str, Any], reason: str) -> None:
    written = write("ncnn", SYM, changed(small_table(), "w", **change))
    assert reason in written.skipped["w"]
    assert "conv0" not in written.files["m.table"].decode()


def test_a_layer_whose_input_stays_float_has_no_row() -> None:
    written = write("ncnn", SYM, changed(small_table(), "x", views=(), reason="asked for"))
    assert written.skipped["w"] == "its input stays float"
    assert written.skipped["x"] == "asked for"


@pytest.mark.parametrize("name", ["a b", "#a", "a_param_1", "schön", "a" * 250])
def test_names_that_break_an_ncnn_table_are_refused(name: str) -> None:
    with pytest.raises(ExportError, match=r"cannot be a name in a file for ncnn.*give it an alias for 'ncnn'"):
        write("ncnn", SYM, changed(small_table(), "r", aliases={"ncnn": name}))


def test_an_alias_is_the_name_of_an_ncnn_layer() -> None:
    rows = ncnn_rows(text("ncnn", table=changed(small_table(), "r", aliases={"ncnn": "conv_7"})))
    assert {"conv_7", "conv_7_param_0"} <= rows.keys()
    assert "conv0" not in rows


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mw", {"consumers": (NodeRef("mm", "MatMul", 0),)}, "multiplies by from the right"),
        ("mw", {"views": (View((BLOCKS,), params(NARROW4, np.ones((3, 3)), axis=0, block=16)),)}, "blocks of 32, 64"),
        ("mw", {"views": (View((BLOCKS,), params(UINT4, np.ones((2, 3)), axis=0, block=32)),)}, "symmetric weights"),
        ("fw", {"views": (View((BLOCKS,), params(NARROW4, 0.5)),), "shape": (3, 130)}, "along which axis"),
    ],
)
def test_matrices_that_have_no_blocks_are_skipped(name: str, change: dict[str, Any], reason: str) -> None:
    written = write("ncnn-llm", BLOCKS, changed(matrices(), name, **change))
    assert reason in written.skipped[name]


def test_a_gemm_with_a_bias_is_skipped() -> None:
    table = matrices()
    bias = Entry("b", "bias", (2,), consumers=(NodeRef("fc", "Gemm", 2),))
    assert "without a bias" in write("ncnn-llm", BLOCKS, replace(table, entries=(*table.entries, bias))).skipped["fw"]


# Sophgo

ROW = re.compile(r"\S+\s+[-0-9.e]+\s+[-0-9.e]+\s+[-0-9.e]+")  # cali_pattern of ImportCalibration.cpp


def sophgo_sections(content: str) -> dict[str, list[str]]:
    """Lines by the section that the last line with a '#' began; comments before the first row do not count."""
    found: dict[str, list[str]] = {"": []}
    section = ""
    for line in content.splitlines():
        if line.startswith("#"):
            section = line if found[""] else ""
            found.setdefault(section, [])
        else:
            found[section].append(line)
    return found


@pytest.mark.parametrize("scale", [2.0**-40, 1e-7, 0.1, 3e5, 1e20])
def test_numbers_of_sophgo_never_have_an_exponent_and_give_the_scale_back(scale: float) -> None:
    """What its pattern does not match is ignored without a word; an int8 consumer divides by 127 or by 255."""
    table = with_view(small_table(), "x", params(INT8, scale))
    for line in sophgo_sections(text("sophgo", table=table))[""]:
        assert ROW.fullmatch(line)
        assert "e" not in line.partition(" ")[2]
        assert all(len(word.partition(".")[2]) >= 7 for word in line.split(" ")[1:])
    threshold, low, high = (float(word) for word in text("sophgo", table=table).splitlines()[2].split(" ")[1:])
    assert np.float32(threshold / 127) == np.float32(scale)
    assert np.float32((high - low) / 255) == np.float32(scale)
    assert round(-low / float(scale)) == 128


@pytest.mark.parametrize("zero_point", [0, 1, 100, 128, 254, 255])
def test_ends_of_sophgo_give_scale_and_zero_point_back(zero_point: int) -> None:
    table = with_view(small_table(), "x", params(UINT8, 0.0371, zero_point))
    threshold, low, high = (float(word) for word in text("sophgo", table=table).splitlines()[2].split(" ")[1:])
    assert np.float32((high - low) / 255) == np.float32(0.0371)
    assert round(-low / np.float64(np.float32(0.0371))) == zero_point
    assert np.float32(threshold) == np.float32(max(zero_point, 255 - zero_point)) * np.float32(0.0371)


def test_names_of_sophgo_have_the_operator_behind_them() -> None:
    names = [line.split(" ")[0] for line in sophgo_sections(text("sophgo"))[""]]
    assert names == ["x", "r_Relu", "d_Conv", "f_Flatten", "y_Gemm"]
    rows = sophgo_sections(text("sophgo"))["#weight_scale"]
    assert [row.split(" ")[:2] for row in rows] == [
        ["r_Relu_weight", "4"],
        ["d_Conv_weight", "4"],
        ["y_Gemm_weight", "2"],
    ]


def test_scales_of_weights_are_the_last_section_and_never_the_only_one() -> None:
    """The reader in Python stops at `#asym_op` and `#int4_th` alone, and takes what comes before for ranges."""
    for scheme in (SYM, ASYM, LOW):
        sections = [section for section in sophgo_sections(text("sophgo", scheme)) if section]
        assert sections[-1] == "#weight_scale"
        assert len(sections) > 1


def test_four_bit_activations_have_ranges_of_their_own_for_sophgo() -> None:
    sections = sophgo_sections(text("sophgo", LOW))
    assert [line.split(" ")[0] for line in sections["#int4_th"]] == ["x", "r_Relu", "d_Conv", "f_Flatten", "y_Gemm"]
    assert "#int4_th" not in sophgo_sections(text("sophgo", ASYM))


def test_asymmetric_operators_are_named_where_others_are_symmetric() -> None:
    assert sophgo_sections(text("sophgo", SYM))["#asym_op"] == []
    assert sophgo_sections(text("sophgo", ASYM))["#asym_op"] == []  # all are: --asymmetric says it
    mixed = with_view(small_table(), "r", params(UINT8, 0.02, 3))
    assert sophgo_sections(text("sophgo", table=mixed))["#asym_op"] == ["r_Relu", "d_Conv"]


def test_what_stays_float_is_in_the_table_of_precisions() -> None:
    written = write("sophgo")
    assert written.files["m_qtable"] == b"# op_name quantize_mode\np_GlobalAveragePool F32\n"
    assert written.skipped["p"] == "no integer form"
    table = small_table()
    without = replace(table, entries=tuple(entry for entry in table.entries if entry.name != "p"))
    assert list(write("sophgo", table=without).files) == ["m_cali_table"]


def test_products_stay_symmetric_in_tpu_mlir() -> None:
    table = changed(small_table(), "d", producer=NodeRef("conv1", "Mul", 0))
    sentence = "the tool keeps products symmetric: the ranges of 'd' are widened to their largest magnitude"
    assert sentence in write("sophgo", ASYM, table).lost
    assert sentence not in write("sophgo", SYM, table).lost
    assert sentence not in write("sophgo", ASYM).lost


# MNN


def test_mnn_has_signed_codes() -> None:
    layer = json.loads(text("mnn", ASYM))["algo"][0]["quantParams"]["layer"][0]
    assert layer["input"] == [
        {"name": "x", "bits": 8, "scales": [0.025], "zeroPoint": 12, "clampMin": -128, "clampMax": 127}
    ]
    assert layer["weight"][0]["scales"] == [0.04] * 4
    assert (layer["weight"][0]["clampMin"], layer["weight"][0]["clampMax"]) == (-127, 127)
    assert (layer["opName"], layer["output"][0]["name"]) == ("c", "r")
    low = json.loads(text("mnn", LOW))["algo"][0]["quantParams"]["layer"][1]
    assert (low["output"][0]["clampMin"], low["output"][0]["clampMax"], low["output"][0]["bits"]) == (-8, 7, 4)


def test_mnn_has_the_bits_alone_of_a_weight_between_floats() -> None:
    """The converter would ignore scales there."""
    written = write("mnn", BLOCKS, matrices())
    (algo,) = json.loads(written.files["m.mnn.json"])["algo"]
    assert algo["quantParams"]["layer"] == [
        {"opName": "y__matmul_converted", "weight": [{"name": "mw", "bits": 4, "asymmetric": False, "blockSize": 32}]},
        {"opName": "z__matmul_converted", "weight": [{"name": "fw", "bits": 5, "asymmetric": False}]},
    ]
    assert written.lost == (
        "scales of 'mw', 'fw' are not in the file: MNN finds them from the values of the baked model",
    )


def test_a_template_of_mnn_keeps_what_the_table_does_not_know() -> None:
    written = write("mnn", template=template("mnn.json"))
    found = json.loads(written.files["m.mnn.json"])
    before = json.loads(template("mnn.json"))["algo"][0]["quantParams"]["layer"]
    after = found["algo"][0]["quantParams"]["layer"]
    assert found["forGuide"] is False
    assert after[2] == before[2]
    assert [layer["conv"] for layer in after] == [layer["conv"] for layer in before]
    assert written.lost == (
        "not in the table, so as the template has it: 'other'",
        "not in the template, so not in the file: 'd'",
    )


@pytest.mark.parametrize(
    "content", [b"{}", b'{"algo": [{}]}', b'{"algo": [{"quantParams": {"layer": [{}]}}]}', b'{"algo": 1}']
)
def test_templates_of_mnn_that_cannot_be_used(content: bytes) -> None:
    with pytest.raises(ExportError, match=r"the template has no algo\[\]\.quantParams\.layer\[\]\.opName"):
        write("mnn", template=content)


def test_a_layer_of_unknown_output_is_left_out_of_mnn() -> None:
    table = small_table()
    table = replace(table, entries=tuple(entry for entry in table.entries if entry.name != "c"))
    assert "does not tell which tensor" in write("mnn", table=table).skipped["w"]


# TIDL

TIDL = {
    "Tensor": {"min": (1, "float"), "max": (2, "float"), "size": (3, "uint32"), "element_type": (4, "uint32")}
    | {"scale": (5, "double*"), "zero_point": (6, "uint32*"), "value": (7, "double*")},
    "Layer": {"layer_name": (1, "string"), "layer_type": (2, "string"), "bit_depth": (3, "uint32")}
    | {name: (4 + i, ".Tensor*") for i, name in enumerate(("outputs", "weights", "bias", "slope"))},
    "Net": {
        "num_layers": (1, "int32"),
        "quant_type": (2, ".Type"),
        "calib_type": (3, ".Calib"),
        "layers": (4, ".Layer*"),
    },
}
AMCT = {
    "Single": {"scale_d": (1, "float"), "offset_d": (2, "int32"), "scale_w": (3, "float*"), "offset_w": (4, "int32*")},
    "Entry": {"key": (1, "string"), "value": (2, ".Single")},
    "Record": {"record": (1, ".Entry*")},
}
ENUMS = {"Type": ("SYMMETRIC", "ASYMMETRIC"), "Calib": ("PERTENSOR", "PERCHANNEL")}


def message(package: str, forms: dict[str, dict[str, tuple[int, str]]], content: str) -> Any:
    """Text as protobuf itself reads it, with messages of our own making; the last of them is the whole."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto2")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number + 1)
    for name, fields in forms.items():
        form = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = form.field.add(name=field, number=number, label=3 if kind.endswith("*") else 1)
            kind = kind.rstrip("*")
            if kind.startswith("."):
                added.type_name = f".{package}{kind}"
                added.type = 14 if kind[1:] in ENUMS else 11
            else:
                added.type = {"double": 1, "float": 2, "int32": 5, "string": 9, "uint32": 13}[kind]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{list(forms)[-1]}"))()
    return text_format.Parse(content, made)


def tidl_layers(content: str) -> dict[str, Any]:
    return {layer.layer_name: layer for layer in message("tidl", TIDL, content).layers}


def test_protobuf_reads_the_ranges_of_tidl() -> None:
    found = tidl_layers(text("tidl"))
    small = small_table()
    for name in ("x", "r", "d"):
        entry = small.entry(name)
        own = entry.params(SYM) if entry else None
        assert own is not None
        (tensor,) = found[name].outputs
        assert (tensor.min, tensor.max) == (-np.float32(127) * own.scale, np.float32(127) * own.scale)
    (tensor,) = found["r"].weights  # one range for all channels
    assert (tensor.min, tensor.max) == (-np.float32(127) * np.float32(0.04), np.float32(127) * np.float32(0.04))
    assert [tensor.max for tensor in found["d"].weights] == [
        np.float32(127) * np.float32(scale) for scale in (0.1, 0.2, 0.3, 0.4)
    ]


def test_tidl_changes_nothing_but_ranges() -> None:
    before, after = template("tidl.prototxt").decode(), text("tidl")
    number = r"-?\d[-+0-9.e]*"
    ends = re.compile(rf"((?:min|max): ){number}")
    assert ends.sub(r"\1_", before) == ends.sub(r"\1_", after)
    ours, theirs = tidl_layers(after), tidl_layers(before)
    assert str(ours["pool"]) == str(theirs["pool"])
    assert str(ours["r"].bias) == str(theirs["r"].bias)


def test_tidl_says_what_it_leaves() -> None:
    written = write("tidl", ASYM, template=template("tidl.prototxt"))
    assert written.lost[0] == "not in the table, so as the template has it: 'pool'"
    assert "TIDL is symmetric: the ranges of 'x', 'd' are widened to their largest magnitude" in written.lost
    assert any(
        "calibrates all layers again, as the template lacks ranges or values in 'pool'" in s for s in written.lost
    )
    assert not any("scales per channel" in sentence for sentence in written.lost)


def test_a_range_of_tidl_stays_below_flt_max() -> None:
    table = with_view(small_table(), "x", params(INT8, 1e37))
    with np.errstate(over="ignore"), pytest.raises(ExportError, match="reaches FLT_MAX, which TIDL takes for no range"):
        write("tidl", table=table, template=template("tidl.prototxt"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.replace("num_layers: 4", "num_layers: 3"), "says num_layers 3 but has 4"),
        (lambda t: t.replace('"x"', '"other"').replace('"r"', '"o"').replace("'d'", '"p"'), "none of the names"),
        (lambda t: t[:-2], "is not protobuf text, as it ends too early"),
        (lambda t: t.replace("quant_type:", "quant_type"), "line 3 of the template is not protobuf text, near 'SYMM"),
        (lambda t: "layers {" * 40, "nests more than 16"),
        (lambda t: 'layer_name: "open\n', "line 1 of the template is not protobuf text"),
        (lambda t: "$", "is not protobuf text, near '\\$'"),
        (lambda t: "\udcff", "not UTF-8"),
    ],
)
def test_templates_of_tidl_that_cannot_be_used(change: Callable[[str], str], error: str) -> None:
    content = change(template("tidl.prototxt").decode()).encode(errors="surrogateescape")
    with pytest.raises(ExportError, match=error):
        write("tidl", template=content)


@pytest.mark.parametrize("name", ["tidl", "rockchip"])
def test_formats_that_patch_need_a_template(name: str) -> None:
    with pytest.raises(UsageError, match="give it as the template"):
        write(name)


# Ascend


@pytest.mark.parametrize("scheme", [SYM, ASYM])
def test_protobuf_reads_the_records_of_ascend(scheme: str) -> None:
    records = {entry.key: entry.value for entry in message("amct", AMCT, text("ascend", scheme)).record}
    assert list(records) == ["conv0", "conv1", "gemm0"]
    for layer in layers(small_table(), scheme):
        found, own = records[layer.node.node], layer.input_params
        assert own is not None
        assert found.scale_d == own.scale
        assert found.offset_d == int(own.zero_point) - (0 if own.grid.signed else 128)
        assert -128 <= found.offset_d <= 127
        assert list(found.scale_w) == np.ravel(layer.weight_params.scale).tolist()
        assert list(found.offset_w) == [0] * len(found.scale_w)


def test_names_of_nodes_are_escaped_for_ascend() -> None:
    table = changed(small_table(), "r", aliases={"ascend": 'a "quoted" \\ näme'})
    assert message("amct", AMCT, text("ascend", table=table)).record[0].key == 'a "quoted" \\ näme'


def test_scales_beyond_the_bounds_of_ascend() -> None:
    tiny = params(NARROW8, [2.0**-40, 0.01, 0.01, 0.01], axis=0)
    written = write("ascend", table=with_view(small_table(), "w", tiny))
    found = message("amct", AMCT, written.files["m.record.txt"].decode()).record[0].value
    assert found.scale_w[0] == ascend.EPSILON
    assert any(
        "smaller ones, of channels that are nearly 0, are raised to that in 'w'" in line for line in written.lost
    )
    for scale in (2.0**-24, 2.0**24):
        skipped = write("ascend", table=with_view(small_table(), "x", params(INT8, scale))).skipped
        assert skipped["w"] == "AMCT takes scales from 2^-23 to 2^23 only"


def test_ascend_has_8_bit_inputs_only() -> None:
    with pytest.raises(ExportError, match="AMCT's record has no form for any weight that w4a4-asym-pc quantizes"):
        write("ascend", LOW)


# Hailo

COMMAND = re.compile(  # as in the scripts of hailo_model_zoo
    r"quantization_param\(\[[\w./-]+\], "
    r"(?:force_range_(?:in|out)=\[-?\d+\.\d+, -?\d+\.\d+\](?:, force_range_index=\d+)?"
    r"|precision_mode=a(?:8_w4|16_w16))\)"
)


@pytest.mark.parametrize("scheme", [SYM, ASYM, LOW])
def test_lines_of_a_hailo_script(scheme: str) -> None:
    for line in text("hailo", scheme).splitlines():
        assert COMMAND.fullmatch(line)


def test_hailo_layers_are_found_by_their_original_names() -> None:
    written = write("hailo", template=template("hailo.json"))
    lines = written.files["m.alls"].decode().splitlines()
    assert lines == [
        "quantization_param([net/conv1], force_range_in=[-3.84, 3.81])",
        "quantization_param([net/conv1], force_range_out=[-6.4, 6.35])",
        "quantization_param([net/dw1], force_range_out=[-12.8, 12.7])",
        "quantization_param([net/fc1], force_range_out=[-25.6, 25.4])",
    ]
    assert written.skipped["f"] == "no layer computes or reads it alone"


def test_an_input_of_a_hailo_layer_with_several_has_an_index() -> None:
    content = json.loads(template("hailo.json"))
    content["layers"]["net/conv1"]["input"] = ["net/other", "net/input_layer1"]
    content["layers"]["net/other"] = {"type": "const_input", "original_names": ["k"]}
    written = write("hailo", template=json.dumps(content).encode())
    assert "force_range_in=[-3.84, 3.81], force_range_index=1)" in written.files["m.alls"].decode()
    assert "not in the table, so as the template has it: 'net/other'" in written.lost


def test_hailo_without_a_template_says_that_names_are_wrong() -> None:
    written = write("hailo")
    assert any("called like nodes of the ONNX file" in sentence for sentence in written.lost)
    assert "quantization_param([relu0], force_range_out=" in written.files["m.alls"].decode()


def test_precisions_of_hailo() -> None:
    assert "precision_mode" not in text("hailo", SYM)
    assert text("hailo", LOW).count("precision_mode=a8_w4") == 3
    wide = with_view(small_table(), "x", params(Grid(16, True), 0.001))
    assert "quantization_param([net/conv1], precision_mode=a16_w16)" in text("hailo", table=wide)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"layers": []}', "has no object 'layers'"),
        (b'{"layers": {"net/a": {"original_names": ["z"]}}}', "none of the names of the template \\('net/a'\\)"),
    ],
)
def test_templates_of_hailo_that_cannot_be_used(content: bytes, error: str) -> None:
    with pytest.raises(ExportError, match=error):
        write("hailo", template=content)


def test_names_that_a_hailo_script_cannot_have_are_refused() -> None:
    with pytest.raises(ExportError, match="letters that a model script has a meaning for"):
        write("hailo", table=changed(small_table(), "r", aliases={"hailo": "a], b"}))


# Rockchip


def test_rockchip_changes_nothing_but_ranges() -> None:
    before, after = template("rockchip.cfg").decode(), text("rockchip")
    old, new = before.splitlines(), after.splitlines()
    assert len(old) == len(new)
    changes = {number + 1: line.strip() for number, (line, was) in enumerate(zip(new, old, strict=True)) if line != was}
    assert changes == {
        9: "- -3.84",
        11: "- 3.81",
        20: "min: [-1.27, -2.54,",
        21: "-3.81, -5.08]",
        22: "max: [1.27, 2.54, 3.81, 5.08]  # per channel",
        27: "min: [-6.4]",
        28: "max: [6.35]",
        31: "min: [-12.8]",
        32: "max: [12.7]",
    }


def test_line_ends_of_a_template_stay() -> None:
    content = template("rockchip.cfg").replace(b"\n", b"\r\n")
    written = write("rockchip", template=content).files["m.quantization.cfg"]
    assert written.replace(b"\r\n", b"\n") == text("rockchip").encode()
    assert written.count(b"\r\n") == written.count(b"\n")


def test_rockchip_says_what_it_leaves() -> None:
    lost = " ".join(write("rockchip", template=template("rockchip.cfg")).lost)
    assert "not in the table, so as the template has it: 'p-rs'" in lost
    assert "since it has other numbers of ranges than the table: 'y'" in lost
    assert "what the template does not keep in int8 have no effect: 'd'" in lost
    assert "those of 'dw', 'gw' follow from the values of the baked model" in lost


@pytest.mark.parametrize("scale", [0.03, 0.0371, 1e-6])
@pytest.mark.parametrize("grid", [INT8, NARROW8])
def test_a_consumer_of_255_steps_finds_the_scale_again(scale: float, grid: Grid) -> None:
    table = with_view(small_table(), "r", params(grid, scale))
    places = {place.name: place for place in rockchip.parameters(text("rockchip", table=table))}
    content = text("rockchip", table=table)
    low, high = (float(content[slice(*ends.spans[0])]) for ends in (places["r"].min, places["r"].max))
    assert np.float32((np.float64(np.float32(high)) - np.float64(np.float32(low))) / 255) == np.float32(scale)
    assert round(-low / scale) == 128


def test_keys_of_a_configuration() -> None:
    """Names may hold colons, quotes and blanks; items stand in brackets, over lines or one a line."""
    content = """quantize_parameters:
  'it''s a:b':  # quoted
    min: -1.0
    max:
      - 1.0  # one a line
  onnx::Conv_1:
    max: [1.0, 2.0]
    min: [-1.0,
      -2.0]
  "no range":
    min: [0.0]
other:
  x: {min: 1}
"""
    found = {place.name: place for place in rockchip.parameters(content)}
    assert list(found) == ["it's a:b", "onnx::Conv_1"]
    spans = found["it's a:b"].min.spans + found["it's a:b"].max.spans + found["onnx::Conv_1"].min.spans
    assert [content[slice(*span)] for span in spans] == ["-1.0", "1.0", "-1.0", "-2.0"]


def test_a_line_of_colons_is_read_in_no_time() -> None:
    """A pattern that goes back over the line would take hours for this."""
    assert list(rockchip.parameters("quantize_parameters:\n  a" + ":" * 1_000_000 + "x\n")) == []


def test_a_template_without_parameters_is_refused() -> None:
    with pytest.raises(ExportError, match="has no 'quantize_parameters:'"):
        write("rockchip", template=b"custom_quantize_layers: {}\n")
    with pytest.raises(ExportError, match="none of the names of the template \\(it has none\\)"):
        write("rockchip", template=b"quantize_parameters:\n")


# nncase


def test_nncase_patches_names_that_it_knows() -> None:
    written = write("nncase", template=template("nncase.json"))
    outputs = json.loads(written.files["m.QuantScheme.json"])["Outputs"]
    before = json.loads(template("nncase.json"))["Outputs"]
    assert outputs[0]["DataRange"] == [{"Min": -3.84, "Max": 3.81, "IsFull": False}]
    assert (outputs[1], outputs[3]) == (before[1], before[3])
    assert outputs[2]["DataType"] == "u8"
    assert written.lost[0] == "not in the table, so as the template has it: 'Const_7', 'p'"
    assert written.skipped["d"] == "the template has no entry for it"


def test_weights_of_nncase_need_an_alias() -> None:
    assert "give it an alias for 'nncase'" in write("nncase").skipped["w"]
    outputs = json.loads(text("nncase", table=changed(small_table(), "w", aliases={"nncase": "Const_7"})))["Outputs"]
    assert outputs[-1] == {
        "Name": "Const_7",
        "DataType": "i8",
        "DataRange": [{"Min": -x, "Max": x, "IsFull": False} for x in (1.27, 2.54, 3.81, 5.08)],
        "DataRangeMode": "by_channel",
    }


def test_nncase_without_a_template_needs_activations() -> None:
    with pytest.raises(ExportError, match="w4af-sym-b32 quantizes no activation: choose another scheme"):
        write("nncase", BLOCKS, matrices())


def test_a_template_of_nncase_must_have_outputs() -> None:
    with pytest.raises(ExportError, match="no list 'Outputs' of named entries"):
        write("nncase", template=b"{}")


# Templates


def test_edits_keep_what_lies_between_them() -> None:
    assert edited("abcdef", [Edit(4, 5, ""), Edit(1, 2, "XYZ")]) == "aXYZcdf"
    assert edited("ab", []) == "ab"
    for edits in ([Edit(0, 2, ""), Edit(1, 2, "")], [Edit(1, 3, "")], [Edit(1, 0, "")]):
        with pytest.raises(ValueError, match="overlaps another or lies outside the text"):
            edited("ab", edits)


def test_a_template_that_is_too_large_is_refused() -> None:
    with pytest.raises(ExportError, match="larger than 16 MiB"):
        write("hailo", template=b" " * ((16 << 20) + 1))


def test_values_of_protobuf_text() -> None:
    tree = prototext.parse(
        "a: 1 # b: 2\nc { d: 'x\\'\\303\\244\\x41\\n' d: \"y\" } e: [-inf, 2.5e-3] f <g: TRUE>; h: [{i: 1}]"
    )
    assert [field.name for field in tree.fields] == ["a", "c", "e", "e", "f", "h"]
    assert prototext.unquoted(tree.all("c")[0].all("d")[0].text) == "x'äA\n"
    assert tree.all("c")[0].value("d") == "y"
    assert [field.text for field in tree.all("e")] == ["-inf", "2.5e-3"]
    assert tree.all("f")[0].value("g") == "TRUE"
    assert tree.all("h")[0].value("i") == "1"


@pytest.mark.parametrize("content", ["a: [1", "a {", "a: }", "{}", "a: ,", "1: 2", "a: [ , 1]"])
def test_text_that_is_no_message_is_refused(content: str) -> None:
    with pytest.raises(ExportError, match="line 1 of the template is not protobuf text"):
        prototext.parse(content)


# All


NOTHING = {
    "ascend": "AMCT's record has no form for any weight that w8a8-sym-pc quantizes: choose another scheme",
    "hailo": "no layer has a range or precision under w8a8-sym-pc",
    "mnn": "MNN has no form for any weight that w8a8-sym-pc quantizes: choose another scheme",
    "ncnn": "ncnn has no int8 form for any weight that w8a8-sym-pc quantizes: choose another scheme",
    "ncnn-llm": "ncnn has no form in blocks for any weight that w8a8-sym-pc quantizes: choose another scheme",
    "nncase": "the table has none of the names of the template \\('x', 'Const_7', 'r' and 1 more\\)",
    "rockchip": "the table has none of the names of the template \\('x', 'w', 'r' and 3 more\\)",
    "sophgo": "w8a8-sym-pc quantizes no activation, and a calibration table has nothing else",
    "tidl": "the table has none of the names of the template \\('x', 'r', 'd' and 1 more\\)",
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_table_with_nothing_to_write_is_one_line(name: str) -> None:
    file = {**TEMPLATES, "nncase": "nncase.json", "mnn": "mnn.json"}.get(name)
    table = replace(small_table(), entries=tuple(replace(entry, views=()) for entry in small_table().entries))
    with pytest.raises(OnnxqtError, match=NOTHING[name]) as caught:
        write(name, table=table, template=template(file) if file else None)
    assert "\n" not in str(caught.value)


NODES = {"x": "conv0", "r": "conv1", "f": "gemm0"}  # by the input that belongs to the name of each
STANDS = {
    "ncnn": NODES,
    "ascend": NODES,
    "hailo": {"x": r"net/conv1], force_range_in", "r": r"net/conv1], force_range_out", "d": "net/dw1", "y": "net/fc1"},
    "sophgo": {"x": "\nx ", "r": "r_Relu", "d": "d_Conv", "f": "f_Flatten", "y": "y_Gemm"},
    **{name: {tensor: f'"{tensor}"' for tensor in "xrdfy"} for name in ("mnn", "nncase")},
}


@pytest.mark.parametrize("name", STANDS)
def test_every_activation_is_written_or_skipped_with_a_reason(name: str) -> None:
    written = write(name, template=template(TEMPLATES[name]) if name in TEMPLATES else None)
    content = next(iter(written.files.values())).decode()
    for tensor in ("x", "r", "d", "f", "y"):
        inside = tensor in STANDS[name]
        assert inside != (tensor in written.skipped)
        assert not inside or STANDS[name][tensor] in content
    assert written.skipped["p"] == "no integer form"
