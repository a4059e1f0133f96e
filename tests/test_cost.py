"""What a device is modelled to need, against figures worked out by hand; and what is measured."""

import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import build, ingested, normal
from onnx import ModelProto

from onnxqt.cost import ASSUMED_HOST, Host, Layer, LayerKind, Measured, Tensor, Workload, estimate, measure, workload
from onnxqt.devices import DEVICES, FITS, Device, Figure, Fit
from onnxqt.errors import DataError, ModelError, UsageError
from onnxqt.numerics import Array
from onnxqt.plan import make_plan

TOOLS = Path(__file__).parents[1] / "tools"
ROUNDING = 1e-12  # relative: a few float64 operations

# 8 x 6 places and 3 channels -> 4 x 3 and 8 -> depthwise, 4 x 3 and 8 -> 2 x 5
NETWORK = """(float[n, 3, 8, 6] x) => (float[] y) {
    a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w, b)
    c = Relu (a)
    d = Conv <group = 8, pads = [1, 1, 1, 1]> (c, v)
    e = Flatten (d)
    y = Gemm <transB = 1> (e, u)
}"""
CONSTANTS = {"w": normal(8, 3, 3, 3), "b": normal(8), "v": normal(8, 1, 3, 3), "u": normal(10, 96)}


def loaded(model: ModelProto, weight_bits: int = 8, activation_bits: int = 8) -> Workload:
    ready = ingested(model)
    return workload(ready, make_plan(ready), weight_bits, activation_bits)


def layers_of(text: str, constants: Mapping[str, Array]) -> tuple[Layer, ...]:
    return loaded(build(text, constants)).layers


def layer(
    name: str, macs: int = 0, weights: int = 0, kind: LayerKind = "conv", integer: bool = True, size: int = 0
) -> Layer:
    """A layer of a chain that reads `name` and writes the next letter, of `size` bytes each."""
    return Layer(name, kind, macs, weights, (Tensor(name, size),), (Tensor(chr(ord(name) + 1), size),), integer)


def chain(*layers: Layer) -> Workload:
    return Workload(layers, 8, 8)


def device(**fields: object) -> Device:
    values: dict[str, object] = {"name": "test", "peak": Figure(2e9, "hand"), "fallback": "none", **fields}
    return Device(**values)  # type: ignore[arg-type]


def fitted(**fields: object) -> Fit:
    values: dict[str, object] = {
        **{"chip": "test", "batch": 1, "rates": {"dense": 4e8, "depthwise": 1e8}, "trained": 9, "held_out": 3},
        **{"median_error": 0.5, "p90_error": 1.5, "ratio_low": 0.5, "ratio_high": 3.0},
        **{"least_macs": 1e3, "most_macs": 1e9, "fastest": 1e6},
    }
    return Fit(**{**values, **fields})  # type: ignore[arg-type]


def close(value: float | None, expected: float) -> bool:
    return value is not None and abs(value - expected) <= ROUNDING * expected


# --- from a model to its workload -----------------------------------------------------------------------


