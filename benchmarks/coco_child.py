"""One child of the COCO benchmark: `python -m benchmarks.coco_child make|json|build|open FILE`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Result, peak_bytes

# instances_train2017.json: 118287 pictures, 860001 annotations, 448 MB.
PER_IMAGE, POINTS = 7.27, 17


def annotations(images: int) -> Iterator[str]:
    """Annotations with polygons as long as COCO's in the mean, as text."""
    import numpy as np

    rng = np.random.default_rng(0)
    total = round(images * PER_IMAGE)
    for number in range(total):
        points = np.round(rng.uniform(0, 640, 2 * int(rng.integers(6, 2 * POINTS + 11))), 2)
        image = int(rng.integers(images))
        left, top, width, height = np.round(rng.uniform(1, 200, 4), 2).tolist()
        yield json.dumps({
            "segmentation": [points.tolist()], "area": round(width * height, 4), "iscrowd": 0,
            "image_id": 1000 + image, "bbox": [left, top, width, height],
            "category_id": number % 80 + 1, "id": number,
        })  # fmt: skip


def make(file: Path, images: int) -> Result:
    """Write an instances file of the layout and size of COCO's; kept if it is there."""
    if not file.is_file():
        with file.open("w") as out:
            rows = (
                {
                    "license": 3, "file_name": f"{1000 + i:012}.jpg", "height": 480, "width": 640,
                    "coco_url": f"http://images.cocodataset.org/train2017/{1000 + i:012}.jpg",
                    "date_captured": "2013-11-14 11:18:45", "id": 1000 + i,
                    "flickr_url": f"http://farm9.staticflickr.com/8186/{1000 + i}_cbf5a1b9a1_z.jpg",
                }
                for i in range(images)
            )  # fmt: skip
            out.write('{"info": {}, "licenses": [], "images": [')
            out.write(", ".join(map(json.dumps, rows)) + '], "annotations": [')
            for number, text in enumerate(annotations(images)):
                out.write(f", {text}" if number else text)
            out.write('], "categories": []}')
    return {"bytes": file.stat().st_size, "annotations": round(images * PER_IMAGE)}


def read_json(file: Path) -> str:
    """As pycocotools does it: everything as Python objects; the last picture's polygons."""
    content = json.loads(file.read_bytes())
    last = content["images"][-1]["id"]
    return json.dumps([a["segmentation"] for a in content["annotations"] if a["image_id"] == last])


def read_index(file: Path) -> str:
    """The last picture's polygons from our index."""
    from controlfill.data.coco import open_index

    index = open_index(file)
    return json.dumps([json.loads(text) for text in index.texts(len(index.ids) - 1)])


def main() -> None:
    """Do one thing, measured."""
    how, file = sys.argv[1], Path(sys.argv[2])
    if how == "make":
        print(json.dumps(make(file, int(sys.argv[3]))))
        return
    cache = file.parent / "index"
    os.environ["CONTROLFILL_CACHE"] = str(cache)
    if how == "build":
        shutil.rmtree(cache, ignore_errors=True)
    if how != "json":
        import controlfill.data.coco  # noqa: F401  # importing is no part of reading
    before, wall, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    first = (read_json if how == "json" else read_index)(file)
    took = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps({**took, "grown": peak_bytes() - before, "first": first}))


if __name__ == "__main__":
    main()
