"""The commands about keyboard skins: make one call each, print one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from controlfill import options as opts
from controlfill.console import reporting, say


def skin_hint(options: opts.SkinHintOptions) -> None:
    """`controlfill skin hint`."""
    from controlfill.images import save_image
    from controlfill.skins.draw import edge_hint, glyph_hint

    layout = layout_of(options)
    picture = glyph_hint(layout, font=options.font) if options.glyphs else edge_hint(layout)
    say(f"wrote {save_image(options.out, picture, settings=options.as_dict())}")


def skin_compose(options: opts.SkinComposeOptions) -> None:
    """`controlfill skin compose`."""
    from controlfill.images import save_image
    from controlfill.skins.compose import compose

    composed = compose(layout_of(options), options.parts)
    for line in composed.reports:
        say(line)
    say(f"wrote {save_image(options.out, composed.image, settings=options.as_dict())}")


def skin_slice(options: opts.SkinSliceOptions) -> None:
    """`controlfill skin slice`."""
    from controlfill.images import as_photo
    from controlfill.skins.compose import write_parts

    image = as_photo(options.image).rgb
    written = write_parts(image, layout_of(options), options.out, options.pressed)
    say(f"wrote {len(written)} parts to {options.out}")


def skin_render(options: opts.SkinRenderOptions) -> None:
    """`controlfill skin render`."""
    from controlfill.images import as_photo, save_image
    from controlfill.skins.draw import draw_labels

    skin = as_photo(options.image).rgb
    picture = draw_labels(skin, layout_of(options), options.font)
    say(f"wrote {save_image(options.out, picture, settings=options.as_dict())}")


def layout_of(options: opts.LayoutOptions) -> Any:
    """The layout that the options of a skin command name, at the size they ask for."""
    from controlfill.skins.layout import sized_layout

    return sized_layout(options.layout, options.size)


def skin_export(options: opts.SkinExportOptions) -> None:
    """`controlfill skin export`."""
    from controlfill.images import as_photo
    from controlfill.skins.formats import export_theme

    skin = as_photo(options.image).rgb
    say(f"wrote {export_theme(skin, layout_of(options), options.out, options.labels)}")


def skin_import(options: opts.SkinImportOptions) -> None:
    """`controlfill skin import`."""
    from controlfill.skins.formats import import_theme
    from controlfill.skins.importing import import_parts, write_skin

    if options.parts:
        imported = import_parts(options.source, layout_of(options), options.out)
        for line in imported.reports:
            say(line)
        say(f"wrote {len(imported.matched)} parts to {options.out}")
        return
    layout, skin = import_theme(options.source)
    write_skin(skin, layout, options.out)
    say(f"wrote skin.png and layout.yaml ({layout.name}) to {options.out}")


def skin_themes(options: opts.SkinThemesOptions) -> None:
    """`controlfill skin themes`."""
    from controlfill.files import check_empty
    from controlfill.skins.themes import draw_theme, write_part_set

    layout = layout_of(options)
    check_empty(options.out, "themes")
    with reporting() as report:
        for number in range(options.count):
            folder = options.out / f"theme_{number:03}"
            folder.mkdir(parents=True)
            write_part_set(draw_theme(options.seed + number), layout, folder)
            report("themes", number + 1, options.count)
    say(f"wrote {options.count} part sets to {options.out}")


def skin_check(options: opts.SkinCheckOptions) -> None:
    """`controlfill skin check`."""
    from controlfill.evaluation.keyfit import key_fit
    from controlfill.images import as_photo
    from controlfill.skins.draw import check_size

    layout, image = layout_of(options), as_photo(options.image).rgb
    check_size(image, layout)
    found = key_fit(image, layout)
    off = [name for name, fits in found.fits.items() if not fits]
    say(f"KeyFit {found.share:.2f}: {len(off)} of {len(found.fits)} keys are not where they belong")
    if off:
        say(f"not in place: {', '.join(off)}")


SKINS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "skin hint": (opts.SkinHintOptions, skin_hint),
    "skin compose": (opts.SkinComposeOptions, skin_compose),
    "skin slice": (opts.SkinSliceOptions, skin_slice),
    "skin render": (opts.SkinRenderOptions, skin_render),
    "skin export": (opts.SkinExportOptions, skin_export),
    "skin import": (opts.SkinImportOptions, skin_import),
    "skin themes": (opts.SkinThemesOptions, skin_themes),
    "skin check": (opts.SkinCheckOptions, skin_check),
}
