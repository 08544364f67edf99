"""Plain classes from Arrow table to Arrow table, storage access and the artifact's format. Never imports Ray."""
