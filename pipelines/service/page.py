"""The search page, one file without outside resources, and the headers that hold a browser to that."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")


def search_page() -> tuple[bytes, dict[str, str]]:
    """The page, UTF-8, and the headers to serve it with.

    Its content security policy allows its own script and style, by their hashes, and requests to the service it came from: text of a
    document that became markup by some fault could neither run nor load anything. Deterministic.
    """
    page = PAGE.read_bytes()
    policy = [
        "default-src 'none'",
        f"script-src {_hash_source(page, b'script')}",
        f"style-src {_hash_source(page, b'style')}",
        "img-src data:",  # its icon
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No script of the page may write markup at all.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(policy),
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
        "etag": f'"{hashlib.sha256(page).hexdigest()[:32]}"',
    }
    return page, headers


def _hash_source(page: bytes, tag: bytes) -> str:
    """`'sha256-...'` of what stands inside the only element of this name."""
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
