"""Reports: report.json, and one HTML page with the figures and the pictures they come from."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controlfill.data.hints import Spec, show_hint
from controlfill.data.sample import Sample, collate
from controlfill.evaluation.evaluate import OURS, Evaluation, known_mask
from controlfill.files import write_json, write_whole
from controlfill.images import as_rgb, png_bytes

SHOWN_SIDE = 128
COLUMNS = {
    "hole_psnr": ("hole PSNR, dB", "{:.2f}"),
    "hole_psnr_mean": ("mean of pictures, dB", "{:.2f}"),
    "hole_ssim": ("hole SSIM", "{:.3f}"),
    "known_max_error": ("known pixels, largest error", "{:d}"),
    "seam": ("seam (1 = truth)", "{:.2f}"),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
       color: #1c1c1e; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 1rem }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
tr.ours { font-weight: 600; background: #f0f6ff }
figure { display: inline-block; margin: .3rem; text-align: center; font-size: 12px; color: #555 }
figure img { image-rendering: pixelated; display: block; border: 1px solid #ddd; height: auto;
             max-width: 100% }
.row { border-top: 1px solid #eee; padding: .4rem 0 } .row p { margin: .2rem .3rem }
.no { color: #b00020 } .yes { color: #0a7a30 }
pre { background: #f6f6f6; padding: .7rem; overflow: auto }
"""


def write_report(result: Evaluation, spec: Spec, folder: Path, extra: str = "") -> Path:
    """Write report.json and report.html into `folder`; `extra` is HTML put before the figures."""
    summary = result.summary()
    write_json(folder / "report.json", summary)
    page = folder / "report.html"
    write_whole(page, make_page(result, summary, spec, extra).encode())
    return page


def make_page(result: Evaluation, summary: dict[str, Any], spec: Spec, extra: str) -> str:
    """The whole page as HTML, pictures inside."""
    parts = [
        extra,
        *(figures_table(group, methods) for group, methods in summary["figures"].items()),
        objects_line(summary["objects"]),
        skipped_lines(summary["skipped"]),
        "<h2>Pictures</h2>",
        *(picture_row(shown, spec) for shown in result.shown),
        settings_part(summary["settings"]),
    ]
    return page("controlfill report", parts)


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A page of HTML parts under a title, in the style of all reports and a `style` of its own."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    top = f"<style>{STYLE}{style}</style><h1>{html.escape(title)}</h1>"
    return "\n".join([head, top, *parts, "</html>"])


def settings_part(settings: dict[str, Any]) -> str:
    """The settings, one in each line, as HTML."""
    lines = html.escape("\n".join(f"{k}: {v}" for k, v in settings.items()))
    return f"<h2>Settings</h2><pre>\n{lines}\n</pre>"


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table as HTML: the titles of its columns, and rows, each a class of its own or "".

    Cells are HTML already.
    """
    titles = "".join(f"<th>{title}</th>" for title in head)
    lines = []
    for mark, cells in rows:
        kind = f" class={mark}" if mark else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><tr>{titles}</tr>{''.join(lines)}</table>"


def figures_table(group: str, methods: dict[str, dict[str, float]]) -> str:
    """One table: a row per method, a column per figure."""
    count = int(next(iter(methods.values()))["pictures"])
    rows = []
    for method, figures in methods.items():
        cells = [form.format(figures[key]) for key, (_, form) in COLUMNS.items()]
        rows.append(("ours" if method == OURS else "", [html.escape(method), *cells]))
    titles = ["fill", *(title for title, _ in COLUMNS.values())]
    return f"<h2>{html.escape(group)} ({count} pictures)</h2>{table(titles, rows)}"


def objects_line(accuracy: dict[str, float]) -> str:
    """A sentence about wholly masked objects; empty when none were."""
    if not accuracy:
        return ""
    return (
        f"<p>Of {accuracy['pictures']:.0f} wholly masked objects, "
        f"<b>{accuracy['colour_and_shape']:.1%}</b> came back in the colour and shape that the "
        f"prompt names ({accuracy['colour']:.1%} in the right colour).</p>"
    )


def skipped_lines(skipped: list[str]) -> str:
    """The pictures that could not be used, by name."""
    if not skipped:
        return ""
    items = "".join(f"<li>{html.escape(reason)}</li>" for reason in skipped)
    return f"<p>{len(skipped)} pictures were skipped:</p><ul>{items}</ul>"


def picture_row(shown: dict[str, Any], spec: Spec) -> str:
    """Input, mask, hint, outputs and truth of one sample, with its prompt."""
    sample: Sample = shown["sample"]
    mask = known_mask(sample)
    hint = show_hint(collate([sample], spec).hint, spec)[0]
    blank = np.where(mask[..., None] > 0, np.uint8(128), sample.image)
    pictures = {"input": blank, "mask": as_rgb(mask), "hint": hint}
    pictures |= shown["outputs"]
    pictures["truth"] = sample.image
    figures = "".join(figure(image, name) for name, image in pictures.items())
    words = html.escape(sample.prompt or "(no prompt)")
    if "verdict" in shown:
        good = shown["verdict"].colour and shown["verdict"].shape
        words += f" <b class={'yes' if good else 'no'}>{'right' if good else 'wrong'}</b>"
    return f"<div class=row><p>{words}</p>{figures}</div>"


def figure(image: np.ndarray, name: str, side: int = SHOWN_SIDE) -> str:
    """A captioned picture as HTML, its PNG inside, shown `side` pixels wide or high."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if scale < 1:
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    data = base64.b64encode(png_bytes(image)).decode()
    title = html.escape(name)
    return (
        f"<figure><img alt='{title}' width={size[0]} src='data:image/png;base64,{data}'>"
        f"{title}</figure>"
    )
