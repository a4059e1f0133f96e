"""Latency, throughput, energy and price of a model on an edge device (a roofline over MACs and bytes), or measured.

The time of one run of `batch` samples is the sum over the layers of

    t = max(batch MACs / rate, (weight bytes + batch activation bytes) / bandwidth)

in seconds. `rate` (MAC/s) is that of the network's class, fitted on published measurements of the device
(`devices.Fit`), and then throughput is no more than the fastest measured network reached. Where a device has no fit
`rate` is half its peak in operations per second: throughput is an upper bound, latency and energy per board are lower
bounds. The second term counts where a bandwidth has a source, and then what passes through memory outside of the chip:

    weights      unless all of the network's fit in the chip's SRAM; once per run
    activations  unless what a layer reads and writes fits in the SRAM that the weights leave; each layer its own,
                 so layers that a compiler fuses can be faster

Layers that run on the host (`Device.fallback`) cost there the same formula at the rates of `Host`, and each tensor
that passes between device and host costs bytes / link. Those rates have no source: they are parameters.

Energy per sample, in joules, at 45 nm:

    E = sum of MACs * (multiply(b) + add(32)) + bytes of memory outside of the chip * 162.5 pJ
    multiply(b) = 0.0029948 b^2 + 0.00104 b pJ, add(b) = 0.003125 b pJ; in float32 3.7 and 0.9 pJ

with b the bits of the wider operand (Horowitz, ISSCC 2014, as coded by QKeras, `qtools/config_public.py`), and by
board: watts / throughput, of the device alone. Elementwise operators have no MACs and cost no time or energy beyond
their bytes. The rate is that of 8 bits whatever the bits are: narrower codes save bytes and energy, no arithmetic.
"""

import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from onnxqt.devices import DEVICES, ZOO, Device, Figure, Fit, NetworkClass
from onnxqt.errors import DataError, ModelError, UsageError
from onnxqt.model import GraphIndex, Model, Node
from onnxqt.numerics import Array
from onnxqt.plan import IntegerNode, QuantPlan
from onnxqt.runtime import Session
from onnxqt.survey.macs import UnknownMacsError, macs, multiplies
from onnxqt.survey.sizes import Sizes, find_sizes
from onnxqt.tensors import nbytes

__all__ = ["ASSUMED_HOST", "DEVICES", "Estimate", "Host", "Layer", "Measured", "Tensor", "Workload"]
__all__ += ["estimate", "measure", "workload"]

Basis = Literal["fitted", "extrapolated", "upper bound", "assumed host"]
LayerKind = Literal["conv", "depthwise", "matmul", "view", "other"]

ENERGY_SOURCE = "energy: Horowitz, ISSCC 2014, as coded by QKeras (qtools/config_public.py): modelled, 45 nm"
BATCHES = (1, 8)  # of the published measurements

_PICO = 1e-12
_DRAM_J = 8 * 20.3125 * _PICO  # per byte
_FLOAT_MAC_J = (3.7 + 0.9) * _PICO
_FLOAT_BYTES = 4
_BIAS_BYTES = 4  # INT32

# A network is a transformer where one in so many layers with MACs multiplies two activations, else depthwise where one
# in so many convolutions is. EfficientNet-B0 has 16 in 81, with its squeeze-and-excitation; YOLOv10-N, dense, 13 in 83.
_ONE_ATTENTION_IN = 10
_ONE_DEPTHWISE_IN = 6

_CONVOLUTIONS = ("Conv", "ConvTranspose", "ConvInteger", "DeformConv")
_VIEWS = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")  # move no bytes
_MIN_RUNS = 5


