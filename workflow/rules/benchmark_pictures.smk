# One model's pictures for a benchmark of the field, where that benchmark's own scorer reads them.
#
# in:  the teacher or a models/<variant>/, the benchmark's prompts
# out: evaluation/benchmarks/<benchmark>/pictures/, and <model>.json beside it, which lists them
#
# Finished batches wait in state/benchmarks, as in record.smk.


rule benchmark_pictures:
    input:
        script=program("benchmark_pictures.py"),
        teacher=teacher_files(),
        prompts=lambda wildcards: benchmark(wildcards.benchmark)["prompts"],
        model=lambda wildcards: (
            [] if wildcards.model == "teacher" else result(f"models/{wildcards.model}")
        ),
    output:
        manifest=result("evaluation/benchmarks/{benchmark}/{model}.json"),
    log:
        result("logs/benchmark_pictures-{benchmark}-{model}.log"),
    benchmark:
        result("benchmarks/benchmark_pictures-{benchmark}-{model}.tsv")
    conda:
        ENVIRONMENT
    threads: every_core
    resources:
        **limits("benchmark_pictures", mem_mb=32000, runtime=1440),
    params:
        config=lambda wildcards: subset_for_benchmark(wildcards.benchmark),
        files=optional("model"),
        pictures=lambda wildcards: result(f"evaluation/benchmarks/{wildcards.benchmark}/pictures"),
        state=lambda wildcards: result(f"state/benchmarks/{wildcards.benchmark}/{wildcards.model}"),
        teacher=teacher_stamp(),
        prompts=lambda wildcards: file_stamp(benchmark(wildcards.benchmark)["prompts"]),
        code=code("benchmark_pictures.py"),
    message:
        "Making pictures of {wildcards.model} for {wildcards.benchmark}"
    shell:
        command(
            "benchmark=wildcards.benchmark",
            "{params.files}",
            "params.pictures",
            "output.manifest",
            "params.state",
        )
