"""The model card of a variant: front matter that the Hub understands, and what people want to know.

Whatever comes from elsewhere (the teacher's name and card, prompts, names of variants) goes in as
data: into YAML by huggingface_hub, into Markdown by `markdown`. No path of this machine goes in.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData

from ppcl.publishing import markdown, measured, removed
from ppcl.publishing.teacher_card import TeacherCard
from ppcl.settings import Settings

PICTURES = "pictures.png"
PAPER = "https://arxiv.org/abs/2511.16156"


@dataclass(frozen=True)
class Described:
    """A variant, as far as its card tells of it.

    Attributes:
        variant: its name.
        pruning: its pruning.json.
        teacher: what was taken from the teacher's card.
        settings: with `teacher`, `pipeline` and `record.samples`.
        units: as schemas.VARIANT_UNITS, of this variant.
        metrics: as schemas.METRICS, of all models.
        pictures: as schemas.IMAGES, a few of this variant's.
        prompts: how many prompts it was evaluated on.
        blocks: the teacher's number of blocks.
        code: files in its folder that loading it runs.
        frames_per_second: of its videos.
        videos: names of videos, in the card's folder.
    """

    variant: str
    pruning: Mapping[str, Any]
    teacher: TeacherCard
    settings: Settings
    units: pd.DataFrame
    metrics: pd.DataFrame
    pictures: pd.DataFrame
    prompts: int
    blocks: int
    code: tuple[str, ...] = ()
    frames_per_second: int = 0
    videos: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called beside other models."""
        return markdown.one_line(f"{self.of_teacher('name').split('/')[-1]}-{self.variant}")

    def of_teacher(self, key: str) -> str:
        """A fact of the teacher's from pruning.json; empty if there is none."""
        return (self.pruning.get("teacher") or {}).get(key) or ""

    @property
    def moving(self) -> bool:
        """Whether it makes videos."""
        return bool((self.pictures["frames"] > 1).any())

    @property
    def edits(self) -> bool:
        """Whether it takes a picture."""
        return bool(self.pictures["source"].map(len).any())

    @property
    def task(self) -> str:
        """The Hub's name of what it does: the teacher's, or by what it takes and makes."""
        made = "video" if self.moving else "image"
        return self.teacher.task or f"{'image' if self.edits else 'text'}-to-{made}"


def card(about: Described) -> ModelCard:
    """The card, read back as the Hub's client reads it.

    Raises:
        ValueError: the client refuses it.
    """
    data = ModelCardData(
        base_model=about.of_teacher("repository") or None,
        base_model_relation="finetune" if about.of_teacher("repository") else None,
        library_name="diffusers",
        pipeline_tag=about.task,
        tags=["diffusers", "pruned", "pruning", "ppcl", "diffusion-transformer"],
        model_name=about.name,
        eval_results=measured.eval_results(about.metrics, about.variant, about.task, about.prompts),
        **_licence(about.teacher),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(about)}")


def _licence(teacher: TeacherCard) -> dict[str, Any]:
    """Keys of the front matter about the licence."""
    if not teacher.licence:
        return {}
    one = teacher.licence[0] if len(teacher.licence) == 1 else list(teacher.licence)
    named = {"license_name": teacher.licence_name, "license_link": teacher.licence_link}
    return {"license": one} | {key: text for key, text in named.items() if text}


