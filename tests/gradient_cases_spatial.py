"""One-operator graphs for the tests of gradients: windows, moves of values, resampling and products."""

from typing import Any

import numpy as np
from gradient_cases import Case, above_one, distinct, ints, random, scalar, signed

from onnxqt.numerics import Array

X = signed(1, 4, 5, 6)
NHWC_LIKE = signed(1, 2, 3, 4)


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


# --- windows --------------------------------------------------------------------------------------------


def convolutions() -> dict[str, Case]:
    def conv(weight: tuple[int, ...], x: Array, **attributes: Any) -> Case:
        return Case("Conv", (x, signed(*weight), signed(weight[0])), attributes, dynamic=True)

    block, line = signed(1, 4, 3, 4, 4), signed(1, 4, 9)
    return {
        "Conv-3d-two-groups": conv((2, 2, 2, 2, 2), block, group=2),
        "Conv-3d-depthwise": conv((4, 1, 2, 2, 2), block, group=4, strides=[1, 2, 3]),
        "Conv-3d-geometry": conv(
            (6, 2, 2, 2, 2), block, group=2, pads=[1, 0, 1, 1, 0, 1], strides=[1, 2, 1], dilations=[1, 1, 2]
        ),
        "Conv-3d-same-upper": conv((2, 2, 2, 3, 2), block, group=2, auto_pad="SAME_UPPER", strides=[2, 1, 2]),
        "Conv-groups-geometry": conv((6, 2, 2, 3), X, group=2, dilations=[2, 1], pads=[1, 0, 2, 1], strides=[1, 2]),
        "Conv-two-per-channel": conv((8, 1, 3, 3), X, group=4, dilations=[1, 2]),
        "Conv-1d-groups": conv((6, 2, 3), line, group=2, dilations=[2], strides=[2], pads=[2, 1]),
        "Conv-stride-beyond-the-kernel": conv((3, 4, 1, 1), X, strides=[2, 3]),
    }


def transposed_convolutions() -> dict[str, Case]:
    small = signed(1, 4, 3, 4)

    def conv(weight: tuple[int, ...], x: Array = small, bias: bool = True, **attributes: Any) -> Case:
        channels = weight[1] * attributes.get("group", 1)
        return Case("ConvTranspose", (x, signed(*weight), *([signed(channels)] * bias)), attributes, dynamic=True)

    line = signed(1, 3, 4)
    return {
        "ConvTranspose-plain": conv((4, 3, 3, 2)),
        "ConvTranspose-no-bias": conv((4, 3, 2, 2), bias=False, strides=[2, 2]),
        "ConvTranspose-stride-2": conv((4, 3, 3, 3), strides=[2, 2]),
        "ConvTranspose-asymmetric-pads": conv((4, 3, 3, 2), pads=[1, 0, 2, 1], strides=[2, 1]),
        "ConvTranspose-dilated": conv((4, 3, 2, 2), dilations=[2, 3], strides=[1, 2], pads=[0, 1, 1, 0]),
        "ConvTranspose-two-groups": conv((4, 3, 3, 3), group=2, strides=[2, 2], pads=[1, 1, 1, 1]),
        "ConvTranspose-depthwise": conv((4, 1, 2, 3), group=4, strides=[2, 2]),
        "ConvTranspose-output-padding": conv((4, 3, 3, 3), strides=[2, 3], pads=[1, 1, 1, 1], output_padding=[1, 2]),
        "ConvTranspose-output-padding-groups": conv(
            (4, 2, 2, 2), group=2, strides=[2, 3], dilations=[1, 3], output_padding=[1, 2]
        ),
        "ConvTranspose-same-upper": conv((4, 3, 3, 2), auto_pad="SAME_UPPER", strides=[2, 1]),
        "ConvTranspose-same-lower": conv((4, 3, 3, 2), auto_pad="SAME_LOWER", strides=[2, 1]),
        "ConvTranspose-same-kernel-below-stride": conv((4, 3, 2, 2), auto_pad="SAME_UPPER", strides=[3, 3]),
        "ConvTranspose-valid": conv((4, 3, 3, 2), auto_pad="VALID", strides=[2, 1]),
        "ConvTranspose-output-shape": conv((4, 3, 3, 3), output_shape=[6, 7], strides=[2, 2]),
        "ConvTranspose-output-shape-same-upper": conv(
            (4, 3, 3, 3), output_shape=[6, 7], strides=[2, 2], auto_pad="SAME_UPPER"
        ),
        "ConvTranspose-output-shape-beyond": conv((4, 3, 2, 2), output_shape=[7, 9], strides=[2, 2]),
        "ConvTranspose-1d": conv((3, 4, 3), line, strides=[2], pads=[1, 0]),
        "ConvTranspose-1d-same-lower": conv((3, 4, 2), line, strides=[1], auto_pad="SAME_LOWER"),
        "ConvTranspose-3d": conv((2, 3, 2, 2, 2), signed(1, 2, 2, 3, 2), strides=[1, 2, 1]),
    }


