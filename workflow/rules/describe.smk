# The model card of one variant, and its folder made ready to be published.
#
# in:  models/<variant>/, variants/units.parquet, evaluation/, and the teacher's card, if it is there
# out: cards/<variant>/: README.md with pictures, which are also put into models/<variant>/, where
#      pruning.json gets the metrics. So the card there goes with the model, and comes again with it.


rule describe:
    input:
        script=program("describe.py"),
        model=result("models/{variant}"),
        units=result("variants/units.parquet"),
        metrics=result("evaluation/metrics.parquet"),
        images=result("evaluation/images.parquet"),
        teacher_card=teacher_card(),
    output:
        card=directory(result("cards/{variant}")),
    log:
        result("logs/describe-{variant}.log"),
    benchmark:
        result("benchmarks/describe-{variant}.tsv")
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=8000,  # videos of several models
        runtime=30,
    params:
        config=subset("teacher", "pipeline", "record.samples"),
        code=code("describe.py"),
    message:
        "Describing {wildcards.variant}"
    shell:
        command(
            "wildcards.variant",
            "input.model",
            "input.units",
            "input.metrics",
            "input.images",
            "output.card",
        )
