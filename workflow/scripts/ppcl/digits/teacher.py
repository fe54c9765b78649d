"""Makes the embedded teacher: a stock QwenImagePipeline, all parts tiny, trained on handwriting.

Each part is trained by `loop.train` and saved by diffusers or transformers. The order matters:
tokenizer, then text encoder (its embeddings condition the transformer), autoencoder, transformer.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from ppcl.digits.captions import Caption, captions
from ppcl.digits.handwriting import COLORS, digits, paint, stroke
from ppcl.digits.recipe import AutoencoderRecipe, TextEncoderRecipe, TransformerRecipe

MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PREFIX_TOKENS = 34  # what the stock pipeline drops from the front of every encoded prompt


def make_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE trained on the template and the captions.

    The vocabulary is the largest at which the template's prefix takes exactly PREFIX_TOKENS tokens.
    Raises RuntimeError if there is none.
    """
    corpus = [TEMPLATE.replace("{}", "")] * 8 + [c.prompt for c in captions("train")]
    # `detailing` and other one-off words lose merges first as the vocabulary shrinks.
    for size in range(600, 256, -1):
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(
            corpus,
            trainers.BpeTrainer(
                vocab_size=size,
                special_tokens=MARKERS,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        count = len(bpe.encode(TEMPLATE.split("{}")[0]).ids)
        if count >= PREFIX_TOKENS:
            break
    model = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]  # its annotation knows no pairs
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=MARKERS[1:],
    )
    count = len(tokenizer(TEMPLATE.split("{}")[0]).input_ids)
    if count != PREFIX_TOKENS:
        raise RuntimeError(
            f"the prompt template's prefix takes {count} tokens, not {PREFIX_TOKENS}"
        )
    return tokenizer


def make_text_encoder(tokenizer: Qwen2Tokenizer, width: int, layers: int):
    """A Qwen2.5-VL of `layers` text layers and a vestigial vision tower, randomly initialised."""
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 16,
            "num_key_value_heads": width // 16,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 1e4,
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def make_vae(base_dim: int, z_dim: int) -> AutoencoderKLQwenImage:
    """An autoencoder of factor 4 (two downsamplings); latent statistics are set after training."""
    return AutoencoderKLQwenImage(
        base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
    )


def make_transformer(
    settings: TransformerRecipe, z_dim: int, text_width: int
) -> QwenImageTransformer2DModel:
    """The stock transformer with adaLN-zero: modulations and the output start at zero."""
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * z_dim,
        out_channels=z_dim,
        num_layers=settings.blocks,
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_dim,
        axes_dims_rope=settings.axes_dims_rope,
        joint_attention_dim=text_width,
    )
    for block in transformer.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            nn.init.zeros_(modulation.weight)
            nn.init.zeros_(modulation.bias)
    for linear in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


