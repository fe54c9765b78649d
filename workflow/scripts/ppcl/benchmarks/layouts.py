"""Where the scorers of the benchmarks look for pictures: functions from a plan to its files."""

import json

from ppcl.benchmarks.benchmark import File, Plan

TEACHER = "teacher"


def _singles(plan: Plan, pattern: str) -> list[File]:
    """A file for each picture.

    pattern: of its path, with {model}, {part}, {key} of the prompt, {picture}, its number among the
        prompt's, and {number}, that among all.
    """
    return [
        File(
            pattern.format(
                model=plan.model,
                part=plan.part,
                key=prompt.key,
                picture=picture,
                number=place * plan.count + picture,
            ),
            place,
            (picture,),
        )
        for place, prompt in enumerate(plan.prompts)
        for picture in range(plan.count)
    ]


def geneval(plan: Plan) -> list[File]:
    """<model>/00000/samples/0000.png: its scorer passes over folders whose names are not digits."""
    return _singles(plan, "{model}/{key}/samples/{picture:04d}.png")


def geneval_texts(plan: Plan) -> dict[str, str]:
    """What GenEval asks of each prompt, beside its pictures."""
    return {f"{plan.model}/{p.key}/metadata.jsonl": f"{p.source}\n" for p in plan.prompts}


def grids(plan: Plan) -> list[File]:
    """<model>/<key>.png: all pictures of a prompt in one grid (DPG-Bench)."""
    pictures = tuple(range(plan.count))
    return [File(f"{plan.model}/{p.key}.png", n, pictures) for n, p in enumerate(plan.prompts)]


def numbered(plan: Plan) -> list[File]:
    """<model>/<key>_<picture>.png."""
    return _singles(plan, "{model}/{key}_{picture}.png")


def oneig(plan: Plan) -> list[File]:
    """<class>/<model>/<id>.webp: all pictures of a prompt in one grid. Its scorers tell a prompt by
    the first three letters of the name."""
    pictures = tuple(range(plan.count))
    return [
        File(f"{p.group}/{plan.model}/{p.key.removeprefix(p.group + '_')}.webp", n, pictures)
        for n, p in enumerate(plan.prompts)
    ]


def t2i_compbench(plan: Plan) -> list[File]:
    """<model>/samples/<prompt>_000000.png, counted through over all prompts: its scorers take the
    prompt from the name, and sort by the number."""
    return _singles(plan, "{model}/samples/{key}_{number:06d}.png")


def hpsv2(plan: Plan) -> list[File]:
    """<model>/<style>/00000.jpg, by the number of the prompt in its file."""
    return _singles(plan, "{model}/{part}/{key}.jpg")


def vbench(plan: Plan) -> list[File]:
    """<model>/<prompt>-0.mp4."""
    return _singles(plan, "{model}/{key}-{picture}.mp4")


def evalscope_texts(plan: Plan) -> dict[str, str]:
    """<model>.jsonl: what evalscope scores, with paths from where Snakemake runs. A variant's
    pictures have the teacher's of the same prompt and seed as reference."""
    lines = []
    for file in numbered(plan):
        prompt = plan.prompts[file.prompt]
        row = {"id": f"{prompt.key}_{file.pictures[0]}", "prompt": prompt.text}
        row |= {"category": prompt.group} if prompt.group else {}
        row["image_path"] = f"{plan.folder}/{file.path}"
        if plan.model != TEACHER:
            reference = file.path.replace(plan.model, TEACHER, 1)
            row["reference_image_path"] = f"{plan.folder}/{reference}"
        lines.append(f"{json.dumps(row, ensure_ascii=False)}\n")
    return {f"{plan.model}.jsonl": "".join(lines)}
