# Teacher and variants on the same prompts and seeds.
#
# in:  the teacher, record/calls.parquet, the evaluation prompts and every models/<variant>/
# out: evaluation/metrics.parquet, quality, size and speed; evaluation/images.parquet
#
# Finished batches wait in state/evaluate, as in record.smk.


rule evaluate:
    input:
        script=program("evaluate.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        prompts=config["evaluate"]["prompts"],
        pictures=pictures("evaluate"),
        models=models(),
    output:
        metrics=result("evaluation/metrics.parquet"),
        images=result("evaluation/images.parquet"),
    log:
        result("logs/evaluate.log"),
    benchmark:
        result("benchmarks/evaluate.tsv")
    conda:
        ENVIRONMENT
    threads: every_core
    resources:
        **limits("evaluate", mem_mb=32000, runtime=720),
    params:
        config=subset("seed", "device", "processes", "teacher", "pipeline", "evaluate"),
        state=result("state/evaluate"),
        teacher=teacher_stamp(),
        prompts=prompts_stamp("evaluate"),
        code=code("evaluate.py"),
    message:
        "Evaluating the teacher and its variants"
    shell:
        command("input.calls", "input.models", "output.metrics", "output.images", "params.state")
