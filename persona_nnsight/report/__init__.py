"""Reports: run directories as one page to read, and its figures as files."""
