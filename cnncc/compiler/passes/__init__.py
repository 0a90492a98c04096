"""Graph passes: one a file, each a pure function `OnnxGraph` → `OnnxGraph`; `pipeline.clean` runs and proves them."""
