"""python -m quantbench, and the script `quantbench`: signals are answered before anything else is imported."""

import sys

from quantbench import shell


def main() -> int:
    """The program; its exit code."""
    return shell.run(_cli)


def _cli() -> int:
    from quantbench.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
