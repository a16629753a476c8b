"""The whole-row path: every run from its first token, in batches of one length, without padding."""
