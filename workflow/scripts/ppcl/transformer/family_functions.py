"""Functions that entries of the registry name: masks of real tokens, the text around a prompt, the
samples of ControlNets, and the arguments that a stock pipeline gives its transformer. They import
no torch and use only methods of the tensors that they get.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

from ppcl.transformer.family import Mask, NewTensor, Size

# ---- masks


def marked(argument: str) -> Mask:
    """The mask that the transformer gets itself, as this argument."""
    return lambda arguments, tokens: arguments.get(argument)


def _first(counts, tokens: int):
    """Mask [batch, tokens] of the first counts[i] tokens of each sample."""
    places = counts.new_ones(tokens).cumsum(0) - 1
    return places[None] < counts[:, None]


def lumina_mask(arguments: dict, tokens: int):
    # Each sample: its text without padding, then its image, then padding.
    text = arguments["encoder_attention_mask"].bool().sum(1)
    return _first(text + tokens - text.max(), tokens)


def hunyuan_image_mask(arguments: dict, tokens: int):
    # Real tokens of both encoders come first, then the padding of both.
    mask = arguments.get("encoder_attention_mask")
    second = arguments.get("encoder_attention_mask_2")
    if mask is None or second is None:
        return mask
    return _first(mask.bool().sum(1) + second.bool().sum(1), tokens)


def z_image_mask(arguments: dict, tokens: int):
    # Each sample: its image and its text, each filled up to a multiple of 32 with tokens that count
    # as real, then padding.
    texts = [-(-len(text) // 32) * 32 for text in arguments["cap_feats"]]
    counts = arguments["t"].double().new_tensor(texts).long()  # bfloat16 can't hold them
    return _first(counts + tokens - counts.max(), tokens)


def hidream_mask(arguments: dict, tokens: int):
    # The last tokens are a layer of the text encoder. Every block gets its own, so they are no part
    # of the stream.
    states = arguments["encoder_hidden_states_llama3"]
    nothing = states[0, :, 0, 0].bool().long() * 0  # bfloat16 can't hold the counts
    return _first(nothing + tokens - states.shape[2], tokens)


# ---- prompts


def instructed(pipe, settings, tokenizer, prompt: str) -> tuple[str, int]:
    return f"{settings.get('system_prompt') or pipe.system_prompt} <Prompt Start> {prompt}", 0


def spoken(pipe, settings, tokenizer, prompt: str) -> tuple[str, int]:
    spoken: list[dict] = [{"role": "user", "content": prompt}]
    instructed = hasattr(pipe, "system_message")
    if instructed:  # in the form that processors want
        said = [("system", pipe.system_message), ("user", prompt)]
        spoken = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in said]
    whole = tokenizer.apply_chat_template(spoken, tokenize=False)
    before, _, _ = whole.rpartition(prompt)
    # With a system message, the template itself begins the text with a special token; the one that
    # the tokenizer adds when tokens are counted (`prompt_tokens.count`) comes on top.
    return before + prompt, int(instructed)


def filled(pipe, settings, tokenizer, prompt: str) -> tuple[str, int]:
    if type(pipe).__name__.startswith("QwenImageEdit"):
        return "", 0  # it reads prompt and picture together, however long they are
    before = pipe.prompt_template_encode.partition("{}")[0]
    return before + prompt, pipe.prompt_template_encode_start_idx


def lettered(pipe, prompt: str) -> int:
    # One guider serves a whole batch, and which one depends on whether any prompt of the batch has
    # words in quotes.
    for base in type(pipe).__mro__:
        if quoted := getattr(sys.modules[base.__module__], "extract_glyph_text", None):
            return int(quoted(prompt) is not None)
    return 0


# ---- samples of ControlNets: as `Stride`


def strided(block: int, blocks: int, samples: int, config: Mapping) -> int:
    return block // math.ceil(blocks / samples)


def repeated(block: int, blocks: int, samples: int, config: Mapping) -> int:
    # Pipelines repeat the samples of a ControlNet that encodes its picture itself (of XLabs).
    if config.get("conditioning_embedding_channels") is not None:
        return block % samples
    return strided(block, blocks, samples, config)


def stretched(block: int, blocks: int, samples: int, config: Mapping) -> int:
    return int(block / (blocks / samples))


def after_first(block: int, blocks: int, samples: int, config: Mapping) -> int | None:
    return block - 1 if 0 < block <= samples else None


def listed(block: int, blocks: int, samples: int, config: Mapping) -> int | None:
    return block if block in config["control_layers_places"] else None


# ---- calls: (config, size, batch, tensor) -> arguments, as `Pipeline.arguments`


def qwen_image(config: Mapping, size: Size, batch: int, tensor: NewTensor) -> dict[str, Any]:
    """Pictures as patches of 2 x 2 latents."""
    high, wide = (side // (2 * size.scale) for side in (size.height, size.width))
    return {
        "hidden_states": tensor(batch, high * wide, config["in_channels"]),
        "encoder_hidden_states": tensor(batch, size.text_tokens, config["joint_attention_dim"]),
        "timestep": tensor(batch),
        "img_shapes": [[(1, high, wide)]] * batch,
        "return_dict": False,
    }


def flux(config: Mapping, size: Size, batch: int, tensor: NewTensor) -> dict[str, Any]:
    """Pictures as patches of 2 x 2 latents, with ids of places that the batch shares."""
    tokens = (size.height // (2 * size.scale)) * (size.width // (2 * size.scale))
    arguments = {
        "hidden_states": tensor(batch, tokens, config["in_channels"]),
        "encoder_hidden_states": tensor(batch, size.text_tokens, config["joint_attention_dim"]),
        "pooled_projections": tensor(batch, config["pooled_projection_dim"]),
        "timestep": tensor(batch),
        "img_ids": tensor(tokens, 3),
        "txt_ids": tensor(size.text_tokens, 3),
        "return_dict": False,
    }
    if config["guidance_embeds"]:
        arguments["guidance"] = tensor(batch, dtype="float32")
    return arguments


def sd3(config: Mapping, size: Size, batch: int, tensor: NewTensor) -> dict[str, Any]:
    """Latents as they are; text of CLIP (77 tokens) and T5, one after the other."""
    high, wide = size.height // size.scale, size.width // size.scale
    text_tokens = 77 + size.text_tokens
    return {
        "hidden_states": tensor(batch, config["in_channels"], high, wide),
        "encoder_hidden_states": tensor(batch, text_tokens, config["joint_attention_dim"]),
        "pooled_projections": tensor(batch, config["pooled_projection_dim"]),
        "timestep": tensor(batch),
        "return_dict": False,
    }


def wan(config: Mapping, size: Size, batch: int, tensor: NewTensor) -> dict[str, Any]:
    """Latents as they are, a frame for the first and for every four further ones."""
    frames = (size.frames - 1) // 4 + 1
    high, wide = size.height // size.scale, size.width // size.scale
    return {
        "hidden_states": tensor(batch, config["in_channels"], frames, high, wide),
        "timestep": tensor(batch, dtype="int64"),
        "encoder_hidden_states": tensor(batch, size.text_tokens, config["text_dim"]),
        "return_dict": False,
    }
