"""The figures of a report: each is a few panels, drawn alike in the page and in files."""
