"""Grids of personas and tasks, and their prompts as token ids."""
