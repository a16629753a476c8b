"""Properties of everything that reads a text or a file, for hypothesis and for atheris."""
