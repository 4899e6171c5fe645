"""Captioners of three kinds, tiny and random: what they are asked, and what of it they answer."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from controlfill.cli_prepare import PREPARES
from controlfill.errors import UserError
from controlfill.images import save_image
from controlfill.models.captioner import load_captioner
from controlfill.reading import read_options

CPU = torch.device("cpu")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "<image>"]
WORDS = ["a", "keyboard", "skin", "of", "red", "blue", "green", "dark", "keys", "on", "ground"]
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
SEEN = {"image_size": 32, "patch_size": 16}
PICTURES = [np.full((40, 60, 3), value, np.uint8) for value in (0, 90, 255)]


def tokenizer(**more):
    """One token for each of the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    learner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=learner, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]", **more
    )


def image_processor():
    """Pictures at 32x32."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": 32, "width": 32}
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)


def save(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A folder with a BLIP that always says words, never that it has ended."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor

    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS))
    torch.manual_seed(0)
    config = BlipConfig(
        text_config={
            **SMALL, "vocab_size": len(SPECIAL + WORDS), "encoder_hidden_size": 16,
            "bos_token_id": 5, "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 3,
            "max_position_embeddings": 64, "projection_dim": 16, "initializer_range": 0.6,
        },
        vision_config={**SMALL, **SEEN, "initializer_range": 0.6}, projection_dim=16,
    )  # fmt: skip
    model = BlipForConditionalGeneration(config)
    model.text_decoder.cls.predictions.bias.data[: len(SPECIAL)] = -99
    words = BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]")
    return save(folder, model, BlipProcessor(image_processor(), words))


def test_blip_goes_on_from_its_prompt(blip):
    bare, prompted = (
        load_captioner(blip, CPU, prompt, max_new_tokens=4) for prompt in ("", "A keyboard skin of")
    )
    answers = bare(PICTURES), prompted(PICTURES)
    for found in answers:
        assert [len(text.split()) for text in found] == [4, 4, 4]
        assert all(set(text.split()) <= set(WORDS) for text in found)
        assert len(set(found)) > 1  # it looks at the pictures
    assert answers[0] != answers[1]
    assert prompted.without_prompt("a keyboard skin of red keys") == "red keys"


def test_batches_answer_as_single_pictures_do(blip):
    captioner = load_captioner(blip, CPU, "a keyboard", max_new_tokens=6)
    assert captioner(PICTURES) == [captioner([picture])[0] for picture in PICTURES]


def test_the_command_writes_what_the_model_says(blip, tmp_path, capsys):
    for number, picture in enumerate(PICTURES):
        save_image(tmp_path / f"{number}.png", picture)
    rows = [{"image": f"{number}.png", "text": ""} for number in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cls, run = PREPARES["prepare captions"]
    words = [str(tmp_path), "--model", blip, "--max_new_tokens", "3", "--device", "cpu"]
    run(read_options(cls, "prepare captions", [*words, "--batch_size", "2"]))
    assert capsys.readouterr().out == f"wrote 3 captions in {tmp_path}\n"
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    expected = load_captioner(blip, CPU, "a keyboard skin of", max_new_tokens=3)(PICTURES)
    assert [json.loads(line)["text"] for line in lines] == [
        f"a keyboard skin of {words},iflyskin" for words in expected
    ]


def test_models_that_take_no_words_see_the_picture_alone(tmp_path):
    from transformers import GitConfig, GitForCausalLM, GitProcessor

    torch.manual_seed(0)
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    model = GitForCausalLM(
        GitConfig(vision_config={**SMALL, **SEEN}, **SMALL, **ends, vocab_size=len(SPECIAL + WORDS))
    )
    words = tokenizer(bos_token="[CLS]", cls_token="[CLS]", sep_token="[SEP]")
    folder = save(tmp_path, model, GitProcessor(image_processor(), words))
    bare, prompted = (load_captioner(folder, CPU, prompt, 4) for prompt in ("", "a keyboard"))
    assert len(bare(PICTURES)) == 3
    assert prompted(PICTURES) == bare(PICTURES)


def test_models_without_a_processor_are_put_together(tmp_path):
    from transformers import (
        GPT2Config,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
    )

    torch.manual_seed(0)
    sees = ViTConfig(**SMALL, **SEEN)
    says = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=len(SPECIAL + WORDS), bos_token_id=2,
        eos_token_id=3, add_cross_attention=True, is_decoder=True,
    )  # fmt: skip
    both = VisionEncoderDecoderConfig.from_encoder_decoder_configs(sees, says)
    model = VisionEncoderDecoderModel(both)
    model.generation_config.decoder_start_token_id = 2
    model.generation_config.pad_token_id = 0
    folder = save(tmp_path, model, image_processor(), tokenizer(bos_token="[CLS]"))
    answers = load_captioner(folder, CPU, "a keyboard", 5)(PICTURES)
    assert all(len(answer.split()) <= 5 for answer in answers)
    assert any(answers)


TALK = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def test_models_that_talk_are_asked_and_only_answer(tmp_path):
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    text = LlamaConfig(
        **SMALL, vocab_size=len(SPECIAL + WORDS), bos_token_id=2, eos_token_id=3, pad_token_id=0,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    vision = CLIPVisionConfig(**SMALL, **SEEN)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=6, vision_feature_layer=-1
        )
    )
    model.lm_head.weight.data[: len(SPECIAL)] = 0
    model.lm_head.weight.data[len(SPECIAL) :] *= 30
    words = tokenizer(additional_special_tokens=["<image>"])
    processor = LlavaProcessor(
        image_processor(), words, patch_size=16, vision_feature_select_strategy="default",
        chat_template=TALK, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    captioner = load_captioner(save(tmp_path, model, processor), CPU, "a keyboard skin", 5)
    asked = captioner.asked([Image.fromarray(picture) for picture in PICTURES])
    spoken = captioner.processor.batch_decode(asked["input_ids"])
    assert all(text.endswith("a keyboard skin") for text in spoken)
    answers = captioner(PICTURES)
    assert all(len(answer.split()) <= 5 for answer in answers)
    assert any(answers)


def test_the_command_refuses_a_device_that_is_not_there(blip, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    save_image(tmp_path / "0.png", PICTURES[0])
    cls, run = PREPARES["prepare captions"]
    options = cls(data=tmp_path, model=blip, device="cuda")
    with pytest.raises(UserError, match="--device cuda, but no CUDA device is there"):
        run(options)


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "a/b/c"])
def test_what_is_no_captioner_is_said(name):
    with pytest.raises(UserError, match="is no folder; give one, `template`, or a hub id"):
        load_captioner(name, CPU)


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="could not be loaded: ") as caught:
        load_captioner(str(tmp_path), CPU)
    assert "\n" not in str(caught.value)
