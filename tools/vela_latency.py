"""Latency of a TFLite file on an Arm Ethos-U, as Arm's own compiler Vela estimates it, as JSON.

    python tools/vela_latency.py FILE.tflite [--vela EXECUTABLE] [--accelerator ethos-u55-128] [--timeout SECONDS]

Vela (`pip install ethos-u-vela`, Apache-2.0, tried with 5.2.0) compiles the file in a process of its own; nothing is
executed on a device. Its default system configuration and memory mode of the accelerator are used. The keys of the
result: `cycles`, `inference_s` and `inferences_hz` of one run, `macs`, `sram_bytes` and `flash_bytes` of memory used,
`npu_operators` and `cpu_operators`, the configuration, and `evidence`, "modelled". The time is that of the operators
on the NPU: Vela gives none for those on the CPU.
"""

import argparse
import csv
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

_KIB = 1024  # Vela's unit of memory used


class VelaError(Exception):
    """Why there is no result, in one line."""


def latency(file: pathlib.Path, vela: str, accelerator: str, timeout: float) -> dict[str, Any]:
    """What Vela's summary says of `file`.

    Raises:
        VelaError: if Vela is absent, fails, takes longer than `timeout` seconds or writes no summary.
    """
    executable = shutil.which(vela)
    if executable is None:
        raise VelaError(f"there is no executable '{vela}': run 'pip install ethos-u-vela', or give its path as --vela")
    if not file.is_file():
        raise VelaError(f"there is no file '{file}': give a quantized TFLite model")
    with tempfile.TemporaryDirectory() as folder:
        command = [executable, "--accelerator-config", accelerator, "--output-dir", folder, str(file.resolve())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise VelaError(f"Vela took longer than {timeout:g} s on '{file}': give more time as --timeout") from None
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise VelaError(f"Vela fails on '{file}': {lines[-1].strip() if lines else f'exit {done.returncode}'}")
        summaries = sorted(pathlib.Path(folder).glob("*_summary_*.csv"))
        if not summaries:
            raise VelaError(f"Vela wrote no summary for '{file}': is it a quantized TFLite model with operators?")
        with summaries[0].open(encoding="utf-8", newline="") as table:
            return result(next(csv.DictReader(table)), done.stdout)


def result(summary: dict[str, str], printed: str) -> dict[str, Any]:
    """The result from the row of Vela's summary and what it printed (operator counts are only there)."""
    counts = {side: re.search(rf"^{side} operators = (\d+)", printed, re.MULTILINE) for side in ("CPU", "NPU")}
    flash = ("on_chip_flash_memory_used", "off_chip_flash_memory_used")
    return {
        "cycles": int(float(summary["cycles_total"])),
        "inference_s": float(summary["inference_time"]),
        "inferences_hz": float(summary["inferences_per_second"]),
        "macs": int(float(summary["nn_macs"])),
        "sram_bytes": round(float(summary["sram_memory_used"]) * _KIB),
        "dram_bytes": round(float(summary["dram_memory_used"]) * _KIB),
        "flash_bytes": round(sum(float(summary[name]) for name in flash) * _KIB),
        **{f"{side.lower()}_operators": int(match[1]) if match else None for side, match in counts.items()},
        "accelerator": summary["accelerator_configuration"],
        "system": summary["system_config"],
        "memory_mode": summary["memory_mode"],
        "clock_hz": float(summary["core_clock"]),
        "source": "Vela, Arm's compiler for Ethos-U",
        "evidence": "modelled",
    }


def main() -> int:
    """Print the result."""
    parser = argparse.ArgumentParser(description="Latency on an Arm Ethos-U by Vela, as JSON.")
    parser.add_argument("file", type=pathlib.Path, help="a quantized TFLite model")
    parser.add_argument("--vela", default="vela", help="the executable, a name on PATH or a path")
    parser.add_argument("--accelerator", default="ethos-u55-128", help="as Vela names it")
    parser.add_argument("--timeout", type=float, default=300, help="seconds")
    arguments = parser.parse_args()
    try:
        found = latency(arguments.file, arguments.vela, arguments.accelerator, arguments.timeout)
    except VelaError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
