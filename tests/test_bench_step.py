"""The benchmark of training steps measures what it says, and refuses what would not be a comparison."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Digits

from onnxqt.errors import InstallationError, TrainingError, UsageError
from onnxqt.pipeline import Settings, open_workspace
from onnxqt.runtime import Session
from onnxqt.trim import TrimSettings
from onnxqt.trim import job as jobs
from onnxqt.trim.losses import Losses, least_loss
from onnxqt.trim.quantizers import relative

TOOLS = Path(__file__).parents[1] / "tools"
SIZE, SAMPLES = 8, 48  # a batch; enough samples for four of them beside what is held out
TORCH = os.environ.get("ONNXQT_TORCH_PYTHON")  # an interpreter with torch, onnx and numpy
needs_torch = pytest.mark.skipif(TORCH is None, reason="ONNXQT_TORCH_PYTHON names no interpreter")


@pytest.fixture(scope="session")
def tool() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield importlib.import_module("bench_step")


@pytest.fixture(scope="session")
def data(torch_digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("samples")
    with np.load(torch_digits.folder / "calib" / "000.npz") as file:
        image = file["image"][:SAMPLES]
    (root / "calib").mkdir()
    np.savez(root / "calib" / "samples.npz", image=image)
    return root


@pytest.fixture(scope="session")
def folder(tool: ModuleType, torch_digits: Digits, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes read."""
    path = tmp_path_factory.mktemp("steps")
    settings = Settings(training=TrimSettings(steps=1, batch_size=SIZE, losses=Losses()))
    tool.prepare_folder(open_workspace(torch_digits.file, data / "calib", None, path / "run", settings), path)
    return path


def answer(ms: float, cpu_ms: float = 10.0, queued_ms: float = 0.0, value: float = 1.0, peak: float = 1.0) -> Any:
    return {"ms": ms, "cpu_ms": cpu_ms, "queued_ms": queued_ms, "value": value, "peak_mb": peak}


# --- figures --------------------------------------------------------------------------------------------


def test_first_steps_do_not_count_for_times_but_for_memory_and_the_first_loss(tool: ModuleType) -> None:
    first = [answer(1000, cpu_ms=900, queued_ms=900, value=5.0, peak=70.0)] * tool.WARM_UP
    row = tool.summary([*first, answer(30, 6, 2), answer(10, 4, 0), answer(11, 5, 3, value=2.0)], refresh_ms=40.0)
    assert row.losses == (5.0, 2.0)
    assert (row.step_ms, row.cpu_ms, row.peak_mb) == (11, 5, 70.0)
    # 15 ms on a core; queued for 2 + 0 + 3 ms, and standing still for 22 + 6 + 3 ms, which is what is left
    assert row.lost == (5 + 31) / (15 + 5 + 31)
    assert row.ms == 11 + 40 / tool.REFRESH_EVERY


def test_table_divides_by_the_float_step_and_by_each_of_pytorch(tool: ModuleType) -> None:
    def row(ms: float, mb: float) -> Any:
        return tool.Measured((0.5, 0.4), ms, mb, 3 * ms, 0.04)

    times = {"onnxqt float": (20, 100), "onnxqt full": (30, 150), "PyTorch float": (10, 400)}
    measured = {name: row(*numbers) for name, numbers in times.items()}
    measured["PyTorch fake-quantize"] = row(40, 500)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tool.table(measured).splitlines()]
    assert lines[3] == ["onnxqt full", "30.0", "1.50", "150", "1.50", "3.00", "0.75", "90.0", "4%", "0.5000"]
    assert {len(line) for line in lines} == {len(lines[0])}
    alone = {name: measured[name] for name in tool.VARIANTS[:2]}
    assert "PyTorch" not in tool.table(alone)


