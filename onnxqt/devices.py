"""Edge devices as data: published figures with their sources, and rates fitted on published board measurements.

A figure without a source is absent (None). Sources marked (2) are secondary: someone other than the maker.
`FITS` is printed by `python tools/fit_cost.py CSV --python`, which also compares it with a CSV.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

NetworkClass = Literal["dense", "depthwise", "transformer"]
Fallback = Literal["none", "layer", "rest"]


@dataclass(frozen=True)
class Figure:
    """A number with its source.

    Attributes:
        value: in the unit that the field's description gives.
        source: where it was published.
    """

    value: float
    source: str


@dataclass(frozen=True)
class Fit:
    """Multiply-accumulate (MAC) rates of one chip, fitted on measured frames per second (fps), and how good they are.

    The rate of a class is the one of least squares of log(fps), over the training networks of that class:

        log(rate) = mean(log(fps * MACs))

    and the model is `fps = min(rate / MACs, fastest)`: nothing says that small networks run faster than any measured.

    Attributes:
        chip: its name in the Hailo Model Zoo.
        batch: samples per run, 1 or 8.
        rates: MAC/s by network class.
        trained: networks that the rates were fitted on.
        held_out: other networks, on which the errors were measured.
        median_error: median of |modelled / measured - 1| over the held-out networks.
        p90_error: 90th percentile of that.
        ratio_low: 10th percentile of measured / modelled fps over the held-out networks.
        ratio_high: 90th percentile of that.
        least_macs: of the networks that the rates were fitted on, per sample.
        most_macs: likewise.
        fastest: the most fps that one of them reached; the model gives no more.
    """

    chip: str
    batch: int
    rates: Mapping[NetworkClass, float]
    trained: int
    held_out: int
    median_error: float
    p90_error: float
    ratio_low: float
    ratio_high: float
    least_macs: float
    most_macs: float
    fastest: float


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: as its maker writes it.
        peak: operations per second on int8, two to a MAC.
        fits: measured rates, one per batch size; empty where no measurements were found.
        bandwidth: of its memory, in B/s.
        sram: memory on the chip, in bytes.
        no_dram: the source that says that the chip has no memory outside of it.
        watts: power, in W.
        price: of a board, in USD.
        fallback: what happens to layers that have no integer form. "none": the device runs them itself; "layer": each
            runs on the host; "rest": the first of them and all layers behind it run on the host.
        fallback_source: where that was published, or that it is an assumption.
    """

    name: str
    peak: Figure | None = None
    fits: tuple[Fit, ...] = ()
    bandwidth: Figure | None = None
    sram: Figure | None = None
    no_dram: str = ""
    watts: Figure | None = None
    price: Figure | None = None
    fallback: Fallback = "layer"
    fallback_source: str = "assumption: they run on the host"


ZOO = "Hailo Model Zoo (MIT), published frames per second"

# fmt: off
# --- printed by tools/fit_cost.py ----------------------------------------------------------------------
FITS: tuple[Fit, ...] = (
    Fit("HAILO10H", 1, {"dense": 2.03e12, "depthwise": 4.5e11, "transformer": 3.37e11},
        trained=151, held_out=40, median_error=0.54, p90_error=1.41, ratio_low=0.42, ratio_high=2.08,
        least_macs=8e07, most_macs=2.576e11, fastest=3704),
    Fit("HAILO10H", 8, {"dense": 2.7e12, "depthwise": 6.53e11, "transformer": 8.61e11},
        trained=151, held_out=40, median_error=0.39, p90_error=1.34, ratio_low=0.43, ratio_high=2.51,
        least_macs=8e07, most_macs=2.576e11, fastest=3733),
    Fit("HAILO15H", 1, {"dense": 2.09e12, "depthwise": 4.96e11, "transformer": 3.41e11},
        trained=151, held_out=40, median_error=0.57, p90_error=1.41, ratio_low=0.41, ratio_high=2.28,
        least_macs=8e07, most_macs=2.576e11, fastest=6630),
    Fit("HAILO15H", 8, {"dense": 2.96e12, "depthwise": 7.9e11, "transformer": 8.78e11},
        trained=151, held_out=40, median_error=0.41, p90_error=1.36, ratio_low=0.42, ratio_high=2.34,
        least_macs=8e07, most_macs=2.576e11, fastest=6630),
    Fit("HAILO15L", 1, {"dense": 9.03e11, "depthwise": 2.32e11, "transformer": 4.17e11},
        trained=95, held_out=23, median_error=0.35, p90_error=0.72, ratio_low=0.58, ratio_high=1.54,
        least_macs=1.4e08, most_macs=1.29e11, fastest=2403),
    Fit("HAILO15L", 8, {"dense": 1.28e12, "depthwise": 4.08e11, "transformer": 1.1e12},
        trained=95, held_out=23, median_error=0.24, p90_error=0.39, ratio_low=0.72, ratio_high=1.51,
        least_macs=1.4e08, most_macs=1.29e11, fastest=2404),
    Fit("HAILO8", 1, {"dense": 2.59e12, "depthwise": 5.88e11, "transformer": 2.27e11},
        trained=124, held_out=34, median_error=0.53, p90_error=1.42, ratio_low=0.41, ratio_high=2.7,
        least_macs=8e07, most_macs=1.175e12, fastest=5203),
    Fit("HAILO8", 8, {"dense": 3.44e12, "depthwise": 8.45e11, "transformer": 7.97e11},
        trained=124, held_out=34, median_error=0.42, p90_error=1.12, ratio_low=0.47, ratio_high=2.27,
        least_macs=8e07, most_macs=1.175e12, fastest=5204),
    Fit("HAILO8L", 1, {"dense": 1.02e12, "depthwise": 1.87e11, "transformer": 2.19e11},
        trained=120, held_out=31, median_error=0.51, p90_error=1.93, ratio_low=0.34, ratio_high=2.06,
        least_macs=8e07, most_macs=1.175e12, fastest=3526),
    Fit("HAILO8L", 8, {"dense": 1.61e12, "depthwise": 3.55e11, "transformer": 6.01e11},
        trained=119, held_out=31, median_error=0.45, p90_error=2.21, ratio_low=0.31, ratio_high=1.89,
        least_macs=8e07, most_macs=2.576e11, fastest=3526),
)
# --- end -----------------------------------------------------------------------------------------------
# fmt: on


