"""A page that a person looks at: one self-contained HTML file about a run."""

from jaxdistill.report.data import ModelFacts, ReportData, Sample, collect
from jaxdistill.report.page import render, write_report

__all__ = ["ModelFacts", "ReportData", "Sample", "collect", "render", "write_report"]
