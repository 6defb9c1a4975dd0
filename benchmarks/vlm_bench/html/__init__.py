"""A report of one run as one self-contained page: `write_html("report.html", results)`."""

from vlm_bench.html.page import render, require, write_html

__all__ = ["render", "require", "write_html"]
