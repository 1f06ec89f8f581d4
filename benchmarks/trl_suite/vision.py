"""Local stand-ins for the vision-language models whose processors need no more than Pillow."""

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from .tokenizers import Vocabulary, make_tokenizer

# Pixels of an image, and of one of its patches.
IMAGE, PATCH = 16, 8
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE,
}
LLAVA = Vocabulary("llava_next", eos="</s>", pad="<pad>", bos="<s>", more=("<image>",))
GEMMA3 = Vocabulary(
    "gemma3",
    eos="<end_of_turn>",
    pad="<pad>",
    bos="<bos>",
    more=("<start_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
PINPOINTS = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE]]
# Models of which none is made, and why. Their processors hold one for videos.
WITHOUT = {
    f"trl-internal-testing/tiny-{name}": "its processor needs torchvision"
    for name in (
        "Gemma4ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration-NoThink",
        "Qwen3_5MoeForConditionalGeneration-3.6",
    )
}


def write_llava(path: Path) -> None:
    tokenizer = make_tokenizer(LLAVA)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, patch_size=PATCH, projection_dim=32),
        text_config=LlamaConfig(**TEXT, **_tokens(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE // PATCH) ** 2,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}, do_convert_rgb=True
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    _write(LlavaForConditionalGeneration, config, processor, path)


def write_llava_next(path: Path) -> None:
    tokenizer = make_tokenizer(LLAVA)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, patch_size=PATCH, projection_dim=32),
        text_config=LlamaConfig(**TEXT, **_tokens(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(IMAGE // PATCH) ** 2,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE},
        crop_size={"height": IMAGE, "width": IMAGE},
        image_grid_pinpoints=PINPOINTS,
        do_convert_rgb=True,
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    _write(LlavaNextForConditionalGeneration, config, processor, path)


def write_gemma3(path: Path) -> None:
    tokenizer = make_tokenizer(
        GEMMA3,
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    image_tokens = 4
    config = Gemma3Config(
        text_config=Gemma3TextConfig(
            **TEXT, **_tokens(tokenizer), head_dim=16, layer_types=["sliding_attention", "full_attention"]
        ),
        vision_config=SiglipVisionConfig(**VISION, patch_size=PATCH // 2, vision_use_head=False),
        mm_tokens_per_image=image_tokens,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    images = Gemma3ImageProcessorPil(size={"height": IMAGE, "width": IMAGE}, do_convert_rgb=True)
    processor = Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=image_tokens)
    _write(Gemma3ForConditionalGeneration, config, processor, path)


MODELS = {
    "tiny-Gemma3ForConditionalGeneration": write_gemma3,
    "tiny-LlavaForConditionalGeneration": write_llava,
    "tiny-LlavaNextForConditionalGeneration": write_llava_next,
}


def _tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _write(architecture: type, config, processor, path: Path) -> None:
    torch.manual_seed(0)
    architecture(config).save_pretrained(path)
    processor.save_pretrained(path)
