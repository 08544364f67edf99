"""Refusals: what is answered in place of hits. One shape for all: rule, value received, where it stood, what to do."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json

MAX_GOT_CHARS = 80

# Status and code of every refusal that there is; the OpenAPI description lists them by status.
CODES = {
    400: ("bad_http", "bad_json"),
    401: ("unauthorized",),
    404: ("not_found",),
    405: ("method_not_allowed",),
    408: ("request_timeout",),
    411: ("length_required",),
    413: ("body_too_large",),
    415: ("unsupported_media_type",),
    421: ("misdirected_request",),
    422: ("invalid_request",),
    429: ("too_many_requests",),
    431: ("head_too_large",),
    500: ("internal_error",),
    503: ("deadline_exceeded", "draining", "not_ready", "unavailable"),
}


class Refusal(Exception):
    """An answer other than 200. `where` is the field of the body, or the header; `got` is shortened."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        where: str | None = None,
        got: Any = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        assert code in CODES[status]
        self.status = status
        self.code = code
        self.message = message
        self.where = where
        self.got = got
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """The JSON of the answer."""
        got = None if self.got is None else _shortened(self.got)
        return to_json({"error": {"code": self.code, "message": self.message, "where": self.where, "got": got}})

    def headers(self) -> dict[str, str]:
        """Headers beside those of every answer."""
        out = {"content-type": "application/json"}
        if self.retry_after_s is not None:
            out["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            out["www-authenticate"] = 'Bearer realm="vectormill"'
        return out


def invalid(message: str, where: str, got: Any = None) -> Refusal:
    """422: the request is JSON and breaks a rule."""
    return Refusal(422, "invalid_request", message, where=where, got=got)


def _shortened(value: Any) -> str:
    """The value as JSON, cut; of what is long only the kind."""
    if isinstance(value, str):
        value = value[: MAX_GOT_CHARS + 1]
    elif isinstance(value, list | dict) and len(value) > 8:
        return f"{type(value).__name__} of {len(value)}"
    said = to_json(value, inf_nan_mode="constants").decode()
    return said if len(said) <= MAX_GOT_CHARS else said[:MAX_GOT_CHARS] + "…"
