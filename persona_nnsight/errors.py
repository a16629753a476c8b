"""The exceptions a caller has to know, and how their messages show a value."""


class PersonaError(Exception):
    """Bad input, said in one sentence that names the value, what is allowed and what to try.

    The command line prints the message and exits with code 2; a notebook shows it as it is.
    """


class OutOfMemoryError(PersonaError):
    """Memory ran out with a single row; what was finished before is good."""


def quoted(value: object, most: int = 60) -> str:
    """A value as a message shows it, in quotes, with the middle of a long one left out.

    >>> quoted("haiku"), quoted("k" * 1000, most=9)
    ("'haiku'", "'kkkk…kkkk'")
    """
    text = str(value)
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most // 2) :]}"
    return repr(text)
