"""Reports: what runs show, as sentences (`findings`) and as one HTML page (`write_report`)."""

from halfulp.report.findings import Finding, findings
from halfulp.report.page import write_report

__all__ = ["Finding", "findings", "write_report"]