@dataclass(frozen=True)
class Tensor:
    """An activation that a layer reads or writes; `bytes` per sample, at the width at which it is stored."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Layer:
    """A node with what is fused into it.

    Attributes:
        name: of the node.
        kind: "conv" with more than one input per output channel, "depthwise" with one; "matmul" for MatMul, Gemm,
            Einsum and recurrent operators; "view" moves no data; "other" for the rest.
        macs: multiply-accumulates per sample.
        weight_bytes: of its weight and bias as stored; 0 where it multiplies two activations.
        reads: the activations that it reads, each once.
        writes: the activations that it gives out.
        integer: whether it runs on integers.
    """

    name: str
    kind: LayerKind
    macs: int
    weight_bytes: int
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    integer: bool

    @property
    def read_bytes(self) -> int:
        """Bytes of activations read per sample."""
        return 0 if self.kind == "view" else sum(tensor.bytes for tensor in self.reads)

    @property
    def write_bytes(self) -> int:
        """Bytes of activations written per sample."""
        return 0 if self.kind == "view" else sum(tensor.bytes for tensor in self.writes)

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations read and written per sample."""
        return self.read_bytes + self.write_bytes


@dataclass(frozen=True)
class Workload:
    """What a model computes and moves for one sample.

    Attributes:
        layers: in topological order; operators that compute shapes or indices are left out.
        weight_bits: of quantized weights.
        activation_bits: of quantized activations; the model's own inputs and outputs have at least 8.
        unknown: what is not counted because sizes are unknown, "node: reason".
    """

    layers: tuple[Layer, ...]
    weight_bits: int
    activation_bits: int
    unknown: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return sum(layer.macs for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; one that two layers read counts twice."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def network_class(self) -> NetworkClass:
        """The class of network whose fitted rate applies.

        "transformer" where at least a tenth of the layers with MACs multiply two activations, else "depthwise" where
        at least a sixth of the convolutions are, else "dense".
        """
        kinds = [(layer.kind, layer.weight_bytes) for layer in self.layers if layer.macs]
        attention = kinds.count(("matmul", 0))
        depthwise = sum(kind == "depthwise" for kind, _ in kinds)
        convolutions = depthwise + sum(kind == "conv" for kind, _ in kinds)
        if attention and _ONE_ATTENTION_IN * attention >= len(kinds):
            return "transformer"
        return "depthwise" if depthwise and _ONE_DEPTHWISE_IN * depthwise >= convolutions else "dense"


@dataclass(frozen=True)
class Host:
    """The processor beside a device, for layers that the device does not run.

    Attributes:
        macs_hz: MAC/s in float32.
        bytes_hz: B/s of its memory.
        link_hz: B/s between host and device.
        source: where these are from.
    """

    macs_hz: float
    bytes_hz: float
    link_hz: float
    source: str


ASSUMED_HOST = Host(
    1e10, 1e10, 1e9, "host: assumption, not published: 10 GMAC/s in float32, 10 GB/s of memory, 1 GB/s to the device"
)


@dataclass(frozen=True)
class Estimate:
    """What one device is modelled to need for a workload.

    Attributes:
        device: its name.
        batch: samples per run.
        weight_bits: of the workload.
        activation_bits: of the workload.
        network_class: of the workload.
        basis: "fitted": on measurements of this device; "extrapolated": likewise, but no network of so few or so many
            MACs was measured, so the error is unknown; "upper bound": on throughput, from the published peak;
            "assumed host": likewise, with layers on a host whose rates are assumed.
        latency_s: of one run, in s: batch / throughput.
        throughput_hz: samples per s.
        throughput_band_hz: where 80 % of networks lie that the rates were not fitted on; None unless fitted.
        median_error: median of |modelled / measured - 1| of throughput on these networks; None unless fitted.
        energy_j: per sample, in J, of arithmetic and memory at 45 nm.
        board_energy_j: per sample, in J: published watts / throughput; None without published watts.
        price_usd: of a board; None without a source.
        bound_by: what takes more of the time, arithmetic or moving bytes.
        integer_share_of_macs: MACs of layers that run on integers on the device over all MACs, 0 to 1.
        boundaries: tensors that pass between device and host.
        host_layers: layers with data to move or MACs that run on the host.
        unknown: what is not counted because sizes are unknown.
        sources: of every figure, one line each, and the assumptions.
        evidence: always "modelled".
    """

    device: str
    batch: int
    weight_bits: int
    activation_bits: int
    network_class: NetworkClass
    basis: Basis
    latency_s: float
    throughput_hz: float
    throughput_band_hz: tuple[float, float] | None
    median_error: float | None
    energy_j: float
    board_energy_j: float | None
    price_usd: float | None
    bound_by: Literal["compute", "memory"]
    integer_share_of_macs: float
    boundaries: int
    host_layers: int
    unknown: tuple[str, ...]
    sources: tuple[str, ...]
    evidence: Literal["modelled"] = "modelled"

    def as_json(self) -> dict[str, Any]:
        """All fields as plain values that `json` writes: lists for tuples."""
        return _plain(self)


@dataclass(frozen=True)
class Measured:
    """How fast ONNX Runtime ran a model on this machine's processor.

    Attributes:
        latency_s: median time of one run, in s.
        p10_s: 10th percentile, in s.
        p90_s: 90th percentile, in s.
        throughput_hz: samples per s: batch / latency_s.
        batch: samples per run.
        runs: that were timed.
        processor: its name.
        processors: logical processors of the machine.
        evidence: always "measured".
    """

    latency_s: float
    p10_s: float
    p90_s: float
    throughput_hz: float
    batch: int
    runs: int
    processor: str
    processors: int
    evidence: Literal["measured"] = "measured"

    def as_json(self) -> dict[str, Any]:
        """All fields as plain values that `json` writes."""
        return _plain(self)


def _plain(record: "Estimate | Measured") -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(record).items()}


