"""Records of a run, and the report that saves them as JSON or as an HTML page."""

from lobs_native.report.records import ErrorBound, LayerReport, Skipped, plain
from lobs_native.report.report import Report

__all__ = ["ErrorBound", "LayerReport", "Report", "Skipped", "plain"]
