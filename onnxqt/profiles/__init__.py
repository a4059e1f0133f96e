"""Back ends as data: how each compiler picks its grids (policy) and how each device computes (arithmetic).

A profile is one row of `PROFILES`, or a TOML file with the same fields (`read_profile`). Nothing here computes:
`onnxqt.compiler` follows the policy, `onnxqt.emulate` the arithmetic.

A profile is `validated` where the emulator was compared with that runtime, code by code (VALIDATION.md), and
`modelled` where only documents say how the device computes; then `assumed` names what they leave open.
"""

from onnxqt.profiles.fields import (
    Accumulator,
    Arithmetic,
    Overflow,
    Policy,
    Precision,
    Profile,
    parse_precision,
)
from onnxqt.profiles.files import profile_text, read_profile
from onnxqt.profiles.table import PROFILES

__all__ = [
    "PROFILES",
    "Accumulator",
    "Arithmetic",
    "Overflow",
    "Policy",
    "Precision",
    "Profile",
    "parse_precision",
    "profile_text",
    "read_profile",
]
