# A complete pipeline folder of one variant, for stock DiffusionPipeline.from_pretrained.
#
# in:  the teacher, the plan, the trained students and their errors; fine-tuned weights, if any;
#      recorded calls, on which the folder must answer as the model in memory does
# out: models/<variant>/, with the map from old to new blocks beside the weights


rule assemble:
    input:
        script=program("assemble.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        plan=result("prune/plan.json"),
        students=taught("students.safetensors"),
        errors=taught("errors.parquet"),
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
    conda:
        ENVIRONMENT
    threads: 1  # several variants at once
    resources:
        mem_mb=memory(16000),
        runtime=30,
    params:
        config=lambda wildcards: subset_for_variant(wildcards.variant, "seed", "teacher"),
        finetuned=lambda wildcards, input: (
            f"--finetuned {input.finetuned}" if input.finetuned else ""
        ),
        taken=lambda wildcards, input: taken(
            last_training(), *([f"finetune-{wildcards.variant}"] if input.finetuned else [])
        ),
        teacher=teacher_stamp(),
        code=code("assemble.py"),
    message:
        "Assembling {wildcards.variant}"
    shell:
        "{params.taken}python {input.script} --config {params.config:q} "
        "--variant {wildcards.variant} --calls {input.calls} --plan {input.plan} "
        "--students {input.students} --errors {input.errors} {params.finetuned} "
        "--output {output.model} 2>&1 | tee {log}"
