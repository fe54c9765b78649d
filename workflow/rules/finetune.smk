# Full-parameter output distillation of one assembled variant, and with finetune.data flow matching on
# the user's own pictures.
#
# in:  the teacher, record/calls.parquet, variants/sets/<variant>.json, and what sets are made of:
#      maps, what modulations get, students of every stage; encode/<data>.parquet, with data
# out: finetune/<variant>.safetensors and the loss curve, finetune/<variant>.parquet
#
# Only variants with finetune_steps > 0. Checkpoints live in state/finetune-<variant>, as in
# distill.smk.


rule finetune:
    input:
        **launched("finetune.py"),
        **model_files(),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        sets=set_of,  # it holds the digest of the refitted maps that it uses, hence `ancient`
        refits=ancient(result("variants/maps.safetensors")),
        encoded=encoded,
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
        **limits("finetune", mem_mb=32000, runtime=2880, launched=True),
    params:
        config=lambda wildcards: subset_for_variant(
            wildcards.variant,
            "seed",
            "device",
            "teacher",
            "finetune",
            trained=True,
        ),
        state=lambda wildcards: result(f"state/finetune-{wildcards.variant}"),
        files=optional(*MODELS, "refits", "encoded"),
        taken=lambda wildcards: taken("choose", *(f"encode-{d}" for d in data_of(wildcards))),
        teacher=teacher_stamp(),
        code=code("finetune.py"),
    message:
        "Fine-tuning {wildcards.variant}"
    shell:
        command(
            "wildcards.variant",
            "input.calls",
            "input.sets",
            "{params.files}",
            "params.state",
            "output=output.weights",
            "log_table=output.log",
            launched=True,
            taken=True,
        )
