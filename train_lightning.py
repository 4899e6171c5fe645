"""Train a ControlNet with PyTorch Lightning: `python train_lightning.py --help`."""

import sys

from controlfill.cli import run

if __name__ == "__main__":
    sys.exit(run(["train_lightning", *sys.argv[1:]]))
