"""The commands about calibration tables: tables, import-table."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from onnxqt.calibrate import Quantizers
from onnxqt.candidates import Candidate
from onnxqt.cli.options import (
    DATA_IF_NEEDED,
    JSON,
    MODEL,
    OUT,
    PREPROCESS,
    RANGES,
    STRIP_QDQ,
    options,
    settings_of,
)
from onnxqt.cli.output import few, print_json
from onnxqt.cli.progress import Bar
from onnxqt.errors import ExportError, UsageError
from onnxqt.files import make_folder, write_bytes, write_model
from onnxqt.ingest import ingest
from onnxqt.model import Model
from onnxqt.pipeline import TABLE, calibrated, keep_table, make_table, open_workspace, plan_of, run_folder
from onnxqt.schemes import parse_scheme
from onnxqt.table import Table, check_belongs, import_table, read_table
from onnxqt.trim import TrimSettings
from onnxqt.vendors import VENDORS, Baked, Request, Vendor, Written, baked_model, write_vendor

TEMPLATE_LIMIT = 16 << 20  # bytes; a larger one is refused where it is read
FOLDER = "tables"

Json = dict[str, Any]


@click.command()
@click.argument("source", metavar="MODEL|DIR", type=MODEL, required=False)
@click.option("--to", "names", metavar="NAME,...", help="Formats to write; --list shows them.")
@click.option("--table", type=MODEL, help="The table.json.  [default: that of DIR, or of MODEL-onnxqt]")
@click.option("--scheme", metavar="ID", help="Which scheme of the table.  [default: its only one]")
@click.option("--template", type=MODEL, help="A file that the vendor's tool made, whose numbers are replaced.")
@click.option("--option", "pairs", multiple=True, metavar="KEY=VALUE", help="Of a format, repeatable; see --list.")
@click.option("--list", "listed", is_flag=True, help="Print the formats, what they take and how they are used.")
@click.option("--out", type=MODEL, help=f"Folder.  [default: {FOLDER}/SCHEME beside the table]")
@options(STRIP_QDQ, JSON)
def tables(
    source: Path | None, names: str | None, scheme: str | None, out: Path | None, as_json: bool, **rest: Any
) -> None:
    """Write the files of vendors' quantization tools from the table of a run.

    Each format gets a folder of its own, with the float model that goes with it: its weights lie on their grids, so
    that a tool which rounds them again changes nothing.

    \b
    Examples:
        onnxqt tables model-onnxqt/ --to tensorrt,qualcomm --scheme w8a8-sym-pc
        onnxqt tables model.onnx --table table.json --to tidl --template tidl.prototxt
        onnxqt tables --list
    """
    if rest["listed"]:
        _list(as_json)
        return
    if source is None or names is None:
        raise UsageError("give a MODEL or run directory, and formats with --to; --list shows the formats")
    chosen = _formats(names)
    template = _template(rest["template"], chosen)
    given = _pairs(rest["pairs"], chosen)
    file, path = _places(source, rest["table"])
    table = read_table(path)
    model_file = file or path.parent / (Path(table.model_file).name or "model.onnx")
    if file is None and not model_file.is_file():
        raise UsageError(
            f"'{source}' has no '{model_file.name}', which its table belongs to: give that file as the MODEL, with "
            f"--table {path}"
        )
    model = ingest(model_file, rest["strip_qdq"])
    check_belongs(table, model)
    scheme = _scheme(table, scheme)
    requests = {
        vendor.name: Request(
            table,
            scheme,
            Path(table.model_file).stem or model_file.stem,
            template,
            {key: value for key, value in given.items() if key in vendor.options},
        )
        for vendor in chosen
    }
    written = {name: _written(name, request) for name, request in requests.items()}
    folder = make_folder(out or path.parent / FOLDER / scheme)
    with Bar() as bar:
        bar.stage("write", len(written))
        scratch = folder / ".baked.tmp"
        try:
            baked = _baked(model, table, scheme, scratch)
            content = {}
            for done, (name, files) in enumerate(written.items(), 1):
                content[name] = _kept(make_folder(folder / name), requests[name].stem, VENDORS[name], files, baked)
                bar.advance(done)
        finally:
            scratch.unlink(missing_ok=True)
    if as_json:
        print_json({"scheme": scheme, "table": str(path), "model": str(model_file), "formats": content})
        return
    for found in content.values():
        _print(found)


def _list(as_json: bool) -> None:
    """Print every format."""
    if as_json:
        print_json(
            [
                {
                    "name": vendor.name,
                    "title": vendor.title,
                    "takes_template": vendor.patches,
                    "options": {key: {"default": d, "meaning": text} for key, (d, text) in vendor.options.items()},
                    "usage": vendor.usage,
                }
                for vendor in VENDORS.values()
            ]
        )
        return
    for vendor in VENDORS.values():
        click.echo(f"{vendor.name}: {vendor.title}{'; takes --template' if vendor.patches else ''}")
        click.echo(f"  usage  {vendor.usage}")
        for key, (default, text) in vendor.options.items():
            click.echo(f"  --option {key}={default or 'VALUE, which is needed'}  {text}")


def _formats(names: str) -> list[Vendor]:
    """The formats that --to names, each once."""
    wanted = dict.fromkeys(name.strip() for name in names.split(",") if name.strip())
    for name in wanted:
        if name not in VENDORS:
            raise UsageError(f"--to {name}: there is no such format: name some of {', '.join(VENDORS)}")
    if not wanted:
        raise UsageError(f"--to names no format: name some of {', '.join(VENDORS)}")
    return [VENDORS[name] for name in wanted]


def _template(path: Path | None, chosen: Sequence[Vendor]) -> bytes | None:
    """The bytes of --template, which goes with one format."""
    if path is None:
        return None
    if len(chosen) != 1:
        raise UsageError(f"--template is of one tool, but --to names {len(chosen)} formats: name one")
    try:
        with path.open("rb") as file:
            return file.read(TEMPLATE_LIMIT + 1)
    except OSError as error:
        raise UsageError(f"cannot read the template '{path}' ({error.strerror}): give a file") from error


def _pairs(pairs: Sequence[str], chosen: Sequence[Vendor]) -> dict[str, str]:
    """What --option gives, by name; each is one of a format that --to names."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--option {pair}: write KEY=VALUE")
        if not any(key in vendor.options for vendor in chosen):
            known = {f"{vendor.name} has {option}" for vendor in chosen for option in vendor.options}
            raise UsageError(f"--option {key}: no format here has it ({', '.join(sorted(known)) or 'they have none'})")
        found[key] = value
    return found


