"""The exceptions a caller has to know, and how their messages show a value."""

import re


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


#: What a terminal or a page would obey: control characters, also those above 127; what turns the
#: direction of the letters that follow, or ends a line unseen; and halves of letters.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def escaped(text: str, keep: str = "\n\t") -> str:
    r"""A text that somebody else may have written, as it may be shown: it moves and hides nothing.

    Args:
        text: any.
        keep: the control characters that stay as they are.

    >>> print(escaped("job \x1b[2J\x9b1m\n\u202e\ud800"))
    job \x1b[2J\x9b1m
    \u202e\ud800
    """

    def number(found: re.Match[str]) -> str:
        letter = found[0]
        if letter in keep:
            return letter
        code = ord(letter)
        return _SHORT.get(letter) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")

    return _OBEYED.sub(number, text)


_ERROR_CLASS = re.compile(r"^\w*(Error|Exception): ")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name, to end a sentence on.

    >>> first_line(ValueError("no such thing.\\nSee above.")), first_line(TimeoutError())
    ('no such thing', 'TimeoutError')
    >>> first_line(KeyError("metadata")), first_line(ValueError("field x:\\n  TypeError: no int"))
    ("unknown name 'metadata'", 'field x: no int')
    """
    if isinstance(error, KeyError):
        return f"unknown name {error}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    first = lines[0].strip()
    if first.endswith(":") and len(lines) > 1:
        first = f"{first} {_ERROR_CLASS.sub('', lines[1].strip())}"
    return first.rstrip(".:")
