"""What the pictures show is read from the text and the marks of their SVG."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from onnxqt.errors import ExportError
from onnxqt.pictures import (
    MOST_WEIGHTS,
    draw_tails,
    draw_training,
    family_losses,
    family_of,
    running_median,
    tail_length,
    worst_first,
)
from onnxqt.trim.prune import Tails, tails

SVG = "{http://www.w3.org/2000/svg}"
REGIMES = ("w8a8-sym-pc", "w4a8-sym-pt", "w4a8-asym-pc", "npu/int8", "float")

Pairs = dict[str, tuple[Tails, Tails]]


def make_history(steps: int = 60, **more: float) -> list[dict[str, Any]]:
    def step(i: int) -> dict[str, Any]:
        return {
            "event": "step",
            "step": i,
            "loss": 0.5 + 0.3 * np.sin(i),
            "blend": min(1.0, i / 30),
            "lr": 1e-3,
            **more,
        }

    return [
        {"event": "start", "losses": [0.1, 0.2, 0.4, 0.3, 0.0]},
        *(step(i) for i in range(steps // 2)),
        {"event": "saved", "step": steps // 2},
        {"event": "evaluate", "step": steps // 2, "losses": [0.1, 0.1, 0.3, 0.2, 0.1], "best": True},
        *(step(i) for i in range(steps // 2, steps)),
        {"event": "evaluate", "step": steps, "losses": [0.2, 0.2, 0.4, 0.3, 0.1], "best": False},
        {"event": "done"},
    ]


def make_tails(count: int) -> Pairs:
    """Weight i has a tail of i + 2 before and 1 after."""
    return {
        f"w{i}": (
            Tails(float(i + 2), {"0.5": 0.1, "0.99": 0.9, "0.999": 1.0}, float(i), 0.01 if i else 0.0),
            Tails(1.0, {"0.5": 0.1, "0.99": 0.9, "0.999": 1.0}, -1.0, 0.0),
        )
        for i in range(count)
    }


def texts(path: Path) -> list[str]:
    """All text of a picture, in the order in which it stands in the file."""
    return ["".join(element.itertext()).strip() for element in ET.parse(path).iter(f"{SVG}text")]


def test_running_median() -> None:
    values = np.arange(350.0)
    values[70] = 1e6  # one outlier moves no median of seven values by more than one place
    half = 3  # 350 // 50 // 2
    expected = [sorted(values[max(0, i - half) : i + half + 1]) for i in range(350)]
    assert running_median(values).tolist() == [float(np.median(window)) for window in expected]
    assert running_median(values)[70] == 71
    assert running_median(np.array([3.0, 1.0, 2.0, 9.0])).tolist() == [2.0, 2.5, 2.5, 2.0]  # windows of five
    assert running_median(np.array([])).tolist() == []


@pytest.mark.parametrize(
    ("regime", "family"), [("w4a8-asym-pt", "w4a8"), ("float", "float"), ("my-npu/w8a8-pc", "my-npu")]
)
def test_family_of(regime: str, family: str) -> None:
    assert family_of(regime) == family


def test_family_losses_are_means_and_begin_before_training() -> None:
    found = family_losses(make_history(), REGIMES)
    assert list(found) == ["w8a8", "w4a8", "npu", "float"]
    at, losses = found["w4a8"]
    assert at.tolist() == [0, 30, 60]
    np.testing.assert_allclose(losses, [0.3, 0.2, 0.3], rtol=1e-15, atol=0)  # one rounding of a sum, 2^-53
    assert found["float"][1].tolist() == [0.0, 0.1, 0.1]
    assert family_losses([], REGIMES) == {}


def test_training_picture_names_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "training.svg"
    draw_training(make_history(), REGIMES, path)
    found = texts(path)
    for family in ("w8a8", "w4a8", "npu", "float"):
        assert f"held out, {family}" in found
    assert {"loss", "lambda", "learning rate", "step", "step, median", "checkpoint"} <= set(found)
    assert not any("tau" in text for text in found)
    draw_training(make_history(tau=0.8), REGIMES, path)
    assert "tau, mean clip" in texts(path)


def test_checkpoint_is_marked_only_where_training_helped(tmp_path: Path) -> None:
    history = [{**report, "best": False} if report["event"] == "evaluate" else report for report in make_history()]
    draw_training(history, REGIMES, tmp_path / "training.svg")
    assert "checkpoint" not in texts(tmp_path / "training.svg")


@pytest.mark.parametrize(
    "history",
    [
        [{"event": "start", "losses": [0.0] * 5}, {"event": "diverged", "message": "at step 0"}],
        [report for report in make_history(2) if report["event"] != "evaluate"],
        [{**report, "loss": 0.0, "losses": [0.0] * 5} for report in make_history()],
        [{**report, "losses": [float("nan")] * 5} for report in make_history()],
        [],
    ],
    ids=["no step", "no evaluation", "no loss", "not finite", "nothing"],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_training_picture_of_a_short_run(history: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_training(history, REGIMES, tmp_path / "training.svg")
    assert "lambda" in texts(tmp_path / "training.svg") or not any(r["event"] == "step" for r in history)


def test_tail_length() -> None:
    weight = np.ones(10_000, np.float32)
    weight[0] = 5
    assert tail_length(tails(weight)) == 5
    assert tail_length(tails(np.zeros(9, np.float32))) == 1
    spike = np.zeros(10_000, np.float32)
    spike[0] = 1
    assert tail_length(tails(spike)) == float("inf")


def test_worst_weights_come_first_and_the_others_are_counted(tmp_path: Path) -> None:
    many = make_tails(MOST_WEIGHTS + 3)
    names = worst_first(many)
    assert names == [f"w{i}" for i in reversed(range(MOST_WEIGHTS + 3))]
    draw_tails(many, tmp_path / "tails.svg")
    found = texts(tmp_path / "tails.svg")
    assert [text for text in found if text.startswith("w")] == [f"{name}  (1.00% clipped)" for name in names[:-3]]
    assert sum("3 more with shorter tails are not shown" in text for text in found) == 1
    few = make_tails(3)
    draw_tails(few, tmp_path / "tails.svg")
    found = texts(tmp_path / "tails.svg")
    assert [text for text in found if text.startswith("w")] == ["w2  (1.00% clipped)", "w1  (1.00% clipped)", "w0"]
    assert not any("not shown" in text for text in found)


@pytest.mark.filterwarnings("error")
def test_any_name_and_any_value_can_be_drawn(tmp_path: Path) -> None:
    pair = make_tails(1)["w0"]
    zero = tails(np.zeros(9, np.float32))
    odd = {"$a$": pair, "<b&c>": pair, "d\x07\n": pair, "\u6743": (zero, zero), "e" * 100: pair}
    draw_tails(odd, tmp_path / "tails.svg")
    found = texts(tmp_path / "tails.svg")
    assert {"$a$", "<b&c>", r"d\x07\n", r"\u6743"} <= set(found)
    (long,) = (text for text in found if text.startswith("eee"))
    assert "..." in long
    assert len(long) < 50
    draw_tails({}, tmp_path / "tails.svg")


def test_same_bytes_whatever_the_process_and_the_users_settings(tmp_path: Path) -> None:
    draw_training(make_history(tau=0.9), REGIMES, tmp_path / "a.svg")
    draw_tails(make_tails(5), tmp_path / "b.svg")
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.hashsalt": "other", "font.size": 20}):
        draw_training(make_history(tau=0.9), REGIMES, tmp_path / "a2.svg")
        assert (matplotlib.rcParams["lines.linewidth"], matplotlib.rcParams["svg.hashsalt"]) == (9, "other")
    code = (
        "import sys; from pathlib import Path; from test_pictures import *;"
        "draw_training(make_history(tau=0.9), REGIMES, Path('a3.svg')); draw_tails(make_tails(5), Path('b3.svg'));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    for first, other in (("a", "a2"), ("a", "a3"), ("b", "b3")):
        assert (tmp_path / f"{first}.svg").read_bytes() == (tmp_path / f"{other}.svg").read_bytes()
    assert b"<dc:date>" not in (tmp_path / "a.svg").read_bytes()


def test_commands_start_without_matplotlib() -> None:
    code = "import sys, onnxqt.cli, onnxqt.pictures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_formats(tmp_path: Path) -> None:
    draw_tails(make_tails(2), tmp_path / "tails.png")
    assert (tmp_path / "tails.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot write '.*gone/tails.svg' \(No such file or directory\)"):
        draw_tails(make_tails(1), tmp_path / "gone" / "tails.svg")
    (tmp_path / "tails.svg").mkdir()
    with pytest.raises(ExportError, match=r"tails.svg' \(.*\): choose another --out"):
        draw_tails(make_tails(1), tmp_path / "tails.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["tails.svg"]