def test_a_workload_counts_each_layer_at_its_widths() -> None:
    found = loaded(build(NETWORK, CONSTANTS), weight_bits=4, activation_bits=4)
    assert [(part.kind, part.macs) for part in found.layers] == [
        ("conv", 12 * 8 * 3 * 9),
        ("depthwise", 12 * 8 * 9),
        ("view", 0),
        ("matmul", 96 * 10),
    ]
    # weights of 4 bits, a bias of 32; the depthwise layer and the Gemm have none
    assert [part.weight_bytes for part in found.layers] == [8 * 3 * 9 // 2 + 4 * 8, 8 * 9 // 2, 0, 960 // 2]
    # inputs and outputs of the model keep 8 bits, all else has 4
    assert [part.read_bytes for part in found.layers] == [144, 96 // 2, 0, 96 // 2]
    assert [part.write_bytes for part in found.layers] == [96 // 2, 96 // 2, 0, 10]
    assert all(part.integer for part in found.layers)
    assert (found.macs, found.weight_bytes) == (2592 + 864 + 960, 140 + 36 + 480)


def test_a_workload_is_that_of_one_sample() -> None:
    one, two = (loaded(build(NETWORK.replace("n,", f"{batch},"), CONSTANTS)) for batch in (1, 2))
    assert [(part.macs, part.activation_bytes) for part in one.layers] == [
        (part.macs, part.activation_bytes) for part in two.layers
    ]


def test_layers_that_stay_float_have_floats() -> None:
    text = """(float[n, 4, 6] x) => (float[] y) {
        a = MatMul (x, w)
        s = Shape (a)
        c = LayerNormalization (a, g)
        y = Reshape (c, s)
    }"""
    product, norm, *rest = layers_of(text, {"w": normal(6, 5), "g": normal(5)})
    assert (product.integer, norm.integer) == (True, False)
    assert (norm.kind, norm.macs, norm.weight_bytes) == ("other", 0, 5 * 4)
    assert (norm.read_bytes, norm.write_bytes) == (4 * 5 * 1, 4 * 5 * 4)  # codes in, float32 out
    assert all(part.kind == "view" and not part.activation_bytes for part in rest)


@pytest.mark.parametrize(
    ("node", "weight", "kind"),
    [
        ("Conv <group = 4> (x, w)", (8, 1, 1, 1), "depthwise"),
        ("Conv <group = 2> (x, w)", (6, 2, 1, 1), "conv"),
        ("Conv (x, w)", (5, 4, 1, 1), "conv"),
        ("ConvTranspose <group = 4> (x, w)", (4, 2, 1, 1), "depthwise"),
        ("ConvTranspose <group = 2> (x, w)", (4, 3, 1, 1), "conv"),
    ],
)
def test_depthwise_has_one_input_channel_per_output_channel(node: str, weight: tuple[int, ...], kind: str) -> None:
    (found,) = layers_of(f"(float[n, 4, 3, 5] x) => (float[] y) {{ y = {node} }}", {"w": normal(*weight)})
    assert found.kind == kind


def test_the_class_of_a_network_is_by_its_layers() -> None:
    attention = layer("a", 1, kind="matmul")
    linear, depthwise, conv = layer("b", 1, 1, "matmul"), layer("c", 1, 1, "depthwise"), layer("d", 1, 1)
    assert chain(attention, *[linear] * 9).network_class == "transformer"
    assert chain(attention, *[linear] * 10).network_class == "dense"
    assert chain(depthwise, *[conv] * 5).network_class == "depthwise"
    assert chain(depthwise, *[conv] * 6).network_class == "dense"
    assert chain(*[layer("e", 0, kind="depthwise")] * 9, conv).network_class == "dense"  # without MACs


def test_a_network_without_known_macs_is_refused() -> None:
    with pytest.raises(ModelError, match="no layer whose multiply-accumulates are known: fix the free dimensions"):
        loaded(build("(float[n, 4] x) => (float[] y) { y = Relu (x) }"))
    unknown = build("(float[n, 2, h, w] x) => (float[n, 3, p, q] y) { y = Conv (x, k) }", {"k": normal(3, 2, 3, 3)})
    with pytest.raises(ModelError, match=r"are known \(Conv '.*': a size of '.*' is unknown\): fix"):
        loaded(unknown)


def test_what_is_not_counted_is_named() -> None:
    text = """(float[n, 4] x, float[n, k, 4] z) => (float[] y, float[] v) {
        y = Gemm (x, w)
        v = MatMul (z, w)
    }"""
    found = loaded(build(text, {"w": normal(4, 6)}))
    assert found.macs == 24
    (line,) = found.unknown
    assert line.startswith("MatMul '")
    assert line.endswith(" is unknown")
    assert estimate(found, device()).unknown == found.unknown


@pytest.mark.parametrize(("bits", "name"), [((1, 8), "weight_bits is 1"), ((8, 17), "activation_bits is 17")])
def test_widths_out_of_range_are_refused(bits: tuple[int, int], name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: give 2 to 16"):
        loaded(build(NETWORK, CONSTANTS), *bits)


# --- the roofline ---------------------------------------------------------------------------------------


def test_each_layer_takes_the_longer_of_its_arithmetic_and_its_bytes() -> None:
    # 1e9 MAC/s and 1e6 B/s: 3 ms of arithmetic against 1 + 2 * 0.5 ms; 1 ms against 2 + 2 * 1.5 ms
    load = chain(layer("a", 3_000_000, 1000, size=500), layer("b", 1_000_000, 2000, size=1500))
    found = estimate(load, device(bandwidth=Figure(1e6, "hand")))
    assert close(found.latency_s, 3e-3 + 5e-3)
    assert close(found.throughput_hz, 1 / 8e-3)
    assert (found.bound_by, found.basis, found.throughput_band_hz) == ("memory", "upper bound", None)
    # weights are read once for 8 samples: 24 ms against 1 + 8 * 1 ms; 8 ms against 2 + 8 * 3 ms
    eight = estimate(load, device(bandwidth=Figure(1e6, "hand")), batch=8)
    assert close(eight.latency_s, 24e-3 + 26e-3)
    assert close(eight.throughput_hz, 8 / 50e-3)
    # without a bandwidth only arithmetic counts
    assert close(estimate(load, device()).latency_s, 4e-3)
    assert estimate(load, device()).bound_by == "compute"


@pytest.mark.parametrize(
    ("sram", "outside"),
    [
        (0, 3000 + 1000 + 3000),
        (2999, 3000 + 0 + 3000),  # the weights do not fit; the first layer's 1000 bytes of activations do
        (3000, 0 + 1000 + 3000),  # the weights fill it
        (4000, 0 + 0 + 3000),
        (6000, 0),
    ],
)
def test_what_fits_on_the_chip_stays_there(sram: int, outside: int) -> None:
    load = chain(layer("a", 1, 1000, size=500), layer("b", 1, 2000, size=1500))
    found = estimate(load, device(peak=Figure(2e30, "hand"), bandwidth=Figure(1e6, "hand"), sram=Figure(sram, "hand")))
    assert close(found.latency_s, max(outside * 1e-6, 2e-30))
    arithmetic = 2 * (0.0029948 * 64 + 0.00104 * 8 + 0.1) * 1e-12
    assert close(found.energy_j, arithmetic + outside * 162.5e-12)


def test_a_chip_without_memory_outside_moves_nothing() -> None:
    load = chain(layer("a", 1_000_000, 10**9, size=10**9))
    found = estimate(load, device(no_dram="hand", bandwidth=Figure(1, "hand")))
    assert close(found.latency_s, 1e-3)


def test_energy_is_that_of_the_wider_operand() -> None:
    load = chain(layer("a", 10**12))
    chip = device(no_dram="hand")
    energies = [
        estimate(dataclasses.replace(load, weight_bits=weights, activation_bits=activations), chip).energy_j
        for weights, activations in ((4, 4), (8, 8), (4, 8))
    ]
    # pJ, as published: 0.15, 0.30; here to the digits of the formula
    assert [round(energy, 4) for energy in energies] == [0.1521, 0.3, 0.3]
    floats = estimate(chain(layer("a", 10**12, integer=False)), chip)
    assert close(floats.energy_j, 4.6)


def test_energy_of_the_board_is_its_power_over_the_throughput() -> None:
    load = chain(layer("a", 4_000_000))
    found = estimate(load, device(watts=Figure(2.5, "hand"), price=Figure(70, "hand")), batch=8)
    assert close(found.latency_s, 32e-3)
    assert close(found.board_energy_j, 2.5 * 4e-3)
    assert found.price_usd == 70
    without = estimate(load, device())
    assert (without.board_energy_j, without.price_usd) == (None, None)


# --- the fit --------------------------------------------------------------------------------------------


def test_a_fit_replaces_the_peak_by_the_rate_of_the_class() -> None:
    chip = device(fits=(fitted(), fitted(batch=8, rates={"dense": 8e8}, fastest=1e7)))
    dense = estimate(chain(layer("a", 4_000_000)), chip)
    assert (dense.basis, dense.median_error) == ("fitted", 0.5)
    assert close(dense.throughput_hz, 100)
    assert dense.throughput_band_hz is not None
    assert close(dense.throughput_band_hz[0], 50)
    assert close(dense.throughput_band_hz[1], 300)
    depthwise = chain(layer("a", 4_000_000, kind="depthwise"))
    assert close(estimate(depthwise, chip).throughput_hz, 25)
    assert close(estimate(chain(layer("a", 4_000_000)), chip, batch=8).throughput_hz, 200)
    # no depthwise network was measured at batch 8: the peak
    assert estimate(depthwise, chip, batch=8).basis == "upper bound"
    assert close(estimate(depthwise, chip, batch=8).throughput_hz, 250)


def test_a_network_outside_of_the_measured_ones_has_no_error_band() -> None:
    chip = device(fits=(fitted(least_macs=1e6, most_macs=1e9, fastest=300),))
    assert estimate(chain(layer("a", 1_000_000)), chip).basis == "fitted"
    small = estimate(chain(layer("a", 999_999)), chip)
    assert (small.basis, small.throughput_band_hz, small.median_error) == ("extrapolated", None, None)
    assert close(small.throughput_hz, 300)  # not 400: no measured network is faster
    assert any("0.001 to 1 GMACs and reach 300 samples/s at most" in line for line in small.sources)
    assert estimate(chain(layer("a", 10**9 + 1)), chip).basis == "extrapolated"


def test_what_cannot_be_estimated_is_refused() -> None:
    load = chain(layer("a", 4_000_000))
    with pytest.raises(UsageError, match="batch is 2: give 1 or 8"):
        estimate(load, device(), batch=2)
    bare = device(peak=None, fits=(fitted(rates={"transformer": 1e9}),))
    with pytest.raises(UsageError, match="'test' has neither a published peak nor measurements of dense networks at"):
        estimate(load, bare)


# --- layers that the device does not run ----------------------------------------------------------------

HOST = Host(macs_hz=1e6, bytes_hz=1e5, link_hz=1e4, source="by hand")
# a -> b, float -> c, view -> d -> e, float -> f
MIXED = chain(
    layer("a", 2_000_000, size=10),
    layer("b", 0, 40, kind="other", integer=False, size=30),
    layer("c", kind="view", integer=False, size=30),
    layer("d", 3_000_000, size=20),
    layer("e", 5_000, kind="matmul", integer=False, size=8),
)


def test_float_layers_run_on_the_host_and_their_tensors_cross() -> None:
    found = estimate(MIXED, device(fallback="layer"), host=HOST)
    # b comes over at 30 bytes, d (a view of c) goes back, e comes over; b: 40 + 60 bytes; e: 5000 MACs
    crossings = (30 + 20 + 8) / 1e4
    assert close(found.latency_s, 2e-3 + 100 / 1e5 + 3e-3 + 5e-3 + crossings)
    assert (found.boundaries, found.host_layers, found.basis) == (3, 2, "assumed host")
    assert close(found.integer_share_of_macs, 5_000_000 / 5_005_000)
    assert "by hand" in found.sources


def test_all_behind_the_first_float_layer_runs_on_the_host_where_the_compiler_cuts_once() -> None:
    found = estimate(MIXED, device(fallback="rest"), host=HOST)
    assert close(found.latency_s, 2e-3 + 100 / 1e5 + 3.0 + 5e-3 + 30 / 1e4)
    assert (found.boundaries, found.host_layers) == (1, 3)
    assert close(found.integer_share_of_macs, 2_000_000 / 5_005_000)


def test_a_device_that_runs_everything_has_no_boundaries() -> None:
    found = estimate(MIXED, device(), host=HOST)
    assert close(found.latency_s, 5.005e-3)
    assert (found.boundaries, found.host_layers, found.basis) == (0, 0, "upper bound")
    assert "by hand" not in found.sources


def test_a_tensor_crosses_once_however_many_read_it() -> None:
    reader = dataclasses.replace(layer("b", 1, integer=False, size=10), name="second", writes=())
    load = chain(layer("a", 1, size=10), layer("b", 1, integer=False, size=10), reader)
    assert estimate(load, device(fallback="layer"), host=HOST).boundaries == 1


def test_a_view_of_an_input_of_the_model_is_on_no_side() -> None:
    load = chain(layer("a", kind="view", integer=False, size=9), layer("b", 1, size=9))
    assert estimate(load, device(fallback="layer")).boundaries == 0


# --- the devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("batch", [1, 8])
def test_every_device_says_where_its_figures_are_from(name: str, batch: int) -> None:
    chip = DEVICES[name]
    found = estimate(loaded(build(NETWORK, CONSTANTS)), chip, batch)
    assert found.evidence == "modelled"
    assert any("modelled" in line and line.startswith("rate: ") for line in found.sources)
    assert any(line.endswith("modelled, 45 nm") for line in found.sources)
    for figure in (chip.peak, chip.bandwidth, chip.sram, chip.watts, chip.price):
        if figure is not None:
            assert figure.value > 0
            assert figure.source
    for figure in (chip.bandwidth, chip.sram, chip.watts, chip.price):
        assert figure is None or any(figure.source in line for line in found.sources)
    assert json.loads(json.dumps(found.as_json()))["device"] == name
    assert found.as_json()["sources"] == list(found.sources)


def test_only_what_was_measured_is_fitted_and_no_rate_exceeds_the_peak() -> None:
    with_fits = {name for name, chip in DEVICES.items() if chip.fits}
    assert with_fits == {"Hailo-8", "Hailo-8L", "Hailo-10H", "Hailo-15H", "Hailo-15L"}
    assert sum(len(chip.fits) for chip in DEVICES.values()) == len(FITS) == 10
    for chip in DEVICES.values():
        for fit in chip.fits:
            assert set(fit.rates) == {"dense", "depthwise", "transformer"}
            assert chip.peak is None or max(fit.rates.values()) < chip.peak.value / 2
            assert fit.ratio_low < 1 < fit.ratio_high
            assert 0 < fit.median_error < fit.p90_error


def test_assumptions_are_called_so() -> None:
    assert "assumption" in ASSUMED_HOST.source
    outside = "memory on the chip: no source, so all bytes are taken to pass through memory outside of it"
    load = chain(layer("a", 1))
    assert outside in estimate(load, device()).sources
    assert outside not in estimate(load, device(sram=Figure(1, "hand"))).sources
    assert outside not in estimate(load, device(no_dram="hand")).sources
    wide = dataclasses.replace(chain(layer("a", 1)), activation_bits=16)
    assert any("assumption, at the rate of 8 bits" in line for line in estimate(wide, device()).sources)


# --- measured -------------------------------------------------------------------------------------------


def test_a_model_is_timed_on_this_processor() -> None:
    model = build("(float[n, 5] x) => (float[] y) { y = MatMul (x, w) }", {"w": normal(5, 7)})
    found = measure(model, {"x": normal(3, 5)}, seconds=0.05)
    assert (found.batch, found.evidence) == (3, "measured")
    assert found.runs >= 5
    assert 0 < found.p10_s <= found.latency_s <= found.p90_s < 10
    assert found.throughput_hz == 3 / found.latency_s
    assert found.processor
    assert Measured(**json.loads(json.dumps(found.as_json()))) == found


def test_times_are_those_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    class Slow:
        def __init__(self, model: ModelProto) -> None: ...

        def run(self, inputs: Mapping[str, Array]) -> None:
            runs.append(inputs)
            time.sleep(0.2 if len(runs) == 1 else 0.01)  # the first is not timed

    monkeypatch.setattr("onnxqt.cost.Session", Slow)
    found = measure(ModelProto(), {"x": normal(4, 5)}, seconds=0.001)
    assert len(runs) == found.runs + 1 == 6
    assert 0.01 <= found.p10_s <= found.p90_s < 0.2


def test_at_least_five_runs_are_timed_and_inputs_of_different_lengths_are_one_sample() -> None:
    model = build("(float[n, 5] x, float[m, 5] z) => (float[] y) { y = Concat <axis = 0> (x, z) }")
    found = measure(model, {"x": normal(3, 5), "z": normal(2, 5)}, seconds=1e-9)
    assert (found.runs, found.batch) == (5, 1)


def test_what_cannot_be_timed_is_refused() -> None:
    model = build("(float[n, 5] x) => (float[] y) { y = Relu (x) }")
    for seconds in (0.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"seconds is {seconds}: give a positive number"):
            measure(model, {"x": normal(2, 5)}, seconds)
    with pytest.raises(DataError, match="there are no inputs to run the model on"):
        measure(model, {})
    with pytest.raises(ModelError, match="fails on these inputs"):
        measure(model, {"x": normal(2, 6)})


# --- the tools ------------------------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(TOOLS)

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def table_of(folder: Path, rows: list[tuple[str, str, float, float, float]]) -> Path:
    path = folder / "zoo.csv"
    lines = ["device,net,fps_b1,fps_b8,ops_G", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_rates_are_geometric_means_of_fps_times_macs(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    fit_cost = tool("fit_cost")
    # 10 GMAC at 100 fps and 20 GMAC at 200: 1e12 and 4e12 MAC/s; a depthwise one apart; 0 fps says nothing
    rows = fit_cost.read(
        table_of(
            tmp_path,
            [
                ("A", "resnet_x", 100, 400, 20),
                ("A", "yolov8q⭐", 200, 0, 40),
                ("A", "mobilenet_x", 50, 50, 2),
                ("B", "yolov8q", 1, 1, 40),
            ],
        )
    )
    assert [row.net for row in rows] == ["resnet_x", "yolov8q", "mobilenet_x", "yolov8q"]
    assert rows[1].held_out == rows[3].held_out
    assert fit_cost.fit_rates(fit_cost.usable(rows, "A", 1), 1) == {"dense": 2e12, "depthwise": 5e10}
    assert fit_cost.fit_rates(fit_cost.usable(rows, "A", 8), 8) == {"dense": 4e12, "depthwise": 5e10}
    ratio = fit_cost.ratios(rows[:2], {"dense": 2e12}, 1)
    assert np.allclose(ratio, [0.5, 2.0], rtol=ROUNDING, atol=0)
    # modelled 200 and 100, at most 150
    assert np.allclose(fit_cost.ratios(rows[:2], {"dense": 2e12}, 1, 150), [100 / 150, 2.0], rtol=ROUNDING, atol=0)
    assert fit_cost.errors(ratio) == (0.75, pytest.approx(0.95, rel=ROUNDING))


@pytest.mark.parametrize(
    ("net", "kind"),
    [
        ("vit_tiny_bn", "transformer"),
        ("clip_resnet_50_text_encoder", "transformer"),
        ("clip_resnet_50_image_encoder", "dense"),
        ("cas_vit_m", "depthwise"),
        ("fastvit_sa12", "depthwise"),
        ("ssd_mobilenet_v1", "depthwise"),
        ("efficientnet_l", "dense"),
        ("yolov11n", "dense"),
        ("yolov12n", "transformer"),
    ],
)
def test_networks_of_the_zoo_have_the_class_of_their_architecture(
    tool: Callable[[str], ModuleType], net: str, kind: str
) -> None:
    assert tool("fit_cost").network_class(net) == kind


def test_errors_are_those_of_held_out_networks_alone(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    fit_cost = tool("fit_cost")
    names = [f"resnet_{number}" for number in range(40)]
    held = {row.net for row in fit_cost.read(table_of(tmp_path, [("A", n, 1, 1, 2) for n in names])) if row.held_out}
    assert 0 < len(held) < len(names) / 2
    # trained: 100 fps on 1 GMAC; held out: 50 fps, which the model takes for 100
    rows = fit_cost.read(table_of(tmp_path, [("A", n, 50 if n in held else 100, 9, 2) for n in names]))
    found = fit_cost.fit(rows, "A", 1)
    assert found.rates == {"dense": 1e11}
    assert (found.trained, found.held_out) == (len(names) - len(held), len(held))
    assert (found.median_error, found.p90_error, found.ratio_low, found.ratio_high) == (1.0, 1.0, 0.5, 0.5)
    assert (found.least_macs, found.most_macs, found.fastest) == (1e9, 1e9, 100)
    source = fit_cost.python([found])
    assert eval(source.partition("=")[2].strip(), {"Fit": Fit}) == (found,)
    assert "| A | 1 | 0.1 | - | - |" in fit_cost.table(rows, [found])


def test_the_fit_says_what_is_wrong_with_a_table(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    fit_cost = tool("fit_cost")
    path = table_of(tmp_path, [("A", "resnet_x", 1, 1, 2)])
    with pytest.raises(SystemExit, match=r"A has \d networks to fit and \d to hold out: need both"):
        fit_cost.fit(fit_cost.read(path), "A", 1)
    path.write_text("device,net\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no column 'fps_b1': give the table of the zoo"):
        fit_cost.read(path)


SUMMARY = """import pathlib, sys, time
if "slow" in sys.argv[-1]: time.sleep(30)
if "bad" in sys.argv[-1]: sys.exit("first\\nRuntimeError: no networks")
print("CPU operators = 2 (40.0%)\\nNPU operators = 3 (60.0%)")
out = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1])
row = dict(cycles_total="900", inference_time="2e-6", inferences_per_second="500000.0", nn_macs="64",
    sram_memory_used="1.5", dram_memory_used="0.0", on_chip_flash_memory_used="0.0",
    off_chip_flash_memory_used="0.25", accelerator_configuration=sys.argv[2], system_config="s",
    memory_mode="m", core_clock="5e8")
if "none" not in sys.argv[-1]:
    (out / "net_summary_s.csv").write_text(",".join(row) + "\\n" + ",".join(row.values()) + "\\n")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a shebang")
def test_vela_is_read(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    vela_latency = tool("vela_latency")
    executable = tmp_path / "vela"
    executable.write_text(f"#!{sys.executable}\n{SUMMARY}", encoding="utf-8")
    executable.chmod(0o755)
    for name in ("good", "bad", "slow", "none"):
        (tmp_path / f"{name}.tflite").touch()
    found = vela_latency.latency(tmp_path / "good.tflite", str(executable), "ethos-u65-256", 20)
    assert (found["cycles"], found["inference_s"], found["macs"]) == (900, 2e-6, 64)
    assert (found["sram_bytes"], found["dram_bytes"], found["flash_bytes"]) == (1536, 0, 256)
    assert (found["cpu_operators"], found["npu_operators"]) == (2, 3)
    assert (found["accelerator"], found["clock_hz"], found["evidence"]) == ("ethos-u65-256", 5e8, "modelled")
    for name, seconds, message in (
        ("bad", 20, "Vela fails on '.*bad.tflite': RuntimeError: no networks"),
        ("slow", 0.2, "Vela took longer than 0.2 s on"),
        ("none", 20, "Vela wrote no summary for"),
        ("absent", 20, "there is no file '.*absent.tflite'"),
    ):
        with pytest.raises(vela_latency.VelaError, match=message):
            vela_latency.latency(tmp_path / f"{name}.tflite", str(executable), "ethos-u55-128", seconds)


def test_without_vela_there_is_one_line(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    vela_latency = tool("vela_latency")
    with pytest.raises(
        vela_latency.VelaError, match="there is no executable 'no-vela': run 'pip install ethos-u-vela'"
    ):
        vela_latency.latency(tmp_path / "x.tflite", "no-vela", "ethos-u55-128", 1)