# --- from a model to its workload -----------------------------------------------------------------------


def workload(model: Model, plan: QuantPlan, weight_bits: int, activation_bits: int) -> Workload:
    """What `model` computes and moves when it is quantized as `plan` says; a free batch axis counts as 1.

    Args:
        model: the float model.
        plan: its plan.
        weight_bits: 2 to 16.
        activation_bits: 2 to 16.

    Raises:
        UsageError: if a width is out of range.
        ModelError: if no layer's MACs are known.
    """
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if not 2 <= bits <= 16:
            raise UsageError(f"{name} is {bits}: give 2 to 16")
    builder = _Builder(model, plan, weight_bits, activation_bits)
    layers = tuple(builder.layers())
    if not any(layer.macs for layer in layers):
        why = f" ({builder.unknown[0]})" if builder.unknown else ""
        raise ModelError(
            f"the model has no layer whose multiply-accumulates are known{why}: fix the free dimensions of its inputs, "
            "or give a model with convolutions or matrix products"
        )
    return Workload(layers, weight_bits, activation_bits, tuple(builder.unknown))


class _Builder:
    """Goes through a graph once."""

    def __init__(self, model: Model, plan: QuantPlan, weight_bits: int, activation_bits: int) -> None:
        self._graph = model.graph
        self._plan = plan
        self._sizes: Sizes = find_sizes(model)
        self._samples = self._sizes.batch if self._sizes.batched else 1
        self._weight_bits = weight_bits
        self._bits = {site.tensor: max(8, activation_bits) if site.io else activation_bits for site in plan.activations}
        self.unknown: list[str] = []

    def layers(self) -> Iterator[Layer]:
        integer = {node.name: node for node in self._plan.integer_nodes}
        fused = {name for node in self._plan.integer_nodes for name in node.followers}
        for node in self._graph.nodes:
            if node.name in integer:
                yield self._integer_layer(node, integer[node.name])
            elif node.name not in fused and not _computes_no_floats(self._graph, node):
                yield self._float_layer(node)

    def _integer_layer(self, node: Node, plan: IntegerNode) -> Layer:
        weight_bytes = 0
        if plan.weight:
            elements = math.prod(self._graph.initializers[plan.weight.tensor].dims)
            weight_bytes += math.ceil(elements * self._weight_bits / 8)
        if plan.bias:
            weight_bytes += _BIAS_BYTES * math.prod(self._graph.initializers[plan.bias].dims)
        return self._layer(node, weight_bytes, (plan.inputs, (plan.output,)), integer=True)

    def _float_layer(self, node: Node) -> Layer:
        graph = self._graph
        names = tuple(dict.fromkeys((*node.inputs, *node.captured)))
        constants = [name for name in names if name in graph.initializers and graph.is_float(name)]
        reads = tuple(name for name in names if name not in graph.initializers and graph.is_float(name))
        writes = tuple(name for name in node.outputs if name and (graph.is_float(name) or not graph.is_typed(name)))
        weight_bytes = sum(nbytes(graph.initializers[name]) for name in constants)
        return self._layer(node, weight_bytes, (reads, writes), integer=False)

    def _layer(
        self, node: Node, weight_bytes: int, tensors: tuple[tuple[str, ...], tuple[str, ...]], integer: bool
    ) -> Layer:
        reasons: list[str] = []
        try:
            products = math.ceil(macs(node, self._sizes.graph.shape) / self._samples)
        except UnknownMacsError as error:
            products = 0
            reasons.append(str(error))
        reads, writes = (tuple(self._tensor(name, reasons) for name in names) for names in tensors)
        if reasons:
            self.unknown.append(f"{node.label}: {reasons[0]}")
        return Layer(node.name, _kind(self._graph, node), products, weight_bytes, reads, writes, integer)

    def _tensor(self, name: str, reasons: list[str]) -> Tensor:
        shape = self._sizes.graph.shape(name)
        sizes = [size for size in shape or () if size is not None]
        if shape is None or len(sizes) != len(shape):
            reasons.append(f"a size of '{name}' is unknown")
            return Tensor(name, 0)
        bits = self._bits.get(name, 8 * _FLOAT_BYTES)
        return Tensor(name, math.ceil(math.prod(sizes) * bits / 8 / self._samples))


