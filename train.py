"""Train a ControlNet to fill holes: `python train.py --help`."""

import sys

from controlfill.cli import run

if __name__ == "__main__":
    sys.exit(run(["train", *sys.argv[1:]]))
