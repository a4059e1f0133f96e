"""The steps of PyTorch that `bench_step.py` measures. `python step_torch.py FOLDER {float,quantized}`.

It builds the network from the ONNX file, in eager mode and with autograd: each node becomes a call of one function of
`OPERATORS`. FOLDER holds what `bench_step.prepare_folder` wrote:

    model.onnx    the float model, normalised by onnxqt
    feeds.npz     `names`, and the array I_J of the name J in the batch I
    step.json     "batches", "inputs", "output", "axis", "classes", "original", "power" (names of arrays in the feeds),
                  "trained", "weights" and "activations" (quantizers by tensor), "rate"

With q the original outputs and p their class probabilities, the loss is that of onnxqt's distillation:

    mean(-sum p log softmax(y)) + mean((y - q)^2) / power

For "quantized", each weight and activation that has a quantizer goes through PyTorch's fused fake-quantize operator.
Needs torch, onnx and numpy; onnxqt is not imported.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from step_server import serve, take_report
from torch import Tensor
from torch.nn import functional

TOLERANCE = 1e-4  # of the float outputs, relative to the largest: float32 sums in another order
Attributes = Mapping[str, Any]
Operator = Callable[..., Any]


# --- operators: attributes, then inputs; None for an input that is left out -----------------------------


def _ints(values: Tensor | None) -> list[int] | None:
    return None if values is None else [int(value) for value in values.flatten().tolist()]


def _padded(a: Attributes, x: Tensor, value: float = 0.0) -> tuple[Tensor, list[int]]:
    """The input with pads that differ between the two ends made explicit, and the pads that are left."""
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad {a['auto_pad']} is not known: give explicit pads")
    rank = x.ndim - 2
    pads = list(a.get("pads", [0] * 2 * rank))
    begins, ends = pads[:rank], pads[rank:]
    if begins == ends:
        return x, begins
    pairs = [size for pair in zip(reversed(begins), reversed(ends), strict=True) for size in pair]
    return functional.pad(x, pairs, value=value), [0] * rank


def conv(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Conv of one, two or three dimensions."""
    rank = x.ndim - 2
    x, pads = _padded(a, x)
    run: Operator = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    ones = [1] * rank
    y: Tensor = run(x, w, b, a.get("strides", ones), pads, a.get("dilations", ones), a.get("group", 1))
    return y


def average_pool(a: Attributes, x: Tensor) -> Tensor:
    """AveragePool of images."""
    pads = a.get("pads", [0, 0, 0, 0])
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or pads[:2] != pads[2:]:
        raise ValueError(f"AveragePool with the pads {pads} is not known: give equal ones on both sides")
    counts = bool(a.get("count_include_pad", 0))
    kernel = a["kernel_shape"]
    strides, ceil = a.get("strides", [1, 1]), bool(a.get("ceil_mode", 0))
    return functional.avg_pool2d(x, kernel, strides, pads[:2], ceil, counts)


def max_pool(a: Attributes, x: Tensor) -> Tensor:
    """MaxPool of images."""
    x, pads = _padded(a, x, -math.inf)
    strides, dilations = a.get("strides", [1, 1]), a.get("dilations", [1, 1])
    y: Tensor = functional.max_pool2d(x, a["kernel_shape"], strides, pads, dilations, bool(a.get("ceil_mode", 0)))
    return y