def _computes_no_floats(graph: GraphIndex, node: Node) -> bool:
    """Whether a node only computes shapes, indices or conditions."""
    return all(graph.is_typed(tensor) and not graph.is_float(tensor) for tensor in node.outputs if tensor)


def _kind(graph: GraphIndex, node: Node) -> LayerKind:
    if node.domain in ("", "ai.onnx"):
        if node.op_type in _VIEWS:
            return "view"
        if node.op_type in _CONVOLUTIONS:
            return "depthwise" if _is_depthwise(graph, node) else "conv"
        if multiplies(node):
            return "matmul"
    return "other"


def _is_depthwise(graph: GraphIndex, node: Node) -> bool:
    """Whether each output channel has one input channel, and there are several groups."""
    groups = node.attributes.get("group", 1)
    shape = graph.shape(node.inputs[1]) or ()
    if groups == 1 or len(shape) < 2:
        return False
    return bool(shape[0] == groups if node.op_type == "ConvTranspose" else shape[1] == 1)


# --- from a workload to an estimate ---------------------------------------------------------------------


def estimate(workload: Workload, device: Device, batch: int = 1, host: Host = ASSUMED_HOST) -> Estimate:
    """What `device` is modelled to need for `workload` (formulas: this module's description).

    Args:
        workload: what is to be computed for a sample.
        device: one of `DEVICES`, or one of your own.
        batch: samples per run: 1 or 8, for which measurements are published.
        host: for the layers that the device does not run.

    Raises:
        UsageError: if the batch is another, or the device has neither a peak nor measurements.
    """
    if batch not in BATCHES:
        raise UsageError(f"batch is {batch}: give 1 or 8, for which measurements are published")
    run = _Run(workload, device, batch, host)
    seconds = run.compute_s + run.memory_s
    throughput = batch / seconds
    basis = run.basis
    fit = run.fit if basis == "fitted" else None
    return Estimate(
        device=device.name,
        batch=batch,
        weight_bits=workload.weight_bits,
        activation_bits=workload.activation_bits,
        network_class=workload.network_class,
        basis=basis,
        latency_s=seconds,
        throughput_hz=throughput,
        throughput_band_hz=(throughput * fit.ratio_low, throughput * fit.ratio_high) if fit else None,
        median_error=fit.median_error if fit else None,
        energy_j=run.energy_j,
        board_energy_j=device.watts.value / throughput if device.watts else None,
        price_usd=device.price.value if device.price else None,
        bound_by="compute" if run.compute_s >= run.memory_s else "memory",
        integer_share_of_macs=run.integer_share_of_macs,
        boundaries=len(run.crossings),
        host_layers=sum(run.on_host(layer) and layer.kind != "view" for layer in workload.layers),
        unknown=workload.unknown,
        sources=tuple(run.sources()),
    )


