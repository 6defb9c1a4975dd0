"""Measurements: `vlm-bench BUNDLE…`, and modules that measure us and a peer in one run."""
