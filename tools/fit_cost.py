"""Fits the MAC rates of `onnxqt/devices.py` on published frames per second (fps), and says how far off they are.

    python tools/fit_cost.py CSV [--python]

CSV has a row per network and chip with the columns device, net, fps_b1, fps_b8 (fps at batch 1 and 8) and ops_G
(10^9 operations per sample, two to a multiply-accumulate, MAC); other columns are not read. It was taken from the
tables of the Hailo Model Zoo (MIT).

The model has one number per chip, batch size and network class, the rate in MAC/s of

    fps = min(rate(class) / MACs, fastest of the networks that it was fitted on)

fitted by least squares of log(fps) on three quarters of the networks. The other quarter, chosen by a hash of the
name so that a network is on one side on every chip, is held out: all errors are measured on it. Siblings of a
held-out network (another size of it) may have been trained on; the column "new family" leaves out all networks whose
names begin with the same letters, in turn.

Prints Markdown; `--python` prints the rows of `FITS` instead. Ends with 1 if `FITS` is not what the CSV gives.
"""

import argparse
import csv
import hashlib
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxqt.devices import DEVICES, FITS, Figure, Fit, NetworkClass

CLASSES: tuple[NetworkClass, ...] = ("dense", "depthwise", "transformer")
COLUMNS = ("device", "net", "fps_b1", "fps_b8", "ops_G")
BATCHES = (1, 8)
HELD_OUT = 4  # one network in so many

# By architecture, as `onnxqt.cost.network_class` would class their graphs: attention throughout; depthwise
# convolutions throughout. What has a single block of attention (yolov10, yolov11, efficientformer_l1) is dense.
TRANSFORMER = re.compile(
    r"^(deit|vit_|swin|davit|levit|segformer|detr|petr|depth_anything|yolov12)|clip_vit|siglip|text_encoder"
    r"|tinyclip"
)
DEPTHWISE = re.compile(
    r"mobile|_mbv1|efficientnet_lite|efficientdet|repghost|hardnet39ds|osnet|fast_depth|zero_dce_pp|lightface|cas_vit"
    r"|fastvit"
)

# MACs of one sample as published, 10^9
PUBLISHED = {
    "resnet_v1_18": (1.8, "arXiv 1512.03385, table 1"),
    "resnet_v1_34": (3.6, "arXiv 1512.03385, table 1"),
    "resnet_v1_50": (3.8, "arXiv 1512.03385, table 1"),
    "mobilenet_v1": (0.569, "arXiv 1704.04861, table 4"),
    "mobilenet_v2_1.0": (0.300, "arXiv 1801.04381, table 4"),
}


@dataclass(frozen=True)
class Row:
    """A network measured on a chip; `fps` by batch size, `macs` per sample."""

    chip: str
    net: str
    macs: float
    fps: Mapping[int, float]

    @property
    def network_class(self) -> NetworkClass:
        """Its class by its name."""
        return network_class(self.net)

    @property
    def held_out(self) -> bool:
        """Whether it is kept for measuring errors."""
        return int(hashlib.sha256(self.net.encode()).hexdigest(), 16) % HELD_OUT == 0

    @property
    def family(self) -> str:
        """The letters that its name begins with."""
        return re.split(r"[^a-z]", self.net.lower(), maxsplit=1)[0]


def network_class(net: str) -> NetworkClass:
    """The class of a network of the zoo by its name."""
    if TRANSFORMER.search(net):
        return "transformer"
    return "depthwise" if DEPTHWISE.search(net) else "dense"


