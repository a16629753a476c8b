"""The exceptions a caller has to know."""


class PersonaError(Exception):
    """Bad input, said in one sentence that names the value, what is allowed and what to try.

    The command line prints the message and exits with code 2; a notebook shows it as it is.
    """


class OutOfMemoryError(PersonaError):
    """Memory ran out with a single row; what was finished before is good."""
