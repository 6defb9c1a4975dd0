"""Engines: each file runs parts of a bundle; found by file name."""
