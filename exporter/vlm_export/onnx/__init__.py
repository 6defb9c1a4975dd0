"""Writing ONNX graphs for ONNX Runtime: streamed weights, one linear layer at any precision, the language model."""
