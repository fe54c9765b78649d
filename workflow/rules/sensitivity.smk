# What every run of blocks costs if one untrained student replaces it: the price in selection.
#
# in:  the teacher and record/calls.parquet
# out: sensitivity/intervals.parquet, the velocity error of each run


rule sensitivity:
    input:
        **launched("sensitivity.py"),
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
        **limits("sensitivity", mem_mb=16000, runtime=2880, launched=True),
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
        command("input.calls", "params.state", "output.table", launched=True)
