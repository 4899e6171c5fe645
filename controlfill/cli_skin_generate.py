"""The commands that generate keyboard skins and measure them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from controlfill.console import quiet_libraries, reporting, say
from controlfill.errors import UserError
from controlfill.options.skin_generate import SkinGenerateOptions, SkinReportOptions


def skin_generate(options: SkinGenerateOptions) -> None:
    """`controlfill skin generate`. Raises UserError at the end when any skin failed."""
    quiet_libraries()
    from controlfill.inference.pipeline import load_for
    from controlfill.inference.skins import find_requests, run_skins

    find_requests(options)  # a mistake is told before anything is loaded
    pipeline = load_for(options)
    with reporting() as report:
        made = run_skins(pipeline, options, report)
    for reason in made.failed:
        say(f"failed: {reason}")
    kept = f", {len(made.kept)} were there already" if made.kept else ""
    say(f"wrote {len(made.written)} skins to {options.output_dir}{kept}")
    if made.failed:
        count = len(made.failed) + len(made.written) + len(made.kept)
        raise UserError(f"{len(made.failed)} of {count} skins could not be made; see above")


def skin_report(options: SkinReportOptions) -> None:
    """`controlfill skin report`."""
    quiet_libraries()
    from controlfill.evaluation.skin_report import measure_skins, write_skin_report

    with reporting() as report:
        result = measure_skins(options, report)
    for line in (*result.skipped, *result.notes):
        say(line)
    for line in result.lines():
        say(line)
    say(f"wrote {write_skin_report(result, options)}")


SKIN_GENERATE: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "skin generate": (SkinGenerateOptions, skin_generate),
    "skin report": (SkinReportOptions, skin_report),
}
