"""The GGUF language model: hyper-parameters, tensors, tokenizer and the file they are written into."""
