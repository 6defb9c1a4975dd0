"""`vlm-assemble`: a LLaVA made of a vision tower and a language model, to be trained from there."""
