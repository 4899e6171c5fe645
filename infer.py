"""Fill the hole of a picture with a trained checkpoint: `python infer.py --help`."""

import sys

from controlfill.cli import run

if __name__ == "__main__":
    sys.exit(run(["infer", *sys.argv[1:]]))
