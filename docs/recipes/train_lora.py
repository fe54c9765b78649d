"""Trains a LoRA on a Qwen-Image pipeline, pruned or not, with diffusers and peft alone.

    python docs/recipes/train_lora.py --model results/digits-depth/models/b16 \
        --pictures mine --output mine-lora --steps 200

The steps are those of examples/dreambooth/train_dreambooth_lora_qwen_image.py of diffusers:
add_adapter, latents and prompts encoded once, the flow-matching loss at a level of noise that
compute_density_for_timestep_sampling draws, save_lora_weights. Nothing here counts blocks: the
model's own config does. The folder of pictures holds PNG files, all of one size, and beside each a
.txt file with its caption. A narrow pipeline has code of its own beside its weights; give
--trust-remote-code if you trust it.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import (
    cast_training_params,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]


@torch.no_grad()
def encoded(pipe: DiffusionPipeline, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Of each picture in a folder: its latents [1, channels, 1, height, width], and its caption's
    embeddings and mask, which is None if all of them are real."""
    mean, std = (
        torch.tensor(pipe.vae.config[key]).view(1, -1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    samples = []
    for file in sorted(folder.glob("*.png")):
        picture = pipe.image_processor.preprocess(Image.open(file).convert("RGB"))
        latents = pipe.vae.encode(picture[:, :, None].to(pipe.vae.dtype)).latent_dist.mode()
        text, mask = pipe.encode_prompt(file.with_suffix(".txt").read_text().strip())
        samples.append({"latents": (latents - mean) / std, "text": text, "mask": mask})
    if not samples:
        raise SystemExit(f"error: --pictures: {folder} holds no .png file")
    return samples


def loss_of(
    pipe: DiffusionPipeline, sample: dict[str, torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """The flow-matching loss of a picture, at a level of noise that the generator draws."""
    latents, schedule = sample["latents"], pipe.scheduler.config
    level = compute_density_for_timestep_sampling(
        "none", 1, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=generator
    )
    index = (level * schedule.num_train_timesteps).long()
    sigma = pipe.scheduler.sigmas[index].to(latents)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noisy = (1 - sigma) * latents + sigma * noise
    _, channels, _, height, width = latents.shape
    packed = pipe._pack_latents(noisy.transpose(1, 2), 1, channels, height, width)
    velocity = pipe.transformer(
        hidden_states=packed,
        timestep=sigma,
        encoder_hidden_states=sample["text"],
        encoder_hidden_states_mask=sample["mask"],
        img_shapes=[[(1, height // 2, width // 2)]],
        return_dict=False,
    )[0]
    factor = pipe.vae_scale_factor
    velocity = pipe._unpack_latents(velocity, height * factor, width * factor, factor)
    weight = compute_loss_weighting_for_sd3("none", sigmas=sigma)
    return (weight * (velocity.float() - (noise - latents).float()) ** 2).mean()


def train(pipe: DiffusionPipeline, pictures: Path, output: Path, steps: int, rank: int) -> None:
    """Trains a LoRA and saves it; prints the loss."""
    samples = encoded(pipe, pictures)
    transformer = pipe.transformer.requires_grad_(False).train()
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    torch.manual_seed(0)
    transformer.add_adapter(config)
    cast_training_params(transformer, dtype=torch.float32)
    trained = [each for each in transformer.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        loss = loss_of(pipe, samples[step % len(samples)], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    type(pipe).save_lora_weights(
        output,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a pipeline")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of PNG and TXT files")
    parser.add_argument("--output", type=Path, required=True, help="folder of the LoRA")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    train(pipe, args.pictures, args.output, args.steps, args.rank)


if __name__ == "__main__":
    main()
