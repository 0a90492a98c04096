"""The threads that every engine brings along: their source, its assembly, and the step that makes an object of it."""
