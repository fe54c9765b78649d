# What every budget would get from the same students, pins aside, without further training.
#
# in:  the teacher, record/calls.parquet, the plan, the trained students and their errors
# out: pareto/points.parquet, quality, size and speed at evenly spaced budgets


rule pareto:
    input:
        script=program("pareto.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        plan=result("prune/plan.json"),
        students=taught("students.safetensors"),
        errors=taught("errors.parquet"),
    output:
        points=result("pareto/points.parquet"),
    log:
        result("logs/pareto.log"),
    benchmark:
        result("benchmarks/pareto.tsv")
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        gpu=1,
        mem_mb=megabytes("pareto", 32000),
        runtime=minutes("pareto", 240),
    params:
        config=subset(
            "seed",
            "device",
            "teacher",
            "pareto",
            "evaluate.velocity_rows",
            "evaluate.batch_size",
            "evaluate.bootstrap",
            "evaluate.latency_repeats",
        ),
        teacher=teacher_stamp(),
        code=code("pareto.py"),
    message:
        "Measuring the budgets between"
    shell:
        "python {input.script} --config {params.config:q} "
        "--calls {input.calls} --plan {input.plan} --students {input.students} "
        "--errors {input.errors} --points {output.points} 2>&1 | tee {log}"
