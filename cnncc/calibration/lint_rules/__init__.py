"""The rules of the Q/DQ lint, a file for each severity, over one view of the graph."""
