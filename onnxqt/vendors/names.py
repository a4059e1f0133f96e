"""What a tensor is called in a vendor's file, and which names such a file cannot hold.

A name that breaks a format is refused here, because the tools that read it would not complain: a blank ends a field,
`_param_` in a layer's name of an ncnn table is taken for its end, a line that begins with `#` is a comment.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from onnxqt.errors import ExportError
from onnxqt.table.form import Entry

LONGEST = 255  # bytes of a key that ncnn's tools read


@dataclass(frozen=True, slots=True)
class Trap:
    """Something in a name that a format cannot have.

    Attributes:
        title: what it is, completing "it has ...".
        caught: whether a name has it.
    """

    title: str
    caught: Callable[[str], bool]


CONTROL = Trap("a control character", lambda name: not name.isprintable())
SPACE = Trap("white space", lambda name: any(letter.isspace() for letter in name))
COLON = Trap("a ':'", lambda name: ":" in name)
COLON_SPACE = Trap("a ':' before a blank", lambda name: ": " in name)
COMMA = Trap("a ','", lambda name: "," in name)
QUOTE = Trap("a quotation mark or backslash", lambda name: any(letter in "\"'\\" for letter in name))
PARAM = Trap("'_param_'", lambda name: "_param_" in name)
HASH = Trap("a '#' at its beginning", lambda name: name.startswith("#"))
FOREIGN = Trap("letters outside ASCII", lambda name: not name.isascii())
LONG = Trap(f"more than {LONGEST} bytes", lambda name: len(name.encode()) > LONGEST)
EMPTY = Trap("no letters", lambda name: not name)


def called(entry: Entry, vendor: str) -> str:
    """What a vendor's tool calls a tensor: the table's alias for that vendor, else its name in the ONNX file."""
    return entry.aliases.get(vendor, entry.name)


def check_names(names: Iterable[tuple[str, str]], vendor: str, traps: Iterable[Trap] = ()) -> None:
    """Refuse names that a file cannot hold, and two tensors of one name.

    Args:
        names: pairs of a tensor's (or node's) name in the ONNX file and its name in the vendor's file.
        vendor: whose file it is: the key of the table's aliases.
        traps: what the format cannot have in a name; an empty name is never allowed.

    Raises:
        ExportError: naming the first that is refused, and the remedy.
    """
    taken: dict[str, str] = {}
    remedy = f"give it an alias for '{vendor}' in the table"
    for own, name in names:
        for trap in (EMPTY, *traps):
            if trap.caught(name):
                raise ExportError(f"'{name}' cannot be a name in a file for {vendor}, as it has {trap.title}: {remedy}")
        other = taken.setdefault(name, own)
        if other != own:
            raise ExportError(f"'{own}' and '{other}' are both called '{name}' in a file for {vendor}: {remedy}")


def names_of(entries: Iterable[Entry], vendor: str, traps: Iterable[Trap] = ()) -> dict[str, str]:
    """What a vendor's file calls each tensor, by its name in the ONNX file.

    Raises:
        ExportError: if the format cannot hold a name, or two tensors have one; naming it and the remedy.
    """
    found = {entry.name: called(entry, vendor) for entry in entries}
    check_names(found.items(), vendor, traps)
    return found