def norm_pools() -> dict[str, Case]:
    x = above_one(1, 2, 5, 6)

    def pool(kernel: list[int], values: Array = x, opset: int = 18, **attributes: Any) -> Case:
        return Case("LpPool", (values,), {"kernel_shape": kernel, **attributes}, opset=opset, dynamic=True)

    return {
        "LpPool-2": pool([2, 2], strides=[2, 2], opset=17),
        "LpPool-1": pool([2, 3], p=1, opset=17),
        "LpPool-3": pool([3, 2], p=3, strides=[2, 1], pads=[1, 0, 0, 1], opset=17),
        "LpPool-same-upper": pool([3, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
        "LpPool-same-lower": pool([3, 2], strides=[2, 2], auto_pad="SAME_LOWER"),
        "LpPool-valid": pool([3, 2], strides=[2, 2], auto_pad="VALID"),
        "LpPool-ceil": pool([2, 3], strides=[2, 2], ceil_mode=1),
        "LpPool-dilated": pool([2, 2], dilations=[2, 3]),
        "LpPool-1d": pool([3], above_one(1, 3, 7), strides=[2], pads=[1, 1]),
        "LpPool-3d": pool([2, 2, 2], above_one(1, 2, 3, 4, 3)),
    }


def more_windows() -> dict[str, Case]:
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    places = np.array([[[[0, 3], [9, 10]], [[16, 19], [25, 30]]], [[[33, 35], [40, 46]], [[48, 50], [58, 63]]]])
    unpooled = (signed(1, 2, 2, 2), places.astype(np.int64))
    return {
        "MaxPool-indices": Case("MaxPool", (distinct(1, 2, 5, 6),), pool, outputs=2, dynamic=True),
        "MaxPool-indices-column-major": Case(
            "MaxPool", (distinct(1, 2, 5, 6),), {**pool, "storage_order": 1}, outputs=2, dynamic=True
        ),
        "MaxPool-indices-pads": Case(
            "MaxPool", (distinct(1, 2, 5, 6),), {**pool, "pads": [1, 0, 0, 1]}, outputs=2, dynamic=True
        ),
        "MaxUnpool": Case("MaxUnpool", unpooled, pool, dynamic=True),
        "MaxUnpool-shape": Case("MaxUnpool", (*unpooled, ints(2, 2, 5, 5)), pool, dynamic=True),
        "LRN-3": Case("LRN", (signed(1, 5, 2, 3),), {"size": 3, "alpha": 0.5, "beta": 0.75, "bias": 1.5}, dynamic=True),
        "LRN-5": Case("LRN", (signed(1, 4, 3, 2),), {"size": 5, "alpha": 0.9, "beta": 0.5, "bias": 2.0}, dynamic=True),
        "LRN-default": Case("LRN", (signed(1, 4, 3, 2),), {"size": 3}, dynamic=True),
    }


# --- moves ----------------------------------------------------------------------------------------------


def pads() -> dict[str, Case]:
    x = NHWC_LIKE

    def pad(amounts: Array, *more: Array | None, opset: int = 17, **attributes: Any) -> Case:
        return Case("Pad", (x, amounts, *more), attributes, opset=opset, dynamic=True)

    around = ints(0, 0, 1, 2, 0, 0, 2, 1)
    return {
        "Pad-reflect": pad(around, mode="reflect"),
        "Pad-edge": pad(around, mode="edge"),
        "Pad-wrap": pad(around, mode="wrap", opset=19),
        "Pad-edge-channels": pad(ints(0, 1, 0, 0, 0, 2, 0, 3), mode="edge"),
        "Pad-edge-negative": pad(ints(0, 0, -1, 2, 0, 0, 0, -1), mode="edge"),
        "Pad-reflect-axes": pad(ints(1, 2), None, ints(3), mode="reflect", opset=18),
        "Pad-constant-axes": pad(ints(1, 2), None, ints(-1), opset=18),
        "Pad-trained-value": pad(ints(0, 0, 1, -1, 0, 0, 2, 1), scalar(0.5)),
        "Pad-trained-value-vector": pad(around, floats(0.5)),
    }


def selections() -> dict[str, Case]:
    x = NHWC_LIKE
    rows = np.array([[[2, 0, -1], [1, 1, 0]]], np.int64)
    condition = np.array([True, False, True])
    pairs = np.array([[[0, 2], [1, 0]], [[-1, -1], [0, 2]]], np.int64)
    return {
        "Slice-backwards": Case("Slice", (x, ints(-1, 0), ints(-9, 9), ints(3, 2), ints(-2, 2)), dynamic=True),
        "Slice-backwards-all-axes": Case("Slice", (signed(4, 5), ints(3, -1), ints(0, -9), None, ints(-1, -3))),
        "GatherElements": Case("GatherElements", (signed(1, 3, 3), rows), {"axis": 1}),
        "GatherElements-last": Case("GatherElements", (signed(2, 2, 3), np.tile(rows, (2, 1, 1))), {"axis": -1}),
        "GatherND": Case("GatherND", (signed(3, 3, 2), pairs)),
        "GatherND-elements": Case("GatherND", (signed(3, 4), ints(0, 2, 1, 1, -1, 3, 0, 2).reshape(4, 2))),
        "GatherND-batch": Case("GatherND", (signed(2, 3, 3, 2), pairs), {"batch_dims": 1}),
        "Gather-pairs": Case("Gather", (x, pairs), {"axis": -2}, dynamic=True),
        "Compress": Case("Compress", (x, condition), {"axis": 2}, dynamic=True),
        "Compress-flat": Case("Compress", (signed(2, 3), np.array([False, True, True, False, True]))),
        "CenterCropPad": Case("CenterCropPad", (x, ints(2, 7)), {"axes": [2, 3]}, opset=18, dynamic=True),
        "CenterCropPad-all-axes": Case("CenterCropPad", (signed(3, 4, 5), ints(2, 5, 2)), opset=18),
        "TopK": Case("TopK", (distinct(1, 3, 5), ints(2)), outputs=2, dynamic=True),
        "TopK-smallest": Case("TopK", (distinct(1, 5, 3), ints(3)), {"axis": 1, "largest": 0}, outputs=2, dynamic=True),
        "Trilu": Case("Trilu", (signed(1, 3, 4),), dynamic=True),
        "Trilu-lower": Case("Trilu", (signed(1, 3, 4), np.array(-1)), {"upper": 0}, dynamic=True),
        "ReverseSequence": Case(
            "ReverseSequence", (signed(1, 4, 3), ints(4, 2)), {"batch_axis": 0, "time_axis": 1}, dynamic=True
        ),
        "ReverseSequence-time-first": Case("ReverseSequence", (signed(4, 2, 3), ints(1, 3))),
        "Tile-leading": Case("Tile", (x, ints(1, 3, 1, 2)), dynamic=True),
        "Expand-two-axes": Case("Expand", (signed(2, 1, 3, 1), ints(2, 2, 3, 4))),
        "Expand-one": Case("Expand", (signed(2, 1, 3), ints(1, 4, 1))),
    }


def overwritings() -> dict[str, Case]:
    data = signed(3, 4)
    places = np.array([[1, 3, 0, 2], [2, 0, 3, 1]], np.int64)
    twice = np.array([[1, 1, 0, 2], [2, 0, 0, 1]], np.int64)
    points = ints(0, 1, 2, 3, -1, 0).reshape(3, 2)
    cases = {
        "ScatterElements": Case("ScatterElements", (data, places, above_one(2, 4)), {"axis": -1}),
        "ScatterElements-add": Case(
            "ScatterElements", (data, twice, above_one(2, 4)), {"axis": 0, "reduction": "add"}, opset=18
        ),
        "ScatterND": Case("ScatterND", (data, points, above_one(3))),
        "ScatterND-rows": Case("ScatterND", (signed(3, 2, 2), ints(2, 0).reshape(2, 1), above_one(2, 2, 2)), opset=18),
        "ScatterND-add": Case(
            "ScatterND", (signed(3, 2), ints(2, 0, 2).reshape(3, 1), above_one(3, 2)), {"reduction": "add"}, opset=18
        ),
    }
    for exclusive in (0, 1):
        for reverse in (0, 1):
            attributes = {"exclusive": exclusive, "reverse": reverse}
            name = f"CumSum-exclusive{exclusive}-reverse{reverse}"
            cases[name] = Case("CumSum", (signed(1, 3, 4), np.array(-1 - reverse)), attributes, dynamic=True)
    return cases


def rearrangements() -> dict[str, Case]:
    columns = {"strides": [2, 1], "pads": [1, 0, 0, 1], "dilations": [1, 2]}
    image = ints(4, 5)
    return {
        "DepthToSpace": Case("DepthToSpace", (signed(1, 8, 2, 3),), {"blocksize": 2}, dynamic=True),
        "DepthToSpace-crd": Case("DepthToSpace", (signed(1, 8, 2, 3),), {"blocksize": 2, "mode": "CRD"}, dynamic=True),
        "DepthToSpace-crd-3": Case(
            "DepthToSpace", (signed(1, 18, 1, 2),), {"blocksize": 3, "mode": "CRD"}, dynamic=True
        ),
        "SpaceToDepth": Case("SpaceToDepth", (signed(1, 2, 4, 6),), {"blocksize": 2}, dynamic=True),
        "Col2Im": Case("Col2Im", (signed(1, 12, 12), image, ints(2, 2)), opset=18, dynamic=True),
        "Col2Im-geometry": Case("Col2Im", (signed(1, 12, 8), image, ints(2, 2)), columns, opset=18, dynamic=True),
        "AffineGrid": Case("AffineGrid", (signed(2, 2, 3), ints(2, 1, 3, 4)), opset=20),
        "AffineGrid-corners": Case("AffineGrid", (signed(2, 2, 3), ints(2, 1, 3, 4)), {"align_corners": 1}, opset=20),
        "AffineGrid-3d": Case("AffineGrid", (signed(2, 3, 4), ints(2, 1, 2, 3, 2)), opset=20),
    }


# --- resampling -----------------------------------------------------------------------------------------


def resizes() -> dict[str, Case]:
    x = signed(1, 3, 4, 5)

    def by_scale(*scales: float, values: Array = x, opset: int = 17, **attributes: Any) -> Case:
        inputs = (values, None, floats(1, 1, *scales))
        return Case("Resize", inputs, attributes, fixed=(1, 2), opset=opset, dynamic=True)

    def to_size(*sizes: int, opset: int = 17, **attributes: Any) -> Case:
        return Case("Resize", (x, None, None, ints(*sizes)), attributes, opset=opset, dynamic=True)

    cases = {}
    for mode in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
        for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
            name = f"Resize-nearest-{mode}-{rounding}"
            cases[name] = by_scale(1.5, 0.6, mode="nearest", coordinate_transformation_mode=mode, nearest_mode=rounding)
        for kind in ("linear", "cubic"):
            name = f"Resize-{kind}-{mode}"
            cases[name] = by_scale(2.0, 0.7, mode=kind, coordinate_transformation_mode=mode)
    crop = floats(0, 0, 0.25, -0.25, 1, 1, 0.75, 1.25)
    cropped = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 3.0}
    return cases | {
        "Resize-nearest-twice": by_scale(2.0, 2.0, mode="nearest", coordinate_transformation_mode="asymmetric"),
        "Resize-nearest-thrice-wide": by_scale(1.0, 3.0, mode="nearest"),
        "Resize-nearest-half": by_scale(0.5, 0.4, mode="nearest"),
        "Resize-nearest-sizes": to_size(2, 3, 7, 11, mode="nearest"),
        "Resize-linear-sizes": to_size(2, 3, 7, 3, mode="linear"),
        "Resize-linear-axes": to_size(7, 3, mode="linear", axes=[3, 2], opset=18),
        "Resize-linear-antialias": to_size(2, 3, 3, 2, mode="linear", antialias=1, opset=18),
        "Resize-cubic-antialias": to_size(2, 3, 3, 2, mode="cubic", antialias=1, opset=18),
        "Resize-cubic-outside": by_scale(2.0, 1.6, mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5),
        "Resize-linear-symmetric": by_scale(
            1.3, 0.7, opset=19, mode="linear", coordinate_transformation_mode="half_pixel_symmetric"
        ),
        "Resize-nearest-channels": Case(
            "Resize", (x, None, floats(1, 2, 1, 2)), {"mode": "nearest"}, (1, 2), 1, 17, True
        ),
        "Resize-linear-1d": by_scale(1.6, values=signed(1, 3, 5), mode="linear"),
        "Resize-nearest-1d": by_scale(2.0, values=signed(1, 3, 5), mode="nearest"),
        "Resize-linear-3d": by_scale(2.0, 1.5, 0.7, values=signed(1, 2, 2, 4, 3), mode="linear"),
        "Resize-crop": Case("Resize", (x, crop, floats(1, 1, 1.5, 1.2)), cropped, (1, 2), 1, 17, True),
        "Resize-crop-only": Case("Resize", (x, crop, floats(1, 1, 1, 1)), cropped, (1, 2), 1, 17, True),
    }


def grid_samples() -> dict[str, Case]:
    # Half of the points lie outside the image, none on a pixel or halfway between two of them.
    grid = (random("grid").integers(-13, 13, (2, 3, 4, 2)) / 8 + 0.0371).astype(np.float32)
    space = (random("grid").integers(-13, 13, (2, 2, 3, 2, 3)) / 8 + 0.0371).astype(np.float32)
    cases = {}
    for mode in ("nearest", "bilinear", "bicubic"):
        for padding in ("zeros", "border", "reflection"):
            for corners in (0, 1):
                attributes = {"mode": mode, "padding_mode": padding, "align_corners": corners}
                name = f"GridSample-{mode}-{padding}-corners{corners}"
                cases[name] = Case("GridSample", (signed(1, 2, 4, 5), grid), attributes, (1,), dynamic=True)
    for mode in ("nearest", "linear"):
        attributes = {"mode": mode, "padding_mode": "reflection"}
        name = f"GridSample-{mode}-3d"
        cases[name] = Case("GridSample", (signed(1, 2, 2, 3, 4), space), attributes, (1,), opset=20, dynamic=True)
    cases["GridSample-cubic-opset20"] = Case(
        "GridSample", (signed(1, 2, 4, 5), grid), {"mode": "cubic"}, (1,), opset=20, dynamic=True
    )
    return cases


# --- products -------------------------------------------------------------------------------------------


def einsums() -> dict[str, Case]:
    def einsum(equation: str, *operands: Array) -> Case:
        return Case("Einsum", operands, {"equation": equation})

    return {
        "Einsum-matmul": einsum("ij,jk->ik", signed(3, 4), signed(4, 2)),
        "Einsum-implicit": einsum("ij,jk", signed(3, 4), signed(4, 2)),
        "Einsum-implicit-order": einsum("bj,ja", signed(3, 4), signed(4, 2)),
        "Einsum-attention": Case(
            "Einsum", (signed(1, 2, 3, 4), signed(2, 2, 5, 4)), {"equation": "bhid,bhjd->bhij"}, dynamic=True
        ),
        "Einsum-ellipsis": einsum("...ij,...jk->...ik", signed(2, 2, 3), signed(2, 3, 2)),
        "Einsum-ellipsis-broadcast": einsum("...ij, ...jk -> ...ik", signed(2, 1, 2, 3), signed(1, 3, 3, 2)),
        "Einsum-ellipsis-implicit": einsum("...ij,jk", signed(2, 2, 3), signed(3, 2)),
        "Einsum-ellipsis-alone": einsum("...i,i->...", signed(2, 2, 3), signed(3)),
        "Einsum-outer": einsum("i,j->ji", signed(3), signed(4)),
        "Einsum-inner": einsum("i,i->", signed(4), above_one(4)),
        "Einsum-three": einsum("ij,jk,kl->il", signed(2, 3), signed(3, 4), signed(4, 2)),
        "Einsum-sum-of-one": einsum("ij,jk->i", signed(3, 4), signed(4, 2)),
        "Einsum-sum": einsum("ijk->j", signed(2, 3, 4)),
        "Einsum-sum-of-all": einsum("ij->", signed(2, 3)),
        "Einsum-transpose": einsum("ijk->kij", signed(2, 3, 4)),
        "Einsum-scalar": einsum(",ij->ij", scalar(1.5), signed(2, 3)),
        "Einsum-uppercase": einsum("bIJ,bJ->bI", signed(2, 3, 4), signed(2, 4)),
        "Einsum-trace": einsum("ii", signed(3, 3)),
        "Einsum-diagonal": einsum("bii->bi", signed(2, 3, 3)),
        "Einsum-diagonal-product": einsum("iji,ik->kj", signed(3, 2, 3), signed(3, 2)),
        "Einsum-diagonal-three": einsum("iii,i->", signed(2, 2, 2), signed(2)),
        "Einsum-diagonal-of-a-constant": Case(
            "Einsum", (signed(3, 3), signed(3, 4)), {"equation": "ii,ij->j"}, fixed=(0,)
        ),
    }


def regular(*shape: int) -> Array:
    """Matrices whose determinant is about as large as the products it consists of."""
    return (signed(*shape) + 4 * np.eye(shape[-1])).astype(np.float32)


def vectors() -> dict[str, Case]:
    def matmul(a: Array, b: Array) -> Case:
        return Case("MatMul", (a, b))

    def gemm(*operands: Array, **attributes: Any) -> Case:
        return Case("Gemm", operands, attributes)

    return {
        "MatMul-vector-left": matmul(signed(3), signed(3, 4)),
        "MatMul-vector-left-batch": matmul(signed(3), signed(2, 3, 4)),
        "MatMul-vector-right": matmul(signed(4, 3), signed(3)),
        "MatMul-vector-right-batch": matmul(signed(2, 4, 3), signed(3)),
        "Det": Case("Det", (regular(1, 3, 3),), dynamic=True),
        "Det-2": Case("Det", (regular(2, 2),)),
        "Det-1": Case("Det", (signed(1, 3, 1, 1),), dynamic=True),
        "Det-singular": Case("Det", (regular(4, 4) * floats(1, 1, 0, 1)[:, None],)),
        "MatMul-vectors": matmul(signed(3), above_one(3)),
        "Gemm-bias-1": gemm(signed(3, 5), signed(5, 4), signed(1)),
        "Gemm-bias-1-1": gemm(signed(3, 5), signed(5, 4), signed(1, 1)),
        "Gemm-bias-row": gemm(signed(3, 5), signed(5, 4), signed(1, 4), beta=0.5),
        "Gemm-bias-column": gemm(signed(5, 3), signed(5, 4), signed(3, 1), transA=1, alpha=2.0),
        "Gemm-bias-full": gemm(signed(5, 3), signed(4, 5), signed(3, 4), transA=1, transB=1, alpha=0.5, beta=3.0),
    }


CASES_SPATIAL = {
    **convolutions(),
    **transposed_convolutions(),
    **norm_pools(),
    **more_windows(),
    **pads(),
    **selections(),
    **overwritings(),
    **rearrangements(),
    **resizes(),
    **grid_samples(),
    **einsums(),
    **vectors(),
}
