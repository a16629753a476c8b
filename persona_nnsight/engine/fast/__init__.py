"""The fast path: shared openings as KV caches, padded batches, layers below an edit skipped."""
