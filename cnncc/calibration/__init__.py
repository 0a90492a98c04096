"""Data that a model is calibrated on, checked with and measured on."""
