"""One-operator graphs for the rules that replace gradients which are right but slow: what they take and leave."""

from typing import Any

import numpy as np
from gradient_cases import Case, around_clip, scalar, signed

from onnxqt.numerics import Array

X = signed(1, 4, 6, 7)


def conv(weight: tuple[int, ...], x: Array = X, fixed: tuple[int, ...] = (), **attributes: Any) -> Case:
    inputs = (x, signed(*weight), signed(weight[0]))
    return Case("Conv", inputs, attributes, fixed=fixed, dynamic=0 not in fixed)


def far_from_zero(x: Array) -> Array:
    """Values of both signs, small and large, none nearer to zero than a step of the differences."""
    return np.asarray(x * np.logspace(-0.5, 2, x.size, dtype=np.float32).reshape(x.shape))


TAKEN = {
    "Conv-fast-asymmetric-pads": conv((3, 4, 3, 2), pads=[1, 0, 2, 1]),
    "Conv-fast-full-pads": conv((3, 4, 2, 3), pads=[1, 2, 1, 2]),
    "Conv-fast-same-size": conv((5, 4, 3, 3), pads=[1, 1, 1, 1], strides=[1, 1], dilations=[1, 1], group=1),
    "Conv-fast-points": conv((6, 4, 1, 1), kernel_shape=[1, 1]),
    "Conv-fast-whole-rows": conv((2, 4, 1, 7)),
    "Conv-fast-one-channel": conv((1, 1, 3, 3), x=signed(1, 1, 4, 5)),
    "Conv-fast-weight-alone": conv((3, 4, 3, 3), pads=[1, 0, 0, 1], fixed=(0, 2)),
    "Conv-fast-data-alone": conv((3, 4, 3, 3), pads=[1, 0, 0, 1], fixed=(1, 2)),
    "Conv-fast-bias-alone": conv((3, 4, 3, 3), fixed=(0, 1)),
    "Conv-fast-as-many-positions-as-channels": conv((20, 4, 3, 3)),  # 4 x 5 positions
    "Relu-fast-large-and-small": Case("Relu", (far_from_zero(signed(5, 8)),)),
    "Clip-fast-one-side": Case("Clip", (signed(4, 5), scalar(0)), fixed=(1,)),
}
LEFT = {
    "Conv-left-groups": (conv((6, 2, 3, 3), group=2), "is grouped"),
    "Conv-left-same-pads": (conv((3, 4, 2, 3), auto_pad="SAME_UPPER"), "finds its pads itself"),
    "Conv-left-valid": (conv((3, 4, 2, 3), auto_pad="VALID"), "finds its pads itself"),
    "Conv-left-stride": (conv((3, 4, 3, 3), strides=[1, 2]), "leaves out positions"),
    "Conv-left-dilation": (conv((3, 4, 2, 2), dilations=[2, 1]), "leaves out positions"),
    "Conv-left-wide-pads": (conv((3, 4, 2, 2), pads=[0, 2, 1, 0]), "wide pads"),
    "Conv-left-wide-pads-at-the-end": (conv((3, 4, 2, 2), pads=[0, 0, 0, 2]), "wide pads"),
    "Conv-left-few-positions": (conv((21, 4, 3, 3)), "few positions"),  # 4 x 5 positions
    "Conv-left-1d": (conv((3, 4, 3), x=signed(1, 4, 8)), "sizes that are not known"),
    "Clip-left-computed-bound": (
        Case("Clip", (around_clip(4, 5), scalar(-1), scalar(1)), fixed=(1,)),
        "computed bounds",
    ),
}
CASES_FAST = {**TAKEN, **{name: case for name, (case, _) in LEFT.items()}}
