"""What a run of training needs to go on: written as a whole, or not at all. JSON, npz and the trainer's checkpoint."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxqt.numerics import Array
from onnxqt.trim import job as jobs

_TRAINER = "trainer"
_ARRAYS = "arrays.npz"
_PROGRESS = "progress.json"
_CLIPS = "clips.npz"
_BEST = (jobs.BEST, _CLIPS)  # the best weights until then, with their clips


@dataclass(frozen=True)
class Saved:
    """A saved state.

    Attributes:
        trainer: the trainer's checkpoint.
        progress: plain numbers.
        arrays: arrays by name, by group.
    """

    trainer: Path
    progress: dict[str, Any]
    arrays: Mapping[str, Mapping[str, Array]]


def save(
    folder: Path,
    save_trainer: Callable[[Path], None],
    arrays: Mapping[str, Mapping[str, Array]],
    progress: Mapping[str, Any],
) -> None:
    """Write a state beside the last one, then put it in its place."""
    now, new, before = _places(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    save_trainer(new / _TRAINER)
    flat = [(f"{group}\n{name}", value) for group, members in arrays.items() for name, value in members.items()]
    # The names go into an array of their own: those of tensors need not be names of files in an archive.
    names = np.array([name for name, _ in flat], np.str_)
    np.savez(new / _ARRAYS, names=names, **{f"array_{i}": value for i, (_, value) in enumerate(flat)})  # type: ignore[arg-type]
    for name in _BEST:
        if (folder / name).exists():
            shutil.copyfile(folder / name, new / name)
    part = new / f"{_PROGRESS}.part"
    part.write_text(json.dumps(dict(progress)))
    os.replace(part, new / _PROGRESS)  # the last file: a state that has it is whole
    shutil.rmtree(before, ignore_errors=True)
    if now.exists():
        os.replace(now, before)
    os.replace(new, now)
    shutil.rmtree(before, ignore_errors=True)


def find(folder: Path) -> Saved | None:
    """The state in a folder; None if there is none."""
    state, new, before = _places(folder)
    if not state.exists():  # a save was cut off between two renames
        for whole in (new, before):
            if (whole / _PROGRESS).exists():
                os.replace(whole, state)
                break
    if not (state / _PROGRESS).exists():
        return None
    arrays: dict[str, dict[str, Array]] = {}
    with np.load(state / _ARRAYS, allow_pickle=False) as file:
        for i, key in enumerate(file["names"]):
            group, _, name = str(key).partition("\n")
            arrays.setdefault(group, {})[name] = file[f"array_{i}"]
    return Saved(state / _TRAINER, json.loads((state / _PROGRESS).read_text()), arrays)


def restore_best(folder: Path) -> None:
    """Put the best weights back that were there when the state was saved; the run may have gone on since."""
    for name in _BEST:
        (folder / name).unlink(missing_ok=True)
        if (folder / jobs.STATE / name).exists():
            shutil.copyfile(folder / jobs.STATE / name, folder / name)


def discard(folder: Path) -> None:
    """Remove the state in a folder."""
    for state in _places(folder):
        shutil.rmtree(state, ignore_errors=True)


def _places(folder: Path) -> tuple[Path, Path, Path]:
    """The state, the next one while it is written, and the last one while they change places."""
    return folder / jobs.STATE, folder / f"{jobs.STATE}.new", folder / f"{jobs.STATE}.old"


def write_clips(folder: Path, clips: Mapping[str, Array]) -> None:
    """Write the clips of reverse pruning that belong to the best weights."""
    arrays = {f"clip_{i}": clip for i, clip in enumerate(clips.values())}
    np.savez(folder / _CLIPS, names=np.array(list(clips), np.str_), **arrays)  # type: ignore[arg-type]


def read_clips(folder: Path) -> dict[str, Array]:
    """What `write_clips` wrote; empty if there is nothing."""
    if not (folder / _CLIPS).exists():
        return {}
    with np.load(folder / _CLIPS, allow_pickle=False) as file:
        return {str(name): file[f"clip_{i}"] for i, name in enumerate(file["names"])}
