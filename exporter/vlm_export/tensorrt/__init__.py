"""Writing ONNX graphs for TensorRT, of standard operators alone, and building engines from them."""