class _Run:
    """One run of `batch` samples; times in s, split by whether arithmetic or moving bytes takes longer in a layer."""

    def __init__(self, workload: Workload, device: Device, batch: int, host: Host) -> None:
        self._workload, self._device, self._batch, self._host = workload, device, batch, host
        kind = workload.network_class
        self.fit: Fit | None = next((fit for fit in device.fits if fit.batch == batch and kind in fit.rates), None)
        self._rate = self._find_rate()
        self.compute_s = self.memory_s = 0.0
        for layer in workload.layers:
            self._add(layer)
        self.memory_s += sum(tensor.bytes for tensor in self.crossings) * batch / host.link_hz
        if self.fit:
            self.compute_s += max(0.0, batch / self.fit.fastest - self.compute_s - self.memory_s)

    def _find_rate(self) -> float:
        if self.fit:
            return self.fit.rates[self._workload.network_class]
        if self._device.peak:
            return self._device.peak.value / 2
        raise UsageError(
            f"'{self._device.name}' has neither a published peak nor measurements of "
            f"{self._workload.network_class} networks at batch {self._batch}: give it one of them"
        )

    def _add(self, layer: Layer) -> None:
        products = layer.macs * self._batch
        if self.on_host(layer):
            moved = layer.weight_bytes + layer.activation_bytes * self._batch
            compute, memory = products / self._host.macs_hz, moved / self._host.bytes_hz
        else:
            bandwidth = self._device.bandwidth
            compute = products / self._rate
            memory = self._outside_bytes(layer) / bandwidth.value if bandwidth else 0.0
        if compute >= memory:
            self.compute_s += compute
        else:
            self.memory_s += memory

    def _outside_bytes(self, layer: Layer) -> float:
        """Bytes that a layer on the device moves from and to memory outside of the chip in one run."""
        if self._device.no_dram or layer.kind == "view":
            return 0
        room = self._device.sram.value if self._device.sram else 0.0
        resident = self._workload.weight_bytes <= room
        room -= self._workload.weight_bytes if resident else 0
        activations = 0 if layer.activation_bytes <= room else layer.activation_bytes * self._batch
        return (0 if resident else layer.weight_bytes) + activations

    @cached_property
    def _sides(self) -> dict[str, bool]:
        """Whether a layer runs on the host, by name; a view is where its data are, absent if they are an input."""
        sides: dict[str, bool] = {}
        produced: dict[str, bool] = {}
        behind = False
        for layer in self._workload.layers:
            if layer.kind == "view":
                side = next((produced[tensor.name] for tensor in layer.reads if tensor.name in produced), None)
            else:
                fallback = self._device.fallback
                behind = behind or not layer.integer
                side = {"none": False, "layer": not layer.integer, "rest": behind}[fallback]
            if side is not None:
                sides[layer.name] = side
                produced.update((tensor.name, side) for tensor in layer.writes)
        return sides

    def on_host(self, layer: Layer) -> bool:
        """Whether a layer runs on the host."""
        return self._sides.get(layer.name, False)

    @cached_property
    def crossings(self) -> tuple[Tensor, ...]:
        """The tensors that pass between device and host, each once however many layers read it."""
        made = {
            tensor.name: self._sides[layer.name]
            for layer in self._workload.layers
            if layer.name in self._sides
            for tensor in layer.writes
        }
        passed: dict[str, Tensor] = {}
        for layer in self._workload.layers:
            for tensor in layer.reads:
                if (
                    layer.name in self._sides
                    and made.get(tensor.name, self._sides[layer.name]) is not (self._sides[layer.name])
                ):
                    passed[tensor.name] = tensor
        return tuple(passed.values())

    @property
    def basis(self) -> Basis:
        """What the time rests on."""
        if any(self._sides.values()):
            return "assumed host"
        if self.fit is None:
            return "upper bound"
        measured = self.fit.least_macs <= self._workload.macs <= self.fit.most_macs
        return "fitted" if measured else "extrapolated"

    @property
    def integer_share_of_macs(self) -> float:
        """MACs of layers that run on integers on the device over all MACs, 0 to 1."""
        integer = sum(layer.macs for layer in self._workload.layers if layer.integer and not self.on_host(layer))
        return integer / self._workload.macs

    @property
    def energy_j(self) -> float:
        """Joules per sample of the device's arithmetic and memory, and of the host's arithmetic."""
        bits = max(self._workload.weight_bits, self._workload.activation_bits)
        total = 0.0
        for layer in self._workload.layers:
            total += layer.macs * (_integer_mac_j(bits) if layer.integer else _FLOAT_MAC_J)
            if not self.on_host(layer):
                total += self._outside_bytes(layer) / self._batch * _DRAM_J
        return total

    def sources(self) -> Iterator[str]:
        """One line for each figure used, and for each assumption."""
        device = self._device
        if self.fit:
            yield (
                f"rate: modelled, fitted on {self.fit.trained} networks at batch {self._batch} ({ZOO}, "
                f"{self.fit.chip}); median error {self.fit.median_error:.0%} on {self.fit.held_out} others; latency "
                "is the inverse of published throughput, and longer where the chip works on several samples at a time"
            )
            if self.basis == "extrapolated":
                yield (
                    f"the measured networks have {self.fit.least_macs / 1e9:.2g} to {self.fit.most_macs / 1e9:.4g} "
                    f"GMACs and reach {self.fit.fastest:g} samples/s at most, this one has "
                    f"{self._workload.macs / 1e9:.2g} GMACs: extrapolated, the error is unknown"
                )
        else:
            yield _line("rate: modelled, the published peak: an upper bound", device.peak)
        yield (
            _line("bandwidth: modelled", device.bandwidth)
            if device.bandwidth
            else ("bandwidth: no source, so time for moving bytes is not modelled on the device")
        )
        if device.no_dram:
            yield f"memory outside of the chip: none ({device.no_dram})"
        if device.sram:
            yield _line("SRAM", device.sram)
        elif not device.no_dram:
            yield "memory on the chip: no source, so all bytes are taken to pass through memory outside of it"
        yield ENERGY_SOURCE
        if device.watts:
            yield _line(f"board energy: modelled, {device.watts.value:g} W / throughput", device.watts)
        if device.price:
            yield _line("price", device.price)
        yield f"layers without an integer form: {device.fallback_source}"
        if any(self._sides.values()):
            yield "which layers these are: assumption, those that the plan leaves in float; the compiler may take more"
            yield self._host.source
        if max(self._workload.weight_bits, self._workload.activation_bits) > 8:
            yield "more than 8 bits: assumption, at the rate of 8 bits, which flatters the device"


