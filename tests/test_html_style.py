"""The colours of pages: every text can be read, in both modes, whatever it stands on."""

import re
from importlib.resources import files

import pytest

CSS = (files("onnxqt.html") / "page.css").read_text(encoding="utf-8")
TEXT = 4.5  # WCAG 2.2, 1.4.3: contrast of text, at least
GRAPHIC = 3.0  # WCAG 2.2, 1.4.11: of what has to be seen to understand a picture
HEATS = range(6)
DECORATION = {"rule"}  # lines of tables and grids, which say nothing


def blocks(css: str) -> list[tuple[str, str]]:
    """Selectors and declarations, those inside of media queries too."""
    return re.findall(r"([^{};]+)\{([^{}]*)\}", css)


def modes() -> dict[str, dict[str, str]]:
    """The colours by name, in light and in dark mode."""
    light, dark = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", body)) for selector, body in blocks(CSS) if ":root" in selector
    ]
    assert dark.keys() == light.keys()
    return {"light": light, "dark": dark}


def luminance(colour: str) -> float:
    """Relative luminance of a colour (WCAG 2.2)."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21, abs=1e-9)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # WebAIM's table has two digits


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_can_be_read(mode: str) -> None:
    colours = modes()[mode]
    for paper in ("paper", "panel"):
        for ink in ("ink", "muted", "link"):
            assert contrast(colours[ink], colours[paper]) >= TEXT, (ink, paper)
    for heat in HEATS:
        assert contrast(colours[f"heat-{heat}-ink"], colours[f"heat-{heat}"]) >= TEXT, heat


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_marks_of_pictures_can_be_seen(mode: str) -> None:
    colours = modes()[mode]
    for mark in ("ink", "accent", "soft"):
        assert contrast(colours[mark], colours["paper"]) >= GRAPHIC, mark
    assert contrast(colours["warn"], colours["panel"]) >= GRAPHIC


def test_every_colour_is_one_of_those() -> None:
    """Else the contrasts above say nothing: colours have names, and each is used for what was tested."""
    used: dict[str, set[str]] = {"color": set(), "background": set(), "svg": set()}
    for selector, body in blocks(CSS):
        if ":root" in selector:
            continue
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b|\b(rgb|hsl|color-mix|opacity)\b", body), selector
        for name, value in re.findall(r"([\w-]+):\s*([^;]+);", body):
            for colour in re.findall(r"var\(--([\w-]+)\)", value):
                kind = "svg" if name in ("fill", "stroke") else name if name in used else "line"
                used.setdefault(kind, set()).add(colour)
            if name in ("fill", "stroke", "color", "background"):
                assert value.startswith("var(") or value == "none", (selector, value)
    inks = {f"heat-{heat}-ink" for heat in HEATS}
    papers = {f"heat-{heat}" for heat in HEATS}
    assert used["color"] == {"ink", "muted", "link", *inks}
    assert used["background"] == {"paper", "panel", *papers}
    assert used["svg"] - DECORATION == {"ink", "muted", "accent", "soft", "paper"}
    assert used["line"] == {"rule", "muted", "link", "warn"}


def test_each_heat_has_the_ink_that_was_tested_for_it() -> None:
    found = {selector.strip(): body for selector, body in blocks(CSS)}
    for heat in HEATS:
        body = found[f".heat-{heat}, .heat-{heat} small"]
        assert f"background: var(--heat-{heat}); color: var(--heat-{heat}-ink);" in body


def test_shades_are_printed_with_their_background() -> None:
    """A browser leaves backgrounds out on paper, where white ink would be lost."""
    selector = ", ".join(f".heat-{heat}" for heat in HEATS)
    assert f"{selector} {{ -webkit-print-color-adjust: exact; print-color-adjust: exact; }}" in CSS


def test_dark_mode_is_for_the_screen() -> None:
    assert re.findall(r"@media[^{]*prefers-color-scheme[^{]*", CSS) == [
        "@media screen and (prefers-color-scheme: dark) "
    ]


def test_the_style_asks_for_nothing() -> None:
    assert not re.search(r"url\(|@import|@font-face|expression|https?:", CSS)
