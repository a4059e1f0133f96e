"""Text of the files that commands write themselves."""

import json
from typing import Any

from onnxqt.overrides import Overrides


def overrides_text(overrides: Overrides) -> str:
    """The TOML file of overrides, which --overrides takes; JSON writes text and numbers as TOML does."""
    content: dict[str, dict[str, Any]] = {}
    for rule in overrides.rules:
        for pattern, settings in Overrides((rule,)).as_json().items():
            content.setdefault(pattern, {}).update(settings)
    lines = ["[overrides]"]
    for pattern, settings in content.items():
        lines += ["", f"[overrides.{json.dumps(pattern, ensure_ascii=False)}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"
