# What every run of blocks costs if one untrained student replaces it: the price in selection.
#
# in:  the teacher and record/calls.parquet
# out: sensitivity/intervals.parquet, the velocity error of each run


rule sensitivity:
    input:
        script=program("sensitivity.py"),
        launcher=program("launch.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
    output:
        table=result("sensitivity/intervals.parquet"),
    log:
        result("logs/sensitivity.log"),
    benchmark:
        result("benchmarks/sensitivity.tsv")
    conda:
        ENVIRONMENT
    threads: cores_beside_one_process
    resources:
        gpu=gpu,
        mem_mb=megabytes("sensitivity", 16000),
        runtime=minutes("sensitivity", 2880),
        processes=config["processes"],
        device=config["device"],
    params:
        config=subset(
            "seed",
            "device",
            "teacher",
            "sensitivity",
            "prune",
            *(WIDTH_FITS if config["prune"]["start"] == "solved" else []),
        ),
        state=result("state/sensitivity"),
        teacher=teacher_stamp(),
        code=code("sensitivity.py"),
    message:
        "Measuring what each run of blocks costs"
    shell:
        "python {input.launcher} --processes {resources.processes} --threads {threads} "
        "--device {resources.device} {input.script} --config {params.config:q} "
        "--calls {input.calls} --state {params.state} --table {output.table} 2>&1 | tee {log}"
