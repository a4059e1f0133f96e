"""What a table says of a model, and what it belongs to."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import build, ingested, normal, prepare
from table_cases import ALL_CONSTANTS, CONSTANTS, SCHEMES, TEXT, entry, net, table

from onnxqt.calibrate import Quantizers, RangeTable, TensorRange, bias_scale, observe
from onnxqt.errors import ExportError
from onnxqt.export import quantized_model
from onnxqt.numerics import Grid, QParams
from onnxqt.plan import make_plan
from onnxqt.table import (
    Entry,
    NodeRef,
    Stats,
    Table,
    build_table,
    check_belongs,
    merge_stats,
    read_table,
    table_quantizers,
    write_table,
)
from onnxqt.table.build import graph_sha256
from onnxqt.table.stats import SHARES, quantiles, stats_of
from onnxqt.table.views import same_params


def test_roles_in_the_order_of_the_graph_and_constants_behind() -> None:
    assert [(found.name, found.role) for found in table().entries if found.role != "bias"] == [
        *(("x", "input"), ("r", "activation"), ("m", "activation"), ("g", "activation"), ("f", "output")),
        *(("p", "activation"), ("o", "activation"), ("e", "activation"), ("z", "activation"), ("h", "output")),
        *(("q", "activation"), ("s", "output"), ("y", "output")),
        *((name, "weight") for name in ("w", "v", "u", "k", "wide")),
    ]


def test_shapes_producers_and_consumers() -> None:
    assert entry("x").shape == (None, 4, 5, 5)
    assert entry("x").producer is None
    assert entry("m").producer == NodeRef("MaxPool_2", "MaxPool", 0)
    assert entry("o").consumers == (NodeRef("Add_11", "Add", 1),)
    assert entry("v").consumers == (NodeRef("MatMul_5", "MatMul", 1), NodeRef("Gemm_10", "Gemm", 1))
    assert entry("v").shape == (6, 5)


def test_a_node_that_reads_a_tensor_twice_and_in_a_subgraph() -> None:
    text = """(float[n,4] x, bool c) => (float[n,4] y) {
        a = Gemm(x, w) d = Add(a, a)
        y = If (c) <then_branch = yes () => (float[n,4] t) { t = Relu(d) },
                    else_branch = no () => (float[n,4] e) { e = Identity(d) }> }"""
    model = ingested(build(text, {"w": normal(4, 4)}))
    built = build_table(model, make_plan(model), RangeTable({}, 0), {}, "m.onnx")
    nodes = {node.op_type: node.name for node in model.graph.nodes}
    add, branch = nodes["Add"], nodes["If"]
    assert entry("a", built).consumers == (NodeRef(add, "Add", 0), NodeRef(add, "Add", 1))
    assert entry("d", built).consumers == (NodeRef(branch, "If", -1),)
    assert entry("a", built).reason == "no scheme quantizes activations"
    assert entry("w", built).reason == "no scheme quantizes weights"


def test_fused_tensors_are_named_by_the_one_they_end_in_and_have_no_entry() -> None:
    assert {found.name: found.fused_from for found in table().entries if found.fused_from} == {
        "r": ("c",),
        "q": ("a", "t"),
    }
    assert all(table().entry(name) is None for name in "cat")


def test_the_first_node_of_a_chain_is_named_by_the_tensor_that_it_ends_in() -> None:
    starts = {e.name: e.computed_by.op for e in table().entries if e.computed_by is not None}
    # r ends Conv and Relu, q ends MatMul, Add and Relu, g and z what has no follower
    assert {name: starts[name] for name in ("r", "q", "y", "g", "z")} == {
        "r": "Conv",
        "q": "MatMul",
        "y": "Gemm",
        "g": "GlobalAveragePool",
        "z": "Add",
    }
    integer = {node.output: (node.name, node.op_type, 0) for node in net().plan.integer_nodes}
    assert integer == {
        e.name: (e.computed_by.node, e.computed_by.op, e.computed_by.index)
        for e in table().entries
        if e.computed_by is not None
    }


def test_tensors_that_share_a_grid() -> None:
    assert {name: entry(name).group for name in "xrmgfz"} == {
        **{"x": None, "z": None},
        **dict.fromkeys("rm", "r"),
        **dict.fromkeys("gf", "g"),
    }


def test_what_stays_float_says_why() -> None:
    reasons = {node.name: node.reason for node in net().plan.float_nodes}
    for name in "esh":
        found = entry(name)
        assert found.producer is not None
        assert (found.views, found.reason) == ((), reasons[found.producer.node])
    assert entry("wide").reason == entry("h").reason == "the bias differs between rows"
    assert all(found.reason is None for found in table().entries if found.views)


def test_hashes_of_constants_are_of_their_values() -> None:
    for found in table().entries:
        value = CONSTANTS.get(found.name)
        assert found.sha256 == (None if value is None else hashlib.sha256(value.astype("<f4").tobytes()).hexdigest())


def test_statistics_are_what_calibration_saw() -> None:
    for name in "xrqy":
        stats, seen = entry(name).stats, net().ranges.tensors[name]
        assert stats is not None
        assert stats.counts is not None
        assert (stats.count, stats.min, stats.max, stats.limit) == (seen.count, seen.min, seen.max, seen.limit)
        np.testing.assert_array_equal(stats.counts, seen.counts)
    assert entry("s").stats is None  # a float tensor is not calibrated
    weight = entry("w").stats
    assert weight is not None
    assert (weight.count, weight.min, weight.max) == (108, CONSTANTS["w"].min(), CONSTANTS["w"].max())


def test_quantiles_are_within_one_bin() -> None:
    """Evenly spread values are taken inside a bin, so a quantile is off by less than its width."""
    values = np.sort(normal(20001, seed=3) ** 3)
    seen = observe(values)
    width = 2 * seen.limit / seen.counts.size
    found = stats_of(seen).quantiles
    assert tuple(found) == SHARES
    for share, value in found.items():
        assert abs(value - values[max(0, int(np.ceil(share * values.size)) - 1)]) <= width


def test_quantiles_of_known_bins() -> None:
    """Bins of width 1 from -2: half of the values lie below 0, and 0.99 of them below 0 + (39.6 - 20) / 20."""
    stats = Stats(40, -0.25, 0.9, {}, np.array([0.0, 20, 20, 0]), 2.0)
    found = quantiles(stats)
    assert (found[0.5], found[0.9999]) == (0.0, 0.9)  # not beyond the largest value
    assert quantiles(replace(stats, max=2.0))[0.99] == pytest.approx(0.98, abs=1e-15)
    assert found[0.0001] == -0.25


def test_merged_statistics_are_those_of_all_values() -> None:
    """The two parts have ranges that are a factor of 16 apart, so one histogram is widened."""
    one, other = normal(501, seed=1), 16 * normal(300, seed=2) + 7
    merged, whole = (
        merge_stats(stats_of(observe(one)), stats_of(observe(other))),
        stats_of(observe(np.append(one, other))),
    )
    assert (merged.count, merged.min, merged.max, merged.limit) == (whole.count, whole.min, whole.max, whole.limit)
    assert merged.quantiles == whole.quantiles
    assert merged.counts is not None
    assert whole.counts is not None
    np.testing.assert_array_equal(merged.counts, whole.counts)


def test_merged_statistics_without_a_histogram_keep_count_and_extremes() -> None:
    one, other = stats_of(observe(normal(9))), stats_of(observe(3 * normal(8, seed=1)))
    merged = merge_stats(one, replace(other, counts=None))
    assert (merged.count, merged.min, merged.max) == (17, min(one.min, other.min), max(one.max, other.max))
    assert (merged.counts, merged.quantiles) == (None, {})
    odd = replace(other, limit=0.75 * other.limit)
    assert merge_stats(one, odd).counts is None  # its bins are no pairs of bins of the other
    empty = stats_of(TensorRange(0, 0.0, 0.0, 1.0, np.zeros(8192, np.int64)))
    assert empty.quantiles == {}
    assert merge_stats(one, empty) is merge_stats(empty, one) is one


def test_a_weight_with_infinite_values_has_no_statistics(tmp_path: Path) -> None:
    """It stays float here; JSON has no number for it."""
    changed = CONSTANTS["wide"].copy()
    changed[0, 0] = np.inf
    model = net().model.with_weights({"wide": changed})
    built = build_table(model, net().plan, net().ranges, {}, "model.onnx")
    assert entry("wide", built).stats is None
    write_table(built, tmp_path / "table.json")
    assert entry("wide", read_table(tmp_path / "table.json")).sha256 == entry("wide", built).sha256


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_quantizer_is_in_the_table(scheme: str) -> None:
    expected = net().quantizers(scheme)
    found = table_quantizers(table(), net().plan, scheme)
    for ours, theirs in ((found.activations, expected.activations), (found.weights, expected.weights)):
        assert ours.keys() == theirs.keys()
        assert all(same_params(ours[name], theirs[name]) for name in theirs)


def test_equal_views_are_kept_once() -> None:
    assert [view.schemes for view in entry("r").views] == [
        ("w8a8-sym-pc", "w4a8-sym-pc"),
        ("w8a8-asym-pc", "w8a8-asym-pt"),
        ("w4a4-asym-pc",),
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_biases_have_the_product_of_two_scales(scheme: str) -> None:
    """One for each node that adds it; one value serves 300 channels."""
    quantizers = net().quantizers(scheme)
    found = [bias for bias in table().entries if bias.role == "bias"]
    assert [(bias.name, bias.consumers[0].op, bias.product_of) for bias in found] == [
        ("b", "Conv", ("x", "w")),
        ("d", "Add", ("f", "v")),
        ("shared", "Gemm", ("f", "u")),
        ("shared", "Gemm", ("f", "v")),
        ("one", "Gemm", ("q", "k")),
    ]
    for bias in found:
        data, weight = bias.product_of
        params = bias.params(scheme)
        assert params is not None
        size = CONSTANTS[bias.name].size
        expected = bias_scale(quantizers.weights[weight], quantizers.activations[data].scale, size)
        np.testing.assert_array_equal(params.scale, expected)
        assert params.axis == (None if scheme.endswith("pt") else 0)
        assert params.grid == Grid(32, signed=True)
        assert not params.zero_point.any()
    sizes = {bias.name: np.size(view.params.scale) for bias in found for view in bias.views if view.params.axis == 0}
    assert sizes == {"b": 6, "d": 5, "shared": 5, "one": 300}


def test_a_scheme_of_weights_alone() -> None:
    weights = net().quantizers("w4a8-sym-pc").weights
    built = build_table(net().model, net().plan, net().ranges, {"w4af": Quantizers({}, weights)}, "model.onnx")
    assert entry("x", built).reason == "no scheme quantizes activations"
    assert {bias.reason for bias in built.entries if bias.role == "bias"} == {"no scheme gives it an integer product"}
    found = table_quantizers(built, net().plan, "w4af")
    assert (found.activations, found.weights.keys()) == ({}, weights.keys())


def test_biases_of_blocked_weights_stay_float() -> None:
    quantizers = net().quantizers("w8a8-sym-pc")
    blocks = np.full((3, 5), 0.125, np.float32)
    blocked = replace(
        quantizers.weights["u"], scale=blocks, zero_point=np.zeros((3, 5), np.int32), axis=0, block_size=2
    )
    changed = replace(quantizers, weights={**quantizers.weights, "u": blocked})
    built = build_table(net().model, net().plan, net().ranges, {"blocks": changed}, "model.onnx")
    shared = [bias for bias in built.entries if bias.name == "shared"]
    assert [len(bias.views) for bias in shared] == [0, 1]
    found = entry("u", built).params("blocks")
    assert found is not None
    assert found.block_size == 2


def test_the_table_names_its_model() -> None:
    assert (table().model_file, table().model_sha256) == ("model.onnx", net().model.sha256)
    assert (table().opset, table().samples, table().schemes) == (net().model.opset, 64, SCHEMES)
    assert table().ranges == "mse"
    assert table().producer.startswith("onnxqt ")


def test_parameters_differ_in_every_field() -> None:
    params = QParams(np.ones(3, np.float32), np.zeros(3, np.int32), Grid(8, signed=True), 0)
    changes = (
        {"scale": np.full(3, 2, np.float32)},
        {"zero_point": np.ones(3, np.int32)},
        {"grid": Grid(8, signed=True, narrow=True)},
        {"axis": 1},
        {"block_size": 2},
    )
    assert same_params(params, replace(params))
    for change in changes:
        assert not same_params(params, replace(params, **change)), change


# --- what it belongs to ---------------------------------------------------------------------------------


def test_a_table_belongs_to_its_model() -> None:
    check_belongs(table(), net().model)


def renamed(old: str, new: str) -> Table:
    return replace(
        table(), entries=tuple(replace(found, name=new) if found.name == old else found for found in table().entries)
    )


def test_a_table_with_a_tensor_that_the_model_lacks() -> None:
    with pytest.raises(ExportError, match=r"the table of 'model.onnx' has 'zz', which the model lacks: give the table"):
        check_belongs(renamed("r", "zz"), net().model)


def test_a_table_with_another_shape() -> None:
    with pytest.raises(
        ExportError, match=r"has 'o' with the shape \[None, 4, 5, 5\], but in the model it has \[None, 5"
    ):
        check_belongs(renamed("x", "o"), net().model)


def test_a_table_of_other_weights() -> None:
    changed = net().model.with_weights({"u": normal(6, 5, seed=70)})
    with pytest.raises(
        ExportError, match=r"the table of 'model.onnx' was made for other values of 'u': make the table"
    ):
        check_belongs(table(), changed)


def test_the_hash_of_a_graph_knows_all_but_numbers() -> None:
    """The same graph whose weights, or values of attributes, differ has the same hash."""
    model = net().model
    pool = next(index for index, node in enumerate(model.graph.nodes) if node.op_type == "MaxPool")

    def changed(change: Callable[[onnx.GraphProto], object]) -> str:
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        change(proto.graph)
        return graph_sha256(replace(model, proto=proto))

    own = graph_sha256(model)
    assert own == changed(lambda graph: None) == graph_sha256(model.with_weights({"u": normal(6, 5, seed=70)}))
    hashes = {
        changed(lambda graph: setattr(graph.node[pool], "op_type", "AveragePool")),
        changed(lambda graph: setattr(graph.node[pool], "name", "pool")),
        changed(lambda graph: setattr(graph.node[pool].attribute[0], "name", "strides")),
        changed(lambda graph: setattr(graph.node[pool], "domain", "other")),
        changed(lambda graph: graph.node[pool].input.append("x")),
        changed(lambda graph: setattr(graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 9)),
        changed(lambda graph: setattr(graph.output[0].type.tensor_type, "elem_type", 11)),
        changed(lambda graph: setattr(graph.initializer[0], "data_type", 11)),
        changed(lambda graph: graph.initializer[0].dims.append(1)),
        own,
    }
    assert len(hashes) == 10


def test_a_table_of_another_graph_with_the_same_tensors() -> None:
    other = prepare(build(TEXT.replace("z = Add(p, o)", "z = Sub(p, o)"), ALL_CONSTANTS)).model
    with pytest.raises(ExportError, match="was made for another graph with the same tensors"):
        check_belongs(table(), other)
    nameless = replace(table(), model_file="")
    with pytest.raises(ExportError, match=r"^the table was made for another graph"):
        check_belongs(nameless, other)


# --- back to quantizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    [*SCHEMES, "w4a8-asym-b16", "w4af-asym-b16", "w8af-sym-pc", "w8a8-asym-pc-dyn", "w8a8-sym-pc-pow2", "w8a16-sym-pc"],
)
def test_files_made_from_a_table_are_the_same(scheme: str, tmp_path: Path) -> None:
    """Byte by byte, whatever the scheme; a block of 16 is more than any weight here has, so reasons are written too."""
    found = {name: net().quantizers(name) for name in ("w8a8-sym-pt", scheme)}
    built = build_table(net().model, net().plan, net().ranges, found, "model.onnx")
    write_table(built, tmp_path / "table.json")
    again = table_quantizers(read_table(tmp_path / "table.json"), net().plan, scheme)
    file = quantized_model(net().model, net().plan, again)
    assert file.SerializeToString(deterministic=True) == net().quantized(scheme).SerializeToString(deterministic=True)


def without(*names: str) -> Table:
    return replace(table(), entries=tuple(found for found in table().entries if found.name not in names))


def test_quantizers_need_the_scheme_and_every_tensor() -> None:
    with pytest.raises(ExportError, match="the table has no scheme w2a8-sym-pc: name one of w8a8-sym-pc, w8a8-asym-pc"):
        table_quantizers(table(), net().plan, "w2a8-sym-pc")
    for name in ("x", "w"):
        with pytest.raises(ExportError, match=f"the table has no '{name}', which the model quantizes: give the table"):
            table_quantizers(without(name), net().plan, "w8a8-sym-pc")


def edited(name: str, change: Entry) -> Table:
    return replace(table(), entries=tuple(change if found.name == name else found for found in table().entries))


def test_quantizers_need_a_view_of_the_scheme() -> None:
    found = entry("y")
    with pytest.raises(ExportError, match="does not quantize 'y' under w8a8-sym-pc: give it a view of this scheme"):
        table_quantizers(edited("y", replace(found, views=found.views[1:])), net().plan, "w8a8-sym-pc")


def test_quantizers_need_one_grid_where_tensors_share_one() -> None:
    table_with_two = edited("m", replace(entry("m"), views=entry("z").views))
    with pytest.raises(ExportError, match="'m' and 'r' share one grid, but the table has two for them under w8a8-sym"):
        table_quantizers(table_with_two, net().plan, "w8a8-sym-pc")
