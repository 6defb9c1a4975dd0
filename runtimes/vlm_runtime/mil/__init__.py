"""Core ML packages read and run without Core ML: the MIL program of a `.mlpackage`, executed with NumPy.

    package ─► wire, program, blob (read without trust) ─► plan ─► executor ─► ops_*

What it shows: the package on disk (weights, decompression, graph, states, names and types) computes what the
checkpoint computes. What it does not: that Core ML loads it, nor a device's placement, speed and rounding.
"""

from vlm_runtime.mil.executor import Executor, Outcome, Overflow
from vlm_runtime.mil.package import Package, open_package

__all__ = ["Executor", "Outcome", "Overflow", "Package", "open_package"]
