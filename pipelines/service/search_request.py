"""The body of a search, parsed and checked by hand: every rule has its own message, and a request costs microseconds.

Q queries, d dimensions.
"""

from __future__ import annotations

import base64
import binascii
import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from pipelines.service.refusals import Refusal, invalid
from pipelines.service.settings import ServiceSettings, option

FORMS = ("queries", "vectors", "vectors_b64")
FIELDS = (*FORMS, "k", "nprobe", "refine_factor", "recall", "doc_id_prefix", "with_text")
DEFAULT_K = 10
MAX_PREFIX_CHARS = 1024


@dataclass(frozen=True)
class SearchRequest:
    """What is asked. Exactly one of `texts` and `vectors_Qd` is given."""

    texts: list[str] | None
    vectors_Qd: npt.NDArray[np.float32] | None
    k: int
    nprobe: int | None
    refine_factor: int | None
    recall: float | None
    prefix: str | None
    with_text: bool

    @property
    def num_queries(self) -> int:
        return len(self.texts) if self.texts is not None else len(self.vectors_Qd)  # type: ignore[arg-type]


def parse_search(body: bytes, settings: ServiceSettings, d: int, nlist: int) -> SearchRequest:
    """The request in a body. Raises Refusal: 400 for what is not JSON, 422 for what breaks a rule, naming the field."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, "bad_json", f"the body must be JSON: {error}", where="body") from None
    if not isinstance(fields, dict):
        raise invalid(f"the body must be a JSON object, got {_kind(fields)}", "body")
    fields = {name: value for name, value in fields.items() if value is not None or name in FORMS}
    for name in fields:
        if name not in FIELDS:
            near = difflib.get_close_matches(name[:80], FIELDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(FIELDS)}"
            raise invalid(f"unknown field {name[:80]!r}; {hint}", "body", name)
    given = [name for name in FORMS if name in fields]
    if len(given) != 1:
        said = "none" if not given else " and ".join(given)
        raise invalid(f"give exactly one of {', '.join(FORMS)}; got {said}", "body")
    k = _integer(fields, "k", 1, settings.max_k, option("max_k")) or DEFAULT_K
    k = min(k, settings.max_k)
    most_probes = min(nlist, settings.max_nprobe)
    nprobe = _integer(
        fields, "nprobe", 1, most_probes, f"nlist is {nlist}, {option('max_nprobe')} {settings.max_nprobe}"
    )
    refine = _integer(fields, "refine_factor", 0, settings.max_refine_factor, option("max_refine_factor"))
    if refine is not None and k * refine > settings.max_candidates:
        raise invalid(
            f"k * refine_factor must be at most {settings.max_candidates} ({option('max_candidates')} of the service), got"
            f" {k} * {refine}; ask for fewer hits, or refine less",
            "refine_factor",
            refine,
        )
    recall = fields.get("recall")
    if recall is not None:
        if isinstance(recall, bool) or not isinstance(recall, int | float) or not 0 < recall < 1:
            raise invalid("recall must be a number between 0 and 1, both excluded", "recall", recall)
        if nprobe is not None or refine is not None:
            raise invalid("recall chooses nprobe and refine_factor: leave those out, or recall", "recall", recall)
    prefix = fields.get("doc_id_prefix")
    if prefix is not None and not (isinstance(prefix, str) and 1 <= len(prefix) <= MAX_PREFIX_CHARS):
        raise invalid(f"doc_id_prefix must be a string of 1 to {MAX_PREFIX_CHARS} characters", "doc_id_prefix", prefix)
    with_text = fields.get("with_text", True)
    if not isinstance(with_text, bool):
        raise invalid("with_text must be true or false", "with_text", with_text)
    texts, vectors = None, None
    if given[0] == "queries":
        texts = _texts(fields["queries"], settings)
    elif given[0] == "vectors":
        vectors = _vectors(fields["vectors"], settings, d)
    else:
        vectors = _packed_vectors(fields["vectors_b64"], settings, d)
    request = SearchRequest(
        texts, vectors, k, nprobe, refine, None if recall is None else float(recall), prefix, with_text
    )
    if request.num_queries * k > settings.max_hits:
        raise invalid(
            f"queries * k must be at most {settings.max_hits} ({option('max_hits')} of the service), got"
            f" {request.num_queries} * {k}; split the request, or ask for fewer hits",
            "k",
            k,
        )
    return request


def _integer(fields: dict[str, Any], name: str, least: int, most: int, limit: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():  # JSON has no integers of its own
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise invalid(f"{name} must be an integer in {least}..{most} ({limit})", name, value)
    return value


def _checked_count(count: int, name: str, settings: ServiceSettings) -> None:
    if not 1 <= count <= settings.max_batch:
        raise invalid(
            f"{name} must hold 1..{settings.max_batch} queries ({option('max_batch')} of the service), got {count}; split the"
            " request",
            name,
            count,
        )


def _texts(value: Any, settings: ServiceSettings) -> list[str]:
    if not isinstance(value, list):
        raise invalid(f"queries must be a list of strings, got {_kind(value)}", "queries", value)
    _checked_count(len(value), "queries", settings)
    for place, text in enumerate(value):
        if not isinstance(text, str):
            raise invalid(f"a query must be a string, got {_kind(text)}", f"queries[{place}]", text)
        if len(text) > settings.max_query_chars:
            raise invalid(
                f"a query must have at most {settings.max_query_chars} characters ({option('max_query_chars')} of the"
                f" service), got {len(text)}",
                f"queries[{place}]",
                text,
            )
        if not text.strip():
            raise invalid("a query must have text, got white space", f"queries[{place}]", text)
    return value


def _vectors(value: Any, settings: ServiceSettings, d: int) -> npt.NDArray[np.float32]:
    if not isinstance(value, list):
        raise invalid(f"vectors must be a list of lists of numbers, got {_kind(value)}", "vectors", value)
    _checked_count(len(value), "vectors", settings)
    for place, vector in enumerate(value):
        if not isinstance(vector, list):
            raise invalid(f"a vector must be a list of numbers, got {_kind(vector)}", f"vectors[{place}]", vector)
        if len(vector) != d:
            raise invalid(
                f"a vector must have d = {d} numbers, as the index has, got {len(vector)}",
                f"vectors[{place}]",
                len(vector),
            )
        kinds = set(map(type, vector))
        if not kinds <= {int, float}:
            at, wrong = next((i, x) for i, x in enumerate(vector) if type(x) not in (int, float))
            raise invalid(f"a vector must hold numbers, got {_kind(wrong)}", f"vectors[{place}][{at}]", wrong)
    try:
        with np.errstate(over="ignore"):
            vectors = np.array(value, np.float64).astype(np.float32)
    except OverflowError:  # an integer beyond float64
        raise invalid("a vector must hold numbers within float32", "vectors") from None
    return _checked_values(vectors, "vectors")


def _packed_vectors(value: Any, settings: ServiceSettings, d: int) -> npt.NDArray[np.float32]:
    name = "vectors_b64"
    if not isinstance(value, str):
        raise invalid(f"{name} must be a string, got {_kind(value)}", name, value)
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{name} must be base64 (RFC 4648, with padding): {error}", name, value) from None
    if not data or len(data) % (4 * d):
        raise invalid(
            f"{name} must hold one or more vectors of d = {d} little-endian float32, a multiple of {4 * d} bytes, got"
            f" {len(data)} bytes",
            name,
            len(data),
        )
    _checked_count(len(data) // (4 * d), name, settings)
    return _checked_values(np.frombuffer(data, "<f4").reshape(-1, d).astype(np.float32, copy=False), name)


def _checked_values(vectors_Qd: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float32]:
    """Raise Refusal for what scores cannot be computed with in float32: NaN, infinity, or a norm beyond it."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms_Q = np.einsum("qd,qd->q", vectors_Qd, vectors_Qd)
    if not (norms_Q < _LARGEST_NORM).all():
        place = int(np.argmin(norms_Q < _LARGEST_NORM))
        finite = np.isfinite(vectors_Qd[place])
        rule = "be finite" if not finite.all() else f"have a squared norm under {_LARGEST_NORM:g}"
        got = float(vectors_Qd[place][np.argmin(finite)]) if not finite.all() else float(norms_Q[place])
        raise invalid(f"a vector must {rule}", f"{name}[{place}]", got)
    return vectors_Qd


# Beyond it differences to stored vectors, squared and summed, may overflow float32.
_LARGEST_NORM = 1e30


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
