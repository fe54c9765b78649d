"""The benchmarks of the field: prompts, layouts, files with scores, as their own code has them."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from docutils.core import publish_doctree
from PIL import Image

from ppcl.benchmarks import benchmark, plans, registry
from ppcl.configuration.config import schema
from ppcl.errors import UserError
from ppcl.evaluation import benchmark_metrics, benchmark_pictures, generation, summary
from ppcl.figures.benchmark_scores import benchmark_scores
from ppcl.figures.quality import quality_against_cost
from ppcl.settings import BenchmarkSettings, EvaluateSettings
from ppcl.storage import schemas, tables
from support import ROOT, tiny

DATA = ROOT / "tests" / "support" / "benchmarks"
CHOSEN = {  # name -> prompts, part, pictures of each
    "geneval": ("prompts.jsonl", None, 2),
    "dpg-bench": ("prompts.csv", None, 4),
    "longtext-bench": ("prompts.jsonl", "en", 2),
    "oneig": ("prompts.csv", "EN", 4),
    "t2i-compbench": ("prompts.txt", "color", 3),
    "hpsv2": ("prompts.json", "anime", 1),
    "vbench": ("prompts.json", None, 2),
    "evalscope": ("prompts.csv", None, 2),
}


def options(name: str, **changes) -> BenchmarkSettings:
    file, part, count = CHOSEN[name]
    given = {"name": name, "part": part, "prompts": str(DATA / name / file)}
    return BenchmarkSettings.of(given | {"images_per_prompt": count} | changes)


def settings(*chosen: BenchmarkSettings) -> EvaluateSettings:
    return EvaluateSettings.of({"bootstrap": 50, "benchmarks": list(chosen)})


def parts(plan: benchmark.Plan, folder: Path, side: int = 16, frames: int = 1) -> list[Path]:
    """Tables of pictures as `making.pictures` leaves them; a picture's red is its prompt, its green
    its number."""
    made = []
    for at, batch in enumerate(np.array_split(np.array(plans.samples(plan)), 3)):
        rows = []
        for item in batch:
            number = item["seed"] - plans.FIRST_SEED - item["prompt_index"] * plans.SEEDS
            picture = np.full((side * frames, side, 3), (item["prompt_index"], number, 9), np.uint8)
            rows.append(
                {"variant": plan.model, "prompt": item["prompt"], "seed": item["seed"], "read": ""}
                | {
                    "png": generation.to_png(picture),
                    "prompt_index": item["prompt_index"],
                    "source": b"",
                }
                | {"frames": frames}
            )
        made.append(folder / f"{at}.parquet")
        table = pd.DataFrame(rows)[schemas.IMAGES.names]
        tables.write(made[-1], table, schemas.IMAGES, {})
    return made


def laid_out(name: str, place: Path, model: str, **changes) -> benchmark.Plan:
    """Makes the pictures of a model, with their manifest."""
    plan = plans.plan(options(name, **changes), model, str(place / "pictures"))
    frames = 3 if registry.BENCHMARKS[name].videos else 1
    made = parts(plan, place.parent / f"parts-{name}-{model}", frames=frames)
    files, sides = benchmark_pictures.lay_out(plan, made, place / "pictures", 8)
    benchmark.write_manifest(place / f"{model}.json", plan, files, sides)
    return plan


@pytest.fixture
def scored(tmp_path):
    """A function that lays out a benchmark's pictures for two models and puts its scores there."""

    def make(name: str, models=("teacher", "p50"), **changes) -> Path:
        place = tmp_path / "benchmarks" / options(name, **changes).label
        for model in models:
            laid_out(name, place, model, **changes)
        for source in sorted((DATA / name).rglob("scores/**/*")) + sorted(
            (DATA / name).rglob("pictures/**/*")
        ):
            if source.is_file():
                target = place / source.relative_to(DATA / name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        return place.parent

    return make


def values(folder: Path, *chosen: BenchmarkSettings) -> dict[tuple[str, str], dict]:
    rows = benchmark_metrics.rows(folder, settings(*chosen), {"teacher", "p50"}, 0)
    assert all(np.isfinite(row["value"]) for row in rows)
    return {(row["variant"], row["metric"]): row for row in rows}


def test_the_schema_names_the_benchmarks():
    items = schema()["properties"]["evaluate"]["properties"]["benchmarks"]["items"]
    assert items["properties"]["name"]["enum"] == [*registry.BENCHMARKS] == [*CHOSEN]


@pytest.mark.parametrize("name", CHOSEN)
def test_patterns_hold_all_that_is_made_and_models_share_their_noise(name, tmp_path):
    mine, theirs = (plans.plan(options(name), model, "pictures") for model in ("p50", "teacher"))
    known = registry.BENCHMARKS[name]
    made = [file.path for file in known.files(mine)] + [*known.texts(mine)]
    for path in made:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    globs = [pattern.format(model="p50") for pattern in known.patterns]
    assert {str(p.relative_to(tmp_path)) for g in globs for p in tmp_path.glob(g)} == set(made)
    assert plans.samples(mine) == plans.samples(theirs)
    seeds = [item["seed"] for item in plans.samples(mine)]
    assert len(set(seeds)) == len(seeds) == mine.count * len(mine.prompts)
    pictures = [(file.prompt, n) for file in known.files(mine) for n in file.pictures]
    assert len(set(pictures)) == len(pictures) == len(seeds)
    fewer = {"images_per_prompt": 1}
    few = plans.samples(plans.plan(options(name, **fewer), "p50", "pictures"))
    assert {item["seed"] for item in few} == set(seeds[:: mine.count])


@pytest.mark.parametrize("name", CHOSEN)
def test_paths_are_those_that_the_scorer_found(name):
    """Its own file with scores names the pictures as it saw them, in our folder."""
    chosen = options(name)
    files = {
        file.path for file in registry.BENCHMARKS[name].files(plans.plan(chosen, "p50", "pictures"))
    }
    text = "".join(
        path.read_text() for path in registry.score_files(DATA / name, name, chosen.part, "p50")
    )
    seen = set(
        re.findall(r"pictures/(p50/[^\"',]+?\.(?:png|jpg|webp|mp4))", text.replace("\\/", "/"))
    )
    if name in ("oneig", "t2i-compbench", "hpsv2"):  # these name prompts, or only the model
        assert not seen
    else:
        missed = {"dpg-bench": 1, "vbench": 1}  # the scorers pass over these
        assert seen <= files and len(files - seen) == missed.get(name, 0)


def test_geneval(scored):
    folder = scored("geneval")
    place = folder / "geneval"
    lines = (DATA / "geneval" / "prompts.jsonl").read_text().splitlines()
    beside = place / "pictures/p50/00002/metadata.jsonl"
    assert json.loads(beside.read_text()) == json.loads(lines[2])
    picture = np.asarray(Image.open(place / "pictures/p50/00002/samples/0001.png"))
    assert (picture == (2, 1, 9)).all()
    made = values(folder, options("geneval"))
    for model in ("teacher", "p50"):
        summary = (DATA / "geneval" / f"{model}-summary.txt").read_text()
        total = float(re.search(r"Overall score .*: (\S+)", summary)[1])
        assert made[model, "geneval"]["value"] == pytest.approx(total, abs=1e-5)
        for tag, share in re.findall(r"^(\w+) += ([\d.]+)%", summary, re.M):
            assert made[model, f"geneval/{tag}"]["value"] == pytest.approx(float(share) / 100)
    row = made["p50", "geneval_difference"]
    fall = made["p50", "geneval"]["value"] - made["teacher", "geneval"]["value"]
    assert row["value"] == pytest.approx(fall) and row["ci_low"] <= row["value"] <= row["ci_high"]
    assert made["p50", "geneval"]["samples"] == 8 and row["higher_is_better"]
    assert ("teacher", "geneval_difference") not in made


def test_dpg_bench(scored):
    folder = scored("dpg-bench")
    grid = np.asarray(Image.open(folder / "dpg-bench/pictures/p50/whoops1.png"))
    assert grid.shape == (32, 32, 3)
    assert [tuple(grid[y, x, :2]) for y, x in ((0, 0), (0, 16), (16, 0), (16, 16))] == [
        (1, 0),
        (1, 1),
        (1, 2),
        (1, 3),
    ]
    made = values(folder, options("dpg-bench"))
    text = (DATA / "dpg-bench/scores/p50.txt").read_text()
    assert made["p50", "dpg-bench"]["value"] == pytest.approx(
        float(re.search(r"DPG-Bench score: (\S+)", text)[1])
    )
    entity = made["p50", "dpg-bench/entity"]
    assert f"entity: {entity['value']}" in text and np.isnan(entity["ci_low"])
    assert made["p50", "dpg-bench_difference"]["samples"] == 8  # the scorer fails on one prompt
    assert "dpg-bench/attribute - color" not in {metric for _, metric in made}


def test_longtext_bench(scored):
    folder = scored("longtext-bench")
    made = values(folder, options("longtext-bench"))
    for model in ("teacher", "p50"):
        row = made[model, "longtext-bench-en"]
        said = (DATA / "longtext-bench" / f"{model}-scores.txt").read_text()
        assert f"Text Score: {row['value']:.4f}\n" == said and row["samples"] == 6
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
    # Words count, not pictures: 4 of 6, 4 of 6, 1 of 1 and 0 of 1 for instance.
    lines = (DATA / "longtext-bench/scores/p50/results.jsonl").read_text().splitlines()
    signs = [row for row in map(json.loads, lines) if "poster" not in row["prompt"]]
    share = sum(r["match_word_count"] for r in signs) / sum(r["gt_word_count"] for r in signs)
    assert made["p50", "longtext-bench-en/sign"]["value"] == pytest.approx(share)


def test_oneig(scored):
    folder = scored("oneig")
    grid = Image.open(folder / "oneig-en/pictures/anime/p50/235.webp")
    assert grid.size == (32, 32)
    made = values(folder, options("oneig"))
    for model in ("teacher", "p50"):
        for name, column in (
            ("alignment", "alignment"),
            ("diversity", "total average"),
            ("style", "style"),
            ("reasoning", "reasoning"),
            ("text", "text score"),
            ("text/edit_distance", "ED"),
            ("text/completion", "CR"),
            ("text/words", "WAC"),
        ):
            path = next((DATA / f"oneig/scores/{model}").glob(f"{name.split('/')[0]}_score_*"))
            total = pd.read_csv(path, index_col=0)[column][model]
            assert made[model, f"oneig-en/{name}"]["value"] == pytest.approx(total), name
    alignment = made["p50", "oneig-en/alignment"]
    assert alignment["samples"] == 4 and alignment["ci_low"] <= alignment["value"]
    assert made["p50", "oneig-en/diversity"]["samples"] == 7
    assert made["p50", "oneig-en/style"]["samples"] == 2
    assert np.isnan(made["p50", "oneig-en/text"]["ci_low"])
    worse = {metric for (_, metric), row in made.items() if not row["higher_is_better"]}
    assert worse == {f"oneig-en/text/edit_distance{end}" for end in ("", "_difference")}


def test_t2i_compbench(scored):
    folder = scored("t2i-compbench")
    place = folder / "t2i-compbench-color/pictures/p50/samples"
    names = sorted(path.name for path in place.iterdir())
    assert names[0] == "The black nine was on top of the red card._000006.png"
    picture = np.asarray(Image.open(place / "a green card and a white zero_000004.png"))
    assert (picture == (1, 1, 9)).all()
    made = values(folder, options("t2i-compbench"))
    for model in ("teacher", "p50"):
        said = (DATA / "t2i-compbench" / f"{model}-score.txt").read_text()
        row = made[model, "t2i-compbench-color"]
        assert row["value"] == pytest.approx(float(said.partition(":")[2])) and row["samples"] == 9


def test_hpsv2(scored):
    made = values(scored("hpsv2"), options("hpsv2"))
    for model in ("teacher", "p50"):
        row = made[model, "hpsv2-anime"]
        said = (DATA / f"hpsv2/scores/{model}.txt").read_text()
        assert f"{model} anime           {row['value']:.2f} \t" in said and np.isnan(row["ci_low"])
    fall = made["p50", "hpsv2-anime_difference"]["value"]
    assert fall == pytest.approx(made["p50", "hpsv2-anime"]["value"] - row["value"] + fall)


def test_vbench(scored):
    imageio = pytest.importorskip("imageio.v2")
    folder = scored("vbench")
    with imageio.get_reader(folder / "vbench/pictures/p50/a person is writing-1.mp4") as reader:
        assert reader.get_meta_data()["fps"] == 8 and sum(1 for _ in reader) == 3
    made = values(folder, options("vbench"))
    for model in ("teacher", "p50"):
        for path in (DATA / f"vbench/scores/{model}").iterdir():
            for dimension, (total, videos) in json.loads(path.read_text()).items():
                row = made[model, f"vbench/{dimension}"]
                assert row["value"] == pytest.approx(total) and row["samples"] == len(videos)
                assert row["ci_low"] <= row["value"] <= row["ci_high"] or np.isnan(row["ci_low"])
    fall = made["p50", "vbench/imaging_quality_difference"]
    both = [made[model, "vbench/imaging_quality"]["value"] for model in ("p50", "teacher")]
    assert fall["value"] == pytest.approx(both[0] - both[1]) and abs(fall["value"]) < 1
    assert made["p50", "vbench/color"]["samples"] == 3  # of four: in one it saw no object
    assert len({metric for _, metric in made}) == 8  # four, and their differences


def test_evalscope(scored, caplog):
    folder = scored("evalscope")
    lines = (folder / "evalscope/pictures/p50.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    assert row["id"] == "a_1" and row["category"] == "warm"
    assert Path(row["reference_image_path"]) == folder / "evalscope/pictures/teacher/a_1.png"
    assert "reference_image_path" not in (folder / "evalscope/pictures/teacher.jsonl").read_text()
    with pytest.raises(
        UserError, match=r"teacher\.jsonl: line 1: ssim was not measured \(error: M"
    ):
        values(folder, options("evalscope"))
    shutil.rmtree(folder / "evalscope/scores/teacher")
    made = values(folder, options("evalscope"))
    reports = json.loads(next((DATA / "evalscope").rglob("p50/*/reports/p50/*.json")).read_text())
    for metric in reports["metrics"]:
        category = metric["identity"]["dimensions"].get("category")
        name = f"evalscope/{metric['identity']['name']}" + (f"/{category}" if category else "")
        mine = made["p50", name]
        assert mine["value"] == pytest.approx(metric["score"], abs=1e-4), name
        assert mine["higher_is_better"] and (category == "warm") == np.isnan(mine["ci_low"])
    assert "teacher has no scores yet; to score:\nevalscope eval --model-id teacher" in caplog.text


def damages():
    """(benchmark, file, how it is spoilt, what is said)."""

    def lines(change):
        return lambda path: path.write_text("".join(change(path.read_text().splitlines(True))))

    def text(old, new):
        return lambda path: path.write_text(path.read_text().replace(old, new, 1))

    geneval, dpg = ("geneval", "scores/p50.jsonl"), ("dpg-bench", "scores/p50.txt")
    yield *geneval, lines(lambda all_: all_[:-1]), "half written.*1 of 8"
    yield *geneval, lines(lambda all_: [*all_, all_[0]]), "line 9 scores .* a second time"
    yield *geneval, lambda p: p.write_bytes(p.read_bytes()[:-40]), "line 8 is not whole JSON"
    yield *geneval, text("red seven", "red six"), "line 1 has another prompt"
    yield *geneval, text('"correct":true', '"correct":1'), "does not say whether"
    yield *geneval, text('"tag":"single', '"tag":"double'), "another tag"
    yield *geneval, text("00000\\/samples", "00077\\/samples"), "no picture of geneval"
    yield *geneval, text("pictures\\/p50", "pictures\\/teacher"), "a picture of teacher, not of p50"
    yield *geneval, lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8"
    yield *geneval, lambda path: path.write_text("[1]\n"), "line 1 is no JSON object"
    yield *geneval, lambda path: path.write_text("[" * 100_000 + "\n"), "line 1 is not whole JSON"
    yield *geneval, lambda path: path.write_text(""), "half written"
    longtext = ("longtext-bench", "scores/p50/results.jsonl")
    yield *longtext, text('"match_word_count": 4', '"match_word_count": 7'), "7 of 6 words"
    yield *longtext, text(', "match_word_count": 4, "gt_word_count": 6', ""), "summary_scores.py"
    yield *longtext, text("0_0.png", "7_0.png"), "no picture of longtext-bench-en"
    yield *longtext, lines(lambda all_: all_[:-1]), "1 of 6 have no score"
    align = "scores/p50/alignment_score_EN_1.csv", "scores/p50/alignment_prompt_score_EN_1.csv"
    oneig = [("oneig", name) for name in align]
    yield *oneig[0], text("p50,", "teacher,"), "is not of p50"
    yield *oneig[0], text("p50,0", "p50,nan"), "no number"
    yield *oneig[1], text("anime_050,", "anime_999,"), "anime_999 is of no prompt"
    yield *oneig[1], text("anime_050,", "anime_235,"), "'anime_235' twice"
    yield *oneig[1], text(",p50", ",teacher"), "is not of p50"
    yield *oneig[1], lambda path: path.write_bytes(path.read_bytes()[:60] + b"\nanime"), "half wr"
    compbench = ("t2i-compbench", "pictures/p50/annotation_blip/vqa_result.json")
    yield *compbench, text('"question_id": 1', '"question_id": 77'), "is of picture 77"
    yield *compbench, text('"question_id": 1', '"question_id": 0'), "is of picture 0"
    yield *compbench, lambda path: path.write_text("[]"), "is of 0 pictures, and 9 were made"
    yield *compbench, lambda path: path.write_text("{}"), "no list"
    yield "hpsv2", "scores/p50.txt", text("p50 anime", "p51 anime"), "has 0 lines"
    yield "hpsv2", "scores/p50.txt", lines(lambda all_: [*all_, *all_]), "has 2 lines"
    vbench = ("vbench", "scores/p50/results_2026-12-01-03_50_00_eval_results.json")
    yield *vbench, lambda path: path.write_text('{"color": 0.5}'), "'color' has not a total"
    yield *vbench, lambda path: path.write_text('{"color": [0.5, []]}'), "color has no scores"
    yield *vbench, text("turns-0.mp4", "turns-7.mp4"), "no picture of vbench"
    yield *vbench, text("pictures/p50", "pictures/teacher"), "a picture of teacher"
    yield *vbench, lambda path: path.write_bytes(path.read_bytes()[:99]), "not whole JSON"
    yield *oneig[0], lambda path: path.write_bytes(path.read_bytes()[:-9]), "does not end"
    yield *oneig[0], lambda path: path.write_text("[" * 200_000), "is no table"
    yield *oneig[1], lines(lambda all_: all_[:20]), "half written: it has no row of anime_050"
    yield *dpg, lines(lambda all_: [*all_, *all_]), "scores of 2 runs"
    for name in ("x_difference", "two\\nlines", "\\ud800", "x" * 101):
        yield *vbench, text('"temporal_flickering"', f'"{name}"'), "names a metric"
    yield *dpg, lines(lambda all_: all_[:-1]), "ends without a score"
    yield *dpg, lines(lambda all_: all_[1:]), "half written"
    yield *dpg, text("DPG-Bench score: ", "DPG-Bench score: 9"), "says that the DPG-Bench score is"
    yield (
        *dpg,
        lambda path: path.write_text(re.sub(", [^,]*\n", "\n", path.read_text(), count=1)),
        "line 1",
    )
    yield *dpg, text("drawtext3.png, ", "drawtext3.png, 0.25, "), "line|--pic-num"
    yield *dpg, text("whoops1.png", "other.png"), "no picture of dpg-bench"
    yield *dpg, text(", 0.", ", nan0."), "no number"


@pytest.mark.parametrize(("name", "file", "spoil", "said"), [*damages()])
def test_a_file_that_is_half_written_or_foreign_is_refused_by_name(name, file, spoil, said, scored):
    folder = scored(name)
    path = folder / options(name).label / file
    spoil(path)
    with pytest.raises(UserError, match=f"(?s)^{re.escape(str(path))}: .*{said}"):
        values(folder, options(name))


def test_every_benchmark_and_part_has_its_metrics_in_tables_and_figures():
    labels = [
        options(name, part=part).label
        for name, known in registry.BENCHMARKS.items()
        for part in known.parts or (None,)
    ]
    assert "hpsv2-concept-art" in labels
    given = [name for label in labels for name in (label, f"{label}/color", f"{label}_difference")]
    assert registry.of_metrics([*given, "psnr"]) == [
        name for label in labels for name in (label, f"{label}/color")
    ]


@pytest.mark.parametrize("place", ["reports", "reviews"])
def test_evalscope_is_read_below_a_folder_of_any_name(place, scored, tmp_path):
    shutil.move(scored("evalscope", models=["p50"]), tmp_path / place / "benchmarks")
    assert ("p50", "evalscope/ssim") in values(
        tmp_path / place / "benchmarks", options("evalscope")
    )


def test_pictures_that_are_gone_and_files_of_others_beside_them(scored):
    folder = scored("geneval")
    place = folder / "geneval"
    (place / "notes.json").write_text("{}")
    shutil.copyfile(place / "p50.json", place / "old.json")  # a variant that the run has no more
    assert {name for name, _ in values(folder, options("geneval"))} == {"teacher", "p50"}
    (place / "pictures/p50/00000/samples/0000.png").unlink()
    with pytest.raises(UserError, match=r"samples/0000\.png: this picture is gone.*p50\.json"):
        values(folder, options("geneval"))


def test_scores_that_are_older_than_the_pictures_do_not_count(scored, caplog):
    folder = scored("geneval")
    for path in (folder / "geneval/scores").iterdir():
        os.utime(path, (time.time() - 99, time.time() - 99))
    assert values(folder, options("geneval")) == {}
    assert "p50 has scores that are older than its pictures" in caplog.text


def test_pictures_that_stay_the_same_are_left_alone_and_others_go(tmp_path):
    place = tmp_path / "geneval"
    laid_out("geneval", place, "p50")
    kept = place / "pictures/p50/00000/samples/0000.png"
    os.utime(kept, (1, 1))
    (place / "pictures/p50/mine.txt").write_text("mine")
    laid_out("geneval", place, "p50", images_per_prompt=1)
    assert kept.stat().st_mtime == 1 and not kept.with_name("0001.png").exists()
    assert (place / "pictures/p50/mine.txt").exists()


def test_kinds_and_shapes_that_a_scorer_cannot_read_are_refused(tmp_path):
    plan = plans.plan(options("dpg-bench"), "p50", "pictures")
    benchmark_pictures.refuse_unfit(plan, parts(plan, tmp_path / "a")[0])
    with pytest.raises(
        UserError, match="dpg-bench scores pictures, but this pipeline makes videos"
    ):
        benchmark_pictures.refuse_unfit(plan, parts(plan, tmp_path / "b", frames=2)[0])
    with pytest.raises(UserError, match="pictures have 32 x 16 pixels"):
        plans.refuse_sides(plan, {"height": 16, "width": 32})
    plans.refuse_sides(plan, {"height": 16})


BAD_PROMPTS = [
    ("geneval", "", "is empty"),
    ("geneval", '{"prompt": "a"}\n', "line 1: has no list 'include'"),
    ("geneval", '{"prompt": "a", "include": []}\n', "'tag' is None"),
    ("geneval", "a cat\n", "line 1 is not JSON"),
    ("dpg-bench", "prompt\na\n", "has no column item_id, text"),
    ("dpg-bench", 'item_id,text\n"a,b\n', "can't be read as CSV|has no column"),
    ("evalscope", "id,prompt\n../a,b\n", "would be the name of a file"),
    ("evalscope", "id,prompt\nA,b\na,c\n", "'a' is there twice"),
    ("evalscope", f"id,prompt\n{'a' * 300},b\n", "would be the name of a file"),
    ("evalscope", "id,prompt,category\na,b,c_difference\n", "would be the name of a metric"),
    ("geneval", '{"prompt": "a", "include": [], "tag": "\\ud800"}\n', "would be the name of a met"),
]
DPG = "item_id,text,proposition_id,dependency,question_natural_language\n"
BAD_PROMPTS += [
    ("dpg-bench", f"{DPG}a.b,x,1,0,q\n", "has a dot"),
    ("dpg-bench", f"{DPG}a,x,1,0,q\nb,y,1,0,q\na,x,2,0,q\n", "rows of 'a' are apart"),
    ("dpg-bench", f"{DPG}a,x,1,0,q\na,y,2,0,q\n", "'a' has two texts"),
    ("dpg-bench", f"{DPG}a/b,x,1,0,q\n", "would be the name of a file"),
    ("longtext-bench", '{"prompt": "a", "prompt_id": "../a"}\n', "has to be a number"),
    ("longtext-bench", '{"prompt": "a", "prompt_id": 1}\n' * 2, "'1' is there twice"),
    ("oneig", "category,id,prompt_en\nPortrait,1,a\n", "has to have three digits"),
    ("oneig", "category,id,prompt_en\nportrait,001,a\n", "is none of Anime_Stylization"),
    ("oneig", "category,id,prompt_cn\nPortrait,001,a\n", "has no column prompt_en"),
    ("t2i-compbench", "a_b\n", "has an underscore"),
    ("t2i-compbench", "a/b\n", "would be the name of a file"),
    ("hpsv2", '{"a": 1}', "holds no list"),
    ("hpsv2", '["a", 1]', "prompt 1 is 1"),
    ("hpsv2", '["a"', "is not whole JSON"),
    ("vbench", "[1]", "entry 0 is no object"),
    ("vbench", '[{"prompt_en": "a"}]', "has no list 'dimension'"),
    ("vbench", '[{"prompt_en": "a/b", "dimension": ["color"]}]', "would be the name of a file"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_PROMPTS)
def test_prompts_that_cannot_be_used_are_refused_by_name(name, content, said, tmp_path):
    path = tmp_path / CHOSEN[name][0]
    path.write_text(content)
    with pytest.raises(
        UserError, match=rf"^evaluate\.benchmarks: {name}[a-z-]*: prompts: .*({said})"
    ):
        plans.plan(options(name, prompts=str(path)), "teacher", "pictures")


def test_options_that_do_not_suit_a_benchmark_are_refused():
    with pytest.raises(UserError, match="has no parts, but part is 'color'"):
        plans.plan(options("geneval", part="color"), "teacher", "pictures")
    with pytest.raises(UserError, match="takes at most 4; lower it"):
        plans.plan(options("dpg-bench", images_per_prompt=5), "teacher", "pictures")
    with pytest.raises(UserError, match="set it to one of en, zh"):
        plans.plan(options("longtext-bench", part=None), "teacher", "pictures")
    with pytest.raises(UserError, match="'gen' is none of geneval"):
        plans.of(BenchmarkSettings.of({"name": "gen"}))


def test_scores_are_in_the_summary_and_in_figures(scored, tmp_path):
    folder = scored("geneval")
    rows = benchmark_metrics.rows(folder, settings(options("geneval")), {"teacher", "p50"}, 0)
    row = dict.fromkeys(schemas.METRICS.names, 0.5) | {"samples": 2, "higher_is_better": True}
    for name, size in (("teacher", 1.0), ("p50", 0.5)):
        more = {"variant": name, "metric": "parameter_fraction", "value": size}
        rows += [row | more, row | more | {"metric": "psnr"}]
    metrics = pd.DataFrame(rows)[schemas.METRICS.names]
    tables.write(tmp_path / "metrics.parquet", metrics, schemas.METRICS, {})
    table = summary.scores(tmp_path / "metrics.parquet")
    value = {(row["variant"], row["metric"]): row for row in rows}
    share = value["p50", "geneval"]["value"]
    low = value["p50", "geneval_difference"]["ci_low"]
    assert [row["benchmark"] for row in table][:2] == ["geneval", "geneval/single_object"]
    assert table[0]["p50"].startswith(f"{share:.4g} ({low:+.2g} to ")
    assert "(" not in table[0]["teacher"] and list(table[0]) == ["benchmark", "teacher", "p50"]
    rows_of = summary.rows(tmp_path / "metrics.parquet", "models", "t")
    printed = summary.text(rows_of, table)
    assert "geneval/two_object" in printed and "own scorers" in printed
    shown = publish_doctree(summary.rst(rows_of, table), settings_overrides={"halt_level": 2})
    assert "geneval/two_object" in shown.astext()

    drawn = benchmark_scores(metrics)
    titles = [ax.get_title("left") for ax in drawn.axes if ax.get_visible()]
    assert titles == [row["benchmark"] for row in table] and len(titles) == 4
    labels = [ax.get_ylabel() for ax in quality_against_cost(metrics).axes]
    assert "geneval" in labels and "geneval/two_object" not in labels
    assert "No scores yet" in benchmark_scores(metrics[:0]).texts[1].get_text()
    rows = [row | {"variant": "p50", "metric": f"geneval/{number}"} for number in range(70)]
    many = benchmark_scores(pd.DataFrame(rows))
    assert len(many.axes) == 60 and "10 more are in" in many.texts[1].get_text()
    note = quality_against_cost(metrics.replace({"samples": {8: 9999}})).texts[1].get_text()
    assert note.startswith("2 samples")


def test_gather_metrics_adds_the_scores_that_are_there(scored, tmp_path):
    folder = scored("geneval")
    (folder / "geneval/scores/teacher.jsonl").unlink()
    row = dict.fromkeys(schemas.METRICS.names, 0.5) | {"samples": 2, "higher_is_better": True}
    models = ["teacher", "p50"]
    measured = pd.DataFrame([row | {"variant": name, "metric": "psnr"} for name in models])
    tables.write(tmp_path / "measured.parquet", measured, schemas.METRICS, {"a": "b"})
    config = {"seed": 1, "evaluate": {"bootstrap": 9, "benchmarks": [vars(options("geneval"))]}}
    paths = {"measured": tmp_path / "measured.parquet", "metrics": tmp_path / "metrics.parquet"}
    tiny.stage("gather_metrics", config, **paths, benchmarks=folder)
    made = tables.read(paths["metrics"], schemas.METRICS).to_pandas()
    assert made["metric"].tolist() == ["psnr", "psnr", "geneval"] + [
        f"geneval/{tag}" for tag in ("single_object", "two_object", "colors")
    ]
    assert made["variant"].tolist() == ["teacher", *["p50"] * 5]
    assert made["teacher_value"].isna().tolist() == [False, False, *[True] * 4]
    assert tables.provenance(paths["metrics"]) == {"a": "b"}
    tiny.stage("gather_metrics", config, **paths)  # without benchmarks
    assert len(tables.read(paths["metrics"])) == 2
