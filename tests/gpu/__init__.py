"""What needs an NVIDIA GPU: ``make test-gpu``."""
