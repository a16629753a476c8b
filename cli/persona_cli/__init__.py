"""The `persona` command: one file per command, which parses options and shows results."""
