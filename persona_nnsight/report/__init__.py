"""Reports: run directories as one page to read, and its figures as files."""

from persona_nnsight.report.write import write_report

__all__ = ["write_report"]
