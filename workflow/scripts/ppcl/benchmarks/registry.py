"""The benchmarks that `evaluate.benchmarks` names. A new one is an entry here, and its name in the
config's schema; all that knows one of them by name are its functions."""

import re
from collections.abc import Iterable
from pathlib import Path

from ppcl.benchmarks import layouts, prompt_files, scores
from ppcl.benchmarks.benchmark import Benchmark

BENCHMARKS = {
    "geneval": Benchmark(
        about="objects, counts, colours and places (djghosh13/geneval)",
        prompts=prompt_files.geneval,
        files=layouts.geneval,
        texts=layouts.geneval_texts,
        patterns=("{model}/*/samples/*.png", "{model}/*/metadata.jsonl"),
        scores=scores.geneval,
        found=lambda model, part: (f"scores/{model}.jsonl",),
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
        found=lambda model, part: (f"scores/{model}.txt",),
        command="accelerate launch dpg_bench/compute_dpg_bench.py "
        "--image-root-path {pictures}/{model} --resolution {side} --pic-num {count} "
        "--csv {prompts} --res-path {scores}/{model}.txt",
        count=4,
        most=4,
        columns=2,
        square=True,
    ),
    "evalscope": Benchmark(
        about="CLIPScore, PickScore, HPSv2, ImageReward, LPIPS ... (modelscope/evalscope)",
        prompts=prompt_files.any_prompts,
        files=layouts.numbered,
        texts=layouts.evalscope_texts,
        patterns=("{model}/*.png", "{model}.jsonl"),
        scores=scores.evalscope,
        found=lambda model, part: (
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
    patterns = BENCHMARKS[name].found(model, part or "") if name in BENCHMARKS else ()
    return sorted({path for each in patterns for path in folder.glob(each) if path.is_file()})


def of_metrics(metrics: Iterable[str]) -> list[str]:
    """Metrics of metrics.parquet that are of a benchmark, each once; not their differences."""
    names = "|".join(map(re.escape, BENCHMARKS))
    mine = re.compile(rf"({names})(-[a-z0-9_]+)?(/.*)?", re.S)
    return [
        metric
        for metric in dict.fromkeys(metrics)
        if mine.fullmatch(metric) and not metric.endswith("_difference")
    ]
