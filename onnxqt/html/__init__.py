"""One page that explains a run: `report.html`, made of report.json and of what lies beside it.

    page = make_page(read_run(Path("model-onnxqt/report.json")))

The page is one file that asks for nothing from anywhere: no script, no font, no picture. The same files give the same
bytes. Nothing is computed anew that a file says already; what no file says is "not measured in this run".
"""

from onnxqt.html.page import make_page
from onnxqt.html.source import Run, read_run

__all__ = ["Run", "make_page", "read_run"]
