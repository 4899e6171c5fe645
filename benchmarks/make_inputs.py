"""Makes base and pairs: `python -m benchmarks.make_inputs FOLDER WIDTH PAIRS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import tiny


def main() -> None:
    """Make what is not there yet."""
    folder, width, pairs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    tiny.make_base(folder / f"base{width}", width)
    tiny.make_pairs(folder, pairs)
    print(json.dumps({"made": str(folder)}))


if __name__ == "__main__":
    main()
