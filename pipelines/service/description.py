"""The service in OpenAPI: schemas with the limits that this replica was started with, and every error that there is."""

from __future__ import annotations

from typing import Any

from pipelines.service.refusals import CODES
from pipelines.service.search_request import DEFAULT_K, FORMS, MAX_PREFIX_CHARS
from pipelines.service.settings import TOLD_LIMITS, ServiceSettings

ERRORS = {
    400: "The body is not JSON, or the request is not HTTP.",
    401: "The bearer token is missing or wrong (where the service was started with one).",
    404: "There is no such path.",
    405: "The path does not take this method.",
    408: "The body did not come in time.",
    413: "The body is larger than the service takes.",
    415: "The body must be sent as application/json.",
    421: "The Host header names something else than the service answers to (only on loopback without a token).",
    422: "The body breaks a rule; the message says which, `where` says the field.",
    431: "The request's head is too large.",
    429: "Too many queries wait already. Retry-After says when to come again.",
    500: "A fault of the service.",
    503: "Not answered in time, draining, or the index cannot be read. Retry-After says when to come again.",
}
ALWAYS = (400, 401, 405, 408, 413, 421, 431, 500)  # what any route may answer
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: the statuses given and those that any route may answer."""
    out: dict[int | str, dict[str, Any]] = {}
    for status in sorted({*statuses, *ALWAYS}):
        out[status] = {
            "description": ERRORS[status],
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/Error{status}"}}},
        }
        if status in (429, 503):
            out[status]["headers"] = _RETRY_AFTER
    return out


def search_body() -> dict[str, Any]:
    """`requestBody` of POST /v1/search."""
    return {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/SearchRequest"}}},
    }


def schemas(settings: ServiceSettings, d: int, nlist: int) -> dict[str, Any]:
    """Components for the limits of the service and the version that it serves now."""
    out: dict[str, Any] = {"SearchRequest": _search_request(settings, d, nlist), **_answers()}
    for status, codes in CODES.items():
        out[f"Error{status}"] = _error(codes)
    return out


def _nullable(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}], "description": description}


def _search_request(settings: ServiceSettings, d: int, nlist: int) -> dict[str, Any]:
    batch = {"minItems": 1, "maxItems": settings.max_batch}
    text = {"type": "string", "minLength": 1, "maxLength": settings.max_query_chars, "pattern": r"\S"}
    vector = {"type": "array", "items": {"type": "number"}, "minItems": d, "maxItems": d}
    properties = {
        "queries": {
            "type": "array",
            "items": text,
            **batch,
            "description": "Questions as text. Cleaned and encoded as the corpus was; what is beyond the model's length is cut.",
        },
        "vectors": {"type": "array", "items": vector, **batch, "description": f"Vectors of d = {d} finite numbers."},
        "vectors_b64": {
            "type": "string",
            "contentEncoding": "base64",
            "minLength": 4,
            "description": f"Vectors of d = {d} little-endian float32 one after the other, in base64: the fast way.",
        },
        "k": _nullable(
            {"type": "integer", "minimum": 1, "maximum": settings.max_k},
            f"Hits for each query; {DEFAULT_K} unless given. Queries * k is at most {settings.max_hits}.",
        ),
        "nprobe": _nullable(
            {"type": "integer", "minimum": 1, "maximum": min(nlist, settings.max_nprobe)},
            "Inverted lists to scan; the service's default unless given.",
        ),
        "refine_factor": _nullable(
            {"type": "integer", "minimum": 0, "maximum": settings.max_refine_factor},
            "Candidates for each hit that are scored again with the stored vectors; 0: the order of the codes alone."
            f" k * refine_factor is at most {settings.max_candidates}.",
        ),
        "recall": _nullable(
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            "In place of nprobe and refine_factor: the operating point that reaches this recall@10 on the stored sample.",
        ),
        "doc_id_prefix": _nullable(
            {"type": "string", "minLength": 1, "maxLength": MAX_PREFIX_CHARS},
            "Only documents whose id begins with this.",
        ),
        "with_text": _nullable({"type": "boolean"}, "Whether hits carry their text; true unless given."),
    }
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "oneOf": [{"required": [form]} for form in FORMS],
    }


def _answers() -> dict[str, Any]:
    hit = {
        "rank": {"type": "integer", "minimum": 1},
        "doc_id": {"type": "string"},
        "chunk_no": {"type": "integer", "minimum": 0, "description": "Of the document's chunks, from 0."},
        "score": {"type": "number", "description": "Inner product, or negative squared distance; larger is better."},
        "text": {"type": "string", "description": "Of the chunk; absent where with_text is false."},
        "source": {"type": "string", "description": "The object below the SOURCE that the document was read from."},
    }
    milliseconds = {"type": "number", "minimum": 0}
    took = dict.fromkeys(("queue", "encode", "search", "rows", "total"), milliseconds)
    number, text = {"type": "number"}, {"type": "string"}
    count = {"type": "integer", "minimum": 0}
    nullable = {"type": ["string", "null"]}
    point = {"nprobe": count, "refine_factor": count}
    return {
        "Hit": _object(hit, optional=("text",)),
        "SearchAnswer": _object(
            {
                "version": {"type": "string", "description": "All hits of an answer are of this version."},
                "nprobe": count,
                "refine_factor": count,
                "results": {"type": "array", "items": _object({"hits": {"type": "array", "items": _ref("Hit")}})},
                "took_ms": _object(took, optional=("encode",)),
            }
        ),
        "IndexFacts": _object(
            {
                "version": text,
                "content_digest": text,
                "created_at": text,
                "opened_at": text,
                **dict.fromkeys(("num_docs", "ntotal", "num_segments", "d", "nlist", "M", "nbits"), count),
                "metric": {"enum": ["ip", "l2"]},
                "model": _object(dict.fromkeys(("name", "fingerprint", "precision"), nullable)),
                "default": _object(point),
                "stored": _object({**point, "recall@10": number}),
                "operating_points": {
                    "type": "array",
                    "items": _object(
                        {"recall": number, **point, "recall@10": number, "p50_ms": number, "p99_ms": number}
                    ),
                },
                "limits": _object(dict.fromkeys(TOLD_LIMITS, count)),
            }
        ),
        "Health": _object({"status": {"const": "ok"}}),
        "Readiness": _object({"status": {"const": "ready"}}),
    }


def _error(codes: tuple[str, ...]) -> dict[str, Any]:
    fields = {
        "code": {"enum": list(codes)},
        "message": {"type": "string", "description": "The rule, the value received, and what to do."},
        "where": {"type": ["string", "null"], "description": "Field of the body, or header."},
        "got": {"type": ["string", "null"], "description": "The value received, shortened."},
    }
    return _object({"error": _object(fields)})


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
