"""Tiny tokenizers, text encoders and autoencoders that the specimens share, made of stock classes.

The vocabularies know the words of `WORDS`, of every line given, and single characters: no network,
no sentencepiece. All models are float32, seeded, and frozen.
"""

import functools
import json

import torch
from diffusers import AutoencoderKL
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from ppcl.digits import teacher

WIDTH = 32  # of every text encoder, unless told otherwise
WORDS = (
    "a an the one two three four five six seven eight nine zero 0 1 2 3 4 5 6 7 8 9 red green blue "
    "yellow white black purple orange digit number photo picture cat dog in on of and with"
)
LETTERS = [chr(code) for code in range(33, 127)]
MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def freeze(model: nn.Module, moved: float = 0.0, seed: int = 0) -> nn.Module:
    """The model in evaluation mode without gradients; every parameter moved by `moved` * normal.

    Zero-initialised gates and modulations would make blocks identities: a transformer is moved.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if moved else ():
            parameter.add_(moved * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()


def seeded(kind: type, config, seed: int = 0) -> nn.Module:
    """A frozen transformers model of `config` with random weights."""
    torch.manual_seed(seed)
    return freeze(kind(config), seed=seed)


@functools.cache
def _bpe(markers: tuple[str, ...], lines: tuple[str, ...], gemma: bool = False):
    """Vocabulary and merges that make one token of every word of `lines` and `WORDS`.

    Args:
        markers: special tokens, the first of the vocabulary.
        gemma: words start with U+2581 and characters are themselves, instead of GPT-2's bytes.
    """
    bpe = Tokenizer(models.BPE())
    if gemma:
        bpe.normalizer = normalizers.Replace(" ", "▁")
        bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        alphabet = [*LETTERS, "▁", "\n"]
    else:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,  # more than there are words: training ends with every word one token
        special_tokens=list(markers),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS, " " + WORDS, *lines], trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return bpe.get_vocab(), [tuple(pair) for pair in merges]


def clip_tokenizer(length: int = 16) -> CLIPTokenizer:
    """CLIP's tokenizer; prompts are cut and padded to `length` tokens.

    Its words are added tokens: training numbers those that end in </w> differently every time.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    tokenizer = CLIPTokenizer(
        {token: number for number, token in enumerate(known)}, [], model_max_length=length
    )
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in WORDS.split()])
    return tokenizer


def clip(
    tokenizer: CLIPTokenizer, projection: bool = False, width: int = WIDTH, seed: int = 0
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """CLIP's text encoder; the one with a projection keeps the width."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return seeded(CLIPTextModelWithProjection if projection else CLIPTextModel, config, seed)


def t5_tokenizer(length: int = 16) -> T5Tokenizer:
    """T5's tokenizer (in transformers 5 the fast one has this name); also UMT5 loads it."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -1.0) for word in WORDS.split()]
    letters = [(letter, -9.0) for letter in ["▁", *LETTERS]]
    known = special + words + letters
    return T5Tokenizer(vocab=known, extra_ids=0, model_max_length=length)


def t5(
    tokenizer: T5Tokenizer | ByT5Tokenizer, width: int = WIDTH, umt5: bool = False, seed: int = 0
) -> T5EncoderModel | UMT5EncoderModel:
    """The encoder half of T5, or of UMT5."""
    config = (UMT5Config if umt5 else T5Config)(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return seeded(UMT5EncoderModel if umt5 else T5EncoderModel, config, seed)


def qwen_tokenizer(*lines: str, markers: tuple[str, ...] = (), **named: str) -> Qwen2Tokenizer:
    """The tokenizer of Qwen 2 and 3 with a chat template; pads on the right.

    Args:
        lines: texts whose words shall be single tokens, such as a pipeline's prompt template.
        markers: further special tokens.
        named: special tokens that are attributes too, such as image_token="<|image_pad|>".
    """
    every = (*MARKERS, *markers, *named.values())
    vocabulary, merges = _bpe(every, lines)
    return Qwen2Tokenizer(
        vocabulary,
        merges,
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(every[1:]),
        extra_special_tokens=named,
        chat_template=CHAT_TEMPLATE,
    )


def qwen_vl(
    tokenizer: Qwen2Tokenizer, width: int = WIDTH, layers: int = 1, seed: int = 0, **more
) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL; a pipeline that reads pictures gives the ids of their tokens as `more`."""
    torch.manual_seed(seed)
    model = teacher.make_text_encoder(tokenizer, width, layers)
    for name, value in more.items():
        setattr(model.config, name, value)
    return freeze(model, seed=seed)


def _language_config(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> dict:
    """What the configurations of all decoder-only language models have in common."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen3(
    tokenizer: Qwen2Tokenizer, width: int = WIDTH, layers: int = 2, head: bool = True, seed: int = 0
) -> Qwen3ForCausalLM | Qwen3Model:
    """Qwen 3, with its language head or without."""
    config = Qwen3Config(**_language_config(tokenizer, width, layers))
    return seeded(Qwen3ForCausalLM if head else Qwen3Model, config, seed)


def llama_tokenizer(*lines: str, markers: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Llama 3's kind of tokenizer: byte-level BPE that starts every text with a marker."""
    every = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", *markers)
    vocabulary, merges = _bpe(every, lines)
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{every[0]} $A", special_tokens=[(every[0], vocabulary[every[0]])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=every[0],
        eos_token=every[1],
        pad_token=every[2],
        additional_special_tokens=list(markers),
        chat_template=CHAT_TEMPLATE,
    )


def llama(
    tokenizer: PreTrainedTokenizerFast,
    width: int = WIDTH,
    layers: int = 2,
    head: bool = True,
    seed: int = 0,
) -> LlamaForCausalLM | LlamaModel:
    """Llama, with its language head or without."""
    config = LlamaConfig(**_language_config(tokenizer, width, layers))
    return seeded(LlamaForCausalLM if head else LlamaModel, config, seed)


def gemma_tokenizer(*lines: str) -> GemmaTokenizer:
    """Gemma's tokenizer; `lines` as in `qwen_tokenizer`."""
    vocabulary, merges = _bpe(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), lines, gemma=True)
    return GemmaTokenizer(vocabulary, merges, add_bos_token=True)


def gemma(
    tokenizer: GemmaTokenizer, width: int = WIDTH, layers: int = 2, seed: int = 0
) -> Gemma2Model:
    """Gemma 2 without its language head."""
    common = _language_config(tokenizer, width, layers)
    return seeded(Gemma2Model, Gemma2Config(**common, query_pre_attn_scalar=width // 2), seed)


def vae(channels: int = 4, levels: int = 2, seed: int = 0, **more) -> AutoencoderKL:
    """An autoencoder that makes pictures 2 ** (levels - 1) times smaller, without quant layers.

    It has no attention either: a linear layer of width 8 rounds its last bit differently where
    weights lie elsewhere in memory, so a reloaded pipeline would not give bitwise the same picture.
    """
    torch.manual_seed(seed)
    made = AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        **more,
    )
    return freeze(made, seed=seed)
