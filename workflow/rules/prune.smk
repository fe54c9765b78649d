# The pruned model before training: the units of the selection, and their start weights.
#
# in:  the teacher, intervals/intervals.parquet, width/candidates.parquet and latency/blocks.parquet
#      (if there are any), and record/calls.parquet, on which linear maps are fitted
# out: prune/selection.json, what each unit replaces; prune/students.safetensors, start weights


rule prune:
    input:
        script=program("prune.py"),
        teacher=teacher_files(),
        intervals=result("intervals/intervals.parquet"),
        candidates=candidates(),
        latency=latency(),
        calls=result("record/calls.parquet"),
    output:
        selection=result("prune/selection.json"),
        students=result("prune/students.safetensors"),
    log:
        result("logs/prune.log"),
    benchmark:
        result("benchmarks/prune.tsv")
    conda:
        ENVIRONMENT
    threads: cores_of_one_process
    resources:
        gpu=gpu,
        mem_mb=memory(16000),
        runtime=30,
    params:
        config=subset(
            "seed",
            "device",
            "teacher",
            "prune",
            *CONSTRAINTS,
            "width.schedule",
            "width.floor",
            *WIDTH_FITS,
        ),
        optional=optional("candidates", "latency"),
        teacher=teacher_stamp(),
        code=code("prune.py"),
    message:
        "Preparing students"
    shell:
        command(
            "input.intervals",
            "{params.optional}",
            "input.calls",
            "output.selection",
            "output.students",
        )