class CaptionReader(nn.Module):
    """The text encoder with heads that name what a caption states; only the encoder is kept."""

    def __init__(self, encoder: Qwen2_5_VLForConditionalGeneration, width: int):
        super().__init__()
        self.encoder = encoder
        sizes = (10, len(COLORS), len(COLORS))
        # The mean trains the states of all tokens; the last token's state trains attention to
        # gather what the others say.
        self.mean_heads = nn.ModuleList(nn.Linear(width, n) for n in sizes)
        self.last_heads = nn.ModuleList(nn.Linear(width, n) for n in sizes)

    def loss(self, ids: Tensor, facts: Tensor) -> Tensor:
        """Mean cross-entropy; ids [batch, tokens] of one length, facts [batch, 3] class indices."""
        states = self.encoder(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        states = states[:, PREFIX_TOKENS:]
        losses = [
            F.cross_entropy(head(pooled), facts[:, i])
            for heads, pooled in (
                (self.mean_heads, states.mean(1)),
                (self.last_heads, states[:, -1]),
            )
            for i, head in enumerate(heads)
        ]
        return torch.stack(losses).mean()


def caption_buckets(
    tokenizer: Qwen2Tokenizer, every: tuple[Caption, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Captions of equal token length together: (ids [n, tokens], facts [n, 3])."""
    encoded = sorted(
        (
            (
                tokenizer(TEMPLATE.format(c.prompt)).input_ids,
                (c.digit, COLORS.index(c.digit_color), COLORS.index(c.background_color)),
            )
            for c in every
        ),
        key=lambda pair: len(pair[0]),
    )
    return [
        (torch.tensor([ids for ids, _ in group]), torch.tensor([facts for _, facts in group]))
        for group in (list(g) for _, g in groupby(encoded, key=lambda pair: len(pair[0])))
    ]


def random_pictures(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Freshly drawn train digits: pictures [count, 3, 1, 32, 32] in -1..1 and facts [count, 3]."""
    images, labels = digits("train")
    pictures, facts = [], []
    for index in rng.integers(len(images), size=count):
        color, background = rng.choice(len(COLORS), 2, replace=False)
        pictures.append(paint(stroke(images[index], rng), COLORS[color], COLORS[background]))
        facts.append((labels[index], color, background))
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)[:, :, None]
    return stacked * 2 - 1, torch.tensor(facts)


def text_losses(
    reader: CaptionReader,
    buckets: list[tuple[Tensor, Tensor]],
    settings: TextEncoderRecipe,
    rank: int,
):
    """Step losses of the text encoder: it must name what the caption states."""
    sizes = np.array([len(ids) for ids, _ in buckets], dtype=float)

    def losses(step: int) -> Iterator[tuple[str, Tensor, dict]]:
        rng = np.random.default_rng((settings.seed, step, rank))
        ids, facts = buckets[rng.choice(len(buckets), p=sizes / sizes.sum())]
        rows = torch.from_numpy(rng.integers(len(ids), size=settings.batch_size))
        yield "text_encoder", reader.loss(ids[rows], facts[rows]), {}

    return losses


def vae_losses(vae: AutoencoderKLQwenImage, settings: AutoencoderRecipe, rank: int):
    """Step losses of the autoencoder: L1, a small KL, and noise on the latent.

    The noise teaches the decoder to forgive the small errors that a generated latent carries.
    """

    def losses(step: int) -> Iterator[tuple[str, Tensor, dict]]:
        rng = np.random.default_rng((settings.seed, step, rank))
        pictures, _ = random_pictures(settings.batch_size, rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        posterior = vae.encode(pictures).latent_dist
        latent = posterior.mean + posterior.std * torch.randn(
            posterior.mean.shape, generator=generator
        )
        latent = latent + settings.latent_noise * torch.randn(latent.shape, generator=generator)
        l1 = (vae.decode(latent).sample - pictures).abs().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        yield "vae", l1 + settings.kl_weight * divergence, {"l1": l1, "kl": divergence}

    return losses


@torch.no_grad()
def encode_captions(encoder, buckets) -> dict[tuple[int, int, int], list[Tensor]]:
    """Prompt embeddings [tokens, width] of every caption, listed by the facts it states."""
    embeddings: dict[tuple[int, int, int], list[Tensor]] = {}
    for ids, facts in buckets:
        for part, stated in zip(ids.split(256), facts.split(256), strict=True):
            states = encoder(input_ids=part, output_hidden_states=True).hidden_states[-1]
            for embedding, key in zip(states[:, PREFIX_TOKENS:], stated.tolist(), strict=True):
                embeddings.setdefault(tuple(key), []).append(embedding.clone())
    return embeddings


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKLQwenImage, count: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Latent means [count, z, height, width] of fresh pictures, and the facts they show."""
    latents, facts = [], []
    for part in range(0, count, 500):
        pictures, shown = random_pictures(min(500, count - part), rng)
        latents.append(vae.encode(pictures).latent_dist.mean[:, :, 0])
        facts.append(shown)
    return torch.cat(latents), torch.cat(facts)


def transformer_losses(
    transformer,
    packed: Tensor,
    facts: Tensor,
    embeddings: dict,
    empty: Tensor,
    settings: TransformerRecipe,
    rank: int,
):
    """Step losses of the transformer: the flow-matching velocity error (Lipman et al. 2023).

    Args:
        packed: clean tokens [n, tokens, channels], normalised as the stock pipeline expects.
        facts: [n, 3], what these pictures show.
        embeddings: as of `encode_captions`.
        empty: embedding [tokens, width] of the negative prompt, for classifier-free guidance.
    """
    seed, batch = settings.seed, settings.batch_size
    side = int(packed.shape[1] ** 0.5)
    by_length: dict[int, list[tuple[tuple, int]]] = {}
    for key, listed in embeddings.items():
        for index, embedding in enumerate(listed):
            by_length.setdefault(len(embedding), []).append((key, index))
    lengths = sorted(by_length)
    weights = np.array([len(by_length[n]) for n in lengths], dtype=float)
    pool: dict[tuple, np.ndarray] = {
        key: np.flatnonzero((facts == torch.tensor(key)).all(1).numpy()) for key in embeddings
    }

    def losses(step: int) -> Iterator[tuple[str, Tensor, dict]]:
        # One caption length a step: no padding, hence no mask, as in the stock pipeline.
        length = np.random.default_rng((seed, step)).choice(len(lengths), p=weights / weights.sum())
        rng = np.random.default_rng((seed, step, rank))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        choices = by_length[lengths[length]]
        drawn = [choices[i] for i in rng.integers(len(choices), size=batch)]
        clean = packed[[int(rng.choice(pool[key])) for key, _ in drawn]]
        sigma = torch.sigmoid(torch.randn(batch, generator=generator))
        uniform = torch.rand(batch, generator=generator)
        sigma = torch.where(torch.rand(batch, generator=generator) < 0.5, uniform, sigma)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        # The whole batch loses its caption at once: no padding, and one call of the transformer.
        if rng.random() < settings.caption_dropout:
            text = empty.expand(batch, -1, -1)
        else:
            text = torch.stack([embeddings[key][i] for key, i in drawn])
        velocity = transformer(
            hidden_states=noisy,
            timestep=sigma,
            encoder_hidden_states=text,
            img_shapes=[[(1, side, side)]] * batch,
            return_dict=False,
        )[0]
        error = (velocity - (noise - clean)).square().mean()
        yield "transformer", error, {}

    return losses


def pack(latents: Tensor) -> Tensor:
    """[n, z, h, w] latents to [n, h/2 * w/2, 4 z] tokens, by the stock pipeline's own function."""
    n, z, h, w = latents.shape
    return QwenImagePipeline._pack_latents(latents[:, :, None], n, z, h, w)
