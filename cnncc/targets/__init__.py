"""Targets: backends that turn an ONNX graph into an engine for a device."""
