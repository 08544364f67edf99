"""The published artifact: list-sorted runs, the quantizer, the manifest, verification, opening for search."""
