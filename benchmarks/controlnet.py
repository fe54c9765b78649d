"""A ControlNet of the embedded teacher on its pruned variants: how much of its effect is left.

    snakemake --cores all --configfile config/digits-depth.yaml
    .venv/bin/python benchmarks/controlnet.py --models b20 b16 b12 --controlnet results/sketch

The ControlNet, of 6 layers, is trained to follow a sketch (the digit in white on black), by flow
matching on pictures of the teacher's recipe; if its folder is there, it is used as it is. Measured
on 48 pictures of held-out digits and captions at six noise levels: the cosine of what it changes in
the variant's velocities with what it changes in the teacher's, and the variant's error. What a
block gets that stands for several of the teacher's:

    as it is   what diffusers gives it: samples by the variant's own count of blocks
    first      the sample of the first of them
    last       of the last
    mean       the mean of theirs
    sum        the sum of theirs (remap_controlnet.py)

Prints a table in Markdown; --output keeps it as parquet.
"""

# ruff: noqa: E402 (paths are searched when libraries are imported)

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow" / "scripts")]

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline, QwenImageControlNetModel
from torch import Tensor, nn

from benchmarks.lora import cosine, load
from ppcl.digits import teacher as making
from ppcl.digits.captions import captions
from ppcl.digits.handwriting import COLORS, digits, paint, stroke

LAYERS = 6
BATCH = 16
RATE = 1e-3
LEVELS = (0.95, 0.8, 0.6, 0.4, 0.2, 0.1)
PICTURES = 48
WAYS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "first": lambda samples: samples[0],
    "last": lambda samples: samples[-1],
    "mean": lambda samples: sum(samples[1:], samples[0]) / len(samples),
    "sum": lambda samples: sum(samples[1:], samples[0]),
}