def test_busy_machine_is_told_and_fails(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    idle, spoilt = (tool.Measured((1, 1), 1, 1, 1, queued) for queued in (tool.BUSY, tool.BUSY + 0.01))
    measured = {"onnxqt float": idle, "onnxqt full": idle, "PyTorch float": spoilt}
    assert tool.busy(measured) == ["PyTorch float"]
    assert tool.remarks(measured, 8, 5).startswith("**Not valid: the machine was busy with other work (PyTorch float)")
    assert tool.remarks({"onnxqt full": idle}, 8, 5).startswith("Median of 5 steps of 8 samples")
    for rows, code in ((measured, 1), ({"onnxqt full": idle}, 0)):
        monkeypatch.setattr(tool, "bench", lambda *_, rows=rows: rows)
        assert tool.main(["m.onnx", "--data", "d"]) == code
    assert "the times mean nothing: stop them" in capsys.readouterr().err


@pytest.mark.parametrize("other", [1.001, 0.999, float("nan")])
def test_other_first_loss_is_another_network(tool: ModuleType, other: float) -> None:
    tool.check_losses({"onnxqt float": 1.0, "onnxqt full": 9.0, "PyTorch float": 1 + tool.TOLERANCE / 2})
    with pytest.raises(TrainingError, match=r"^the first loss is 1\.000000 here and .* in PyTorch.*: compare what"):
        tool.check_losses({"onnxqt float": 1.0, "onnxqt full": 9.0, "PyTorch float": other})


# --- a process that serves ------------------------------------------------------------------------------


def served(code: str, *names: str) -> list[dict[str, Any]]:
    """What a process with these jobs answers."""
    program = f"import sys, time\nsys.path.insert(0, {str(TOOLS)!r})\nimport step_server\n{textwrap.dedent(code)}"
    told = subprocess.run(
        [sys.executable, "-c", program],
        input="".join(f"{n}\n" for n in names),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in told.stdout.splitlines()]


def test_time_is_told_apart_from_work_and_memory_from_that_of_the_parent() -> None:
    ballast = np.ones(40_000_000)  # 320 MB: what getrusage may tell of a process that this one starts
    ready, sleep, grow, again = served(
        """
        report = step_server.take_report()
        print("this is no answer")
        kept = []
        def sleep():
            time.sleep(0.2)
            return 1.5
        def grow():
            kept.append(b"x" * 100_000_000)
            return 0.0
        step_server.serve({"sleep": sleep, "grow": grow}, report)
        """,
        "sleep",
        "grow",
        "sleep",
    )
    assert ready == {"ready": True}
    assert sleep["value"] == 1.5
    assert sleep["ms"] >= 200
    assert sleep["cpu_ms"] < 100  # half of the time asleep: a wide margin for what answering takes
    assert sleep["peak_mb"] < 100 < ballast.nbytes / 1e6
    # kB of whole pages, and what the allocation itself takes: under 5 MB
    assert grow["peak_mb"] - sleep["peak_mb"] == pytest.approx(100, abs=5)
    assert again["peak_mb"] >= grow["peak_mb"]


def test_threads_that_share_a_core_are_queued() -> None:
    _, crowded = served(
        """
        import os, subprocess
        core = {min(os.sched_getaffinity(0))}
        os.sched_setaffinity(0, core)
        rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # inherits the core
        def work():
            end = time.monotonic() + 0.5
            while time.monotonic() < end: pass
            return 0.0
        try:
            step_server.serve({"work": work}, step_server.take_report())
        finally:
            rival.kill()
            rival.wait()
        """,
        "work",
    )
    # An equal rival takes half of 500 ms; two and a half times less is still seen. What this process may be doing
    # without a core is at most all of its time; 10 % for the scheduler's ticks.
    assert crowded["queued_ms"] > 100
    assert crowded["queued_ms"] + crowded["cpu_ms"] < 1.1 * crowded["ms"]


def test_stopped_process_is_seen_though_it_is_not_queued(tool: ModuleType) -> None:
    _, stopped = served(
        """
        import os, signal, subprocess
        wake = "import os, signal, sys, time; time.sleep(1); os.kill(int(sys.argv[1]), signal.SIGCONT)"
        def work():
            helper = subprocess.Popen([sys.executable, "-c", wake, str(os.getpid())])
            os.kill(os.getpid(), signal.SIGSTOP)
            helper.wait()
            return 0.0
        step_server.serve({"work": work}, step_server.take_report())
        """,
        "work",
    )
    assert stopped["ms"] >= 1000
    assert tool.lost_ms(stopped) > 500  # of the second that it was stopped for


def test_process_that_ends_says_why(tool: ModuleType, folder: Path, tmp_path: Path) -> None:
    code = "import sys; print(1, file=sys.stderr); sys.exit('the last line')"
    process = tool.Stepper("mine", (sys.executable, "-c", code), tmp_path / "log")
    with pytest.raises(TrainingError, match=r"^the process of 'mine' ended: the last line$"):
        process.wait()
    with pytest.raises(TrainingError, match=r"^the process of 'mine' ended: the last line$"):
        process.ask("step")
    process.close()
    silent = tool.Stepper("mine", (sys.executable, "-c", "raise SystemExit(7)"), tmp_path / "log")
    with pytest.raises(TrainingError, match=r"ended: exit code 7$"):
        silent.wait()
    silent.close()
    with pytest.raises(InstallationError, match=r"^'/no/python' cannot be run .*: give an interpreter with torch"):
        tool.Stepper("PyTorch", ("/no/python",), tmp_path / "log")


# --- what is measured -----------------------------------------------------------------------------------


def test_plain_graph_has_no_quantizer_and_trains_the_same_parameters(tool: ModuleType, folder: Path) -> None:
    plain, full = jobs.read(folder / "plain"), jobs.read(folder / "full")
    assert plain.parameters == full.parameters
    graphs = {kind: onnx.load(folder / kind / jobs.GRAPH) for kind in ("plain", "full")}
    operators = {kind: {node.op_type for node in graph.graph.node} for kind, graph in graphs.items()}
    added = {"ProgressiveQDQ", "ReversePrune", "Statistics", "NonNegativeStatistics", "RunTimeGrid"}
    assert added <= operators["full"]
    assert not added & operators["plain"]
    named = {kind: {tensor.name for tensor in graph.graph.initializer} for kind, graph in graphs.items()}
    assert set(plain.parameters) <= named["plain"]
    assert {relative(name) for name in full.parameters} <= named["full"]
    assert not plain.given_out
    assert full.given_out
    assert full.regimes[0].name == str(tool.SCHEME)


def test_feeds_come_back_and_hold_the_original_outputs(tool: ModuleType, folder: Path) -> None:
    batches, job = tool.read_feeds(folder), json.loads((folder / "step.json").read_text())
    assert len(batches) == job["batches"] == tool.BATCHES
    session = Session(folder / "model.onnx")
    for batch in batches:
        (name,) = job["inputs"]
        assert len(batch[name]) == SIZE
        np.testing.assert_array_equal(session.run({name: batch[name]})[job["output"]], batch[job["original"]])
    first, second = (batch[job["inputs"][0]] for batch in batches[:2])
    assert not np.array_equal(first, second)


def test_more_batches_than_samples_are_refused(
    tool: ModuleType, torch_digits: Digits, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(torch_digits.file), "--data", str(data), "--batch-size", "16", "--steps", "1"]) == 1
    assert re.search(r"Error: .*but 4 batches needs 64; add samples", capsys.readouterr().err)
    assert tool.main([str(torch_digits.file), "--data", str(data), "--steps", "0"]) == UsageError.exit_code
    assert "--steps is 0: give a number of at least 1" in capsys.readouterr().err