def _places(source: Path, table: Path | None) -> tuple[Path | None, Path]:
    """The float model, None where it lies beside the table, and the table.

    Raises:
        UsageError: if there is no table.
    """
    if source.is_dir():
        found = table or source / TABLE
        file = None
    else:
        found = table or run_folder(source) / TABLE
        file = source
    if not found.is_file():
        raise UsageError(
            f"there is no table '{found}': make one with 'onnxqt calibrate' or 'onnxqt trim', or give --table"
        )
    return file, found


def _scheme(table: Table, scheme: str | None) -> str:
    if scheme is not None:
        return str(parse_scheme(scheme))
    if len(table.schemes) != 1:
        raise UsageError(f"the table has several schemes: name one of {', '.join(table.schemes)} with --scheme")
    return table.schemes[0]


def _written(name: str, request: Request) -> Written:
    """The files of a format; errors name it."""
    try:
        return write_vendor(name, request)
    except (ExportError, UsageError) as error:
        raise type(error)(f"{name}: {error}") from error


def _baked(model: Model, table: Table, scheme: str, scratch: Path) -> Baked:
    """The float model with its weights on the grids of a table."""
    plan = plan_of(table, model)
    weights = {entry.name: params for entry, params in table.quantized(scheme, "weight")}
    nodes = tuple(node for node in plan.integer_nodes if node.weight is None or node.weight.tensor in weights)
    return baked_model(model, replace(plan, integer_nodes=nodes), Quantizers({}, weights), scratch)


