"""A small network that has everything a table speaks of, prepared once."""

import functools

import numpy as np
from helpers import Prepared, build, normal, prepare

from onnxqt.numerics import Array
from onnxqt.table import Entry, Table, build_table

SCHEMES = ("w8a8-sym-pc", "w8a8-asym-pc", "w4a8-sym-pc", "w8a8-asym-pt", "w4a4-asym-pc")
CONSTANTS: dict[str, Array] = {
    "w": normal(6, 2, 3, 3) * np.float32(0.3),
    "b": normal(6, seed=1),
    "v": normal(6, 5, seed=2),
    "d": normal(5, seed=3),
    "k": normal(5, 300, seed=4),  # more channels than stand in the JSON file itself
    "one": normal(1, seed=5),
    "shared": normal(5, seed=6),
    "u": normal(6, 5, seed=7),
    "rows": normal(2, 5, seed=8),
    "wide": normal(6, 5, seed=9),
}
ALL_CONSTANTS = {**CONSTANTS, "zero": np.array([0], np.int64), "two": np.array([2], np.int64)}
# c, t and a are fused; r and m share a grid; 'one' serves 300 channels and 'shared' two nodes; 'wide' stays float.
TEXT = """(float[n,4,5,5] x) => (float[] f, float[] y, float[] s, float[2,5] h) {
    c = Conv<group = 2>(x, w, b) r = Relu(c) m = MaxPool<kernel_shape = [3, 3]>(r)
    g = GlobalAveragePool(m) f = Flatten(g)
    t = MatMul(f, v) a = Add(t, d) q = Relu(a) y = Gemm(q, k, one)
    p = Gemm(f, u, shared) o = Gemm(f, v, shared) z = Add(p, o) s = Softmax(z)
    e = Slice(f, zero, two, zero) h = Gemm(e, wide, rows) }"""


@functools.cache
def net() -> Prepared:
    return prepare(build(TEXT, ALL_CONSTANTS))


@functools.cache
def table() -> Table:
    prepared = net()
    quantizers = {scheme: prepared.quantizers(scheme) for scheme in SCHEMES}
    return build_table(prepared.model, prepared.plan, prepared.ranges, quantizers, "model.onnx")


def entry(name: str, of: Table | None = None) -> Entry:
    found = (of or table()).entry(name)
    assert found is not None, name
    return found
