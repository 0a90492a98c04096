"""Before compiling: train, prune, distil and fine-tune a model, with the engine that becomes of it in view."""
