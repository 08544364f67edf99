"""The search service: an ASGI application over the published version of an index. Knows nothing of Ray."""
