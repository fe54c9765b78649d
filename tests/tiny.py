"""A tiny QwenImagePipeline folder with random weights, and recorded calls of it: wiring only."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

from ppcl import calls, pipelines, recording, teacher

SETTINGS = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 3,
    "true_cfg_scale": 2.0,
    "negative_prompt": " ",
}
CALIBRATION = ["a red 1 on blue", "a blue 2 on red", "a green two on red", "4 in red"]
Z_DIM, TEXT_WIDTH = 4, 32


def source(folder: Path) -> dict:
    """The config's `teacher` mapping for a folder."""
    return {
        "path": str(folder),
        "revision": None,
        "variant": None,
        "dtype": "float32",
        "trust_remote_code": False,
    }


def pipeline(folder: Path, blocks: int = 3, seed: int = 0) -> Path:
    """Writes a complete pipeline; the same seed gives the same weights."""
    torch.manual_seed(seed)
    tokenizer = teacher.make_tokenizer()
    shape = {"blocks": blocks, "heads": 1, "head_dim": 32, "axes_dims_rope": [8, 12, 12]}
    transformer = teacher.make_transformer(shape, Z_DIM, TEXT_WIDTH)
    with torch.no_grad():
        for parameter in transformer.parameters():  # zero modulations would make blocks identities
            parameter.add_(0.05 * torch.randn_like(parameter))
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=teacher.make_vae(8, Z_DIM),
        text_encoder=teacher.make_text_encoder(tokenizer, TEXT_WIDTH, 1),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def record(folder: Path, path: Path, prompts: list[str] = CALIBRATION) -> Path:
    """Records the pipeline's calls on prompts, one batch each; every other prompt is held out."""
    pipe = pipelines.load(source(folder), torch.device("cpu"))
    tables = []
    for number, prompt in enumerate(prompts):
        sample = {"sample": number, "prompt_index": number, "prompt": prompt, "seed": number}
        sample["heldout"] = number % 2 == 1
        tables += recording.record_batch(pipe, [sample], SETTINGS, 1, seed=0)
    calls.write(path, [table.schema for table in tables], tables, {})
    return path
