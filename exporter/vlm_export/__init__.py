"""Trained LLaVA checkpoints to bundles that run on devices, each one checked against its checkpoint."""

from vlm_export.export import export

__all__ = ["export"]
