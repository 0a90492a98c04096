"""The `cnncc` command: parse, call one library function, render."""