def test_own_variants_step(tool: ModuleType, folder: Path) -> None:
    terms = jobs.read(folder / "full").terms
    with tool.steppers(folder, None) as processes:
        measured = tool.measure(processes, 3)
    assert list(measured) == ["onnxqt float", "onnxqt full"]
    plain, full = measured.values()
    # Before any step the network is its own teacher: only the entropy of the targets is left. float32 sums of
    # fewer than 1000 terms, each rounded to 6e-8 of the total.
    least = least_loss(terms, tool.read_feeds(folder)[0])
    assert plain.losses[0] == pytest.approx(least, rel=1e-4)
    assert full.losses[0] > plain.losses[0]  # no quantizer is free of error here
    assert full.refresh_ms > 0 == plain.refresh_ms
    assert full.ms > full.step_ms
    assert plain.peak_mb > 0 < full.peak_mb


def test_interpreter_without_torch_is_named(tool: ModuleType, folder: Path) -> None:
    without = pytest.raises(TrainingError, match=r"^the process of 'PyTorch float' ended: ModuleNotFoundError.*'torch'")
    with without, tool.steppers(folder, Path(sys.executable)):
        pass


# --- PyTorch --------------------------------------------------------------------------------------------

HEAD = '<ir_version: 8, opset_import: ["": {opset}]> g (float[2,6,8,8] x) => ({output} y) {{ {body} }}'


