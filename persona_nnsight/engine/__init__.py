"""Every nnsight trace of the project: clean runs, edited runs and texts, on one of two paths.

A plan runs in chunks of cells (`run`). For each, `Runs` does the clean runs when it is made, then
scores and writes what is edited:

- `fast.runs`: prompts share openings as KV caches, rows are padded on the left, positions are
  explicit, and edited rows enter at the edited layer and token. Where a sliding window has let go
  of tokens, caches are neither shared nor cut.
- `whole.runs`: every row from its first token, with rows of its own length.

`self_check` finds which of them gives a plan's rows what plain forwards give them. What an edit
does to its rows is said by kind of intervention, in one place (`acts`).

The clean log-probabilities could be had from decoding. They are computed again, teacher-forced like
the edited rows, so that in low precision both are rounded alike.

The engine is meant to run as it is on a remote server: it imports torch, nnsight, transformers and
the plain-data modules of this package, and returns small things.
"""
