"""What every writer of a vendor's file takes and gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from onnxqt.table.form import Table


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """What is to be written.

    Attributes:
        table: the neutral table.
        scheme: the scheme of it that is written.
        stem: of the names of the files.
        template: a file that the vendor's tool made, which is patched; None where none was given.
        options: by name, such as the version of TensorRT.
    """

    table: Table
    scheme: str
    stem: str
    template: bytes | None = None
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Written:
    """Files for a vendor's tool.

    Attributes:
        files: contents by name, without a folder.
        lost: what the format cannot express, one sentence each; empty where nothing is lost.
        skipped: why a tensor was left out, by its name.
    """

    files: Mapping[str, bytes]
    lost: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Vendor:
    """One file format of a vendor.

    Attributes:
        name: as `--to` has it.
        title: the tool that reads it.
        write: makes the files.
        baked: whether the tool rounds float weights again, so that it needs the float file whose weights already
            lie on the grid.
        patches: whether it takes a template.
        options: what `options` may hold: default and meaning by name; an empty default means that it must be given.
        usage: one line of how the tool is given the files.
    """

    name: str
    title: str
    write: Callable[[Request], Written]
    baked: bool
    usage: str
    patches: bool = False
    options: Mapping[str, tuple[str, str]] = field(default_factory=dict)
