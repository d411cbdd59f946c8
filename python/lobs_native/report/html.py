"""Reports as HTML pages that need nothing else: no network, no second file.

The templates show what ``view`` computes. Whatever they print passes through ``visible`` and is
escaped, so no name from outside can add markup or hide. A page's Content-Security-Policy allows its
own style and its own script by their hashes, and nothing else. The script sorts the table of
layers; without it, the whole page can still be read.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lobs_native.report.charts import Curve, method_chart
from lobs_native.report.records import ReportRecord
from lobs_native.report.text import number, percent, visible
from lobs_native.report.view import report_view

__all__ = ["demo_page", "report_page"]


def report_page(report: ReportRecord) -> str:
    """The page that ``Report.save("report.html")`` writes.

    Parameters
    ----------
    report : ReportRecord
        A finished or unfinished run. Not modified.

    Returns
    -------
    str
        A whole HTML document that includes its style and its script.
    """
    return _render("report.html.j2", report=report, view=report_view(report))


def demo_page(
    *,
    facts: Mapping[str, str],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    legend: str,
    curves: Sequence[Curve],
    before: float,
    report: ReportRecord,
    report_title: str,
) -> str:
    """The page that ``lobs-native demo`` writes: a comparison of methods and one full report.

    Parameters
    ----------
    facts : mapping of str to str
        What was done, and with which data: a list below the chart.
    header, rows : sequences of str
        The comparison, one row per run. The first column is text, the others are numbers.
    legend : str
        The meaning of the columns.
    curves : sequence of Curve
        Test error against sparsity, one curve per method.
    before : float
        Test error before pruning, a fraction: the line without marks.
    report : ReportRecord
        The run that is shown in full. Not modified.
    report_title : str
        The heading of that run.

    Returns
    -------
    str
        A whole HTML document that includes its style, its script and its charts.
    """
    return _render(
        "demo.html.j2",
        facts=facts,
        header=header,
        rows=rows,
        legend=legend,
        chart=method_chart(curves, before),
        report=report,
        report_title=report_title,
        view=report_view(report),
    )


def _static(name: str) -> str:
    path = resources.files(__package__) / "static" / name
    return path.read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """The source expression of a Content-Security-Policy that allows this content."""
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _printed(value: object) -> object:
    """Markup of our own macros as it is; everything else visible. Jinja escapes it after that."""
    return value if hasattr(value, "__html__") else visible(value)


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=PackageLoader(__package__, "templates"),
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "percent": percent, "repr": repr}
    style, script = _static("style.css"), _static("sort.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    environment.globals |= {"style": style, "script": script, "policy": policy}
    return environment


_ENVIRONMENT = _environment()


def _render(template: str, **values: Any) -> str:
    return _ENVIRONMENT.get_template(template).render(values)
