# Stage 1.3: every student learns its interval from the teacher's activations (Eq. 6).
#
# in:  the teacher, record/calls.parquet, prune/selection.json and prune/students.safetensors
# out: distill/students.safetensors; the loss curves, distill/log.parquet; and what each student
#      alone costs, distill/unit_costs.parquet, by which variants choose
#
# Checkpoints, and the teacher's streams at the first block that it has to run
# (ppcl/training/input_cache.py), live in state/distill, which Snakemake does not know of: it deletes
# the declared outputs of a failed job, and a killed training must be able to resume. They stay when
# the program ends, for Snakemake may be killed before it has taken the outputs, and go when the
# next stage reads those (forget.py).


rule distill:
    input:
        **launched("distill.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        selection=result("prune/selection.json"),
        students=result("prune/students.safetensors"),
    output:
        students=result("distill/students.safetensors"),
        log=result("distill/log.parquet"),
        unit_costs=result("distill/unit_costs.parquet"),
    log:
        result("logs/distill.log"),
    benchmark:
        result("benchmarks/distill.tsv")
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        **limits("distill", mem_mb=32000, runtime=2880, launched=True),
    params:
        config=subset(
            "seed", "device", "teacher", "distill", "width.linear_weight", "width.lr_scale"
        ),
        state=result("state/distill"),
        teacher=teacher_stamp(),
        code=code("distill.py"),
    message:
        "Distilling students"
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
        )
