"""Kernels: a list of rules, each of which schedules one family of functions or declines."""
