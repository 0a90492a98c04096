"""Interleaved benchmarks: an engine against its peers, a process each, honest about noise."""
