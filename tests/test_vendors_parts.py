"""Names, numbers, and the baked model: what all writers of vendors' files share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import build, ingested, normal, prepare, run
from onnx import numpy_helper
from vendor_cases import ASYM, INT4, INT8, NARROW, SYM, UINT8, changed, only, params, small_table

from onnxqt.calibrate import Quantizers
from onnxqt.errors import ExportError
from onnxqt.files import write_model
from onnxqt.ingest import files as ingest_files
from onnxqt.ingest import ingest
from onnxqt.numerics import Array, Grid, QParams, quantize
from onnxqt.plan import make_plan
from onnxqt.schemes import parse_scheme
from onnxqt.vendors import VENDORS, Vendor, baked_model, names
from onnxqt.vendors.bake import unreached_scales
from onnxqt.vendors.lost import float_nodes, float_tensors, named, where
from onnxqt.vendors.names import Trap, called, check_names, names_of
from onnxqt.vendors.ranges import ends, is_power_of_two, magnitude, symmetric_scale, weight_ends
from onnxqt.vendors.text import decimal, float32_hex, json_bytes, nested, number

DOCS = Path(__file__).parents[1] / "docs" / "vendors.md"

# Names


@pytest.mark.parametrize(
    ("trap", "bad", "good"),
    [
        (names.CONTROL, "a\nb", "a b"),
        (names.SPACE, "a b", "a_b"),
        (names.SPACE, "a\u2003b", "ab"),
        (names.COLON, "x:0", "x.0"),
        (names.COLON_SPACE, "x: 0", "x:0"),
        (names.COMMA, "a,b", "a;b"),
        (names.QUOTE, 'a"b', "a`b"),
        (names.QUOTE, "a\\b", "a/b"),
        (names.PARAM, "fc_param_0", "fc_params_0"),
        (names.HASH, "#x", "x#"),
        (names.FOREIGN, "größe", "groesse"),
        (names.LONG, "é" * 128, "é" * 127),
    ],
)
def test_each_trap_catches_its_own(trap: Trap, bad: str, good: str) -> None:
    check_names([("own", good)], "tool", [trap])
    with pytest.raises(ExportError, match=f"{trap.title}: give it an alias for 'tool' in the table") as caught:
        check_names([("own", bad)], "tool", [trap])
    assert repr(bad)[1:-1] in repr(str(caught.value))


def test_names_must_differ_and_be_there() -> None:
    with pytest.raises(ExportError, match="'b' and 'a' are both called 'x' in a file for tool: give it an alias"):
        check_names([("a", "x"), ("b", "x")], "tool")
    check_names([("a", "x"), ("a", "x")], "tool")
    with pytest.raises(ExportError, match="'' cannot be a name in a file for tool, as it has no letters"):
        check_names([("a", "")], "tool")


def test_an_alias_counts_for_its_vendor_alone() -> None:
    table = changed(small_table(), "x", aliases={"ncnn": "conv0"})
    entry = table.entries[0]
    assert (called(entry, "ncnn"), called(entry, "tensorrt")) == ("conv0", "x")
    assert names_of(table.entries[:2], "ncnn") == {"x": "conv0", "r": "r"}


# Numbers


def scales(count: int, seed: int) -> Array:
    """Scales of all mantissas over many powers of two, and some next to powers of two."""
    rng = np.random.default_rng(seed)
    mixed = rng.uniform(1, 2, count) * np.exp2(rng.integers(-30, 20, count))
    edges = np.exp2(np.arange(-20, 20))
    return np.concatenate([mixed, edges, edges * 256 / 255, edges * 128 / 127]).astype(np.float32)


def found_again(low: np.float32, high: np.float32, grid: Grid) -> tuple[np.float32, int]:
    """Scale and zero point as `compute_scale_zp` of onnxruntime/quantization/quant_utils.py finds them."""
    scale = (np.float64(high) - np.float64(low)) / np.float64(grid.qmax - grid.qmin)
    return np.float32(scale), int(np.round(grid.qmin - low / scale))


@pytest.mark.parametrize("grid", [UINT8, INT8, Grid(16, False), Grid(16, True)])
def test_a_consumer_of_ranges_finds_every_scale_and_zero_point_again(grid: Grid) -> None:
    values = scales(3000, grid.bits + grid.signed)
    rng = np.random.default_rng(7)
    zero_points = rng.integers(grid.qmin, grid.qmax + 1, values.size)
    zero_points[::7], zero_points[1::7], zero_points[2::7] = grid.qmin, grid.qmax, 0
    missed = 0
    for scale, zero_point in zip(values, zero_points, strict=True):
        each = params(grid, scale, zero_point)
        low, high = ends(each)
        assert found_again(low, high, grid) == (scale, zero_point)
        assert low <= 0 <= high
        plain_low, plain_high = (np.float32(end) for end in each.range)
        missed += found_again(plain_low, plain_high, grid)[0] != scale
        moved = max(abs(float(low) - float(plain_low)), abs(float(high) - float(plain_high)))
        assert moved <= 2 * np.spacing(max(-plain_low, plain_high))  # one unit of the larger end, twice
    assert missed > 0 or grid.signed  # the plain ends miss some of unsigned grids


def test_the_ends_of_a_grid_from_zero_may_begin_just_below_it() -> None:
    """Where 255 s lies between two float32 that both miss s: by no more than one unit of 255 s, 255 s / 2^23."""
    below = 0
    for scale in scales(3000, 11):
        low, high = ends(params(UINT8, scale))
        assert found_again(low, high, UINT8) == (scale, 0)
        if found_again(np.float32(0), np.float32(255) * scale, UINT8)[0] == scale:
            assert low == 0
        else:
            assert -scale * 255 / 2**23 <= low < 0
            below += 1
    assert below > 0


@pytest.mark.parametrize(("bits", "half"), [(4, 7.5), (8, 127.0), (16, 32767.0)])
def test_ends_of_symmetric_weights(bits: int, half: float) -> None:
    low, high = weight_ends(params(Grid(4, True, narrow=True), [0.5, 2.0], axis=0), bits)
    np.testing.assert_array_equal(high, np.array([0.5 * half, 2 * half], np.float32))
    np.testing.assert_array_equal(low, -high)


def test_ends_of_other_weights_are_those_of_the_grid() -> None:
    low, high = weight_ends(params(UINT8, [0.5, 2.0], [10, 200], axis=0), 8)
    assert (low.tolist(), high.tolist()) == ([-5.0, -400.0], [122.5, 110.0])


def test_magnitudes() -> None:
    assert magnitude(params(INT8, 0.5)) == 63.5  # not 64: consumers divide by 127
    assert magnitude(params(INT8, 0.5, 1)) == 64.5
    assert magnitude(params(UINT8, 0.5, 200)) == 100
    assert magnitude(params(UINT8, 0.5)) == 127.5


def test_symmetric_scales_are_the_tables_own_where_the_codes_are_the_same() -> None:
    for scale in scales(1000, 3):
        assert symmetric_scale(params(NARROW, scale), 127) == scale
    assert symmetric_scale(params(INT4, 0.5), 127) == np.float32(3.5 / 127)
    assert symmetric_scale(params(UINT8, 0.5, 128), 127) == np.float32(64 / 127)
    assert symmetric_scale(params(UINT8, np.float32(1e-44)), 127) == np.finfo(np.float32).tiny


def test_powers_of_two() -> None:
    assert is_power_of_two(params(INT8, [0.25, 8.0], axis=0))
    assert not is_power_of_two(params(INT8, [0.25, 3.0], axis=0))


def test_numbers_read_back_to_the_same_float32() -> None:
    for value in scales(2000, 5):
        assert np.float32(number(value)) == value
        text = decimal(value)
        assert np.float32(text) == value
        assert set(text) <= set("0123456789.")  # no exponent: some readers stop there
        digits = float32_hex(value)
        assert len(digits) == 8
        assert np.frombuffer(bytes.fromhex(digits), ">f4")[0] == value
    assert float32_hex(np.float32(1e-45)) == "00000001"
    assert float32_hex(1.0) == "3f800000"
    assert nested(np.array([[1, 2]], np.float32)) == [[1.0, 2.0]]
    assert nested(np.array(0.5, np.float32)) == 0.5


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes([float("nan")])


# Documentation


def documented(vendor: Vendor) -> str:
    """The line of docs/vendors.md about a format."""
    options = "; ".join(
        f"`{name}`{f' ({default})' if default else ''}: {text}" for name, (default, text) in vendor.options.items()
    )
    model, template = "baked" if vendor.baked else "any", "yes" if vendor.patches else ""
    return f"| {vendor.name} | {vendor.title} | {model} | {template} | {options} | {vendor.usage} |"


@pytest.mark.parametrize("name", VENDORS)
def test_every_format_is_documented(name: str) -> None:
    assert documented(VENDORS[name]) in DOCS.read_text().splitlines()


# What is lost


def test_sentences_name_the_first_and_count_the_rest() -> None:
    assert named("abc") == "'a', 'b', 'c'"
    assert named("abcde") == "'a', 'b', 'c' and 2 more"
    assert where(small_table(), ASYM, ["weight"], lambda each: each.grid.bits == 8, "{} are wide") == ("'w' are wide",)
    assert where(small_table(), ASYM, ["weight"], lambda each: each.grid.bits == 4, "{} are narrow") == ()


def test_what_stays_float() -> None:
    assert float_tensors(small_table(), ASYM) == {"s": "has no integer form"}
    assert float_nodes(small_table(), ASYM) == ["soft", "mul"]
    table = changed(small_table(), "y", views=only(params(INT8, 1.0), SYM))
    assert float_tensors(table, ASYM) == {"s": "has no integer form", "y": f"stays float under {ASYM}"}
    assert float_nodes(table, ASYM) == ["soft", "mul", "add"]


def test_a_fused_tensor_with_an_entry_does_not_stay_float() -> None:
    table = small_table()
    fused = replace(table.entries[2], name="c", reason=None)
    assert float_tensors(replace(table, entries=(*table.entries, fused)), ASYM) == {"s": "has no integer form"}


# The baked model

CONSTANTS: dict[str, Array] = {
    "w": normal(4, 3, 3, 3) * np.array([0.1, 1, 0.01, 3], np.float32).reshape(4, 1, 1, 1),
    "b": normal(4, seed=1),
    "t": normal(4, 3, 2, 2, seed=2),
    "v": normal(6, 5, seed=3),
    "e": normal(5, seed=4),
    "k": normal(2, 5, 7, seed=5),
}
TEXT = """(float[2,3,4,4] x) => (float[] y) {
    c = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Relu(c) u = ConvTranspose<group = 2>(r, t)
    g = GlobalAveragePool(u) f = Flatten(g) h = Gemm(f, v, e) y = MatMul(h, k) }"""


def weights_of(proto: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


@pytest.mark.parametrize("scheme", ["w8a8-asym-pc", "w4a8-sym-pc", "w3a8-sym-pt", "w4a8-sym-b32", "w4af-asym-pc"])
def test_baked_weights_keep_their_codes_and_all_else_its_values(scheme: str) -> None:
    net = prepare(build(TEXT, CONSTANTS))
    quantizers = net.quantizers(scheme)
    before = net.model.proto.SerializeToString(deterministic=True)
    baked = weights_of(baked_model(net.model, net.plan, quantizers).proto)
    assert net.model.proto.SerializeToString(deterministic=True) == before
    original = weights_of(net.model.proto)
    assert set(quantizers.weights) == {"w", "t", "v", "k"}
    for name, value in original.items():
        if name not in quantizers.weights:
            np.testing.assert_array_equal(baked[name], value)
            continue
        each = quantizers.weights[name]
        codes = quantize(value, each)
        np.testing.assert_array_equal(quantize(baked[name], each), codes)
        assert np.any(baked[name] != value)


def test_the_largest_magnitude_of_each_channel_is_qmax_times_the_scale() -> None:
    net = prepare(build(TEXT, CONSTANTS))
    quantizers = net.quantizers("w8a8-asym-pc")
    found = baked_model(net.model, net.plan, quantizers)
    baked = weights_of(found.proto)
    for name in ("w", "v"):
        each = quantizers.weights[name]
        axis = each.axis or 0
        others = tuple(i for i in range(baked[name].ndim) if i != axis)
        np.testing.assert_array_equal(np.abs(baked[name]).max(axis=others), np.float32(127) * each.scale)
    assert not found.unreached


def test_a_baked_model_computes_what_the_quantized_weights_compute() -> None:
    """The only thing that differs is the rounding of activations and biases: none here, so outputs are equal bits."""
    net = prepare(build(TEXT, CONSTANTS))
    quantizers = net.quantizers("w4a8-sym-pc")
    baked = baked_model(net.model, net.plan, quantizers).proto
    weights = {name: weights_of(baked)[name] for name in quantizers.weights}
    x = {"x": normal(2, 3, 4, 4, seed=9)}
    np.testing.assert_array_equal(
        run(baked, x, optimize=False)["y"], run(net.model.with_weights(weights).proto, x, optimize=False)["y"]
    )


@pytest.mark.parametrize(
    ("each", "codes", "missing"),
    [
        (params(NARROW, [1.0, 2.0, 3.0], axis=0), [[127, 0], [126, -5], [-127, 3]], (1,)),
        (params(NARROW, [1.0, 2.0], axis=1), [[127, 0], [126, -5], [-127, 3]], (1,)),
        (params(INT8, 1.0), [[-128, 127]], (0,)),  # -128 makes the magnitude larger
        (params(INT8, 1.0), [[-127, 127]], ()),
        (params(UINT8, [1.0, 1.0], [3, 4], axis=0), [[0, 255], [1, 255]], (1,)),
        (params(INT4, [[1.0, 1.0]], axis=1, block=2), [[7, 1, -7]], ()),  # the last block is shorter
        (params(INT4, [[1.0, 1.0]], axis=1, block=2), [[6, 1, -6]], (0, 1)),
    ],
)
def test_scales_that_do_not_follow_from_the_values(each: QParams, codes: list[list[int]], missing: object) -> None:
    assert unreached_scales(np.array(codes, np.int32), each) == missing


def test_weights_that_miss_an_end_are_told_and_keep_their_codes() -> None:
    net = prepare(build(TEXT, CONSTANTS))
    quantizers = net.quantizers("w8a8-asym-pc")
    wider = replace(quantizers.weights["w"], scale=quantizers.weights["w"].scale * np.array([1, 2, 1, 1.5], np.float32))
    changed_ = Quantizers(quantizers.activations, {**quantizers.weights, "w": wider}, quantizers.constants)
    found = baked_model(net.model, net.plan, changed_)
    assert found.unreached == {"w": (1, 3)}
    np.testing.assert_array_equal(quantize(weights_of(found.proto)["w"], wider), quantize(CONSTANTS["w"], wider))


def test_large_weights_are_baked_one_at_a_time_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"w0": normal(20, 30), "w1": normal(30, 40, seed=1)}
    proto = build("(float[n,20] x) => (float[] y) { r = MatMul(x, w0) y = MatMul(r, w1) }", values)
    small = prepare(proto)
    quantizers = small.quantizers("w4a8-sym-pc")
    monkeypatch.setattr(ingest_files, "EMBED_LIMIT", 64)
    monkeypatch.setattr(ingest_files, "_LARGE", 64)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="model.data", size_threshold=0)
    model = ingest(path)
    plan = make_plan(model)
    assert model.is_large
    with pytest.raises(ExportError, match="weight 'w0' lies outside of the model: give a scratch file"):
        baked_model(model, plan, quantizers)
    with pytest.raises(ExportError, match=r"cannot write '.*absent/x' \(No such file or directory\)"):
        baked_model(model, plan, quantizers, tmp_path / "absent" / "x")
    found = baked_model(model, plan, quantizers, tmp_path / "scratch")
    write_model(tmp_path / "out.onnx", found.proto)
    (tmp_path / "scratch").unlink()
    written = weights_of(onnx.load(tmp_path / "out.onnx"))
    expected = weights_of(baked_model(small.model, small.plan, quantizers).proto)
    for name in values:
        np.testing.assert_array_equal(written[name], expected[name])
    np.testing.assert_array_equal(model.graph.constant("w0"), values["w0"])  # the user's file is as it was


def test_a_scheme_without_weights_bakes_nothing() -> None:
    model = ingested(build("(float[n,4] x) => (float[n,4] y) { y = Relu(x) }"))
    plan = make_plan(model)
    assert not plan.weights
    baked = baked_model(model, plan, Quantizers({}, {}))
    assert baked.proto.SerializeToString() == model.proto.SerializeToString()
    assert str(parse_scheme("w8a8-sym-pc")) == SYM