def _fits(chip: str) -> tuple[Fit, ...]:
    return tuple(fit for fit in FITS if fit.chip == chip)


_ZOO_FALLBACK = f"{ZOO}: measured on whole networks, with all that the compiler puts on the chip"
_H10 = "awesomeagents.ai/hardware/hailo-10h (2)"
_H8 = "cnx-software.com/2020/10/07 (2)"
_CORAL = "applied-ee.github.io (2)"
_ORIN = "brojogopalsapui.com, citing NVIDIA's datasheet (2)"
_METIS = "axelera.ai/blog; docs.axelera.ai"

_ALL = (
    Device(
        "Hailo-8",
        peak=Figure(26e12, _H8),
        fits=_fits("HAILO8"),
        no_dram=_H8,
        watts=Figure(2.5, f"{_H8}: typical"),
        fallback="none",
        fallback_source=_ZOO_FALLBACK,
    ),
    Device("Hailo-8L", fits=_fits("HAILO8L"), fallback="none", fallback_source=_ZOO_FALLBACK),
    Device(
        "Hailo-10H",
        peak=Figure(20e12, f"{_H10}: 40 TOPS int4, 20 int8"),
        fits=_fits("HAILO10H"),
        watts=Figure(2.5, _H10),
        price=Figure(130, f"{_H10}: HAT+ 2 board"),
        fallback="none",
        fallback_source=_ZOO_FALLBACK,
    ),
    Device("Hailo-15H", fits=_fits("HAILO15H"), fallback="none", fallback_source=_ZOO_FALLBACK),
    Device("Hailo-15L", fits=_fits("HAILO15L"), fallback="none", fallback_source=_ZOO_FALLBACK),
    Device(
        "Coral Edge TPU",
        peak=Figure(4e12, _CORAL),
        sram=Figure(8e6, _CORAL),
        watts=Figure(2, _CORAL),
        price=Figure(75, f"{_CORAL}: USB accelerator in 2019"),
        fallback="rest",
        fallback_source="developer.axis.com, ARTPEC-7 tips: the first unsupported operator and all behind it run on "
        "the CPU",
    ),
    Device(
        "Jetson Orin Nano Super",
        peak=Figure(67e12, f"{_ORIN}: sparse int8"),
        bandwidth=Figure(102e9, _ORIN),
        watts=Figure(7, f"{_ORIN}: lower end of 7 to 25 W"),
        price=Figure(249, _ORIN),
        fallback="none",
        fallback_source="assumption: the GPU computes in float what has no integer form",
    ),
    Device("RK3588", peak=Figure(6e12, "specification of a board with an RK3588 (2)")),
    Device("Axelera Metis", peak=Figure(214e12, _METIS)),
    Device(
        "STM32N6",
        peak=Figure(600e9, "community.st.com; giacomocolosio02.github.io (2)"),
        sram=Figure(4.2e6, "community.st.com; giacomocolosio02.github.io (2)"),
    ),
    Device("Ryzen AI 300", peak=Figure(50e12, "galaxus.fr (2)")),
)

DEVICES: Mapping[str, Device] = {device.name: device for device in _ALL}
