"""Bodies of searches that must be refused, by what is wrong with them; for an index of D dimensions and four lists."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

D = 384  # of the default model
VECTOR = [0.1] * D


def encoded(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def packed(*values: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


QUERY = b'{"queries": ["wing"], '
NOT_JSON = {
    "nothing": b"",
    "half of an object": b'{"queries": ["wing"',
    "two documents": b'{"queries": ["wing"]}{"queries": ["wing"]}',
    "a comma too many": b'{"queries": ["wing"],}',
    "not UTF-8": b'{"queries": ["\xff\xfe"]}',
    "overlong UTF-8": b'{"queries": ["\xc0\xaf"]}',
    "UTF-16": '{"queries": ["wing"]}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + encoded(queries=["wing"]),
    "NaN": b'{"vectors": [[NaN' + b", 0" * (D - 1) + b"]]}",
    "Infinity": b'{"vectors": [[-Infinity' + b", 0" * (D - 1) + b"]]}",
    "NaN as recall": QUERY + b'"recall": NaN}',
    "half of a surrogate pair": b'{"queries": ["\\ud800"]}',
    "half of a surrogate pair as a name": b'{"\\udfff": 1, "queries": ["wing"]}',
    "half of a surrogate pair as a prefix": QUERY + b'"doc_id_prefix": "\\ud800"}',
    "100,000 open brackets": b"[" * 100_000,
    "100,000 brackets in a field": b'{"queries": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 objects in each other": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 100,000 digits": QUERY + b'"k": ' + b"9" * 100_000 + b"}",
    "a form": b"queries=wing&k=3",
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    "zeros": bytes(1000),
}

WRONG_VALUES: dict[str, list[Any]] = {
    "k": [0, -1, 10**6, 10**30, True, 1.5, 1e300, "3", [3], {}],
    "nprobe": [0, -1, 5, 10**9, False, "1"],
    "refine_factor": [-1, 10**9, True, 0.5],
    "recall": [0, 1, -0.5, 2, True, "0.95", [0.95]],
    "with_text": [1, "yes", []],
    "doc_id_prefix": [7, ["a"], "", True],
}

BREAKS_A_RULE: dict[str, bytes] = {
    "a list": b"[]",
    "null": b"null",
    "a number": b"17",
    "a string": b'"wing"',
    "an empty object": b"{}",
    "two forms": encoded(queries=["wing"], vectors=[VECTOR]),
    "no query": encoded(queries=[]),
    "an empty query": encoded(queries=[""]),
    "white space": encoded(queries=[" \t\n\u2003"]),
    "a query that is a number": encoded(queries=[7]),
    "a query that is null": encoded(queries=[None]),
    "a query that is a list": encoded(queries=[["wing"]]),
    "queries as a string": encoded(queries="wing"),
    "queries as an object": encoded(queries={"0": "wing"}),
    "100,000 queries": encoded(queries=["a"] * 100_000),
    "a query of a million characters": encoded(queries=["a" * 1_000_000]),
    "no vector": encoded(vectors=[]),
    "a vector without numbers": encoded(vectors=[[]]),
    "a vector too short": encoded(vectors=[VECTOR[1:]]),
    "vectors of different lengths": encoded(vectors=[VECTOR, VECTOR[1:]]),
    "a vector of strings": encoded(vectors=[["0.1"] * D]),
    "a vector of booleans": encoded(vectors=[[True] * D]),
    "a vector of nulls": encoded(vectors=[[None] * D]),
    "a vector of vectors": encoded(vectors=[[[0.1]] * D]),
    "one flat vector": encoded(vectors=VECTOR),
    "numbers beyond float32": encoded(vectors=[[1e39] * D]),
    "numbers whose squares are beyond float32": encoded(vectors=[[1e30] * D]),
    "an integer beyond float64": encoded(vectors=[[10**400, *VECTOR[1:]]]),
    "base64 that is none": encoded(vectors_b64="!!!!"),
    "base64 of another alphabet": encoded(vectors_b64="é" * 100),
    "base64 without padding": encoded(vectors_b64="QUJD" * 10 + "Q"),
    "base64 of nothing": encoded(vectors_b64=""),
    "base64 of half a vector": encoded(vectors_b64=packed(*VECTOR[: D // 2])),
    "base64 of NaN": encoded(vectors_b64=packed(float("nan"), *VECTOR[1:])),
    "base64 of infinity": encoded(vectors_b64=packed(float("inf"), *VECTOR[1:])),
    "base64 as a list": encoded(vectors_b64=[packed(*VECTOR)]),
    **{
        f"{name} = {value!r}": encoded(queries=["wing"], **{name: value})
        for name, values in WRONG_VALUES.items()
        for value in values
    },
    "k = 4,300 digits": QUERY + b'"k": ' + b"9" * 4300 + b"}",
    "k = 1e400": QUERY + b'"k": 1e400}',
    "recall beside nprobe": encoded(queries=["wing"], recall=0.9, nprobe=1),
    "a prefix of 100,000 characters": encoded(queries=["wing"], doc_id_prefix="a" * 100_000),
    **{
        f"the unknown field {name[:20]!r}": encoded(queries=["wing"], **{name: "../../etc/passwd"})
        for name in ("version", "model", "root", "path", "__class__", "K", "a" * 100_000)
    },
}