def floats(name: str, *shape: int) -> str:
    """A constant of some eighths, of both signs."""
    values = ",".join(str((7 * i % 11 - 5) / 8) for i in range(math.prod(shape)))
    return f"{name} = Constant<value = float[{','.join(map(str, shape))}] {{{values}}}>()"


W, M = floats("w", 4, 3, 3, 3), floats("m", 5, 8)


def ints(name: str, *values: int) -> str:
    return f"{name} = Constant<value = int64[{len(values)}] {{{','.join(map(str, values))}}}>()"


BODIES = {
    "conv": f"{W} y = Conv<group = 2, pads = [1,0,2,1], strides = [2,1], kernel_shape = [3,3]>(x, w)",
    "conv-even": f"{W} y = Conv<group = 2, pads = [1,1,1,1], dilations = [2,1], kernel_shape = [3,3]>(x, w)",
    "average-pool": "y = AveragePool<kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]>(x)",
    "average-pool-counts": "y = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1>(x)",
    "max-pool": "y = MaxPool<kernel_shape = [3,3], strides = [2,2], pads = [0,1,1,0]>(x)",
    "global-pool": "y = GlobalAveragePool(x)",
    "gemm": f"{ints('s', 96, 8)} {M} f = Reshape(x, s) y = Gemm<alpha = 0.5, transB = 1>(f, m)",
    "matmul": f"{M} t = Transpose(m) y = MatMul(x, t)",
    "reduce-mean": "y = ReduceMean<axes = [-1, 1], keepdims = 0>(x)",
    "reduce-mean-18": f"{ints('a', 2)} y = ReduceMean(x, a)",
    "reshape": f"{ints('s', 0, -1, 4)} y = Reshape(x, s)",
    "flatten": "y = Flatten<axis = 2>(x)",
    "pad": f"{ints('p', 0, 1, 0, 2, 0, 0, 3, 1)} v = Constant<value_float = 0.5>() y = Pad(x, p, v)",
    "slice": f"{ints('s', -7, 1)} {ints('e', 9, -1)} {ints('a', 3, 1)} {ints('b', 2, 1)} y = Slice(x, s, e, a, b)",
    "split": f"{ints('s', 1, 2, 3)} u, v, w = Split<axis = 1>(x, s) y = Concat<axis = 1>(w, u)",
    "squeeze": f"{ints('a', 2)} {ints('s', 12, 8, 1, 8)} r = Reshape(x, s) y = Squeeze(r, a)",
    "unsqueeze": f"{ints('a', -1, 1)} y = Unsqueeze(x, a)",
    "gather": f"{ints('i', -1, 0, 4)} y = Gather<axis = 1>(x, i)",
    "hard-sigmoid": "y = HardSigmoid<alpha = 0.3, beta = 0.4>(x)",
    "hard-sigmoid-sixth": "y = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x)",
    "hard-swish": "y = HardSwish(x)",
    "clip": "l = Constant<value_float = -0.5>() y = Clip(x, l)",
    "transpose": "t = Transpose<perm = [2,0,3,1]>(x) y = Relu(t)",
    "softmax": "y = Softmax<axis = 1>(x)",
    "layer-norm": f"{floats('w', 8)} y = LayerNormalization<epsilon = 0.01>(x, w, w)",
    "arithmetic": "a = Mul(x, x) b = Sqrt(a) c = Erf(x) d = Sub(b, c) t = Tanh(d) s = Sigmoid(x) "
    "o = Constant<value_float = 1.0>() p = Add(s, o) y = Div(t, p)",
    "pow": "t = Constant<value_float = 2.0>() y = Pow(x, t)",
}