def _line(what: str, figure: Figure | None) -> str:
    return f"{what} ({figure.source})" if figure else what


def _integer_mac_j(bits: int) -> float:
    """Energy of one integer multiply-accumulate with a 32-bit sum, in J."""
    return (0.0029948 * bits**2 + 0.00104 * bits + 0.003125 * 32) * _PICO


# --- measured -------------------------------------------------------------------------------------------


def measure(model: onnx.ModelProto | Path, inputs: Mapping[str, Array], seconds: float = 2.0) -> Measured:
    """Time a model in ONNX Runtime on this machine's processor, all threads, after one run to warm up.

    Args:
        model: the model, or the path of its file.
        inputs: one batch, by name of the input; the first axis counts samples if it is the same on all.
        seconds: how long to repeat the run; at least five are timed.

    Raises:
        UsageError: if `seconds` is not positive.
        DataError: if there are no inputs.
        ModelError: if ONNX Runtime cannot run the model on them.
    """
    if not 0 < seconds < math.inf:
        raise UsageError(f"seconds is {seconds}: give a positive number")
    if not inputs:
        raise DataError("there are no inputs to run the model on: give an array for each of its inputs")
    session = Session(model)
    session.run(inputs)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _MIN_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(inputs)
        times.append(time.perf_counter() - start)
    low, median, high = (float(value) for value in np.percentile(times, [10, 50, 90]))
    first = {array.shape[0] if array.ndim else None for array in map(np.asarray, inputs.values())}
    size = first.pop() if len(first) == 1 else None
    batch = 1 if size is None else int(size)
    return Measured(median, low, high, batch / median, batch, len(times), processor_name(), os.cpu_count() or 1)


def processor_name() -> str:
    """The processor's name as the system gives it; its architecture where it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "unknown"
