"""Numeric code on arrays: k-means, assignment, product quantization, pooling, top-k. Imports nothing at package level."""

__version__ = "0.0.0"
