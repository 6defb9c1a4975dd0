"""LLaVA's original layout in Hugging Face terms: tensor names, config, vision tower, tokenizer and processor."""
