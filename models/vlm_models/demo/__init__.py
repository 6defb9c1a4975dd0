"""The trained demo checkpoint: SmolLM2-135M-Instruct that sees coloured shapes and digits, and the recipe that trained it."""
