"""Writing what a comparison found: tables, numbers and figures."""

from __future__ import annotations

import json
import sys

from agents.comparison.figures import draw
from agents.comparison.plan import Plan
from agents.comparison.summary import as_dict, summarize
from agents.comparison.tables import markdown, spreadsheet
from repfusion_env.atomic import write_text
from repfusion_env.figures import save_figure


def write_report(plan: Plan) -> None:
    """Write ``results.json``, ``results.csv``, ``table.md`` and the figures from the results."""
    summary = summarize(plan)
    text = json.dumps(as_dict(summary), indent=1, allow_nan=False, ensure_ascii=False)
    write_text(plan.folder / "results.json", text + "\n")
    write_text(plan.folder / "results.csv", spreadsheet(summary))
    write_text(plan.folder / "table.md", markdown(summary))
    names = ["table.md", "results.json", "results.csv"]
    for name, figure in draw(summary).items():
        save_figure(figure, plan.folder / f"{name}.png")
        names.append(f"{name}.png")
    print(f"{plan.folder}: {', '.join(names)}", file=sys.stderr)
