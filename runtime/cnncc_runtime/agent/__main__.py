"""``python -m cnncc_runtime.agent`` is ``cnncc-agent``: what a service calls, by the path of its Python."""

from cnncc_runtime.agent.cli import main

if __name__ == "__main__":
    main()