@torch.no_grad()
def latents(pipe: DiffusionPipeline, pictures: list[np.ndarray]) -> Tensor:
    """Packed latents [n, tokens, channels] of pictures [height, width, 3] in [0, 1]."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)[:, :, None] * 2 - 1
    config = pipe.vae.config
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.latents_mean, config.latents_std))
    made = [pipe.vae.encode(part).latent_dist.mean[:, :, 0] for part in pixels.float().split(250)]
    return making.pack((torch.cat(made) - mean) / std)


def drawn(strokes: list[np.ndarray], inks: list[tuple[str, str]]) -> list[np.ndarray]:
    return [paint(s, ink, paper) for s, (ink, paper) in zip(strokes, inks, strict=True)]


def sketches(strokes: list[np.ndarray]) -> list[np.ndarray]:
    return [np.repeat(s[..., None], 3, 2).astype(np.float32) for s in strokes]


def arguments(clean: Tensor, noise: Tensor, levels: Tensor, text: Tensor) -> dict:
    """Arguments of one call of the transformer, and of the ControlNet."""
    side, count = int(clean.shape[1] ** 0.5), len(clean)
    return {
        "hidden_states": torch.lerp(clean, noise, levels[:, None, None]),
        "timestep": levels,
        "encoder_hidden_states": text,
        "img_shapes": [[(1, side, side)]] * count,
        "return_dict": False,
    }


def train(pipe: DiffusionPipeline, steps: int, pictures: int) -> QwenImageControlNetModel:
    """A ControlNet of the teacher, trained to follow sketches."""
    torch.manual_seed(0)
    config, teacher = pipe.transformer.config, pipe.transformer
    rng, (images, labels) = np.random.default_rng(7), digits("train")
    which = rng.integers(len(images), size=pictures)
    colors = [rng.choice(len(COLORS), 2, replace=False) for _ in which]
    strokes = [stroke(images[i], rng) for i in which]
    clean = latents(pipe, drawn(strokes, [(COLORS[a], COLORS[b]) for a, b in colors]))
    control = latents(pipe, sketches(strokes))
    buckets = making.caption_buckets(pipe.tokenizer, captions("train"))
    embeddings = making.encode_captions(pipe.text_encoder, buckets)
    by_length: dict[int, list[tuple[int, Tensor]]] = {}  # a batch has texts of one length
    for number, (i, (ink, paper)) in enumerate(zip(which, colors, strict=True)):
        for text in embeddings.get((int(labels[i]), int(ink), int(paper)), []):
            by_length.setdefault(len(text), []).append((number, text))
    lengths = sorted(by_length)
    share = np.array([len(by_length[n]) for n in lengths], dtype=float)
    made = QwenImageControlNetModel.from_transformer(
        teacher,
        num_layers=LAYERS,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
    )
    made.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(made.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 2))
    for step in range(steps):
        choices = by_length[lengths[rng.choice(len(lengths), p=share / share.sum())]]
        batch = [choices[i] for i in rng.integers(len(choices), size=BATCH)]
        rows, text = [number for number, _ in batch], torch.stack([text for _, text in batch])
        noise = torch.randn(clean[rows].shape)
        given = arguments(clean[rows], noise, torch.rand(BATCH), text)
        samples = made(controlnet_cond=control[rows], **given)
        velocity = teacher(controlnet_block_samples=samples, **given)[0]
        loss = (velocity - (noise - clean[rows])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.4f}", flush=True)
    return made.eval().requires_grad_(False)


@torch.no_grad()
def heldout(pipe: DiffusionPipeline) -> tuple[dict, Tensor, Tensor]:
    """Arguments of a call on held-out pictures; their sketches' latents; the right velocity."""
    rng, (images, labels) = np.random.default_rng(11), digits("test")
    by_length: dict[int, list] = {}
    for caption in captions("evaluation"):
        ids = pipe.tokenizer(making.TEMPLATE.format(caption.prompt)).input_ids
        by_length.setdefault(len(ids), []).append((caption, ids))
    group = max(by_length.values(), key=len)
    chosen = [group[i] for i in rng.integers(len(group), size=PICTURES)]
    ids = torch.tensor([ids for _, ids in chosen])
    states = pipe.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states
    strokes = [
        stroke(images[rng.choice(np.flatnonzero(labels == c.digit))], rng) for c, _ in chosen
    ]
    inks = [(c.digit_color, c.background_color) for c, _ in chosen]
    clean, control = latents(pipe, drawn(strokes, inks)), latents(pipe, sketches(strokes))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    levels = torch.tensor(LEVELS * (PICTURES // len(LEVELS)))
    given = arguments(clean, noise, levels, states[-1][:, making.PREFIX_TOKENS :])
    return given, control, noise - clean


@torch.no_grad()
def measure(asked: argparse.Namespace) -> pd.DataFrame:
    """Rows: model, way, cosine, error. Of the teacher alone, the cosine is 1."""
    pipe = load(asked.teacher)
    if not asked.controlnet.exists():
        with torch.enable_grad():
            train(pipe, asked.steps, asked.pictures).save_pretrained(asked.controlnet)
    control_net = QwenImageControlNetModel.from_pretrained(asked.controlnet)
    given, control, right = heldout(pipe)
    samples = control_net(controlnet_cond=control, **given)
    count = len(pipe.transformer.transformer_blocks)
    each = [samples[i // -(-count // len(samples))] for i in range(count)]
    rows: list[dict] = []

    def change(model: nn.Module, added: list[Tensor]) -> Tensor:
        bare, velocity = model(**given)[0], model(controlnet_block_samples=added, **given)[0]
        errors = [float((v - right).square().mean()) for v in (bare, velocity)]
        rows.append(dict(zip(("error_without", "error"), errors, strict=True)))
        return (velocity - bare).flatten()

    wanted = change(pipe.transformer, samples)
    rows[-1] |= {"model": "teacher", "way": "as it is", "cosine": 1.0}
    for name in asked.models:
        model = load(asked.run / "models" / name).transformer
        folder = asked.run / "models" / name / "transformer"
        block_map = json.loads((folder / "block_map.json").read_text(encoding="utf-8"))
        ways = {"as it is": samples}
        ways |= {
            way: [of([each[i] for i in members]) for members in block_map]
            for way, of in WAYS.items()
        }
        for way, added in ways.items():
            changed = change(model, added)
            rows[-1] |= {"model": name, "way": way, "cosine": cosine(changed, wanted)}
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> str:
    """The rows as Markdown."""
    lines = ["| model | way | cosine | error | error without |", "|---|---|---|---|---|"]
    for row in rows.to_dict("records"):
        told = f"{row['cosine']:.3f} | {row['error']:.4f} | {row['error_without']:.4f}"
        lines.append(f"| {row['model']} | {row['way']} | {told} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("results/digits-depth"))
    parser.add_argument("--models", nargs="+", default=["b20", "b16", "b12"])
    parser.add_argument("--teacher", type=Path, default=Path("resources/digits"))
    parser.add_argument(
        "--controlnet", type=Path, required=True, help="its folder; trained if it is not there"
    )
    parser.add_argument("--steps", type=int, default=1600, help="of the training")
    parser.add_argument("--pictures", type=int, default=6000, help="trained on")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    rows = measure(asked)
    print(table(rows))
    if asked.output:
        rows.to_parquet(asked.output)


if __name__ == "__main__":
    main()
