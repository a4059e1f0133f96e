"""Numbers and names as people read them."""

import unicodedata

NOTHING = "n/a"
SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit
LONGEST = 96  # characters of a name that are shown
_LONGEST_SENTENCE = 400
_LARGEST_COUNT = 1e15  # that is shown in full
_MINUS = "\N{MINUS SIGN}"
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of characters without a look of their own


def visible(text: str) -> str:
    r"""The text with each character that cannot be seen, or that HTML cannot hold, as its escape: \x00, \u202e."""
    return "".join(_escape(char) if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    code = ord(char)
    return unicodedata.category(char) in _HIDDEN or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF


def _escape(char: str) -> str:
    return char.encode("ascii", "backslashreplace").decode() if ord(char) > 0x7F else f"\\x{ord(char):02x}"


def short(text: str, longest: int = LONGEST) -> str:
    """A name of at most so many characters, its middle left out where it has more."""
    text = visible(text)
    if len(text) <= longest:
        return text
    half = (longest - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def sentence(text: str) -> str:
    """A text of at most 400 characters, its middle left out where it has more."""
    return short(text, _LONGEST_SENTENCE)


def signed(text: str) -> str:
    """A formatted number with a true minus sign."""
    return text.replace("-", _MINUS)


def percent(share: float | None) -> str:
    """A share of 1 as percent with two digits behind the point, as `onnxqt trim` prints it."""
    return NOTHING if share is None else f"{100 * share:.2f}"


def points(share: float | None, plus: str = "") -> str:
    """A difference of shares in percentage points; `plus` stands before one above 0."""
    if share is None:
        return NOTHING
    text = f"{100 * share:.2f}"
    return "0.00" if float(text) == 0 else signed(text) if share < 0 else f"{plus}{text}"


def decibel(snr: float | None, mse: float | None) -> str:
    """A signal-to-noise ratio in dB; "exact" where there is no error at all."""
    if snr is not None:
        return signed(f"{snr:.1f}")
    return "exact" if mse == 0 else NOTHING


def digits(value: float | None) -> str:
    """Four significant digits, or all before the point."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return signed(f"{value:.3e}")
    return signed(f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}")


def whole(value: float | None) -> str:
    """A count."""
    return NOTHING if value is None else f"{value:,.0f}" if abs(value) < _LARGEST_COUNT else digits(value)


def plural(count: int, what: str) -> str:
    """A count with its noun."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
