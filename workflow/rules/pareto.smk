# What the budgets between would get, required choices aside, without further training.
#
# in:  what choose.smk takes, and variants/sets.json
# out: pareto/points.parquet, quality, size and speed at evenly spaced budgets


rule pareto:
    input:
        script=program("pareto.py"),
        launcher=program("launch.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        sets=result("variants/sets.json"),
        maps=widths("maps.safetensors"),
        conditioning=conditioning(),
        start=start(),
        distill=taught("distill", "students.safetensors"),
        narrow=taught("narrow", "students.safetensors"),
        subsets=taught("subsets", "students.safetensors"),
        selection=selection(),
        width=widths("measured.parquet"),
        latency=latency(),
        distill_unit_costs=taught("distill", "unit_costs.parquet"),
        narrow_unit_costs=taught("narrow", "unit_costs.parquet"),
        subsets_unit_costs=taught("subsets", "unit_costs.parquet"),
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
        gpu=gpu,
        mem_mb=megabytes("pareto", 32000),
        runtime=minutes("pareto", 240),
        processes=config["processes"],
        device=config["device"],
    params:
        config=lambda wildcards: configuration.subset(
            {**config, "variants": configuration.budgets(config["variants"])},
            "seed",
            "device",
            "teacher",
            "choose",
            "variants",
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
        "python {input.launcher} --processes {resources.processes} --threads {threads} "
        "--device {resources.device} {input.script} --config {params.config:q} "
        "--calls {input.calls} --sets {input.sets} {params.files} --points {output.points} 2>&1 | tee {log}"
