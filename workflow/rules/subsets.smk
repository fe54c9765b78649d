# Any-subset distillation: students learn to stand each other's errors, whichever are plugged in.
#
# in:  the teacher, record/calls.parquet, prune/selection.json and the distilled students
# out: subsets/students.safetensors; the loss curve, subsets/log.parquet; and what each student
#      alone costs now, subsets/unit_costs.parquet, by which variants choose
#
# Only with subsets.steps > 0. Checkpoints live in state/subsets, as in distill.smk.


rule subsets:
    input:
        **launched("subsets.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        selection=result("prune/selection.json"),
        students=taught(training()[-2], "students.safetensors"),
    output:
        students=result("subsets/students.safetensors"),
        log=result("subsets/log.parquet"),
        unit_costs=result("subsets/unit_costs.parquet"),
    log:
        result("logs/subsets.log"),
    benchmark:
        result("benchmarks/subsets.tsv")
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        **limits("subsets", mem_mb=32000, runtime=2880, launched=True),
    params:
        config=subset("seed", "device", "teacher", "subsets", "width.lr_scale"),
        state=result("state/subsets"),
        taken=taken(training()[-2]),
        teacher=teacher_stamp(),
        code=code("subsets.py"),
    message:
        "Distilling random subsets of the students"
    shell:
        command(
            "input.calls",
            "input.selection",
            "input.students",
            "params.state",
            "output=output.students",
            "log_table=output.log",
            "output.unit_costs",
            launched=True,
            taken=True,
        )
