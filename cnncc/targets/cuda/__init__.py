"""GPU engines through TensorRT 10, TensorRT 11 or TensorRT-RTX."""