def gemm(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Matrix product: alpha x w + beta b, with x or w transposed where asked for."""
    x = x.T if a.get("transA", 0) else x
    w = w.T if a.get("transB", 0) else w
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    if b is None:
        return alpha * (x @ w)
    return torch.addmm(b, x, w, alpha=alpha, beta=beta)


def reduce_mean(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """ReduceMean, with the axes as an attribute or, from opset 18 on, as an input."""
    over = _ints(axes) if axes is not None else a.get("axes")
    if not over:
        if a.get("noop_with_empty_axes", 0):
            return x
        over = list(range(x.ndim))
    return x.mean(over, keepdim=bool(a.get("keepdims", 1)))


def reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """Reshape; a size of 0 is that of the input."""
    sizes = _ints(shape) or []
    if not a.get("allowzero", 0):
        sizes = [size or x.shape[axis] for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def pad(a: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    """Pad with a constant."""
    if a.get("mode", "constant") != "constant":
        raise ValueError(f"Pad with mode '{a['mode']}' is not known: give 'constant'")
    sizes = _ints(pads) or []
    given = _ints(axes) or list(range(x.ndim))
    pairs = {axis % x.ndim: (sizes[i], sizes[i + len(given)]) for i, axis in enumerate(given)}
    flat = [size for axis in reversed(range(x.ndim)) for size in pairs.get(axis, (0, 0))]
    return functional.pad(x, flat, value=0.0 if value is None else float(value))


def slice_(
    a: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    """Slice with steps above 0."""
    first, last = _ints(starts) or [], _ints(ends) or []
    index = [slice(None)] * x.ndim
    along, by = _ints(axes) or list(range(len(first))), _ints(steps) or [1] * len(first)
    for axis, start, end, step in zip(along, first, last, by, strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split into given sizes, or into as many parts as there are outputs."""
    axis = a.get("axis", 0)
    given = _ints(sizes)
    parts: tuple[Tensor, ...] = torch.split(x, given or math.ceil(x.shape[axis] / a["outputs"]), axis)
    return parts


def squeeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Squeeze the given axes, or all of size 1."""
    given = _ints(axes)
    return x.squeeze() if given is None else x.squeeze(given)


def unsqueeze(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    """Unsqueeze: the axes are those of the result."""
    given = _ints(axes) or []
    for axis in sorted(axis % (x.ndim + len(given)) for axis in given):
        x = x.unsqueeze(axis)
    return x


def hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    """max(0, min(1, alpha x + beta)); PyTorch's own has alpha = 1/6 and beta = 1/2."""
    alpha, beta = a.get("alpha", 0.2), a.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return functional.hardsigmoid(x)
    return (alpha * x + beta).clamp(0, 1)


def layer_norm(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """LayerNormalization."""
    axis = a.get("axis", -1) % x.ndim
    return functional.layer_norm(x, x.shape[axis:], w, b, a.get("epsilon", 1e-5))


def gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    """Gather along an axis."""
    axis = a.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    taken = x.index_select(axis, index.flatten())
    return taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def clip(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Clip."""
    return x if low is None and high is None else torch.clamp(x, low, high)


def transpose(a: Attributes, x: Tensor) -> Tensor:
    """Transpose."""
    return x.permute(a.get("perm", tuple(reversed(range(x.ndim)))))


def flatten(a: Attributes, x: Tensor) -> Tensor:
    """Flatten to a matrix."""
    return x.reshape(math.prod(x.shape[: a.get("axis", 1) % (x.ndim + 1)]), -1)


OPERATORS: Mapping[str, Operator] = {
    "Add": lambda a, x, y: x + y,
    "AveragePool": average_pool,
    "Clip": clip,
    "Concat": lambda a, *parts: torch.cat(parts, a["axis"]),
    "Conv": conv,
    "Div": lambda a, x, y: x / y,
    "Erf": lambda a, x: torch.erf(x),
    "Flatten": flatten,
    "Gather": gather,
    "Gelu": lambda a, x: functional.gelu(x, approximate=a.get("approximate", "none")),
    "Gemm": gemm,
    "GlobalAveragePool": lambda a, x: x.mean(list(range(2, x.ndim)), keepdim=True),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": lambda a, x: functional.hardswish(x),
    "Identity": lambda a, x: x,
    "LayerNormalization": layer_norm,
    "MatMul": lambda a, x, y: x @ y,
    "MaxPool": max_pool,
    "Mul": lambda a, x, y: x * y,
    "Pad": pad,
    "Pow": lambda a, x, y: x**y,
    "ReduceMean": reduce_mean,
    "Relu": lambda a, x: torch.relu(x),
    "Reshape": reshape,
    "Sigmoid": lambda a, x: torch.sigmoid(x),
    "Slice": slice_,
    "Softmax": lambda a, x: torch.softmax(x, a.get("axis", -1)),
    "Split": split,
    "Sqrt": lambda a, x: torch.sqrt(x),
    "Squeeze": squeeze,
    "Sub": lambda a, x, y: x - y,
    "Tanh": lambda a, x: torch.tanh(x),
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}


# --- the network ----------------------------------------------------------------------------------------


def fake_quantizer(params: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """PyTorch's operator with the parameters of one quantizer."""
    low, high, axis = params["qmin"], params["qmax"], params["axis"]
    if axis is None:
        scale, zero_point = float(params["scale"]), int(params["zero_point"])
        return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    scales = torch.tensor(params["scale"], dtype=torch.float32)
    zero_points = torch.tensor(params["zero_point"], dtype=torch.int32)
    return lambda x: torch.fake_quantize_per_channel_affine(x, scales, zero_points, axis, low, high)


class Network:
    """An ONNX model.

    Args:
        proto: the model.
        trained: the initializers that are trained.
        quantizers: what goes behind a tensor, by its name.

    Raises:
        ValueError: for an operator that is not in `OPERATORS`.
    """

    def __init__(
        self, proto: onnx.ModelProto, trained: list[str], quantizers: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> None:
        self._quantizers = dict(quantizers)
        self._outputs = [value.name for value in proto.graph.output]
        self._values = {tensor.name: _tensor(tensor) for tensor in proto.graph.initializer}
        self._nodes = []
        for node in proto.graph.node:
            attributes: dict[str, Any] = {a.name: _attribute(a) for a in node.attribute}
            if node.op_type == "Constant":
                self._values[node.output[0]] = _constant(attributes)
                continue
            if node.domain or node.op_type not in OPERATORS:
                raise ValueError(f"node '{node.name}' is a {node.op_type}: add it to OPERATORS of step_torch.py")
            attributes["outputs"] = len(node.output)
            self._nodes.append((OPERATORS[node.op_type], attributes, list(node.input), list(node.output)))
        self.parameters = {name: self._values[name].requires_grad_() for name in trained}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name."""
        values: dict[str, Tensor | None] = {"": None}
        for name, value in (*self._values.items(), *inputs.items()):
            values[name] = self._quantized(name, value)
        for run, attributes, reads, writes in self._nodes:
            results = run(attributes, *(values[name] for name in reads))
            for name, result in zip(writes, results if isinstance(results, tuple) else (results,), strict=False):
                values[name] = self._quantized(name, result)
        return {name: value for name in self._outputs if (value := values[name]) is not None}

    def _quantized(self, name: str, value: Tensor) -> Tensor:
        quantizer = self._quantizers.get(name)
        return value if quantizer is None else quantizer(value)


def _tensor(proto: onnx.TensorProto) -> Tensor:
    """A constant; weights of convolutions of images channels last."""
    value = torch.from_numpy(np.array(numpy_helper.to_array(proto)))
    return channels_last(value) if value.is_floating_point() else value


def _constant(attributes: Mapping[str, Any]) -> Tensor:
    """The value of a Constant: a tensor, or plain numbers."""
    ((name, value),) = attributes.items()
    if name == "value":
        return _tensor(value)
    return torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64)


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def channels_last(value: Tensor) -> Tensor:
    """Images and their filters in the layout that PyTorch's CPU kernels want; other tensors as they are."""
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


# --- the step -------------------------------------------------------------------------------------------


class Training:
    """The network with its samples, its loss and its optimizer.

    Raises:
        ValueError: if its float outputs differ from ONNX Runtime's.
    """

    def __init__(self, folder: Path, quantized: bool) -> None:
        self._job = job = json.loads((folder / "step.json").read_text())
        proto = onnx.load(folder / "model.onnx")
        with np.load(folder / "feeds.npz", allow_pickle=False) as file:
            names = [str(name) for name in file["names"]]
            self._batches = [{n: file[f"{i}_{j}"] for j, n in enumerate(names)} for i in range(job["batches"])]
        self._check(Network(proto, [], {}))
        sites = {**job["weights"], **job["activations"]} if quantized else {}
        self.network = Network(proto, job["trained"], {name: fake_quantizer(site) for name, site in sites.items()})
        parameters = list(self.network.parameters.values())
        self._optimizer = torch.optim.AdamW(parameters, lr=job["rate"], weight_decay=0.01, fused=True)
        self._count = 0

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: channels_last(torch.from_numpy(batch[name])) for name in self._job["inputs"]}

    def _check(self, network: Network) -> None:
        batch, name = self._batches[0], self._job["output"]
        with torch.no_grad():
            found = network(self._inputs(batch))[name].numpy()
        expected = batch[self._job["original"]]
        error, size = float(np.abs(found - expected).max()), float(np.abs(expected).max())
        if not error <= TOLERANCE * max(1.0, size):
            raise ValueError(f"output '{name}' differs from ONNX Runtime's by {error:g}, its values are up to {size:g}")

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch."""
        job = self._job
        y = self.network(self._inputs(batch))[job["output"]]
        p, q = torch.from_numpy(batch[job["classes"]]), torch.from_numpy(batch[job["original"]])
        entropy = -(p * functional.log_softmax(y, job["axis"])).sum(job["axis"]).mean()
        return entropy + functional.mse_loss(y, q) / float(batch[job["power"]])

    def step(self) -> float:
        """An update by the next batch; the loss before it."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self._batches[self._count % len(self._batches)])
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._count += 1
        return float(loss.detach())


if __name__ == "__main__":
    answers = take_report()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    serve({"step": Training(Path(sys.argv[1]), sys.argv[2] == "quantized").step}, answers)
