"""What a run did, as records, JSON and one page."""

from lobs_native.report.records import ErrorBound, LayerReport, Skipped, plain
from lobs_native.report.report import Report

__all__ = ["ErrorBound", "LayerReport", "Report", "Skipped", "plain"]
