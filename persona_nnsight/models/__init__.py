"""Models: where their weights are, how they are loaded, where their layers are."""
