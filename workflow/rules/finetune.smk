# Full-parameter output distillation of one assembled variant.
#
# in:  the teacher, record/calls.parquet, variants/sets/<variant>.json, and what sets are made of:
#      maps, what modulations get, students of every stage
# out: finetune/<variant>.safetensors and the loss curve, finetune/<variant>.parquet
#
# Only variants with finetune_steps > 0. Checkpoints live in state/finetune-<variant>, as in
# distill.smk.


rule finetune:
    input:
        script=program("finetune.py"),
        launcher=program("launch.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        sets=set_of,  # which tells what of the next it needs, too
        refits=ancient(result("variants/maps.safetensors")),
        maps=widths("maps.safetensors"),
        conditioning=conditioning(),
        start=start(),
        distill=taught("distill", "students.safetensors"),
        narrow=taught("narrow", "students.safetensors"),
        subsets=taught("subsets", "students.safetensors"),
    output:
        weights=result("finetune/{variant}.safetensors"),
        log=result("finetune/{variant}.parquet"),
    log:
        result("logs/finetune-{variant}.log"),
    benchmark:
        result("benchmarks/finetune-{variant}.tsv")
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        gpu=gpu,
        mem_mb=megabytes("finetune", 32000),
        runtime=minutes("finetune", 2880),
        processes=config["processes"],
        device=config["device"],
    params:
        config=lambda wildcards: subset_for_variant(
            wildcards.variant,
            "seed",
            "device",
            "teacher",
            "finetune",
        ),
        state=lambda wildcards: result(f"state/finetune-{wildcards.variant}"),
        files=optional(*MODELS, "refits"),
        taken=taken("choose"),
        teacher=teacher_stamp(),
        code=code("finetune.py"),
    message:
        "Fine-tuning {wildcards.variant}"
    shell:
        "{params.taken}python {input.launcher} --processes {resources.processes} --threads {threads} "
        "--device {resources.device} {input.script} --config {params.config:q} "
        "--variant {wildcards.variant} --calls {input.calls} --sets {input.sets} {params.files} "
        "--state {params.state} --output {output.weights} --log-table {output.log} 2>&1 | tee {log}"