def _kept(folder: Path, stem: str, vendor: Vendor, written: Written, baked: Baked) -> Json:
    """Write the files of a format and its model; what there is to say of them."""
    for name, content in written.files.items():
        write_bytes(folder / name, content)
    lost, model = list(written.lost), None
    if vendor.baked:
        model = f"{stem}.baked.onnx"
        write_model(folder / model, baked.proto)
        if baked.unreached:
            lost.append(
                f"a tool that finds the scales of weights from their values finds others for {few(baked.unreached)}"
            )
    return {
        "format": vendor.name,
        "title": vendor.title,
        "folder": str(folder),
        "files": list(written.files),
        "model": model,
        "usage": vendor.usage,
        "lost": lost,
        "skipped": dict(written.skipped),
    }


def _print(found: Mapping[str, Any]) -> None:
    """What was written for one format, for people."""
    model = [found["model"]] if found["model"] else []
    click.echo(f"{found['title']}: {found['folder']}/")
    click.echo(f"  files  {', '.join([*found['files'], *model])}")
    click.echo(f"  usage  {found['usage']}" + (f"  (BAKED is {found['model']})" if model else ""))
    for sentence in found["lost"]:
        click.echo(f"  lost   {sentence}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in found["skipped"].items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        click.echo(f"  left out  {few(names)}: {reason}")


@click.command(name="import-table")
@click.argument("file", type=MODEL)
@click.option("--model", type=MODEL, required=True, help="The float model that the ranges or scales are of.")
@click.option("--scheme", metavar="ID", required=True, help="The scheme whose scales are replaced.")
@click.option("--table", type=MODEL, help="The table.json to put them into, instead of one of --data.")
@options(DATA_IF_NEEDED, PREPROCESS, RANGES, OUT, STRIP_QDQ, JSON)
def import_ranges(
    file: Path, model: Path, scheme: str, table: Path | None, data: Path | None, out: Path | None, **rest: Any
) -> None:
    """Take ranges or scales over from FILE of another tool into a table, which `export --table` takes.

    FILE is a calibration cache of ONNX Runtime or TensorRT, encodings of Qualcomm, ranges of AMD Quark, a JSON object
    of {tensor: [low, high]}, or a table.json of onnxqt. What it does not name keeps the values of --table, or of the
    calibration on --data.

    \b
    Example:
        onnxqt import-table model.encodings --model model.onnx --scheme w8a8-asym-pc --data calib/
    """
    as_json = rest.pop("as_json")
    if table is not None and data is not None:
        raise UsageError("give either --data, to calibrate on, or --table, to put the values into")
    settings = settings_of([scheme], training=TrimSettings(steps=0), **rest)
    name = str(settings.schemes[0])
    if table is None:
        settings.check_data(data)
        with Bar() as bar:
            work, ranges = calibrated(open_workspace(model, data, None, out, settings, bar))
            base, folder = make_table(work, Candidate(work.source.model, ranges)), work.folder
    else:
        base = read_table(table)
        check_belongs(base, ingest(model, rest["strip_qdq"]))
        folder = out or run_folder(model)
    found, unused = import_table(file, base, name)
    keep_table(make_folder(folder), found)
    taken = [entry.name for entry in found.entries if entry.role != "bias" and _differs(base, found, entry.name, name)]
    if as_json:
        print_json({"table": str(folder / TABLE), "changed": taken, "unused": unused})
        return
    if unused:
        click.echo(f"not used: {few(unused)}, which the model lacks or quantizes though FILE does not", err=True)
    click.echo(f"{len(taken)} tensors changed; wrote {folder / TABLE}")


def _differs(before: Table, after: Table, name: str, scheme: str) -> bool:
    """Whether a tensor has other parameters now."""
    old, new = (entry.params(scheme) if entry else None for entry in (before.entry(name), after.entry(name)))
    if old is None or new is None:
        return old is not new
    same = np.array_equal(old.scale, new.scale) and np.array_equal(old.zero_point, new.zero_point)
    return not (same and old.grid == new.grid)
