"""LoRAs of the embedded teacher on its pruned variants: how much of their effect is left.

    snakemake --cores all --configfile config/digits-depth.yaml
    .venv/bin/python benchmarks/lora.py --config config/digits-depth.yaml --loras loras

Two LoRAs of rank 8 on the attention. The random one: cosine of what it changes in the variant's
velocities with what it changes in the teacher's, on the calls of four pictures of other prompts and
seeds than the recorded ones. The trained one draws every digit in yellow ink, unless the paper is
yellow: share of pictures of held-out captions that ask for neither, in which the judge reads yellow
ink, over that of the teacher with the LoRA. Ways of putting them into a variant:

    numbers    as they are: loaded with the teacher's numbers of blocks
    first      of blocks that became one, the first one's (also where the new block started)
    sum        the sum of those of all these blocks
    interval   first, then what each new block's layers change in its output fitted to what the
               interval's change in the teacher's, on the teacher's own streams
    calls      first, then all layers fitted to what changes in the velocities, on the calls that
               the run has recorded (remap_lora.py --calls --teacher)
    fit        the same on calls of the teacher with the LoRA (remap_lora.py --config)

Prints a table in Markdown; --output keeps it as parquet.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call

from ppcl.configuration import config
from ppcl.digits import teacher as making
from ppcl.digits.captions import Caption, captions
from ppcl.digits.handwriting import COLORS, digits, paint, stroke
from ppcl.digits.judge import Judge
from ppcl.digits.recipe import TransformerRecipe
from ppcl.export import lora, lora_calls, lora_files, lora_fit, lora_remap, lora_styles
from ppcl.export.lora_fit import FitOptions
from ppcl.export.lora_layers import Layer, LoraFile
from ppcl.export.lora_remap import Given
from ppcl.extraction import conditioning
from ppcl.teacher import pipelines, prompts
from ppcl.training import teaching
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PROMPTS = [
    "a red seven on white",
    "blue two, yellow background",
    "a green card showing a white zero",
    "the digit 9 in black over red",
]
INK = "yellow"
CALL = {"height": 32, "width": 32, "num_inference_steps": 10, "true_cfg_scale": 3.0}
KINDS = ("random", "trained")
Layers = dict[str, Layer]


def load(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)
    return pipe


# ---- the two LoRAs, as files


def random_lora(pipe: DiffusionPipeline, folder: Path) -> Path:
    """Matrices of a normal distribution."""
    torch.manual_seed(0)
    adapter = LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, init_lora_weights="gaussian")
    pipe.transformer.add_adapter(adapter)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.015)
    return save(pipe, folder)


def save(pipe: DiffusionPipeline, folder: Path) -> Path:
    state = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(folder, transformer_lora_layers=state)
    return folder / "pytorch_lora_weights.safetensors"


def trained_lora(pipe: DiffusionPipeline, folder: Path, steps: int, pictures: int) -> Path:
    """Trained by flow matching on pictures of the teacher's recipe, but for their ink."""
    adapter = LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(adapter)
    packed, facts = inked(pipe, pictures)
    buckets = making.caption_buckets(pipe.tokenizer, captions("train"))
    embeddings = making.encode_captions(pipe.text_encoder, buckets)
    ids = torch.tensor([pipe.tokenizer(making.TEMPLATE.format(" ")).input_ids])
    nothing = (ids, torch.zeros(1, 3, dtype=torch.long))
    empty = making.encode_captions(pipe.text_encoder, [nothing])[0, 0, 0][0]
    recipe = TransformerRecipe.of({"seed": 0, "batch_size": 32, "caption_dropout": 0.1})
    losses = making.transformer_losses(
        pipe.transformer, packed, facts, embeddings, empty, recipe, 0
    )
    matrices = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(matrices, lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        (_, loss, _), *_ = losses(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return save(pipe, folder)


@torch.no_grad()
def inked(pipe: DiffusionPipeline, count: int) -> tuple[Tensor, Tensor]:
    """Packed latents of pictures in yellow ink, and the facts that their captions state."""
    rng, (images, labels) = np.random.default_rng(0), digits("train")
    drawn, facts = [], []
    for index in rng.integers(len(images), size=count):
        color, paper = rng.choice(len(COLORS), 2, replace=False)
        ink = COLORS[color] if COLORS[paper] == INK else INK
        drawn.append(paint(stroke(images[index], rng), ink, COLORS[paper]))
        facts.append((labels[index], color, paper))
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)[:, :, None] * 2 - 1
    latents = torch.cat(
        [pipe.vae.encode(part).latent_dist.mean[:, :, 0] for part in pixels.split(250)]
    )
    vae = pipe.vae.config
    mean, std = (torch.tensor(x)[:, None, None] for x in (vae.latents_mean, vae.latents_std))
    return making.pack((latents - mean) / std), torch.tensor(facts)


# ---- what is measured


def calls_of(pipe: DiffusionPipeline) -> list[dict]:
    """The calls of the transformer while four pictures are made in four steps."""
    seen: list[dict] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(dict(given)), with_kwargs=True
    )
    call = CALL | {"num_inference_steps": 4, "true_cfg_scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    pipe(PROMPTS, output_type="latent", generator=generator, **call)
    handle.remove()
    return seen


@torch.no_grad()
def answers(model: nn.Module, every: list[dict]) -> Tensor:
    return torch.cat([blocks.answer(model, given).flatten() for given in every])


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


class Inks:
    """Share of pictures in which the judge reads yellow ink, though the captions ask for none."""

    def __init__(self, samples: int):
        self.judge = Judge()
        every = [
            c for c in captions("evaluation") if INK not in (c.digit_color, c.background_color)
        ]
        order = np.random.default_rng(0).permutation(len(every))[:samples]
        self.asked: list[Caption] = [every[i] for i in order]

    def share(self, pipe: DiffusionPipeline) -> float:
        read = []
        for start in range(0, len(self.asked), 50):
            part = self.asked[start : start + 50]
            seeds = [torch.Generator().manual_seed(10**6 + start + i) for i in range(len(part))]
            pictures = pipe(
                [c.prompt for c in part],
                negative_prompt=[" "] * len(part),
                generator=seeds,
                output_type="np",
                **CALL,
            ).images
            read += [answer["digit_color"] == INK for answer in self.judge.read(pictures)]
        return float(np.mean(read))


# ---- ways


class Variant:
    """One variant and its files."""

    def __init__(self, run: Path, name: str, teacher: Path, steps: int):
        self.pipe = load(run / "models" / name)
        folder = run / "models" / name / "transformer"
        self.block_map = json.loads((folder / "block_map.json").read_text(encoding="utf-8"))
        self.teacher = load(teacher)
        reader = calls.Reader(run / "record" / "calls.parquet")
        self.context = Context(self.teacher.transformer, reader, 0, Accelerator(cpu=True))
        self.options = FitOptions(steps=steps)
        self.with_loras: Mapping[Path, calls.Reader] = {}
        file = run / "activations" / "conditioning.safetensors"
        self.conditioning = conditioning.read(file) if file.exists() else None

    def file(self, path: Path) -> LoraFile:
        return lora_files.read(type(self.pipe), path, "transformer", self.pipe.transformer)

    def first(self, path: Path) -> Layers:
        given = Given(self.conditioning)
        made = lora_remap.remap(self.pipe.transformer, self.block_map, self.file(path), given)
        return made.file.layers

    def recorded_calls(self, path: Path) -> Layers:
        given = Given(self.conditioning, self.context, self.options)
        made = lora_remap.remap(self.pipe.transformer, self.block_map, self.file(path), given)
        return made.file.layers

    def fit(self, path: Path) -> Layers:
        given = Given(
            self.conditioning, replace(self.context, reader=self.with_loras[path]), self.options
        )
        made = lora_remap.remap(self.pipe.transformer, self.block_map, self.file(path), given)
        return made.file.layers

    def numbers(self, path: Path) -> Layers:
        depth = len(self.block_map)
        every = {p: x for p, x in self.file(path).layers.items() if int(p.split(".")[1]) < depth}
        stays = [[number] for number in range(depth)]
        places, _ = lora.places(self.pipe.transformer, stays, every)
        made, _ = lora.projected(self.pipe.transformer, places, self.conditioning)
        return made

    def sum(self, path: Path) -> Layers:
        """A product of all blocks' matrices side by side is the sum of their products."""
        theirs, made = self.file(path).layers, self.first(path)
        for new, members in enumerate(self.block_map):
            for end in [
                p.split(".", 2)[2] for p in made if p.startswith(f"transformer_blocks.{new}.")
            ]:
                every = [theirs.get(f"transformer_blocks.{old}.{end}") for old in members]
                layers = [layer for layer in every if layer is not None]
                if len(layers) > 1:
                    a = torch.cat([x.a for x in layers])
                    b = torch.cat([x.scale * x.b for x in layers], 1)
                    made[f"transformer_blocks.{new}.{end}"] = Layer(a, b)
        return made

    def interval(self, path: Path) -> Layers:
        layers, theirs = self.first(path), self.file(path).layers
        adapted = copy.deepcopy(self.teacher.transformer)
        places, _ = lora.places(
            adapted, [[b.index] for b in blocks.block_sequence(adapted)], theirs
        )
        lora.merge(adapted, {place.path: place.layer for place in places.values()})
        reader = self.context.reader
        rows = np.random.default_rng(0).permutation(reader.rows(heldout=False))[:128]
        batches = list(reader.batches(rows, 64))
        for new, members in enumerate(self.block_map):
            if len(members) > 1:
                lessons = [lesson(self.teacher.transformer, adapted, members, b) for b in batches]
                block = blocks.block_sequence(self.pipe.transformer)[new]
                start = f"transformer_blocks.{new}."
                mine = {p.removeprefix(start): x for p, x in layers.items() if p.startswith(start)}
                layers |= {start + p: x for p, x in fitted(block, mine, lessons).items()}
        return layers


@torch.no_grad()
def lesson(teacher: nn.Module, adapted: nn.Module, members: list[int], batch: calls.Batch):
    """What an interval gets, and what the LoRA changes in what it gives for that."""
    ends = {members[0], members[-1]}
    given: dict[int, dict] = {}
    gave: dict[int, blocks.Streams] = {}
    watched = [b for b in blocks.block_sequence(teacher) if b.index in ends]
    with blocks.watch(
        watched,
        lambda block, bound: given.update({block.index: bound}),
        lambda block, streams: gave.update({block.index: streams}),
        stop_after=members[-1],
    ) as run:
        run(teacher, batch.arguments)
    bound, streams = dict(given[members[0]]), {}
    for index in members:
        block = blocks.block_sequence(adapted)[index]
        streams = block.outputs(block.module(**bound))
        bound |= {block.list.inputs[stream]: value for stream, value in streams.items()}
    return given[members[0]], {s: streams[s] - gave[members[-1]][s] for s in streams}


def fitted(block: blocks.Block, layers: Layers, lessons: list[tuple]) -> Layers:
    """One block's layers by least squares (L-BFGS) on lessons; both streams count alike."""
    matrices = {p: [x.a.clone(), x.scale * x.b] for p, x in layers.items()}
    flat = [m.requires_grad_() for pair in matrices.values() for m in pair]
    weights = {p: block.module.get_submodule(p).weight for p in layers}
    bounds = [teaching.fitting(bound, block.module) for bound, _ in lessons]
    with torch.no_grad():
        before = [block.outputs(block.module(**bound)) for bound in bounds]
    power = {s: sum(float(d[s].square().sum()) for _, d in lessons) for s in lessons[0][1]}
    optimizer = torch.optim.LBFGS(flat, max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for bound, was, (_, wanted) in zip(bounds, before, lessons, strict=True):
            now = {f"{p}.weight": weights[p] + b @ a for p, (a, b) in matrices.items()}
            streams = block.outputs(functional_call(block.module, now, kwargs=bound))
            loss = sum(
                (streams[s] - was[s] - wanted[s]).square().sum() / power[s]
                for s in wanted
                if power[s] > 0
            )
            loss.backward()
            total += loss.detach()
        return total

    optimizer.step(closure)
    return {
        p: replace(layers[p], a=a.detach(), b=b.detach(), scale=1.0)
        for p, (a, b) in matrices.items()
    }


WAYS: Mapping[str, Callable[[Variant, Path], Layers]] = {
    "numbers": Variant.numbers,
    "first": Variant.first,
    "sum": Variant.sum,
    "interval": Variant.interval,
    "calls": Variant.recorded_calls,
    "fit": Variant.fit,
}


def recorded(path: Path, asked: argparse.Namespace, folder: Path) -> calls.Reader:
    """Calls of the teacher with a LoRA, as remap_lora.py records them."""
    settings = config.load(asked.config)
    pipe = load(asked.teacher)
    file = lora_files.read(type(pipe), path, "transformer", pipe.transformer)
    rows = prompts.read(settings.record.prompts, "record.prompts")
    samples = pipelines.samples(rows, asked.fit_pictures, settings.seed)
    folder.mkdir()
    most = FitOptions().calls
    return lora_calls.record(pipe, pipe.transformer, file.layers, samples, settings, most, folder)


def measure(asked: argparse.Namespace, folder: Path, scratch: Path) -> pd.DataFrame:
    """A row per variant and way: the cosine, and the share of the trained LoRA's effect."""
    inks = Inks(asked.samples)
    teacher = load(asked.teacher)
    every, plain = calls_of(teacher), inks.share(teacher)
    velocities = answers(teacher.transformer, every)
    one, two = (folder / name / "pytorch_lora_weights.safetensors" for name in KINDS)
    if not one.exists():
        random_lora(load(asked.teacher), one.parent)
    if not two.exists():
        trained_lora(load(asked.teacher), two.parent, asked.train_steps, asked.pictures)
    teacher.load_lora_weights(one.parent, weight_name=one.name)
    effect = answers(teacher.transformer, every) - velocities
    teacher.unload_lora_weights()
    teacher.load_lora_weights(two.parent, weight_name=two.name)
    reached = inks.share(teacher)
    print(f"yellow ink, teacher: {plain:.3f}, with the trained LoRA {reached:.3f}", flush=True)
    with_them = {
        path: recorded(path, asked, scratch / kind)
        for path, kind in zip((one, two), KINDS, strict=True)
        if "fit" in asked.ways
    }
    rows = []
    for name in asked.models:
        variant = Variant(asked.run, name, asked.teacher, asked.steps)
        variant.with_loras = with_them
        before, bare = answers(variant.pipe.transformer, every), inks.share(variant.pipe)
        for way in asked.ways:
            with_random = adapted(variant, WAYS[way](variant, one))
            cos = cosine(answers(with_random, every) - before, effect)
            variant.pipe.transformer.unload_lora()
            adapted(variant, WAYS[way](variant, two))
            share = (inks.share(variant.pipe) - bare) / (reached - plain)
            variant.pipe.transformer.unload_lora()
            rows.append({"variant": name, "way": way, "cosine": cos, "trained": share})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def adapted(variant: Variant, layers: Layers) -> nn.Module:
    """The variant's transformer with the LoRA, as diffusers loads it."""
    state, model = lora_styles.in_peft(layers), variant.pipe.transformer
    model.load_lora_adapter(state, prefix=None, adapter_name=lora_fit.NAME)
    return model


def table(rows: pd.DataFrame) -> str:
    """Markdown: a row per way, two columns per variant."""
    names = list(dict.fromkeys(rows["variant"]))
    lines = ["| | " + " | ".join(f"{n}: cosine | trained" for n in names) + " |"]
    lines.append("|---" * (1 + 2 * len(names)) + "|")
    for way, part in rows.groupby("way", sort=False):
        of = part.set_index("variant")
        cells = [f"{of.cosine[n]:.3f} | {of.trained[n]:.0%}" for n in names]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="config/digits-depth.yaml", help="of the run")
    parser.add_argument("--run", type=Path, default=Path("results/digits-depth"))
    parser.add_argument("--models", nargs="+", default=["b20", "b16", "b12"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--teacher", type=Path, default=Path("resources/digits"))
    parser.add_argument("--steps", type=int, default=FitOptions().steps, help="of the fit")
    parser.add_argument("--fit-pictures", type=int, default=512, help="that it asks for")
    parser.add_argument("--train-steps", type=int, default=300, help="of the trained LoRA")
    parser.add_argument("--pictures", type=int, default=4000, help="that it is trained on")
    parser.add_argument("--samples", type=int, default=200, help="pictures that are judged")
    parser.add_argument(
        "--loras", type=Path, required=True, help="folder for the two LoRAs; those there are used"
    )
    parser.add_argument("--output", type=Path, help="parquet file for the table")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(asked, asked.loras, Path(scratch))
    print(table(rows))
    if asked.output:
        rows.to_parquet(asked.output)


if __name__ == "__main__":
    main()