def _text(about: Described) -> str:
    quality, speed = measured.tables(about.metrics, about.variant)
    cells = removed.rows(about.units, about.blocks)
    units = markdown.table(removed.HEAD, cells) if cells else "Nothing: it is the teacher itself."
    tuned = about.pruning.get("finetuned")
    after = "\n\nAfter that, all of its weights were trained on the teacher's output." * bool(tuned)
    parts = [
        f"# {markdown.plain(about.name)}\n\n{_opening(about)}",
        f"## What was removed\n\n{units}{after}",
        _shown(about),
        f"## How good it is\n\n{_judged(about)}\n\n{quality}" * bool(quality),
        f"## Size and speed\n\n{_timed(about)}\n\n{speed}" * bool(speed),
        f"## How to load it\n\n{markdown.block(_example(about), 'python')}",
        "## What to watch for\n\n" + "\n".join(f"- {line}" for line in _warnings(about)),
        f"## How it was made\n\n{_made(about)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _teacher(about: Described) -> str:
    """The teacher's name, as a link if it is on the Hub."""
    name, repository = about.of_teacher("name") or "its teacher", about.of_teacher("repository")
    if not repository:
        return markdown.code(name)
    revision = about.of_teacher("revision")
    at = f"/tree/{revision}" if revision.isalnum() else ""
    return f"[{markdown.plain(repository)}](https://huggingface.co/{repository}{at})"


def _opening(about: Described) -> str:
    share = about.pruning.get("parameter_fraction")
    size = f", with {100 * share:.3g} % of the parameters of its transformer" if share else ""
    licence = ", ".join(map(markdown.plain, about.teacher.licence))
    if licence and about.teacher.licence_link:
        named = markdown.plain(about.teacher.licence_name or licence)
        licence = f"[{named}]({about.teacher.licence_link})"
    known = f"Licence: {licence}, as the teacher's." if licence else ""
    unknown = (
        f"Licence: not known, since {about.teacher.refused}. The teacher's holds for this model "
        "too; name it in the front matter before you publish this."
    )
    base = "\n\nThe teacher was a folder; if it is on the Hub, name it as `base_model` above."
    base *= not about.of_teacher("repository")
    fused = ", ".join(
        f"{markdown.code(lora['path'])} (scale {lora['scale']:g})"
        for lora in about.pruning.get("loras") or ()
    )
    base += f"\n\nFused into the weights before anything else: LoRA {fused}." * bool(fused)
    return (
        f"{_teacher(about)}, pruned by PPCL ([paper]({PAPER})){size}: a complete pipeline for "
        f"diffusers.\n\n{known or unknown}{base}"
    )


def _shown(about: Described) -> str:
    """Pictures and videos of teacher and variant."""
    if not len(about.pictures):
        return ""
    kind = "Videos, a few frames of each" if about.moving else "Pictures"
    told = f"{kind}; the same prompt and seed in each row, the teacher beside this model."
    films = "\n\n".join(
        f'<video controls loop muted playsinline src="{name}"></video>' for name in about.videos
    )
    films = f"\n\nLeft the teacher, right this model:\n\n{films}" if films else ""
    return f"## Pictures\n\n{told}\n\n![Teacher and this model]({PICTURES}){films}"


def _judged(about: Described) -> str:
    return (
        f"{about.prompts} prompts that nothing was fitted or trained on; teacher and variant with "
        "the same seeds. Intervals: 95 %, by a bootstrap over prompts."
    )


def _timed(about: Described) -> str:
    dtype = about.settings.teacher.dtype
    return (
        f"Times were taken in turns with the teacher on one machine, in {dtype}; compare the "
        "ratio, not the seconds. Intervals: 95 %, over rounds."
    )


def _example(about: Described) -> str:
    """Code that loads the variant and makes one picture."""
    trust = ", trust_remote_code=True" if about.code else ""
    call = {k: v for k, v in about.settings.pipeline.items() if _is_shown(k, v)}
    prompt = str(about.pictures["prompt"].iloc[0]) if len(about.pictures) else "a red seven"
    prompt = " ".join(prompt.split())
    words = [f"{prompt!r}", *(f"{name}={value!r}" for name, value in call.items())]
    imports, given = ["import torch", "from diffusers import DiffusionPipeline"], []
    helpers = []
    if about.edits:
        helpers.append("load_image")
        given = ['picture = load_image("picture.png")']
        words[0] = f"image=picture, prompt={words[0]}"
    if about.moving:
        helpers.append("export_to_video")
    if helpers:
        imports.append(f"from diffusers.utils import {', '.join(sorted(helpers))}")
    made = f"pipe(\n    {f',{chr(10)}    '.join(words)},\n)"
    end = (
        f'export_to_video({made}.frames[0], "video.mp4", fps={about.frames_per_second})'
        if about.moving
        else f'{made}.images[0].save("image.png")'
    )
    load = (
        f"pipe = DiffusionPipeline.from_pretrained(\n    {f'owner/{about.name}'!r}, "
        f"dtype=torch.{about.settings.teacher.dtype}{trust}\n)"
    )
    return "\n".join([*imports, "", load, *given, end])


def _is_shown(name: str, value: Any) -> bool:
    """Whether an argument of the call is shown: numbers and prompts; other texts may be paths."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 64 and all(_is_shown("", one) for one in value)
    if isinstance(value, str):
        return re.fullmatch(r"(negative_)?prompt(_\d+)?", name) is not None and len(value) <= 300
    return isinstance(value, (bool, int, float))


def _warnings(about: Described) -> list[str]:
    kinds = set(about.units["kind"])
    lines = []
    if "interval" in kinds:
        lines.append(
            "LoRAs, ControlNets and IP-Adapters for the teacher name its blocks by number, and "
            "would load into the wrong ones here, with a warning at most. "
            "`block_map.json`, beside the transformer's weights, says which of the teacher's "
            "blocks each block stands for: remap them by it, as the workflow's `remap_*.py` do."
        )
    if kinds & {"ffn", "text", "modulation"}:
        lines.append(
            "LoRAs that change a layer which is linear, shared or of low rank here do not fit it: "
            "what they change may be gone."
        )
    if about.code:
        files = ", ".join(map(markdown.code, about.code))
        lines.append(
            f"Loading it runs code of this repository ({files}), hence `trust_remote_code=True`: "
            "read it first. Tools that know diffusers' own classes alone may refuse it."
        )
    if how := about.pruning.get("quantised"):
        lines.append(
            f"Its weights are quantised ({how}), which loading needs the package "
            f"{about.pruning['package']} for."
        )
    size = [about.settings.pipeline.get(key) for key in ("height", "width")]
    at = f" at {size[0]} x {size[1]} pixels" if all(isinstance(n, int) for n in size) else ""
    lines.append(
        f"It was calibrated on {about.settings.record.samples} samples{at}, with the call above. "
        "Other sizes, numbers of steps, guidances, languages and kinds of prompts may lose more: "
        "try yours."
    )
    lines.append(
        "PSNR, SSIM and the velocity error say how near it is to the teacher, not how good its "
        "pictures are. "
        + "Accuracies are what a program read in them, on the kind of prompts that are shown above."
        * bool(about.metrics["metric"].str.endswith("_accuracy").any())
    )
    if "modulation" in kinds:
        lines.append("Low-rank modulation saves memory, not time.")
    lines.append("What the teacher is not to be used for, this model is not to be used for either.")
    return [line.strip() for line in lines]


def _made(about: Described) -> str:
    of = about.pruning.get("provenance") or {}
    names = ("torch", "diffusers", "transformers")
    versions = ", ".join(f"{name} {of[name]}" for name in names if name in of)
    facts = [
        ("teacher", markdown.code(about.of_teacher("name"))),
        ("its revision", markdown.code(about.of_teacher("revision") or "")),
        ("commit of the workflow", markdown.code(of.get("commit", ""))),
        ("versions", markdown.plain(versions)),
        ("assembled", markdown.code(of.get("created", ""))),
    ]
    rows = [row for row in facts if row[1].strip("` ")]
    return (
        f"By a Snakemake workflow after PPCL ([paper]({PAPER})). `pruning.json` has every choice, "
        "all metrics with their intervals, and digests of the files.\n\n"
        + markdown.table(("", ""), rows)
    )
