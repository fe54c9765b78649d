# What budgets between the smallest variant and the teacher would get, without further training.
# Choices that the config requires are ignored.
#
# in:  what choose.smk takes, and variants/sets.json
# out: pareto/points.parquet, quality, size and speed at evenly spaced budgets


rule pareto:
    input:
        **launched("pareto.py"),
        **model_files(),
        **price_files(),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        sets=result("variants/sets.json"),
    output:
        points=result("pareto/points.parquet"),
    log:
        result("logs/pareto.log"),
    benchmark:
        result("benchmarks/pareto.tsv")
    conda:
        ENVIRONMENT
    threads: every_core
    resources:
        **limits("pareto", mem_mb=32000, runtime=240, launched=True),
    params:
        config=subset_for_budgets(
            "seed",
            "device",
            "teacher",
            "choose",
            *CONSTRAINTS,
            "pareto",
            "evaluate.velocity_rows",
            "evaluate.batch_size",
            "evaluate.bootstrap",
            "evaluate.latency_repeats",
        ),
        files=optional(*MODELS, *PRICES),
        teacher=teacher_stamp(),
        code=code("pareto.py"),
    message:
        "Measuring the budgets between"
    shell:
        command("input.calls", "input.sets", "{params.files}", "output.points", launched=True)
