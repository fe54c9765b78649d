# All metrics of a run: what evaluate measured, and what scorers of benchmarks left.
#
# in:  evaluation/measured.parquet, lists of the benchmarks' pictures, and the files with scores that are
#      there; a new or newer one reruns it
# out: evaluation/metrics.parquet


rule gather_metrics:
    input:
        script=program("gather_metrics.py"),
        measured=result("evaluation/measured.parquet"),
        pictures=benchmark_manifests(),
        scores=benchmark_scores(),
    output:
        metrics=result("evaluation/metrics.parquet"),
    log:
        result("logs/gather_metrics.log"),
    benchmark:
        result("benchmarks/gather_metrics.tsv")
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        config=subset("seed", "evaluate.bootstrap", "evaluate.benchmarks"),
        benchmarks=as_it_is(
            f"--benchmarks {result('evaluation/benchmarks')}" if benchmarks() else ""
        ),
        code=code("gather_metrics.py"),
    message:
        "Gathering metrics"
    shell:
        command("input.measured", "{params.benchmarks}", "output.metrics")
