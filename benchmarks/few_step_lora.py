"""A LoRA that makes the embedded teacher's pictures in four calls: for config/digits-fast.yaml.

    .venv/bin/python benchmarks/few_step_lora.py --output results/fast-lora
    snakemake --cores all --configfile config/digits-fast.yaml

The teacher makes pictures in twelve steps with guidance, which is two calls a step. The LoRA
(rank 16, attention and FFNs) learns to reach every third of these states from the one before, in
one call without guidance, as LoRAs such as Lightning do. Prints how far its pictures are from those
of twelve steps, beside the teacher's own in four, and in what share of each the judge reads what
the caption asks for.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow" / "scripts")]

import numpy as np  # noqa: E402 (paths are searched when libraries are imported)
import torch  # noqa: E402
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler  # noqa: E402
from peft import LoraConfig  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import few_steps  # noqa: E402
from ppcl import program  # noqa: E402
from ppcl.configuration import config  # noqa: E402
from ppcl.evaluation import metrics  # noqa: E402
from ppcl.teacher import pipelines, prompts  # noqa: E402

CONFIG = ROOT / "config" / "digits-fast.yaml"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
LAYERS += ["to_add_out", "net.0.proj", "net.2"]
JUMP = 3  # steps of the slow pipeline in one of the fast one
RATE = 2e-3
FIRST_SEED = 10**6  # of the pictures that are looked at; no training uses it


def load(settings) -> DiffusionPipeline:
    """The teacher with the scheduler of the config, and without a LoRA."""
    pipe = DiffusionPipeline.from_pretrained(ROOT / "resources" / "digits")
    keys = {**pipe.scheduler.config, **settings.teacher.scheduler}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(keys)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False).eval()
    return pipe


def slow_call(settings) -> dict:
    """The call of twelve steps with guidance, as config/digits.yaml has it."""
    guided = config.load(str(ROOT / "config" / "digits.yaml")).pipeline
    return {**guided, "num_inference_steps": JUMP * settings.pipeline["num_inference_steps"]}


def trajectories(pipe, call: dict, items: list[dict]) -> list[list[tuple[Tensor, dict, Tensor]]]:
    """What the fast pipeline should do: per batch of equal prompts' lengths, and per fast step, the
    noise level, the arguments of the call without guidance, and the velocity that leads from this
    state to the one that the slow pipeline reaches `JUMP` steps later."""
    made = []
    for batch in pipelines.in_batches(pipe, items, 32):
        seen: list[dict] = []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda _model, _args, given, into=seen: into.append(dict(given)), with_kwargs=True
        )
        texts, seeds = [i["prompt"] for i in batch], [i["seed"] for i in batch]
        last = pipelines.run(pipe, texts, seeds, call, output_type="latent").images
        hook.remove()
        with_prompt = seen[::2]  # the other half are calls of the negative prompt
        states = [given["hidden_states"] for given in with_prompt] + [last]
        levels = pipe.scheduler.sigmas
        steps = []
        for k in range(0, len(with_prompt), JUMP):
            way = (states[k + JUMP] - states[k]) / (levels[k + JUMP] - levels[k])
            steps.append((levels[k], with_prompt[k], way))
        made.append(steps)
    return made


def train(pipe, taught: list, steps: int) -> None:
    """Adds a LoRA to the transformer, and trains it. In place."""
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=LAYERS))
    matrices = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(matrices, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    rng = np.random.default_rng(0)
    for step in range(steps):
        batch = taught[rng.integers(len(taught))]
        _, given, way = batch[rng.integers(len(batch))]
        velocity = pipe.transformer(**given)[0]
        loss = (velocity - way).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.4f}", flush=True)


def pictures(pipe, call: dict, items: list[dict]) -> tuple[np.ndarray, list[dict]]:
    """8-bit pictures, and the items that they are of, in one order."""
    made, order = [], []
    for batch in pipelines.in_batches(pipe, items, 50):
        texts, seeds = [i["prompt"] for i in batch], [i["seed"] for i in batch]
        made.append(np.asarray(pipelines.run(pipe, texts, seeds, call, output_type="np").images))
        order += batch
    return (np.concatenate(made) * 255).round().astype(np.uint8), order


def told(name: str, made: np.ndarray, wanted: np.ndarray, items: list[dict]) -> None:
    """Prints a row of the table."""
    right = few_steps.accuracy(list(made), [items])
    likeness = [metrics.psnr(one, other) for one, other in zip(made, wanted, strict=True)]
    alike = "" if made is wanted else f"{np.mean(likeness):.1f}"
    print(f"| {name} | {alike} | {right.value:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of the training")
    parser.add_argument("--samples", type=int, default=640, help="pictures trained on")
    parser.add_argument("--pictures", type=int, default=200, help="pictures looked at")
    parser.add_argument("--output", type=Path, required=True, help="folder of the LoRA's file")
    args = parser.parse_args()
    settings = config.load(str(CONFIG))
    pipe, slow, fast = load(settings), slow_call(settings), dict(settings.pipeline)
    rows = prompts.read(ROOT / "resources" / "digits" / "calibration.csv")
    taught = trajectories(pipe, slow, pipelines.samples(rows, args.samples, 0))
    rows = prompts.read(ROOT / "resources" / "digits" / "evaluation.csv")
    items = pipelines.samples(rows, args.pictures, FIRST_SEED)
    wanted, items = pictures(pipe, slow, items)
    before, _ = pictures(pipe, fast, items)
    train(pipe, taught, args.steps)
    after, _ = pictures(pipe, fast, items)
    state = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(args.output, transformer_lora_layers=state)
    print("| pictures of | PSNR to those of twelve steps, dB | right |\n|---|---|---|")
    told("twelve steps, guided: 24 calls", wanted, wanted, items)
    told("four calls", before, wanted, items)
    told("four calls with the LoRA", after, wanted, items)


if __name__ == "__main__":
    program.run(main)
