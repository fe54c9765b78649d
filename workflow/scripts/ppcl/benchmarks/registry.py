"""The benchmarks that `evaluate.benchmarks` names. A new one is an entry here, and its name in the
config's schema; all that knows one of them by name are its functions."""

from collections.abc import Iterable
from pathlib import Path

from ppcl.benchmarks import layouts, prompt_files, scores
from ppcl.benchmarks.benchmark import Benchmark
from ppcl.settings import BenchmarkSettings

# Part of T2I-CompBench -> folder in which its scorer leaves scores, inside that of the pictures.
COMPBENCH = {
    **dict.fromkeys(("color", "shape", "texture"), "annotation_blip"),
    "spatial": "labels/annotation_obj_detection_2d",
    "3d_spatial": "labels/annotation_obj_detection_3d",
    "numeracy": "annotation_num",
    "non_spatial": "annotation_clip",
    "complex": "annotation_3_in_1",
}
# Its shell scripts set IMAGE_GRIDS and read IMAGE_GRID, so its programs are called without them.
ONEIG = " && ".join(
    [
        *(
            f"python -m scripts.{name}.{name}_score --mode {{part}} --model_names {{model}} "
            f"--image_grid {{grid}} --image_dirname {{pictures}}{more}"
            for name, more in (
                ("alignment", ""),
                ("diversity", " --class_items anime human object text reasoning"),
                ("text", "/text"),
                ("style", "/anime"),
                ("reasoning", "/reasoning"),
            )
        ),
        "mkdir -p {scores}/{model}",
        "mv results/*_score_{part}_*.csv {scores}/{model}/",
    ]
)

