"""Samples as the benchmark tools want them: a folder with `calib` and `eval`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_samples(source: Path, root: Path, counts: Mapping[str, int]) -> Path:
    """The first samples of each part of `source`, as many as `counts` says, in `root`."""
    for part, count in counts.items():
        with np.load(source / part / "000.npz") as file:
            arrays: dict[str, Any] = {name: file[name][:count] for name in file.files}
        (root / part).mkdir()
        np.savez(root / part / "samples.npz", **arrays)
    return root
