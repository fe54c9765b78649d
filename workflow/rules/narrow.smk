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
        script=program("narrow.py"),
        launcher=program("launch.py"),
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
        gpu=gpu,
        mem_mb=megabytes("narrow", 32000),
        runtime=minutes("narrow", 2880),
        processes=config["processes"],
        device=config["device"],
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
        "{params.taken}python {input.launcher} --processes {resources.processes} --threads {threads} "
        "--device {resources.device} {input.script} --config {params.config:q} "
        "--calls {input.calls} --selection {input.selection} --students {input.students} "
        "--state {params.state} --output {output.students} --log-table {output.log} "
        "--unit-costs {output.unit_costs} 2>&1 | tee {log}"