BENCHMARKS = {
    "geneval": Benchmark(
        about="objects, counts, colours and places (djghosh13/geneval)",
        prompts=prompt_files.geneval,
        files=layouts.geneval,
        texts=layouts.geneval_texts,
        patterns=("{model}/*/samples/*.png", "{model}/*/metadata.jsonl"),
        scores=scores.geneval,
        score_patterns=lambda model, part: (f"scores/{model}.jsonl",),
        command="python evaluation/evaluate_images.py {pictures}/{model} "
        "--outfile {scores}/{model}.jsonl --model-path <folder of the detector>",
        count=4,
    ),
    "dpg-bench": Benchmark(
        about="long prompts, asked about one fact at a time (TencentQQGYLab/ELLA)",
        prompts=prompt_files.dpg_bench,
        files=layouts.grids,
        patterns=("{model}/*.png",),
        scores=scores.dpg_bench,
        score_patterns=lambda model, part: (f"scores/{model}.txt",),
        command="accelerate launch dpg_bench/compute_dpg_bench.py "
        "--image-root-path {pictures}/{model} --resolution {side} --pic-num {count} "
        "--csv {prompts} --res-path {scores}/{model}.txt",
        count=4,
        most=4,
        columns=2,
        square=True,
    ),
    "longtext-bench": Benchmark(
        about="long texts to be written in the picture (X-Omni-Team/X-Omni, textbench)",
        prompts=prompt_files.longtext_bench,
        files=layouts.numbered,
        patterns=("{model}/*.png",),
        scores=scores.longtext_bench,
        score_patterns=lambda model, part: (f"scores/{model}/results.jsonl",),
        command="torchrun --nproc_per_node 1 evaluate_text_reward.py --mode {part} "
        "--sample_dir {pictures}/{model} --output_dir {scores}/{model} && "
        "mv {scores}/{model}/results_chunk0.jsonl {scores}/{model}/results.jsonl && "
        "python summary_scores.py {scores}/{model}/results.jsonl --mode {part}",
        count=4,
        parts=("en", "zh"),
    ),
    "oneig": Benchmark(
        about="alignment, texts, reasoning, style, diversity (OneIG-Bench/OneIG-Benchmark)",
        prompts=prompt_files.oneig,
        files=layouts.oneig,
        patterns=("*/{model}/*.webp",),
        scores=scores.oneig,
        score_patterns=lambda model, part: (f"scores/{model}/*_score_{part}_*.csv",),
        command=ONEIG,
        count=4,
        most=9,
        columns=2,
        parts=("EN", "ZH"),
    ),
    "t2i-compbench": Benchmark(
        about="attributes, places, numbers and acts of several things (Karine-Huang/T2I-CompBench)",
        prompts=prompt_files.t2i_compbench,
        files=layouts.t2i_compbench,
        patterns=("{model}/samples/*.png",),
        scores=scores.t2i_compbench,
        score_patterns=lambda model, part: (
            f"pictures/{model}/{COMPBENCH.get(part, '')}/vqa_result.json",
        ),
        command="<for {part}: BLIP_vqa.py, 2D_spatial_eval.py, 3D_spatial_eval.py, "
        "numeracy_eval.py, CLIP_similarity.py or, after the first two and the last, 3_in_1.py> "
        "with {pictures}/{model}/ as --out_dir or --outpath",
        count=10,
        parts=tuple(COMPBENCH),
    ),
    "hpsv2": Benchmark(
        about="what people prefer, in four styles (tgxs002/HPSv2)",
        prompts=prompt_files.hpsv2,
        files=layouts.hpsv2,
        patterns=("{model}/*/*.jpg",),
        scores=scores.hpsv2,
        score_patterns=lambda model, part: (f"scores/{model}.txt",),
        command="""python -c "import hpsv2; hpsv2.evaluate('{pictures}/{model}')" """
        "| tee {scores}/{model}.txt",
        count=1,
        most=1,
        parts=("anime", "concept-art", "paintings", "photo"),
    ),
    "vbench": Benchmark(
        about="videos, in 16 dimensions (Vchitect/VBench)",
        prompts=prompt_files.vbench,
        files=layouts.vbench,
        patterns=("{model}/*.mp4",),
        scores=scores.vbench,
        score_patterns=lambda model, part: (f"scores/{model}/*_eval_results.json",),
        command="python evaluate.py --videos_path {pictures}/{model} "
        "--output_path {scores}/{model} --full_json_dir {prompts} --dimension <one or several>",
        count=5,
        most=5,
        videos=True,
    ),
    "evalscope": Benchmark(
        about="CLIPScore, PickScore, HPSv2, ImageReward, LPIPS ... (modelscope/evalscope)",
        prompts=prompt_files.any_prompts,
        files=layouts.numbered,
        texts=layouts.evalscope_texts,
        patterns=("{model}/*.png", "{model}.jsonl"),
        scores=scores.evalscope,
        score_patterns=lambda model, part: (
            f"scores/{model}/**/reviews/*/general_t2i_{model}.jsonl",
            f"scores/{model}/**/reports/*/general_t2i.json",
        ),
        command="evalscope eval --model-id {model} --model-task image_generation "
        "--eval-type text2image --datasets general_t2i --work-dir {scores}/{model} --dataset-args "
        """'{{"general_t2i": {{"dataset_id": "{pictures}/{model}.jsonl", """
        """"metric_list": ["PickScore", "CLIPScore"]}}}}'""",
        count=1,
    ),
}


def score_files(folder: Path, name: str, part: str | None, model: str) -> list[Path]:
    """The files with a model's scores for a benchmark that are there, in the order of their names.

    folder: of the benchmark, below evaluation/benchmarks.
    """
    patterns = BENCHMARKS[name].score_patterns(model, part or "") if name in BENCHMARKS else ()
    return sorted({path for each in patterns for path in folder.glob(each) if path.is_file()})


def of_metrics(metrics: Iterable[str]) -> list[str]:
    """Metrics of metrics.parquet that are of a benchmark, each once; not their differences."""
    labels = {
        BenchmarkSettings.of({"name": name, "part": part}).label
        for name, known in BENCHMARKS.items()
        for part in (None, *known.parts)
    }
    return [
        metric
        for metric in dict.fromkeys(metrics)
        if metric.partition("/")[0] in labels and not metric.endswith("_difference")
    ]
