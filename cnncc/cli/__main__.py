"""``python -m cnncc.cli``: the command without its script."""

from cnncc.cli.main import main

main()
