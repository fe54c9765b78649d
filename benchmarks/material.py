"""What is measured on: a stock transformer with random weights, calls as if recorded, sizes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ppcl.digits import teacher
from ppcl.digits.recipe import TransformerRecipe
from ppcl.transformer import call_tables

Z_DIM, TEXT_WIDTH = 4, 64


@dataclass(frozen=True)
class Size:
    """How large a benchmark is.

    Attributes:
        side: image tokens are side x side. text_tokens: per sample; some are padding.
        rows: recorded samples, half of them held out. batch: samples of a call.
        most_rows: of the long extraction, whose memory is compared with that of 16.
        cka_width, cka_tokens, cka_depth: similarity's channels, held-out tokens, and blocks that
            are measured, and half of them (of `CKA_BLOCKS`, to which times are extrapolated).
    """

    width: int
    blocks: int
    side: int
    text_tokens: int
    rows: int
    batch: int
    most_rows: int
    cka_width: int
    cka_tokens: int
    cka_depth: int
    repeats: int


CKA_BLOCKS = 60
SIZES = {
    "tiny": Size(64, 6, 4, 5, 8, 2, 12, 16, 60, 4, 1),
    "small": Size(256, 8, 16, 32, 16, 4, 256, 128, 1280, 12, 5),
    "medium": Size(512, 12, 16, 32, 16, 4, 256, 512, 5120, 8, 3),
}


def transformer(size: Size, blocks: int | None = None):
    """A stock QwenImageTransformer2DModel, float32, every weight random."""
    torch.manual_seed(0)
    shape = {
        "blocks": blocks or size.blocks,
        "heads": size.width // 32,
        "head_dim": 32,
        "axes_dims_rope": [8, 12, 12],
    }
    made = teacher.make_transformer(TransformerRecipe.of(shape), Z_DIM, TEXT_WIDTH)
    with torch.no_grad():
        for parameter in made.parameters():  # zero modulations would make blocks identities
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return made.requires_grad_(False).eval()


def arguments(size: Size, batch: int, seed: int = 0) -> dict:
    """One call of `transformer`; every other sample's text is padded by a fifth."""
    generator = torch.Generator().manual_seed(seed)
    tokens = size.side**2
    length = torch.tensor(
        [size.text_tokens - (i % 2) * (size.text_tokens // 5) for i in range(batch)]
    )
    mask = torch.arange(size.text_tokens)[None] < length[:, None]
    text = torch.randn(batch, size.text_tokens, TEXT_WIDTH, generator=generator)
    return {
        "hidden_states": torch.randn(batch, tokens, 4 * Z_DIM, generator=generator),
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": mask.long(),
        "timestep": torch.rand(batch, generator=generator),
        "img_shapes": [[(1, size.side, size.side)]] * batch,
        "return_dict": False,
    }


def record(path: Path, size: Size, rows: int) -> Path:
    """Writes calls as if recorded, `size.batch` in a row group, every other group held out.

    The answers are noise: nothing that is measured here reads them but the naive loop's peer.
    """
    found = []
    for number, start in enumerate(range(0, rows, size.batch)):
        batch = min(size.batch, rows - start)
        given = arguments(size, batch, seed=number)
        answer = torch.randn(given["hidden_states"].shape)
        names = list(range(start, start + batch))
        where = {"sample": names, "prompt_index": names, "prompt": [f"p{i}" for i in names]}
        same = {"seed": 0, "kind": "pipeline", "step": 0, "branch": 0}
        same |= {"timestep": 1.0, "sigma": 0.5, "heldout": number % 2 == 1}
        where |= {name: [value] * batch for name, value in same.items()}
        found += call_tables.to_tables(given, answer, where)
    call_tables.write(path, [table.schema for table in found], found, {})
    return path


def tokens(size: Size, seed: int, depth: int) -> list[np.ndarray]:
    """Tokens [n, d] at `depth` + 1 boundaries of a stream that each block changes a little."""
    rng = np.random.default_rng(seed)
    shape = size.cka_tokens, size.cka_width
    scale = np.exp(rng.normal(0, 1, shape[1]))  # channels of unlike variance, as in real models
    found = [rng.normal(size=shape) * scale]
    for _ in range(depth):
        found.append(found[-1] + 0.3 * scale * rng.normal(size=shape))
    return found
