"""Targets: each file writes a bundle's parts for one runtime; found by file name."""
