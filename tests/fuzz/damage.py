"""Hypothesis strategies: valid files, spoilt a little."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

#: What stands in a file where something else belongs.
ODD_WORDS = (
    *("", " ", "nan", "NaN", "inf", "-inf", "1e999", "9" * 400, "-0", "0x10", "1_0", "٣", "1.5"),
    *("true", "null", "~", '"', "'", '""', ",", ",,", "\x00", "\n", "\r", "\ufeff", "\u2028", "é"),
    *("{", "}", "[", "]", ": ", " #", "&a", "*a", "!t", "|", ">", "-", "? ", "%", "@", "`", "\t"),
)

ODD_JSON: SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(ODD_WORDS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def spoilt_bytes(draw: DrawFn, raw: bytes) -> bytes:
    """`raw` with up to four changes: bytes flipped, cut out, put in; lines left out or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        kind = draw(st.sampled_from(("flip", "cut", "insert", "drop line", "double line", "end")))
        if kind == "flip" and at < len(raw):
            raw = raw[:at] + bytes([draw(st.integers(0, 255))]) + raw[at + 1 :]
        elif kind == "cut":
            raw = raw[:at] + raw[at + draw(st.integers(1, 40)) :]
        elif kind == "insert":
            word = draw(st.sampled_from(ODD_WORDS).map(str.encode) | st.binary(max_size=6))
            raw = raw[:at] + word + raw[at:]
        elif kind == "end":
            raw = raw[:at]
        elif kind.endswith("line"):
            start = raw.rfind(b"\n", 0, at) + 1
            end = raw.find(b"\n", at) + 1 or len(raw)
            raw = raw[:start] + (raw[start:end] * 2 if kind == "double line" else b"") + raw[end:]
    return raw


@st.composite
def spoilt_json(draw: DrawFn, data: Any) -> Any:
    """Plain data with up to three values left out or replaced."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        node = data
        while isinstance(node, dict | list) and node:
            key = draw(
                st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
            )
            if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            if draw(st.integers(0, 2)):
                node[key] = draw(ODD_JSON)
            else:
                del node[key]
            break
    return data


def spoilt_json_file(raw: bytes) -> SearchStrategy[bytes]:
    """A JSON file spoilt in its bytes or in its values."""
    spoilt = spoilt_json(json.loads(raw)).map(lambda data: json.dumps(data).encode())
    return spoilt_bytes(raw) | spoilt


@st.composite
def spoilt_csv(draw: DrawFn, raw: bytes) -> bytes:
    """A table with up to three fields left out or replaced, in its head or its rows."""
    rows = [line.split(",") for line in raw.decode().splitlines()]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.just(0) | st.integers(0, len(rows) - 1))
        if not rows[row]:
            continue
        field = draw(st.integers(0, len(rows[row]) - 1))
        words = st.sampled_from(ODD_WORDS) | st.sampled_from(rows[0] or [""])
        rows[row][field : field + draw(st.integers(0, 1))] = draw(st.lists(words, max_size=2))
    return "\n".join(map(",".join, rows)).encode() + b"\n"


@st.composite
def spoilt_safetensors(draw: DrawFn, raw: bytes) -> bytes:
    """A safetensors file whose header, labels or bytes are spoilt."""
    kind = draw(st.sampled_from(("bytes", "header", "labels")))
    if kind == "bytes":
        return draw(spoilt_bytes(raw))
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if kind == "header":
        header = draw(spoilt_json(header))
    else:
        labels = draw(spoilt_json(json.loads(header["__metadata__"]["persona_nnsight"])))
        header["__metadata__"]["persona_nnsight"] = json.dumps(labels)
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + raw[8 + length :]
