"""Every decoder that transformers can run, tiny, against the oracle: `make test-architectures`."""
