"""Makes the embedded teacher from nothing: resources/digits, a stock QwenImagePipeline.

python -m torch.distributed.run --standalone --nproc_per_node 2 workflow/scripts/train_teacher.py \
    --config config/teacher-digits.yaml --state results/teacher/state \
    --output results/teacher/digits

Killed at any point, the same command goes on where it was. `--state` keeps the parts that are done
and the checkpoint of the part in training.
"""

import csv
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

from ppcl import program, provenance
from ppcl.configuration import strict_yaml
from ppcl.digits import teacher
from ppcl.digits.captions import TEMPLATES, captions
from ppcl.digits.handwriting import SIZE
from ppcl.digits.judge import Judge
from ppcl.digits.recipe import Recipe, ScoreRecipe
from ppcl.runtime import processes, stopping
from ppcl.storage import tensors, texts, whole
from ppcl.training import loop

NEGATIVE_PROMPT = " "
PARTS = ("text_encoder", "vae", "transformer")  # in the order of training


def identity_of(settings: Recipe, parts: tuple[str, ...], accelerator: Accelerator) -> str:
    """Digest of what decides a part: its settings, those of the parts before it, and the code."""
    chosen = [settings.given[part] for part in parts]
    code = provenance.code_digest(Path(__file__))
    return provenance.digest([settings.seed, chosen, accelerator.num_processes, code])


def train_part(name, module, losses, settings, state: Path, accelerator) -> list[dict]:
    """Trains one part, or loads it when an earlier run finished it."""
    done = state / f"{name}.safetensors"
    before = PARTS[: PARTS.index(name) + 1]
    identity = identity_of(settings, before, accelerator)
    weights, metadata = tensors.read(done) if done.exists() else ({}, {})
    finished = torch.tensor(int(metadata.get("identity") == identity))
    if processes.of_main(accelerator, finished):
        weights, metadata = (weights, metadata) if finished else tensors.read(done)
        module.load_state_dict(weights, strict=False)
        return json.loads(metadata["log"])
    options = loop.Optimisation.from_settings(getattr(settings, name))
    log = loop.train(
        {name: module}, losses, options, accelerator, state / f"{name}.checkpoint", identity
    )
    if accelerator.is_main_process:
        weights = {k: p for k, p in module.named_parameters()}
        tensors.write(done, weights, {"identity": identity, "log": json.dumps(log)})
        (state / f"{name}.checkpoint").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return log


