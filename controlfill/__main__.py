"""python -m controlfill."""

from __future__ import annotations

import sys

from controlfill.cli import run


def main() -> None:
    """The `controlfill` command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
