# Stage 2 after stage 1: distilled students and kept blocks become narrow, and learn once more.
#
# in:  the teacher, record/calls.parquet, prune/selection.json and distill/students.safetensors
# out: narrow/students.safetensors; the loss curves, narrow/log.parquet; and what each unit costs
#      now, narrow/unit_costs.parquet
#
# Only with width.enabled and width.schedule: staged; with joint, distill trains narrow blocks from
# the start. Checkpoints live in state/narrow, as in distill.smk.


rule narrow:
    input:
        **launched("narrow.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        selection=result("prune/selection.json"),
        students=result("distill/students.safetensors"),
    output:
        students=result("narrow/students.safetensors"),
        log=result("narrow/log.parquet"),
        unit_costs=result("narrow/unit_costs.parquet"),
    log:
        result("logs/narrow.log"),
    benchmark:
        result("benchmarks/narrow.tsv")
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        **limits("narrow", mem_mb=32000, runtime=2880, launched=True),
    params:
        config=subset(
            "seed",
            "device",
            "teacher",
            *distill_keys(),
            "width.steps",
            "width.linear_weight",
            "width.lr_scale",
            *WIDTH_FITS,
        ),
        state=result("state/narrow"),
        taken=taken("distill"),
        teacher=teacher_stamp(),
        code=code("narrow.py"),
    message:
        "Distilling narrow blocks"
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