def build(
    settings: Recipe, state: Path, accelerator: Accelerator
) -> tuple[QwenImagePipeline, dict]:
    """Trains every part; returns the pipeline and the training logs."""
    rank, world = accelerator.process_index, accelerator.num_processes
    logs = {}
    torch.manual_seed(settings.seed)
    tokenizer = teacher.make_tokenizer()

    text = settings.text_encoder
    encoder = teacher.make_text_encoder(tokenizer, text.width, text.layers)
    reader = teacher.CaptionReader(encoder, text.width)
    buckets = teacher.caption_buckets(tokenizer, captions("train"))
    losses = teacher.text_losses(reader, buckets, text, rank)
    logs["text_encoder"] = train_part("text_encoder", reader, losses, settings, state, accelerator)
    encoder.eval()

    vae = teacher.make_vae(settings.vae.base_dim, settings.vae.z_dim)
    losses = teacher.vae_losses(vae, settings.vae, rank)
    logs["vae"] = train_part("vae", vae, losses, settings, state, accelerator)

    options = settings.transformer
    cache = state / f"latents-{rank}-of-{world}.safetensors"
    identity = identity_of(settings, PARTS, accelerator)
    stored, metadata = tensors.read(cache) if cache.exists() else ({}, {})
    if metadata.get("identity") != identity:
        rng = np.random.default_rng((options.seed, rank))
        latents, facts = teacher.encode_pictures(vae, options.pictures // world, rng)
        stored = {"latents": latents, "facts": facts}
        tensors.write(cache, stored, {"identity": identity})
    # Every process must scale its latents alike; the first process's statistics decide.
    statistics = torch.stack([stored["latents"].mean((0, 2, 3)), stored["latents"].std((0, 2, 3))])
    statistics = accelerator.reduce(statistics, reduction="mean")
    vae.register_to_config(latents_mean=statistics[0].tolist(), latents_std=statistics[1].tolist())
    mean, std = statistics[:, None, :, None, None]
    packed = teacher.pack((stored["latents"] - mean) / std)

    embeddings = teacher.encode_captions(encoder, buckets)
    ids = torch.tensor([tokenizer(teacher.TEMPLATE.format(NEGATIVE_PROMPT)).input_ids])
    empty = teacher.encode_captions(encoder, [(ids, torch.zeros(1, 3, dtype=torch.long))])
    transformer = teacher.make_transformer(options, settings.vae.z_dim, text.width)
    losses = teacher.transformer_losses(
        transformer, packed, stored["facts"], embeddings, empty[0, 0, 0][0], options, rank
    )
    logs["transformer"] = train_part(
        "transformer", transformer, losses, settings, state, accelerator
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=options.scheduler_shift)
    return (
        QwenImagePipeline(
            scheduler=scheduler,
            vae=vae.eval(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        ),
        logs,
    )


def score(pipe: QwenImagePipeline, settings: ScoreRecipe) -> dict:
    """Generates from captions never used in training and reads the pictures back."""
    judge = Judge()
    every = captions("evaluation")
    chosen = np.random.default_rng(settings.seed).permutation(len(every))[: settings.samples]
    prompts = [every[i] for i in chosen]
    pipe.set_progress_bar_config(disable=True)
    right = []
    for start in range(0, len(prompts), 100):
        part = prompts[start : start + 100]
        generators = [torch.Generator().manual_seed(10**6 + start + i) for i in range(len(part))]
        pictures = pipe(
            [c.prompt for c in part],
            negative_prompt=[NEGATIVE_PROMPT] * len(part),
            generator=generators,
            output_type="np",
            **settings.pipeline,
        ).images
        for caption, read in zip(part, judge.read(pictures), strict=True):
            right.append(
                [
                    read[k] == getattr(caption, k)
                    for k in ("digit", "digit_color", "background_color")
                ]
            )
    table = np.array(right)
    return {
        "images": len(table),
        "digit_accuracy": float(table[:, 0].mean()),
        "digit_color_accuracy": float(table[:, 1].mean()),
        "background_color_accuracy": float(table[:, 2].mean()),
        "all_correct": float(table.all(1).mean()),
        "judge_on_real_digits": judge.accuracy_on_real_digits(),
    }


def write_prompts(folder: Path, calibration: int, seed: int) -> None:
    """Prompt files beside the teacher: evaluation (never trained on) and calibration."""
    rng = np.random.default_rng(seed)
    for name, split, count in (
        ("calibration", "train", calibration),
        ("evaluation", "evaluation", None),
    ):
        every = captions(split)
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["prompt", "digit", "digit_color", "background_color"])
            for i in rng.permutation(len(every))[:count]:
                c = every[i]
                writer.writerow([c.prompt, c.digit, c.digit_color, c.background_color])


CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# Digits: a tiny, trained Qwen-Image teacher

A complete stock `QwenImagePipeline` that draws coloured handwritten digits of {size}x{size} pixels:
"a red handwritten seven on a white background". It is small enough to prune, distil and judge in
minutes on two CPU cores, and trained far enough that damage shows.

| part | class | parameters |
|---|---|---|
{parts}

## What it scores
{images} pictures from captions and seeds never used in training, {steps} steps, guidance
{guidance}, read by a support vector machine that itself reads {judge:.1%} of held-out real digits
correctly:

| digit | digit colour | background colour | all three |
|---|---|---|---|
| {digit_accuracy:.1%} | {digit_color_accuracy:.1%} | {background_accuracy} | {all_correct:.1%} |

## How it was made
`snakemake --cores all train_teacher` remakes it from nothing with `config/teacher-digits.yaml`
(`teacher.json` here holds its settings, versions and last losses). Pictures: real handwriting (UCI
Optical Recognition of Handwritten Digits, as in scikit-learn, CC BY 4.0; the train split of
1,347), drawn with small random rotations, scales and shifts in one of six colours on one of the
five others. Captions: {templates} templates; a fifth of all captions is never trained on
(`evaluation.csv`); `calibration.csv` is drawn from the others. The tokenizer is a byte-level BPE in
which the pipeline's prompt template takes exactly the {prefix} tokens that the stock pipeline
drops. Text encoder: taught to name what a caption states, then frozen. Autoencoder: L1, a small KL,
and noise on the latent. Transformer: flow matching, AdamW, {transformer_steps} steps, cosine decay
to zero.
"""


def card(pipe: QwenImagePipeline, settings: Recipe, scores: dict) -> str:
    """The model card."""
    rows = [
        f"| {name} | {type(part).__name__} | {sum(p.numel() for p in part.parameters()):,} |"
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    ]
    return CARD.format(
        **scores,
        background_accuracy=f"{scores['background_color_accuracy']:.1%}",
        size=SIZE,
        parts="\n".join(rows),
        steps=settings.score.pipeline["num_inference_steps"],
        guidance=settings.score.pipeline["true_cfg_scale"],
        judge=scores["judge_on_real_digits"]["digit"],
        templates=len(TEMPLATES),
        prefix=teacher.PREFIX_TOKENS,
        transformer_steps=settings.transformer.steps,
    )


def main() -> None:
    args = program.parser(
        __doc__, "config", "state", writes=("output",), output="the pipeline folder"
    ).parse_args()
    settings = Recipe.of(strict_yaml.read(args.config))
    accelerator = processes.accelerator("cpu")
    args.state.mkdir(parents=True, exist_ok=True)
    pipe, logs = build(settings, args.state, accelerator)
    if not accelerator.is_main_process:
        return
    scores = score(pipe, settings.score)
    last = {name: rows[-1] for name, rows in logs.items()}
    made = {"scores": scores, "settings": settings.given, "last_losses": last}
    stopping.ignore()
    with whole.writing(args.output, folder=True) as folder:
        pipe.save_pretrained(folder)
        write_prompts(folder, settings.calibration_prompts, settings.seed)
        texts.write_json(folder / "teacher.json", provenance.stamp(settings.given) | made)
        texts.write(folder / "README.md", card(pipe, settings, scores))
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    program.run(main)
