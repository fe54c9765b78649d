# A complete pipeline folder of one variant, for stock DiffusionPipeline.from_pretrained.
#
# in:  the teacher, variants/sets/<variant>.json, and what sets are made of; fine-tuned weights, if
#      any; recorded calls, on which the folder must answer as the model in memory does
# out: models/<variant>/, with the map from old to new blocks beside the weights


rule assemble:
    input:
        **model_files(),
        script=program("assemble.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        sets=set_of,  # it holds the digest of the refitted maps that it uses, hence `ancient`
        refits=ancient(result("variants/maps.safetensors")),
        finetuned=lambda wildcards: [
            result(f"finetune/{name}.safetensors")
            for name in finetuned()
            if name == wildcards.variant
        ],
    output:
        model=directory(result("models/{variant}")),
    log:
        result("logs/assemble-{variant}.log"),
    benchmark:
        result("benchmarks/assemble-{variant}.tsv")
    wildcard_constraints:
        variant="|".join(map(re.escape, pruned())),
    conda:
        ENVIRONMENT
    threads: 1  # several variants at once
    resources:
        gpu=gpu_to_quantise,
        mem_mb=memory(16000),
        runtime=30,
    params:
        config=lambda wildcards: subset_for_variant(
            wildcards.variant, "seed", "teacher", "pipeline"
        ),
        files=optional(*MODELS, "refits", "finetuned"),
        taken=lambda wildcards, input: taken(
            "choose", *([f"finetune-{wildcards.variant}"] if input.finetuned else [])
        ),
        teacher=teacher_stamp(),
        code=code("assemble.py"),
    message:
        "Assembling {wildcards.variant}"
    shell:
        command(
            "wildcards.variant",
            "input.calls",
            "input.sets",
            "{params.files}",
            "output=output.model",
            taken=True,
        )