def read(path: pathlib.Path) -> list[Row]:
    """The measurements of a CSV; stars behind names (the zoo's recommendations) are dropped."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise SystemExit(f"{path} has no column '{missing[0]}': give the table of the zoo ({', '.join(COLUMNS)})")
        return [_row(row) for row in reader]


def _row(row: Mapping[str, str]) -> Row:
    fps = {batch: float(row[f"fps_b{batch}"]) for batch in BATCHES}
    return Row(row["device"], row["net"].replace("⭐", "").strip(), float(row["ops_G"]) * 1e9 / 2, fps)


def usable(rows: Sequence[Row], chip: str, batch: int) -> list[Row]:
    """What was measured on a chip; frames per second that the zoo rounds to 0 say nothing."""
    return [row for row in rows if row.chip == chip and row.fps[batch] > 0 and row.macs > 0]


def fit_rates(rows: Sequence[Row], batch: int) -> dict[NetworkClass, float]:
    """MAC/s by class, `exp(mean(log(fps * MACs)))`; three digits."""
    rates: dict[NetworkClass, float] = {}
    for name in CLASSES:
        logs = [np.log(row.fps[batch] * row.macs) for row in rows if row.network_class == name]
        if logs:
            rates[name] = float(f"{np.exp(np.mean(logs)):.3g}")
    return rates


def fastest(rows: Sequence[Row], batch: int) -> float:
    """The most fps of some networks."""
    return max(row.fps[batch] for row in rows)


def ratios(rows: Sequence[Row], rates: Mapping[NetworkClass, float], batch: int, most: float = np.inf) -> Any:
    """Measured / modelled fps of each network whose class has a rate; the model gives `most` fps at most."""
    known = [row for row in rows if row.network_class in rates]
    return np.array([row.fps[batch] / min(most, rates[row.network_class] / row.macs) for row in known])


def errors(ratio: Any) -> tuple[float, float]:
    """Median and 90th percentile of |modelled / measured - 1|."""
    error = np.abs(1 / ratio - 1)
    return float(np.median(error)), float(np.percentile(error, 90))


def fit(rows: Sequence[Row], chip: str, batch: int) -> Fit:
    """The rates of a chip and their errors on held-out networks."""
    measured = usable(rows, chip, batch)
    trained = [row for row in measured if not row.held_out]
    held_out = [row for row in measured if row.held_out]
    if not trained or not held_out:
        raise SystemExit(f"{chip} has {len(trained)} networks to fit and {len(held_out)} to hold out: need both")
    rates = fit_rates(trained, batch)
    ratio = ratios(held_out, rates, batch, fastest(trained, batch))
    median, p90 = errors(ratio)
    low, high = np.percentile(ratio, [10, 90])
    return Fit(
        chip,
        batch,
        rates,
        trained=len(trained),
        held_out=len(ratio),
        median_error=round(median, 2),
        p90_error=round(p90, 2),
        ratio_low=round(float(low), 2),
        ratio_high=round(float(high), 2),
        least_macs=float(f"{min(row.macs for row in trained):.4g}"),
        most_macs=float(f"{max(row.macs for row in trained):.4g}"),
        fastest=fastest(trained, batch),
    )


def new_family_error(rows: Sequence[Row], chip: str, batch: int) -> str:
    """Median error when each family of networks in turn is predicted from all others; "-" for a single family."""
    measured = usable(rows, chip, batch)
    parts = []
    for family in sorted({row.family for row in measured}):
        others = [row for row in measured if row.family != family]
        own = [row for row in measured if row.family == family]
        if not others:
            return "-"
        parts.append(ratios(own, fit_rates(others, batch), batch, fastest(others, batch)))
    return f"{errors(np.concatenate(parts))[0]:.0%}"


def baselines(rows: Sequence[Row], chip: str, batch: int, peak: Figure | None) -> tuple[str, str]:
    """Median held-out error of one rate for all classes, and of the peak rate alone."""
    measured = usable(rows, chip, batch)
    logs = [np.log(row.fps[batch] * row.macs) for row in measured if not row.held_out]
    held_out = [row for row in measured if row.held_out]
    one = errors(ratios(held_out, dict.fromkeys(CLASSES, float(np.exp(np.mean(logs)))), batch))[0]
    if peak is None:
        return f"{one:.0%}", "-"
    return f"{one:.0%}", _factor(float(np.median(1 / ratios(held_out, dict.fromkeys(CLASSES, peak.value / 2), batch))))


def _factor(value: float) -> str:
    return f"{value:.1f}x too fast"


def table(rows: Sequence[Row], fits: Sequence[Fit]) -> str:
    """The fits as Markdown."""
    lines = [
        "| chip | batch | " + " | ".join(f"{name}, TMAC/s (of peak)" for name in CLASSES) + " | fitted on | held out "
        "| median error | 90th percentile | measured / modelled, 10th to 90th | new family, median "
        "| one rate for all, median | peak alone, median |",
        "|---|---|" + "---|" * (len(CLASSES) + 8),
    ]
    peaks = {fit.chip: device.peak for device in DEVICES.values() for fit in device.fits}
    for row in fits:
        peak = peaks.get(row.chip)
        cells = [
            row.chip,
            str(row.batch),
            *(_rate(row.rates.get(name), peak) for name in CLASSES),
            str(row.trained),
            str(row.held_out),
            f"{row.median_error:.0%}",
            f"{row.p90_error:.0%}",
            f"{row.ratio_low:.2f} to {row.ratio_high:.2f}",
            new_family_error(rows, row.chip, row.batch),
            *baselines(rows, row.chip, row.batch, peak),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate(rate: float | None, peak: Figure | None) -> str:
    if rate is None:
        return "-"
    return f"{rate / 1e12:.3g}" + (f" ({2 * rate / peak.value:.1%})" if peak else "")


def check_of_operations(rows: Sequence[Row]) -> str:
    """Whether operations are two to a MAC, on networks whose MACs are published, as Markdown."""
    lines = ["| network | ops_G / 2 | published GMACs | source |", "|---|---|---|---|"]
    by_name = {row.net: row.macs for row in rows}
    for net, (published, source) in PUBLISHED.items():
        if net in by_name:
            lines.append(f"| {net} | {by_name[net] / 1e9:.3g} | {published} | {source} |")
    return "\n".join(lines)


def python(fits: Sequence[Fit]) -> str:
    """The fits as Python source, a row each."""
    lines = ["FITS: tuple[Fit, ...] = ("]
    for row in fits:
        rates = ", ".join(f'"{name}": {rate:.3g}' for name, rate in row.rates.items()).replace("e+", "e")
        errors_of = ", ".join(
            f"{name}={getattr(row, name)}"
            for name in ("trained", "held_out", "median_error", "p90_error", "ratio_low", "ratio_high")
        )
        span = f"least_macs={row.least_macs:.4g}, most_macs={row.most_macs:.4g}, fastest={row.fastest:g}"
        lines += [
            f'    Fit("{row.chip}", {row.batch}, {{{rates}}},',
            f"        {errors_of},",
            f"        {span.replace('e+', 'e')}),",
        ]
    return "\n".join([*lines, ")"])


def main() -> int:
    """Fit, print, and compare with the committed table."""
    parser = argparse.ArgumentParser(description="Fit MAC rates on published frames per second.")
    parser.add_argument("csv", type=pathlib.Path, help="the zoo's table")
    parser.add_argument("--python", action="store_true", help="print the rows of FITS in onnxqt/devices.py")
    arguments = parser.parse_args()
    rows = read(arguments.csv)
    chips = dict.fromkeys(row.chip for row in rows)
    fits = tuple(fit(rows, chip, batch) for chip in sorted(chips) for batch in BATCHES)
    print(python(fits) if arguments.python else f"{check_of_operations(rows)}\n\n{table(rows, fits)}")
    if fits != FITS:
        print("FITS in onnxqt/devices.py is not what this CSV gives: paste what --python prints", file=sys.stderr)
    return int(fits != FITS)


if __name__ == "__main__":
    sys.exit(main())
