"""A tiny vision-language model with its processor, and rows with pictures."""

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from helpers import toy

# Pixels of an image, and of one of its patches.
IMAGE, PATCH = 16, 8
TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    set_seed(0)
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=IMAGE, patch_size=PATCH, projection_dim=32),
        text_config=LlamaConfig(
            **sizes, vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, eos_token_id=2
        ),
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
        chat_template=TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


def picture_rows(count: int, word: str = "film") -> Dataset:
    """Chats about one picture each."""
    turn = {"role": Value("string"), "content": Value("string")}
    chats = [
        [{"role": "user", "content": f"the {word} was"}, {"role": "assistant", "content": "good" if i % 2 else "bad"}]
        for i in range(count)
    ]
    pictures = [[Picture.new("RGB", (IMAGE, IMAGE), (20 * i, 9, 9))] for i in range(count)]
    features = Features({"messages": List(turn), "images": List(Image())})
    return Dataset.from_dict({"messages": chats, "images": pictures}, features=features)
