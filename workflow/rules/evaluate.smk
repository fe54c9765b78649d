# Teacher and variants on the same prompts and seeds.
#
# in:  the teacher, record/calls.parquet, the evaluation prompts and every models/<variant>/
# out: evaluation/measured.parquet, quality, size and speed; evaluation/images.parquet
#
# Finished batches wait in state/evaluate, as in record.smk. gather_metrics.smk makes metrics.parquet of
# it, so that scores of benchmarks, which come later, have nothing measured again.


rule evaluate:
    input:
        script=program("evaluate.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        prompts=config["evaluate"]["prompts"],
        pictures=pictures("evaluate"),
        models=models(),
    output:
        metrics=result("evaluation/measured.parquet"),
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
        config=subset("seed", "device", "processes", "teacher", "pipeline", *evaluate_keys()),
        state=result("state/evaluate"),
        teacher=teacher_stamp(),
        prompts=prompts_stamp("evaluate"),
        code=code("evaluate.py"),
    message:
        "Evaluating the teacher and its variants"
    shell:
        command("input.calls", "input.models", "output.metrics", "output.images", "params.state")
