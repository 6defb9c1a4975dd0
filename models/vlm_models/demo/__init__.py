"""The trained demo checkpoint: SmolLM2-135M that sees coloured shapes and digits, and its recipe."""
