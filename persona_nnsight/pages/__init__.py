"""What pages are made of: figures, tables and texts of a run, as plain blocks."""
