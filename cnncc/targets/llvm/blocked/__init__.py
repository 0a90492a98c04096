"""Blocked tensors: which layout each tensor has, and the operators that are defined on blocks of channels."""
