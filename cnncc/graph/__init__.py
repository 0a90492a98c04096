"""The ONNX graph that flows from exporters to targets, and what can be asked of it."""
