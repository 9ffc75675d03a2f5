"""What a person looks at: a run's page, one self-contained HTML file, and the alignment of a text, as text and page."""

from jaxdistill.report.data import ModelFacts, ReportData, Sample, collect
from jaxdistill.report.page import render, write_report

__all__ = ["ModelFacts", "ReportData", "Sample", "collect", "render", "write_report"]
