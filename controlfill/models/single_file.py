"""Whole checkpoints in one file, loaded, with the tokenizers that such files lack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlfill.errors import UserError
from controlfill.models.formats import TEXT_PARTS, Model, Told, load_part, open_model

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Tokenizers = dict[str, "CLIPTokenizer"]
# All Stable Diffusions have this vocabulary; SD 2 and SDXL's second encoder pad with another word.
USUAL, PAD = "openai/clip-vit-large-patch14", "!"
# Every byte, within a word and at its end.
LEAST_WORDS = 2 * 256


def load_checkpoint(
    path: Path, tokenizer: str | None = None, told: Told | None = None
) -> dict[str, Any]:
    """The parts of a checkpoint in one file, by their names in a diffusers pipeline.

    `unet`, `vae`, `text_encoder` and `tokenizer` (SDXL: also `text_encoder_2`, `tokenizer_2`), in
    the file's number format, the config of the `scheduler`, the class of the `pipeline`, and
    `empty_is_zero`, what SDXL makes of an empty prompt. Raises UserError.
    """
    model = open_model(path, told)
    if model.kind != "checkpoint":
        raise UserError(f"{path} is a {model.kind}, no whole checkpoint to start from")
    parts: dict[str, Any] = {**find_tokenizers(model, tokenizer, path)}
    parts |= {part: load_part(model, part) for part in model.parts}
    return parts | {
        "scheduler": model.configs["scheduler"], "pipeline": model.pipeline,
        "empty_is_zero": model.empty_is_zero,
    }  # fmt: skip


def find_tokenizers(model: Model, told: str | None, source: Path) -> Tokenizers:
    """The tokenizers of a checkpoint's text encoders: `tokenizer`, and SDXL's `tokenizer_2`.

    Looked for where the user has `told`, else beside the `source`, else at the hub. Raises
    UserError when they can't be had or have more words than the encoders.
    """
    found: Tokenizers = {}
    for part in TEXT_PARTS:
        if part in model.parts:
            name = part.replace("text_encoder", "tokenizer")
            found[name] = _find(name, told, source, _pads_otherwise(model, part))
            _check_words(found[name], model.configs[part].get("vocab_size", 49408), told)
    return found


def _pads_otherwise(model: Model, part: str) -> bool:
    return part == "text_encoder_2" or model.configs[part].get("hidden_act") == "gelu"


def _find(name: str, told: str | None, source: Path, pads_otherwise: bool) -> CLIPTokenizer:
    """One tokenizer. A folder that has it as its part knows its padding itself."""
    from transformers import CLIPTokenizer

    beside = source if source.is_dir() else source.parent
    folder = Path(told) if told else beside
    if (folder / name).is_dir():
        return _load(CLIPTokenizer, str(folder / name))
    if (folder / "tokenizer").is_dir():
        return _load(CLIPTokenizer, str(folder / "tokenizer"), pads_otherwise)
    return _load(CLIPTokenizer, told or USUAL, pads_otherwise)


def _load(cls: Any, where: str, pads_otherwise: bool = False) -> CLIPTokenizer:
    from huggingface_hub import hf_hub_download

    more = {"pad_token": PAD} if pads_otherwise else {}
    reason = "it is in no folder or cache, and the hub does not answer"
    for local in (True, False):
        try:
            if not local and not Path(where).is_dir():
                # One file first: offline, each of the many that the library looks for takes long.
                hf_hub_download(where, "vocab.json")
            tokenizer = cls.from_pretrained(where, local_files_only=local, **more)
        except Exception as error:  # the loaders raise anything from OSError to TypeError
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]
            continue
        # Where there are no files, the library makes one that knows no words.
        if len(tokenizer) >= LEAST_WORDS:
            return tokenizer
    raise UserError(
        f"a single file holds no tokenizer, and {where} can't be loaded ({reason}); put "
        "its folder `tokenizer` beside it, or run `controlfill convert` with --tokenizer, the "
        "folder of a CLIP tokenizer or of any Stable Diffusion"
    )


def _check_words(tokenizer: CLIPTokenizer, most: int, told: str | None) -> None:
    if len(tokenizer) > most:
        raise UserError(
            f"the tokenizer {told or USUAL} has {len(tokenizer)} words, the text encoder {most}; "
            "put the folder `tokenizer` that it was trained with beside it, or run `controlfill "
            "convert` with that as --tokenizer"
        )
