"""Tables of other tools, laid over ours. Where the golden files come from is in their folder's README."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from table_cases import SCHEMES, entry, net, table

from onnxqt.calibrate import bias_scale, range_params
from onnxqt.errors import ExportError
from onnxqt.numerics import Grid, QParams
from onnxqt.table import Entry, Table, View, import_table, merge_tables, read_table, table_quantizers, write_table
from onnxqt.table.views import by_scheme, same_params
from onnxqt.vendors import Request, write_vendor

GOLDEN = Path(__file__).parent / "golden" / "table"
SYM, ASYM, NARROW = "w8a8-sym-pc", "w8a8-asym-pc", "w4a4-asym-pc"
SIGNED, UNSIGNED = Grid(8, signed=True), Grid(8, signed=False)

Json = dict[str, Any]


def params(of: Table, name: str, scheme: str) -> QParams:
    found = entry(name, of).params(scheme)
    assert found is not None
    return found


def imported(of: Table) -> set[str]:
    return {found.name for found in of.entries if found.source == "imported"}


def expect(of: Table, scheme: str, expected: Mapping[str, QParams]) -> None:
    """The entries that were given, and all else as it was."""
    for name, wanted in expected.items():
        assert same_params(params(of, name, scheme), wanted), name
    for found, before in zip(of.entries, table().entries, strict=True):
        others = {key: value for key, value in by_scheme(found).items() if key != scheme}
        assert all(same_params(value, by_scheme(before)[key]) for key, value in others.items() if found.role != "bias")
        assert found.name in expected or found.source != "imported"
        assert found.stats is before.stats


def given(scale: float, zero_point: int, grid: Grid) -> QParams:
    return QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), grid)


def over(low: float, high: float, grid: Grid) -> QParams:
    """A grid over a range, whose ends are float32 as tensors are."""
    return range_params(float(np.float32(low)), float(np.float32(high)), grid)


# --- ONNX Runtime ---------------------------------------------------------------------------------------

# Of the file that onnxruntime 1.32.0 quantized with this cache: QUInt8 activations have the same scales.
ORT_SCALES = {"x": 0.028629176, "r": 0.020559719, "q": 0.05498529, "y": 0.31774518}


@pytest.mark.parametrize("scheme", [SYM, ASYM])
def test_a_cache_that_onnxruntime_wrote(scheme: str) -> None:
    path = GOLDEN / "onnxruntime_1.32.json"
    found, unused = import_table(path, table(), scheme)
    ranges = {
        name: (data["lowest"]["data"][0], data["highest"]["data"][0])
        for name, data in json.loads(path.read_text())["data"].items()
    }
    assert {"c", "t", "a", "e", "s"} < set(ranges)  # it has fused and float tensors as well
    assert unused == []
    grid = SIGNED if scheme == SYM else UNSIGNED
    expect(found, scheme, {name: range_params(*ranges[name], grid) for name in "xrmgfpozqy"})
    assert imported(found) == set("xrmgfpozqy")


def test_scales_of_the_cache_are_those_that_onnxruntime_computes() -> None:
    """Its own arithmetic is float32: (highest - lowest) / 255 may differ by one unit in the last place."""
    found, _ = import_table(GOLDEN / "onnxruntime_1.32.json", table(), ASYM)
    for name, scale in ORT_SCALES.items():
        np.testing.assert_array_max_ulp(params(found, name, ASYM).scale, np.float32(scale), maxulp=1)


def cache(**data: Any) -> Json:
    return {"CLS": "TensorsData", "data": data, "calibration_method": "MinMax"}


def saved(folder: Path, content: Any) -> Path:
    path = folder / "foreign"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_cache_with_plain_numbers_and_per_channel_arrays(tmp_path: Path) -> None:
    channels = {"data": [[-1.0], [-2.0]], "dtype": "float32", "CLS": "numpy.array"}
    content = cache(x={"lowest": channels, "highest": {"data": 4, "dtype": "float32"}}, y={"lowest": -1, "highest": 1})
    found, _ = import_table(saved(tmp_path, content), table(), ASYM)
    expect(found, ASYM, {"x": range_params(-2, 4, UNSIGNED), "y": range_params(-1, 1, UNSIGNED)})


# --- ranges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "ranges", "lacking"),
    [
        ("quark.json", {"x": (-2.0, 3.1), "r": (0.0, 6.0), "m": (0.0, 6.0)}, "gone"),
        ("pairs.json", {"x": (-1.0, 1.0), "q": (0.0, 6.375)}, "elsewhere"),
    ],
)
@pytest.mark.parametrize("scheme", [SYM, ASYM, NARROW])
def test_ranges_are_laid_over_the_grids_of_the_scheme(
    file: str, ranges: Mapping[str, tuple[float, float]], lacking: str, scheme: str
) -> None:
    """'c' is fused into 'r', 'm' shares the grid of 'r', and inputs keep 8 bits where activations have 4."""
    found, unused = import_table(GOLDEN / file, table(), scheme)
    assert unused == [lacking]
    grids = {name: params(table(), name, scheme).grid for name in ranges}
    expect(found, scheme, {name: over(*ends, grids[name]) for name, ends in ranges.items()})
    if scheme == NARROW:
        assert [grids[name].bits for name in ranges][:2] == [8, 4]


def test_the_range_of_all_codes_gives_its_scale_back(tmp_path: Path) -> None:
    """[-128 s, 127 s] is what INT8 quantizers tell; [-127 s, 127 s] is what the table tells of the same grid."""
    scale = np.float32(0.029720526)
    for least in (-128, -127):
        ends = [float(str(np.float32(code) * scale)) for code in (least, 127)]
        found, _ = import_table(saved(tmp_path, {"x": ends}), table(), SYM)
        assert same_params(params(found, "x", SYM), given(float(scale), 0, SIGNED))
    found, _ = import_table(saved(tmp_path, {"x": [-128.5 * float(scale), 127 * float(scale)]}), table(), SYM)
    assert params(found, "x", SYM).scale > scale * np.float32(1.01)  # any other range is laid about zero


def test_ends_are_float32(tmp_path: Path) -> None:
    """Of the double 5.242728 the scale would be one unit in the last place less."""
    scale = np.float32(0.020559719)
    assert np.float32(5.242728 / 255) < scale == np.float32(float(np.float32(5.242728)) / 255)
    found, _ = import_table(saved(tmp_path, {"r": [0.0, 5.242728]}), table(), ASYM)
    assert params(found, "r", ASYM).scale == scale


WRITERS = {  # how the name of the file ends
    "ort-cache": "ort-cache.json",
    "quark": "quark.json",
    "tensorrt": ".cache",
    "qualcomm-0.6.1": ".encodings",
    "qualcomm-1.0.0": ".encodings",
    "qualcomm": ".encodings",
}


@pytest.mark.parametrize(
    ("vendor", "scheme"),
    [
        (vendor, scheme)
        for vendor in WRITERS
        for scheme in (SYM, ASYM, "w4a8-sym-pc")
        if (vendor, scheme) != ("tensorrt", ASYM)  # it has no zero points
    ],
)
def test_what_our_writers_write_reads_back_bit_by_bit(vendor: str, scheme: str, tmp_path: Path) -> None:
    """Over a table in which all activations, and some weights, have other scales."""
    files = write_vendor(vendor, Request(table(), scheme, "m")).files
    (raw,) = (content for name, content in files.items() if name.endswith(WRITERS[vendor]))
    other, _ = import_table(GOLDEN / "qualcomm-2.0.0.json", table(), scheme)
    weights = Table(tuple(found for found in other.entries if found.role == "weight"), (scheme,))
    ranges = {name: [-1.0, 1.0] for name in "xrgpozqy"}
    changed, _ = import_table(saved(tmp_path, ranges), merge_tables(table(), weights), scheme)
    found, unused = import_table(saved(tmp_path, raw.decode()), changed, scheme)
    assert unused == []
    for name, role in ((before.name, before.role) for before in table().entries if before.views):
        if role not in ("weight", "bias") or name in "uv":
            assert not same_params(params(changed, name, scheme), params(table(), name, scheme))
        if role not in ("weight", "bias") or (role == "weight" and vendor.startswith("qualcomm")):
            assert same_params(params(found, name, scheme), params(table(), name, scheme)), name


def test_ranges_over_powers_of_two_have_scales_that_are(tmp_path: Path) -> None:
    powers = (View((SYM,), given(2.0**-5, 0, SIGNED)),)
    base = Table((Entry("x", "input", views=powers), Entry("y", "output", views=powers)), (SYM,))
    result, _ = import_table(saved(tmp_path, {"x": [-1.0, 1.0]}), base, SYM)
    assert same_params(params(result, "x", SYM), given(2.0**-6, 0, SIGNED))  # 1 / 127 is more than 2^-7
    result, _ = import_table(saved(tmp_path, "TRT-8601-MinMaxCalibration\nx: 3c010204\n"), base, SYM)
    assert same_params(params(result, "x", SYM), given(2.0**-6, 0, SIGNED))  # 0x3c010204 is 1 / 127


def test_names_of_vendors_are_found_by_their_alias(tmp_path: Path) -> None:
    named = merge_tables(table(), Table((Entry("y", "output", aliases={"mnn": "y__out"}),), ()))
    found, unused = import_table(saved(tmp_path, {"y__out": [-1.0, 1.0]}), named, SYM)
    assert unused == []
    assert same_params(params(found, "y", SYM), range_params(-1, 1, SIGNED))


def test_a_range_for_a_weight_or_a_float_tensor_is_passed_over(tmp_path: Path) -> None:
    found, unused = import_table(saved(tmp_path, {"w": [-1.0, 1.0], "s": [0.0, 1.0]}), table(), SYM)
    assert unused == []
    expect(found, SYM, {})


# --- TensorRT -------------------------------------------------------------------------------------------


def test_a_tensorrt_cache_gives_the_same_bits_on_signed_grids() -> None:
    """'q' has the scale 0: nothing was seen of it. A layer of TensorRT alone is no tensor of the model."""
    found, unused = import_table(GOLDEN / "tensorrt.cache", table(), SYM)
    assert unused == ["(Unnamed Layer* 3) [Shuffle]_output"]
    bits = {"x": "3cf37876", "r": "3ca00000", "m": "3ca00000", "y": "3e800000", "p": "3dcccccd"}
    scales = {name: struct.unpack(">f", bytes.fromhex(digits))[0] for name, digits in bits.items()}
    expect(found, SYM, {name: given(scale, 0, SIGNED) for name, scale in scales.items()})


def test_a_tensorrt_cache_gives_ranges_on_other_grids() -> None:
    """From 0 where calibration saw nothing below it, as behind the Relu."""
    found, _ = import_table(GOLDEN / "tensorrt.cache", table(), ASYM)
    relu, other = 127 * 0.01953125, 127 * 0.25
    expect(
        found,
        ASYM,
        {
            "r": range_params(0.0, relu, UNSIGNED),
            "m": range_params(0.0, relu, UNSIGNED),
            "y": range_params(-other, other, UNSIGNED),
            "x": params(found, "x", ASYM),
            "p": params(found, "p", ASYM),
        },
    )
    narrow, _ = import_table(GOLDEN / "tensorrt.cache", table(), NARROW)
    assert same_params(params(narrow, "r", NARROW), range_params(0.0, relu, Grid(4, signed=False)))


def test_digits_of_a_scale_may_lack_leading_zeros(tmp_path: Path) -> None:
    text = "TRT-8601-MinMaxCalibration\nx: 800000\n\ny: 3C000000\n"
    found, _ = import_table(saved(tmp_path, text), table(), SYM)
    expect(found, SYM, {"x": given(2.0**-126, 0, SIGNED), "y": given(2.0**-7, 0, SIGNED)})


# --- Qualcomm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
@pytest.mark.parametrize("scheme", [SYM, ASYM])
def test_encodings_give_their_scales_exactly(version: str, scheme: str) -> None:
    """Codes that count from 0 move by half of them on signed grids: zero point 127 becomes -1, and 0 becomes -32768."""
    found, unused = import_table(GOLDEN / f"qualcomm-{version}.json", table(), scheme)
    assert unused == ["q", "gone"]  # 'q' is float there
    wide = (
        given(0.0001, -(1 << 15), Grid(16, signed=True)) if scheme == SYM else given(0.0001, 0, Grid(16, signed=False))
    )
    weights = np.array([0.01, 0.02, 0.03, 0.04, 0.05], np.float32)
    expected = {
        "x": given(0.02, -1, SIGNED) if scheme == SYM else given(0.02, 127, UNSIGNED),
        "r": wide,
        "m": wide,
        "u": QParams(weights, np.zeros(5, np.int32), Grid(8, signed=True, narrow=True), 1),
    }
    if version == "2.0.0":
        blocks = np.arange(1, 11, dtype=np.float32).reshape(2, 5) / np.float32(10)
        expected["v"] = QParams(blocks, np.zeros((2, 5), np.int32), Grid(4, signed=True, narrow=True), 0, 4)
    expect(found, scheme, expected)


def test_biases_follow_encodings() -> None:
    found, _ = import_table(GOLDEN / "qualcomm-2.0.0.json", table(), SYM)
    of_u, of_v = (bias for bias in found.entries if bias.name == "shared")
    assert of_v.params(SYM) is None  # blocks
    expected = bias_scale(params(found, "u", SYM), params(found, "f", SYM).scale, 5)
    shown = of_u.params(SYM)
    assert shown is not None
    np.testing.assert_array_equal(shown.scale, expected)


def two(*entries: Json, version: str = "2.0.0") -> Json:
    return {"version": version, "encodings": list(entries)}


def test_a_scale_for_a_whole_weight(tmp_path: Path) -> None:
    content = two(
        {"name": "u", "output_dtype": "int8", "y_scale": 0.5}, {"name": "x", "output_dtype": "int8", "y_scale": 1}
    )
    found, _ = import_table(saved(tmp_path, content), table(), ASYM)
    assert same_params(params(found, "u", ASYM), given(0.5, 0, Grid(8, signed=True, narrow=True)))
    assert same_params(params(found, "x", ASYM), given(1, 128, UNSIGNED))


def test_the_lowest_zero_point_leaves_a_narrow_grid(tmp_path: Path) -> None:
    content = two({"name": "u", "output_dtype": "int8", "y_scale": 0.5, "y_zero_point": -128})
    found, _ = import_table(saved(tmp_path, content), table(), SYM)
    assert same_params(params(found, "u", SYM), given(0.5, -128, SIGNED))


def one(folder: Path, **changes: Any) -> Path:
    """An encoding of version 1.0.0 for the weight 'w'."""
    encoding = {"name": "w", "dtype": "INT", "bw": 8, "enc_type": "PER_CHANNEL", "scale": [1] * 6, "offset": [-128] * 6}
    content = {"version": "1.0.0", "activation_encodings": [], "param_encodings": [{**encoding, **changes}]}
    return saved(folder, content)


@pytest.mark.parametrize("scheme", [SYM, "w8a8-asym-pt"])
def test_an_axis_that_the_file_does_not_say_is_that_of_the_table(scheme: str, tmp_path: Path) -> None:
    found, _ = import_table(one(tmp_path), table(), scheme)
    assert params(found, "w", scheme).axis == 0


def test_an_axis_that_nobody_knows(tmp_path: Path) -> None:
    """The base has scales per tensor alone, so the shape 6 x 2 x 3 x 3 decides: 6 is one axis, 3 could be two."""
    weights = net().quantizers("w8a8-sym-pt").weights
    base = Table((Entry("w", "weight", (6, 2, 3, 3), views=(View((SYM,), weights["w"]),)),), (SYM,))
    found, _ = import_table(one(tmp_path), base, SYM)
    assert params(found, "w", SYM).axis == 0
    path = one(tmp_path, scale=[1] * 3, offset=[-128] * 3)
    with pytest.raises(
        ExportError, match=r"tensor 'w': the axis of its 3 scales is unclear: import into a scheme per ch"
    ):
        import_table(path, base, SYM)


# --- our own --------------------------------------------------------------------------------------------


def test_a_table_of_ours_gives_the_views_of_one_scheme(tmp_path: Path) -> None:
    source = tmp_path / "other.json"
    changed, _ = import_table(GOLDEN / "pairs.json", table(), SYM)
    changed, _ = import_table(GOLDEN / "pairs.json", changed, ASYM)
    write_table(changed, source)
    found, unused = import_table(source, table(), SYM)
    assert unused == []
    assert same_params(params(found, "x", SYM), range_params(-1, 1, SIGNED))
    assert same_params(params(found, "x", ASYM), params(table(), "x", ASYM))
    small = Table(tuple(e for e in table().entries if e.name != "y"), SCHEMES)
    assert import_table(source, small, SYM)[1] == ["y"]
    with pytest.raises(ExportError, match="the table to import has no scheme new: name one of w8a8-sym-pc"):
        import_table(source, merge_tables(table(), Table((), ("new",))), "new")


@pytest.mark.parametrize("file", sorted(path.name for path in GOLDEN.iterdir() if path.suffix in (".json", ".cache")))
def test_what_was_imported_can_be_written_and_exported(file: str, tmp_path: Path) -> None:
    found, _ = import_table(GOLDEN / file, table(), ASYM)
    write_table(found, tmp_path / "table.json")
    read = read_table(tmp_path / "table.json")
    quantizers = table_quantizers(read, net().plan, ASYM)
    for name, shown in quantizers.activations.items():
        assert same_params(shown, params(found, name, ASYM))


# --- refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "is no table that can be read: give a calibration cache of ONNX Runtime or TensorRT, ranges of Quark"),
        ({"x": 3}, "is no table that can be read"),
        ("x: 3ce4e8a0", "is not JSON"),
        ({"format": "onnxqt.quant_table", "version": "9"}, "is not a table of version 1.0"),
        ({"x": [1]}, r"'x' must be a list of two numbers, not \[1\]"),
        ({"x": [1, "2"]}, "tensor 'x': 'max' must be a finite number, not '2'"),
        ({"x": [2, 1]}, "tensor 'x': its least value 2 is larger than its largest 1"),
        ({"x": [0, 1e39]}, "tensor 'x': its range is too large for float32"),
        ({"tensors_range": []}, "'tensors_range' must be an object"),
        ({"CLS": "TensorsData"}, "'data' is missing"),
        (cache(x=3), "data: 'x' must be an object, not 3"),
        (cache(x={"lowest": 1}), "tensor 'x': 'highest' is missing"),
        (cache(x={"lowest": {"data": []}, "highest": 1}), "tensor 'x', lowest: 'data' must be numbers"),
        (cache(x={"lowest": {"data": ["a"]}, "highest": 1}), "tensor 'x', lowest: 'data' must be numbers"),
        ("TRT-8601-MinMaxCalibration\nx 3ce4e8a0", "line 2 is not 'name: scale' in hexadecimal digits"),
        ("TRT-8601-MinMaxCalibration\nx: 3ce4e8a00", "line 2 is not 'name: scale'"),
        ("TRT-8601-MinMaxCalibration\nx: 3ce4e8a0\nx: 3ce4e8a0", "line 3: 'x' is listed twice"),
        ("TRT-8601-MinMaxCalibration\nx: 7f800000", "line 2: scale inf is negative or not finite"),
        ("TRT-8601-MinMaxCalibration\nx: 7fc00000", "line 2: scale nan is negative or not finite"),
        ("TRT-8601-MinMaxCalibration\nx: bce4e8a0", "line 2: scale -0.02.* is negative or not finite"),
        (two(version="2.1.0"), "has encodings of version 2.1.0: give one of 0.6.1, 1.0.0, 2.0.0"),
        ({"version": [], "encodings": []}, r"'version' must be a text that is not empty, not \[\]"),
        (two({"output_dtype": "int8"}), "encodings: 'name' is missing"),
        (
            two({"name": "x", "output_dtype": "int99"}),
            "'output_dtype' must be a type of integers or floats, not 'int99'",
        ),
        (two({"name": "x", "output_dtype": "int8"}), "tensor 'x': 'y_scale' is missing"),
        (two({"name": "x", "output_dtype": "int8", "y_scale": 0}), "its scale must be finite and more than 0"),
        (two({"name": "x", "output_dtype": "int8", "y_scale": "a"}), "'y_scale' must be a number or a list of numbers"),
        (
            two({"name": "x", "output_dtype": "int8", "y_scale": 1, "y_zero_point": 0.5}),
            "its zero point must be a whole",
        ),
        (
            two({"name": "x", "output_dtype": "int8", "y_scale": 1, "y_zero_point": 200}),
            "zero point lies outside of 8 bit",
        ),
        (two({"name": "x", "output_dtype": "int8", "y_scale": [1, 2], "y_zero_point": 0}), "one y_zero_point for each"),
        (two({"name": "x", "output_dtype": "int4", "per_block_int_scale": [1]}), r"two factors \(LPBQ\) are not read"),
        (two({"name": "u", "output_dtype": "int4", "y_scale": [1], "block_size": 2}), "blocks of 2 along axis None"),
        (two(*[{"name": "x", "output_dtype": "int8", "y_scale": 1}] * 2), "tensor 'x': it is listed twice"),
        ({"version": "0.6.1", "activation_encodings": []}, "'activation_encodings' must be an object"),
        ({"version": "0.6.1", "activation_encodings": {"x": []}}, "tensor 'x': it has no encoding"),
        ({"version": "0.6.1", "activation_encodings": {"x": [{"dtype": "int"}]}}, "'bitwidth' is missing"),
        ({"version": "1.0.0", "activation_encodings": {}}, "'activation_encodings' must be a list of objects"),
    ],
)
def test_a_foreign_file_that_cannot_be_read_is_one_line(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        import_table(saved(tmp_path, content), table(), SYM)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enc_type": "PER_BLOCK"}, "enc_type PER_BLOCK does not say how its blocks are ordered; export version 2.0.0"),
        ({"offset": [-128]}, "it must have one offset for each scale"),
        ({"bw": 64}, "'bw' must be a whole number of bits from 2 to 32, not 64"),
        (
            {"scale": [1, 2, 3, 4], "offset": [-128] * 4},
            r"'w' under w8a8-sym-pc does not fit: scale has the shape \[4\]",
        ),
        ({"scale": [[1] * 6], "offset": [[-128] * 6]}, "it must have one offset for each scale"),
    ],
)
def test_encodings_that_do_not_fit_are_one_line(changes: Json, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        import_table(one(tmp_path, **changes), table(), SYM)


def test_channels_of_several_widths_are_refused(tmp_path: Path) -> None:
    channels = [{"bitwidth": bits, "dtype": "int", "scale": 1, "offset": 0} for bits in (4, 8)]
    with pytest.raises(ExportError, match="tensor 'w': its channels have several bit widths"):
        import_table(saved(tmp_path, {"version": "0.6.1", "param_encodings": {"w": channels}}), table(), SYM)


def test_the_scheme_must_be_one_of_the_table() -> None:
    with pytest.raises(ExportError, match="the table has no scheme w2a8-sym-pc: name one of w8a8-sym-pc"):
        import_table(GOLDEN / "pairs.json", table(), "w2a8-sym-pc")