DRIVER = """
import sys, json
from pathlib import Path
import numpy as np, onnx, torch
sys.path.insert(0, sys.argv[2])
import step_torch
folder = Path(sys.argv[1])
x = torch.from_numpy(np.load(folder / "x.npy"))
for file in sorted(folder.glob("*.onnx")):
    (y,) = step_torch.Network(onnx.load(file), [], {})({"x": step_torch.channels_last(x)}).values()
    np.save(file.with_suffix(".y.npy"), y.numpy())
np.save(folder / "quantized.npy", step_torch.fake_quantizer(json.loads(sys.argv[3]))(x).numpy())
"""


@needs_torch
def test_operators_in_torch_equal_onnx_runtime(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(0, 2, (2, 6, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    expected = {}
    for name, body in BODIES.items():
        ranks = {"gemm": 2, "flatten": 2, "reduce-mean": 2, "reshape": 3, "squeeze": 3, "unsqueeze": 6}
        output = f"float[{','.join('abcdef'[: ranks.get(name, 4)])}]"
        model = onnx.parser.parse_model(HEAD.format(opset=18 if name.endswith("18") else 17, output=output, body=body))
        onnx.save(model, tmp_path / f"{name}.onnx")
        expected[name] = Session(model, optimize=False).run({"x": x})["y"]
    site = {
        "scale": [0.5, 0.25, 0.1, 0.3, 1.0, 2.0],
        "zero_point": [0, 3, -1, 0, 0, 5],
        "qmin": -7,
        "qmax": 7,
        "axis": 1,
    }
    command = [str(TORCH), "-c", DRIVER, str(tmp_path), str(TOOLS), json.dumps(site)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for name, y in expected.items():
        # float32: at most 64 terms of size 10 are added in another order, 64 * 10 * 6e-8
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.y.npy"), y, rtol=0, atol=4e-5, err_msg=name)
    s, z = (np.asarray(site[key], np.float32).reshape(1, 6, 1, 1) for key in ("scale", "zero_point"))
    codes, found = np.clip(np.rint(x / s) + z, -7, 7), np.load(tmp_path / "quantized.npy")
    # PyTorch multiplies by 1 / s, so that a value within some 1e-6 of a rounding tie may go either way.
    clear = np.abs(x / s - np.floor(x / s) - 0.5) > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_allclose(found[clear], ((codes - z) * s)[clear], rtol=1e-6)


@needs_torch
def test_torch_begins_with_the_loss_of_the_trainer(tool: ModuleType, folder: Path) -> None:
    with tool.steppers(folder, Path(str(TORCH))) as processes:
        measured = tool.measure(processes, 1)  # compares the float losses
    assert list(measured) == list(tool.VARIANTS)
    own, other = (measured[name].losses[0] for name in ("onnxqt full", "PyTorch fake-quantize"))
    excess = [loss - measured["onnxqt float"].losses[0] for loss in (own, other)]
    # The same grids, but for codes next to rounding ties, and weights whose scale is raised for a wide bias.
    assert excess[0] == pytest.approx(excess[1], rel=0.5)


@needs_torch
def test_torch_refuses_other_outputs(tool: ModuleType, folder: Path, tmp_path: Path) -> None:
    job, batches = json.loads((folder / "step.json").read_text()), tool.read_feeds(folder)
    batches[0][job["original"]] = batches[0][job["original"]] + 0.01
    tool.write_feeds(tmp_path, batches)
    for name in ("step.json", "model.onnx"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    process = tool.Stepper("t", (str(TORCH), str(TOOLS / "step_torch.py"), str(tmp_path), "float"), tmp_path / "log")
    with pytest.raises(TrainingError, match=r"differs from ONNX Runtime's by 0\.01"):
        process.wait()
    process.close()
