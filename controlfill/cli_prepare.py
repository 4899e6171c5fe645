"""The commands that make training data of skins: make one call each, say what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from controlfill.console import quiet_libraries, reporting, say
from controlfill.errors import UserError
from controlfill.options.skinset import (
    PrepareCannyOptions,
    PrepareCaptionsOptions,
    PrepareGlyphsOptions,
    PrepareSkinsOptions,
)

if TYPE_CHECKING:
    from controlfill.data.captions import Captioner, Changed
    from controlfill.data.sample import Sample


def prepare_skins(options: PrepareSkinsOptions) -> None:
    """`controlfill prepare skins`."""
    from controlfill.data.skinset import prepare_skins as prepare

    with reporting() as report:
        done = prepare(options, report)
    say_changed(done, f"wrote {done.samples} skins to {done.folder}")


def prepare_canny(options: PrepareCannyOptions) -> None:
    """`controlfill prepare canny`."""
    from controlfill.data.skinset import prepare_canny as prepare

    with reporting() as report:
        done = prepare(options, report)
    for reason in done.skipped:
        say(f"skipped: {reason}")
    say(f"wrote {done.samples} pictures to {done.folder}")


def prepare_captions(options: PrepareCaptionsOptions) -> None:
    """`controlfill prepare captions`."""
    from controlfill.data.captions import open_captioned
    from controlfill.data.captions import prepare_captions as prepare

    open_captioned(options.data)  # a mistake is told before anything is loaded
    caption = choose_captioner(options)
    with reporting() as report:
        done = prepare(options, caption, report)
    say_changed(done, f"wrote {done.samples} captions in {done.folder}")


def choose_captioner(options: PrepareCaptionsOptions) -> Captioner:
    """Where the words come from: a table, the template, or a model. Raises UserError."""
    from controlfill.data.captions import template, written

    if options.captions:
        if options.model != "template":
            raise UserError("--captions and --model both say where words come from; give one")
        return written(options.captions)
    if options.model == "template":
        return template
    quiet_libraries()
    from controlfill.inference.pipeline import pick_device
    from controlfill.models.captioner import load_captioner

    device = pick_device(options.device)
    model = load_captioner(options.model, device, options.prefix, options.max_new_tokens)

    def caption(samples: Sequence[Sample]) -> list[str]:
        return model([sample.image for sample in samples])

    return caption


def prepare_glyphs(options: PrepareGlyphsOptions) -> None:
    """`controlfill prepare glyphs`."""
    from controlfill.data.glyphs import prepare_glyphs as prepare
    from controlfill.models.ocr import find_texts, open_finder

    open_finder()  # what is missing is told once, not for every picture
    with reporting() as report:
        done = prepare(options, find_texts, report)
    say_changed(done, f"read {done.samples} pictures in {done.folder}")


def say_changed(done: Changed, result: str) -> None:
    """Say what is odd, what was left out, and the `result`."""
    for note in done.notes:
        say(note)
    for reason in done.skipped:
        say(f"skipped: {reason}")
    say(f"{result}, left {done.kept} as they were" if done.kept else result)


PREPARES: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "prepare skins": (PrepareSkinsOptions, prepare_skins),
    "prepare canny": (PrepareCannyOptions, prepare_canny),
    "prepare captions": (PrepareCaptionsOptions, prepare_captions),
    "prepare glyphs": (PrepareGlyphsOptions, prepare_glyphs),
}
