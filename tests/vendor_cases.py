"""A table of a few tensors with scales that can be checked by hand."""

from dataclasses import replace
from typing import Any

import numpy as np

from onnxqt.numerics import Grid, QParams
from onnxqt.table.form import Entry, NodeRef, Role, Table, View

ASYM, SYM, LOW, BLOCKS = "w8a8-asym-pc", "w8a8-sym-pc", "w4a4-asym-pt", "w4af-sym-b32"
SCHEMES = (ASYM, SYM, LOW, BLOCKS)
INT4, UINT4, INT8, UINT8 = Grid(4, True, narrow=True), Grid(4, False), Grid(8, True), Grid(8, False)
NARROW, INT32 = Grid(8, True, narrow=True), Grid(32, True)


def params(grid: Grid, scale: Any, zero_point: Any = 0, axis: int | None = None, block: int | None = None) -> QParams:
    scales = np.asarray(scale, np.float32)
    zeros = np.array(np.broadcast_to(np.asarray(zero_point, np.int32), scales.shape))
    return QParams(scales, zeros, grid, axis, block)


def activation(name: str, role: Role, asym: QParams, sym: QParams, low: QParams, **facts: Any) -> Entry:
    views = (View((ASYM,), asym), View((SYM,), sym), View((LOW,), low))
    return Entry(name, role, (2, 4), views=views, **facts)


def small_table() -> Table:
    """x -> Conv c -> Relu r -> Softmax s (float) -> MatMul m, Add y."""
    conv, relu = NodeRef("conv", "Conv", 0), NodeRef("relu", "Relu", 0)
    softmax, matmul, add = NodeRef("soft", "Softmax", 0), NodeRef("mul", "MatMul", 0), NodeRef("add", "Add", 0)
    weights = (
        View((ASYM, SYM), params(NARROW, [0.5, 0.125], axis=0)),
        View((LOW,), params(INT4, 2.0)),
        View((BLOCKS,), params(INT4, [[1.0, 0.5], [0.25, 2.0]], axis=1, block=32)),
    )
    return Table(
        entries=(
            activation(
                "x",
                "input",
                params(UINT8, 0.5, 100),
                params(INT8, 1.0),
                params(UINT8, 0.5, 100),
                consumers=(conv,),
            ),
            activation(
                "r",
                "activation",
                params(UINT8, 0.25),
                params(INT8, 0.5),
                params(UINT4, 4.0),
                producer=relu,
                consumers=(softmax,),
                fused_from=("c",),
            ),
            Entry("s", "activation", (2, 4), softmax, (matmul,), reason="has no integer form"),
            activation(
                "y",
                "output",
                params(UINT8, 2.0, 7),
                params(INT8, 4.0),
                params(UINT8, 2.0, 7),
                producer=add,
                fused_from=("m",),
            ),
            Entry("w", "weight", (2, 64), None, (replace(conv, index=1),), views=weights),
            Entry(
                "b",
                "bias",
                (2,),
                None,
                (replace(conv, index=2),),
                views=(
                    View((ASYM,), params(INT32, [0.25, 0.0625], axis=0)),
                    View((SYM,), params(INT32, [0.5, 0.125], axis=0)),
                    View((LOW,), params(INT32, 1.0)),
                ),
                product_of=("x", "w"),
            ),
        ),
        schemes=SCHEMES,
    )


def changed(table: Table, name: str, **facts: Any) -> Table:
    """The table with other facts in the entries of one name."""
    entries = tuple(replace(entry, **facts) if entry.name == name else entry for entry in table.entries)
    return replace(table, entries=entries)


def only(params: QParams, scheme: str = ASYM) -> tuple[View, ...]:
    """The views of a tensor that one scheme quantizes."""
    return (View((scheme,), params),)
