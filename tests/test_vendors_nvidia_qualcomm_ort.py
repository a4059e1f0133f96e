"""Files for ONNX Runtime, TensorRT, Qualcomm and Quark: exact bytes, and the rules of those who read them."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable
from vendor_cases import (
    ASYM,
    BLOCKS,
    INT4,
    INT8,
    INT32,
    LOW,
    NARROW,
    SCHEMES,
    SYM,
    UINT8,
    changed,
    only,
    params,
    small_table,
)

from onnxqt.errors import ExportError, UsageError
from onnxqt.numerics import Grid
from onnxqt.table.form import Entry, NodeRef, Table
from onnxqt.vendors import FORMATS, VENDORS, Request, Written, write_vendor

GOLDEN = Path(__file__).parent / "golden" / "vendors" / "main"
Json = dict[str, Any]


def written(name: str, scheme: str = ASYM, table: Table | None = None, **options: str) -> Written:
    return write_vendor(name, Request(table or small_table(), scheme, "m", options=options))


def content(found: Written, file: str) -> Json:
    parsed: Json = json.loads(found.files[file])
    return parsed


def texts(found: Written) -> dict[str, str]:
    return {name: data.decode() for name, data in found.files.items()}


CASES = [
    *((name, scheme) for name in ("ort-cache", "ort-overrides", "tensorrt", "quark") for scheme in (ASYM, SYM, LOW)),
    *((name, scheme) for name in ("qualcomm", "qualcomm-1.0.0", "qualcomm-0.6.1") for scheme in SCHEMES),
]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_files_are_exactly_these_bytes(name: str, scheme: str) -> None:
    """Golden files, looked through by hand; the readers that `tools/check_vendors.py` runs take files made so."""
    folder = GOLDEN / f"{name}-{scheme}"
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert dict(written(name, scheme).files) == expected


@pytest.mark.parametrize("name", ["ort-cache", "ort-overrides", "ort-trt", "tensorrt", "quark"])
def test_formats_of_activations_alone_refuse_weight_only_schemes(name: str) -> None:
    with pytest.raises(ExportError, match=f"{BLOCKS} quantizes no activation, and the format holds nothing else"):
        written(name, BLOCKS)


@pytest.mark.parametrize("name", ["ort-cache", "ort-overrides", "ort-trt", "tensorrt", "quark"])
def test_activations_have_one_scale(name: str) -> None:
    table = changed(small_table(), "x", views=only(params(UINT8, [0.5] * 4, 3, axis=1)))
    with pytest.raises(ExportError, match="activation 'x' has several scales"):
        written(name, ASYM, table)


# ONNX Runtime


def test_the_cache_has_the_ends_of_grids_also_for_what_is_fused() -> None:
    data = content(written("ort-cache"), "m.ort-cache.json")["data"]
    ends = {name: (found["lowest"]["data"], found["highest"]["data"]) for name, found in data.items()}
    assert ends == {"x": (-50.0, 77.5), "r": (0.0, 63.75), "c": (0.0, 63.75), "y": (-14.0, 496.0), "m": (-14.0, 496.0)}
    data = content(written("ort-cache", SYM), "m.ort-cache.json")["data"]
    assert [data["x"][end]["data"] for end in ("lowest", "highest")] == [-128.0, 127.0]


def test_the_arguments_beside_the_cache() -> None:
    """The Softmax reads and gives out a float tensor, and so does the MatMul; the Add adds the MatMul's bias."""
    options = content(written("ort-cache"), "m.ort-options.json")
    assert options == {
        "activation_type": "QUInt8",
        "weight_type": "QInt8",
        "per_channel": True,
        "calibrate_method": "MinMax",
        "nodes_to_exclude": ["soft", "mul", "add"],
        "extra_options": {
            "ActivationSymmetric": False,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
    }
    assert content(written("ort-cache", SYM), "m.ort-options.json")["activation_type"] == "QInt8"
    low = content(written("ort-cache", LOW), "m.ort-options.json")
    assert (low["weight_type"], low["per_channel"], low["activation_type"]) == ("QInt8", False, "QUInt8")
    assert content(written("ort-overrides", LOW), "m.ort-options.json")["weight_type"] == "QInt4"


def test_averages_have_a_grid_of_their_own() -> None:
    """ONNX Runtime would lay the output of an AveragePool on the grid of its input."""
    table = changed(small_table(), "r", consumers=(NodeRef("pool", "AveragePool", 0), NodeRef("max", "MaxPool", 0)))
    assert content(written("ort-cache", ASYM, table), "m.ort-options.json")["nodes_to_exclude"] == [
        *("soft", "mul", "pool", "add")
    ]


def test_what_only_excluded_nodes_touch_is_told_to_stay_float() -> None:
    """The Add behind the MatMul is excluded, and nobody reads y; the Relu before the Softmax quantizes r."""
    sentence = "ONNX Runtime leaves 'y' float, since all nodes around them are excluded: give it the QDQ file for them"
    for name in ("ort-cache", "ort-overrides"):
        assert sentence in written(name).lost
        read = changed(small_table(), "y", consumers=(NodeRef("fc", "Gemm", 0),))
        assert not any("leaves" in each for each in written(name, ASYM, read).lost)


def test_16_bit_activations_have_their_type() -> None:
    table = changed(small_table(), "x", views=only(params(Grid(16, False), 0.5, 300)))
    found = written("ort-cache", ASYM, table)
    assert content(found, "m.ort-options.json")["activation_type"] == "QUInt16"
    assert "the tool's codes have 16 bits: 'r', 'y' keep their ranges with other steps" in found.lost


def test_without_a_bias_behind_a_matmul_nothing_is_said_of_it() -> None:
    table = changed(small_table(), "y", fused_from=())
    extra = content(written("ort-cache", ASYM, table), "m.ort-options.json")["extra_options"]
    assert "OpTypesToExcludeOutputQuantization" not in extra


def test_both_forms_of_overrides() -> None:
    scales = content(written("ort-overrides"), "m.ort-overrides.json")
    assert scales["x"] == [{"scale": 0.5, "zero_point": 100}]
    assert scales["c"] == scales["r"] == [{"scale": 0.25, "zero_point": 0}]
    assert scales["w"] == [{"scale": 0.5, "zero_point": 0, "axis": 0}, {"scale": 0.125, "zero_point": 0}]
    assert "b" not in scales  # an override would make a bias a weight
    ranges = content(written("ort-overrides", form="range"), "m.ort-overrides.json")
    assert ranges["x"] == [{"rmin": -50.0, "rmax": 77.5}]
    assert ranges["w"] == [{"rmin": -63.5, "rmax": 63.5, "axis": 0}, {"rmin": -15.875, "rmax": 15.875}]


def test_ranges_of_4_bit_weights_follow_the_16_codes_that_onnx_runtime_gives_them() -> None:
    """scale = 2 absmax / 15 there, so that absmax = 7.5 s gives s back."""
    ranges = content(written("ort-overrides", LOW, form="range"), "m.ort-overrides.json")
    assert ranges["w"] == [{"rmin": -15.0, "rmax": 15.0}]


def test_overrides_leave_blocks_out() -> None:
    table = changed(small_table(), "w", views=only(params(INT4, [[1.0, 0.5], [0.25, 2.0]], axis=1, block=32)))
    found = written("ort-overrides", ASYM, table)
    assert "w" not in content(found, "m.ort-overrides.json")
    assert found.skipped == {"s": "has no integer form", "w": "overrides have no scales per block"}


def test_overrides_of_another_shape_are_refused() -> None:
    table = changed(small_table(), "w", shape=(3, 64))
    with pytest.raises(ExportError, match=r"weight 'w': scale has the shape \[2\], but \[3\] is needed"):
        written("ort-overrides", ASYM, table)


def test_unknown_form() -> None:
    with pytest.raises(UsageError, match="unknown form 'both' of ort-overrides: give scale or range"):
        written("ort-overrides", form="both")


def test_the_tables_of_the_tensorrt_provider_hold_the_largest_magnitude() -> None:
    """ONNX Runtime's own writer takes the larger of the two ends, which is 3.1 here."""
    table = changed(small_table(), "x", views=only(params(UINT8, np.float32(6.6 / 255), 135)))
    found = written("ort-trt", ASYM, table)
    low = abs(float(np.float32(-135) * np.float32(6.6 / 255)))
    content = TrtTable.GetRootAsTrtTable(found.files["m.ort-trt.flatbuffers"], 0)
    entries = [content.Dict(index) for index in range(content.DictLength())]
    values = {entry.Key().decode(): float(entry.Value()) for entry in entries}
    assert values == {"r": 63.75, "x": pytest.approx(low, rel=1e-7), "y": 496.0}
    assert np.float32(values["x"]) == np.float32(low)
    lines = dict(line.split(" ") for line in found.files["m.ort-trt.cache"].decode().splitlines())
    assert {name: float(value) for name, value in lines.items()} == values
    assert (
        found.lost[0] == "the format is symmetric: the ranges of 'x', 'r', 'y' are widened to their largest magnitude"
    )


def test_symmetric_tables_lose_no_symmetry() -> None:
    for name in ("ort-trt", "tensorrt"):
        assert not any("symmetric" in sentence for sentence in written(name, SYM).lost)


# TensorRT


def read_cache(data: bytes) -> dict[str, np.float32]:
    """What ModelOpt's reader does with a cache: the first line is skipped, every other is split once."""
    found = {}
    for line in data.decode().split("\n")[1:]:
        if line:
            name, digits = line.split(": ")
            found[name] = np.float32(struct.unpack("!f", bytes.fromhex(digits))[0])
    return found


def test_the_cache_has_own_scales_where_they_are_symmetric_and_magnitudes_over_127_elsewhere() -> None:
    assert texts(written("tensorrt", SYM))["m.cache"] == (
        "TRT-100300-EntropyCalibration2\nx: 3f800000\nr: 3f000000\nc: 3f000000\ny: 40800000\n"
    )
    asym = read_cache(written("tensorrt").files["m.cache"])
    assert asym == {
        name: np.float32(wide / 127) for name, wide in (("x", 77.5), ("r", 63.75), ("c", 63.75), ("y", 496))
    }


def test_small_scales_have_all_eight_digits_and_are_never_zero() -> None:
    table = changed(small_table(), "x", views=only(params(UINT8, np.float32(1e-39), 128)))
    digits = written("tensorrt", ASYM, table).files["m.cache"].decode().splitlines()[1].split(": ")[1]
    assert len(digits) == 8
    assert digits == "00800000"  # the least normal float32


def test_the_cache_ends_with_one_line_break() -> None:
    data = written("tensorrt").files["m.cache"]
    assert data.endswith(b"\n")
    assert b"\n\n" not in data


def test_ranges_and_layers_for_tensorrt() -> None:
    found = texts(written("tensorrt"))
    assert found["m.ranges.txt"] == "x: 77.5\nr: 63.75\nc: 63.75\ny: 496.0\n"
    assert json.loads(found["m.ranges.json"]) == {"act_quant_info": {"x": 77.5, "r": 63.75, "c": 63.75, "y": 496.0}}
    assert found["m.layers.txt"] == "--precisionConstraints=prefer --layerPrecisions=soft:fp16,mul:fp16\n"


def test_options_of_tensorrt() -> None:
    found = texts(written("tensorrt", version="8601", algorithm="MinMaxCalibration", float="fp32"))
    assert found["m.cache"].startswith("TRT-8601-MinMaxCalibration\n")
    assert "soft:fp32" in found["m.layers.txt"]


@pytest.mark.parametrize("version", ["110000", "", "10.3", "\uff18\uff16\uff10\uff11", "0", "-8601", "1" * 5000])
def test_versions_without_a_cache(version: str) -> None:
    with pytest.raises(UsageError, match="of TensorRT reads no cache: give one under 110000, such as 8601 or 100300"):
        written("tensorrt", version=version)


@pytest.mark.parametrize(("option", "value"), [("algorithm", "Entropy"), ("float", "int8")])
def test_unknown_options_of_tensorrt(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"unknown {option} '{value}' for tensorrt: give "):
        written("tensorrt", ASYM, None, **{option: value})


def test_a_model_without_float_layers_needs_no_argument() -> None:
    entries = tuple(entry for entry in small_table().entries if entry.name != "s")
    assert "m.layers.txt" not in written("tensorrt", ASYM, Table(entries, SCHEMES)).files


def test_layers_that_an_argument_cannot_name_are_told() -> None:
    nodes = (NodeRef("a,b", "Softmax", 0), (NodeRef("ok", "MatMul", 0), NodeRef("/c:0", "MatMul", 0)))
    found = written("tensorrt", ASYM, changed(small_table(), "s", producer=nodes[0], consumers=nodes[1]))
    assert found.files["m.layers.txt"].endswith(b"--layerPrecisions=ok:fp16\n")
    assert "layers 'a,b', '/c:0' cannot be named in an argument: set their precision in code" in found.lost


def test_names_with_colons_are_written_and_told() -> None:
    found = written("tensorrt", ASYM, changed(small_table(), "x", aliases={"tensorrt": "x:0"}))
    assert read_cache(found.files["m.cache"])["x:0"] == np.float32(77.5 / 127)
    assert any("end the names" in sentence or "ends the names 'x:0'" in sentence for sentence in found.lost)


@pytest.mark.parametrize(("alias", "title"), [("x: 0", "a ':' before a blank"), ("x\n", "a control character")])
def test_names_that_break_a_cache(alias: str, title: str) -> None:
    with pytest.raises(ExportError, match=f"as it has {title}: give it an alias for 'tensorrt' in the table"):
        written("tensorrt", ASYM, changed(small_table(), "x", aliases={"tensorrt": alias}))


def test_what_lies_before_a_bias_has_no_range_for_tensorrt() -> None:
    """m + b is not m: only a Relu or Clip leaves the range that matters as it is."""
    assert "m" not in read_cache(written("tensorrt").files["m.cache"])


# Qualcomm


def test_version_2_has_the_words_of_onnx() -> None:
    encodings = {found["name"]: found for found in content(written("qualcomm"), "m.encodings")["encodings"]}
    assert encodings["x"] == {"name": "x", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 100}
    assert encodings["r"] == {"name": "r", "output_dtype": "uint8", "y_scale": 0.25}
    assert encodings["w"] == {"name": "w", "output_dtype": "int8", "y_scale": [0.5, 0.125], "axis": 0}
    assert encodings["b"] == {"name": "b", "output_dtype": "int32", "y_scale": [0.25, 0.0625], "axis": 0}
    assert encodings.keys() == {"x", "r", "y", "w", "b"}  # neither what is fused nor what stays float


def test_blocks_in_version_2() -> None:
    found = written("qualcomm", BLOCKS)
    (weight,) = content(found, "m.encodings")["encodings"]
    blocks = [[1.0, 0.5], [0.25, 2.0]]
    assert weight == {"name": "w", "output_dtype": "int4", "y_scale": blocks, "axis": 1, "block_size": 32}
    assert set(found.skipped) == {"x", "r", "s", "y"}


def test_signed_activations_become_unsigned() -> None:
    encodings = {found["name"]: found for found in content(written("qualcomm", SYM), "m.encodings")["encodings"]}
    assert encodings["x"] == {"name": "x", "output_dtype": "uint8", "y_scale": 1.0, "y_zero_point": 128}
    old = content(written("qualcomm-0.6.1", SYM), "m-0.6.1.encodings")
    assert old["activation_encodings"]["x"] == [
        {
            **{"bitwidth": 8, "dtype": "int", "is_symmetric": "False"},
            **{"min": -128.0, "max": 127.0, "scale": 1.0, "offset": -128},
        }
    ]


def test_old_offsets_belong_to_unsigned_codes() -> None:
    old = content(written("qualcomm-0.6.1"), "m-0.6.1.encodings")
    weight = old["param_encodings"]["w"]
    assert [(found["offset"], found["scale"], found["min"], found["max"]) for found in weight] == [
        (-128, 0.5, -64.0, 63.5),
        (-128, 0.125, -16.0, 15.875),
    ]
    assert {found["is_symmetric"] for found in weight} == {"True"}  # a string: a boolean would mean unsigned
    assert old["activation_encodings"]["x"][0]["offset"] == -100
    assert old["activation_encodings"]["s"] == [{"bitwidth": 16, "dtype": "float"}]
    new = {found["name"]: found for found in content(written("qualcomm-1.0.0"), "m-1.0.0.encodings")["param_encodings"]}
    assert (new["w"]["offset"], new["w"]["is_sym"], new["w"]["enc_type"]) == ([-128, -128], True, "PER_CHANNEL")
    assert new["b"]["offset"] == [-(2**31)] * 2
    low = content(written("qualcomm-0.6.1", LOW), "m-0.6.1.encodings")
    assert [found["offset"] for found in low["param_encodings"]["w"]] == [-8]


@pytest.mark.parametrize(
    ("shape", "axis", "scales", "flat"),
    [
        ((2, 64), 1, [[1.0, 0.5], [0.25, 2.0]], [1.0, 0.5, 0.25, 2.0]),  # (out, in)
        ((64, 2), 0, [[1.0, 0.5], [0.25, 2.0]], [1.0, 0.25, 0.5, 2.0]),  # (in, out), written as (out, in)
    ],
)
def test_blocks_in_version_1(shape: tuple[int, ...], axis: int, scales: list[list[float]], flat: list[float]) -> None:
    blocks = only(params(INT4, scales, axis=axis, block=32), BLOCKS)
    found = written("qualcomm-1.0.0", BLOCKS, changed(small_table(), "w", shape=shape, views=blocks))
    (weight,) = content(found, "m-1.0.0.encodings")["param_encodings"]
    assert (weight["enc_type"], weight["block_size"], weight["scale"]) == ("PER_BLOCK", 32, flat)
    assert any("AIMET's converter refuses 'w': write 'qualcomm' for it" in sentence for sentence in found.lost)


@pytest.mark.parametrize(
    ("version", "shape", "scales", "reason"),
    [
        ("1.0.0", (2, 40), [[1.0, 0.5]] * 2, "has no last block that is shorter than 32"),
        ("1.0.0", (2, 64, 3), np.ones((2, 2, 3)), "has no blocks for each place of a kernel"),
        ("0.6.1", (2, 64), [[1.0, 0.5]] * 2, "has no scales per block"),
    ],
)
def test_blocks_that_old_versions_cannot_say(version: str, shape: tuple[int, ...], scales: Any, reason: str) -> None:
    blocks = only(params(INT4, scales, axis=1, block=32), BLOCKS)
    found = written(f"qualcomm-{version}", BLOCKS, changed(small_table(), "w", shape=shape, views=blocks))
    assert found.skipped["w"] == f"version {version} {reason}: write 'qualcomm'"
    assert not content(found, f"m-{version}.encodings")["param_encodings"]


def with_second_bias(scale: float) -> Table:
    table = small_table()
    first = next(entry for entry in table.entries if entry.name == "b")
    views = only(params(INT32, [scale, 0.0625], axis=0))
    second = Entry("b", "bias", (2,), None, (NodeRef("other", "Conv", 2),), views=views)
    return Table((*table.entries, second), SCHEMES) if first else table


def test_a_bias_of_several_nodes_is_written_once_or_not_at_all() -> None:
    same, other = written("qualcomm", ASYM, with_second_bias(0.25)), written("qualcomm", ASYM, with_second_bias(0.5))
    names = [[found["name"] for found in content(each, "m.encodings")["encodings"]] for each in (same, other)]
    assert [each.count("b") for each in names] == [1, 0]
    assert other.skipped["b"] == "several nodes add this bias, each on a grid of its own"


def test_a_bias_whose_value_serves_many_channels_is_left_out() -> None:
    found = written("qualcomm", ASYM, changed(small_table(), "b", shape=(1,)))
    assert found.skipped["b"] == "1 value(s) of a bias serve channels on 2 grids"


def test_float_weights_are_told() -> None:
    table = Table((*small_table().entries, Entry("v", "weight", (3, 3), reason="not constant enough")), SCHEMES)
    assert content(written("qualcomm-0.6.1", ASYM, table), "m-0.6.1.encodings")["param_encodings"]["v"] == [
        {"bitwidth": 16, "dtype": "float"}
    ]
    found = written("qualcomm", ASYM, table)
    assert found.skipped["v"] == "not constant enough"
    assert "the converter needs --float_fallback to leave 's', 'v' so" in found.lost[0]


def test_axes_that_shapes_do_not_tell() -> None:
    for version in ("0.6.1", "1.0.0"):
        assert not any("axis" in sentence for sentence in written(f"qualcomm-{version}").lost)
        square = written(f"qualcomm-{version}", ASYM, changed(small_table(), "w", shape=(2, 2)))
        assert any("the shapes of 'w' do not tell it" in sentence for sentence in square.lost)
    assert written("qualcomm", ASYM, changed(small_table(), "w", shape=(2, 2))).lost == written("qualcomm").lost


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (only(params(NARROW, [0.5, 0.5, 0.5], axis=0)), r"'w': scale has the shape \[3\], but \[2\] is needed"),
        (only(params(INT8, 0.5, 200)), r"'w': a zero point lies outside of \[-128, 127\]"),
        (only(params(NARROW, [0.5, 0.5], axis=3)), "'w': axis 3 is none of its 2 axes"),
    ],
)
def test_encodings_that_a_reader_would_refuse_or_misread(views: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        written("qualcomm", ASYM, changed(small_table(), "w", views=views))


def test_losses_of_encodings_name_what_has_them() -> None:
    assert "Hexagon has activations of 8 and 16 bits: the converter may refuse 'r'" in written("qualcomm", LOW).lost
    assert not any("Hexagon" in sentence for sentence in written("qualcomm").lost)
    odd = written("qualcomm", ASYM, changed(small_table(), "w", views=only(params(Grid(5, True), 0.5))))
    assert "codes have 4, 8, 16 or 32 bits: 'w' keep their scales in the next width" in odd.lost


# Quark


def test_ranges_for_quark() -> None:
    found = written("quark", ASYM, version="0.14")
    parsed = content(found, "m.quark.json")
    assert parsed["quark_version"] == "0.14"
    assert parsed["tensors_range"] == {
        **{"x": [-50.0, 77.5], "r": [0.0, 63.75], "c": [0.0, 63.75]},
        **{"y": [-14.0, 496.0], "m": [-14.0, 496.0]},
    }
    assert not any("powers of two" in sentence for sentence in found.lost)
    odd = written("quark", ASYM, changed(small_table(), "x", views=only(params(UINT8, 0.3, 5))))
    assert "scales of 'x' are no powers of two: XINT8 configurations round them to such" in odd.lost


# All of them


def test_every_format_has_one_row() -> None:
    assert len(VENDORS) == len(FORMATS)
    assert all(vendor.name == name and vendor.usage and vendor.title for name, vendor in VENDORS.items())


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("dla", {}, "unknown format 'dla': give one of ort-cache, ort-overrides"),
        ("quark", {"scheme": "w2a8-sym-pt"}, "the table has no scheme w2a8-sym-pt: give one of w8a8-asym-pc"),
        ("quark", {"template": b"{}"}, "quark takes no template: leave it out"),
        ("tensorrt", {"options": {"x": "1"}}, "tensorrt has no option 'x': it has version, algorithm, float"),
        ("qualcomm", {"options": {"x": "1"}}, "qualcomm has no option 'x': it has none"),
    ],
)
def test_requests_that_cannot_be_met(name: str, request_: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_vendor(name, Request(**{"table": small_table(), "scheme": ASYM, "stem": "m", **request_}))


def test_writing_twice_gives_the_same_bytes() -> None:
    for name, scheme in (*CASES, ("ort-trt", ASYM)):
        assert written(name, scheme).files == written(name, scheme).files
