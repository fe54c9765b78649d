# A variant once more, with the weights of its blocks quantised, for stock from_pretrained.
#
# in:  models/<of>/, and recorded calls, on which the folder must answer as the model in memory does
# out: models/<variant>/
#
# Only variants with `of`; one with a budget of its own is quantised as it is assembled.


rule quantise:
    input:
        script=program("quantise.py"),
        calls=result("record/calls.parquet"),
        model=lambda wildcards: result(f"models/{quantised()[wildcards.variant]}"),
    output:
        model=directory(result("models/{variant}")),
    log:
        result("logs/quantise-{variant}.log"),
    benchmark:
        result("benchmarks/quantise-{variant}.tsv")
    wildcard_constraints:
        variant="|".join(map(re.escape, quantised())),
    conda:
        ENVIRONMENT
    threads: 1  # several variants at once
    resources:
        gpu=gpu_to_quantise,
        mem_mb=memory(16000),
        runtime=30,
    params:
        config=lambda wildcards: subset_for_variant(wildcards.variant, "seed", "teacher"),
        code=code("quantise.py"),
    message:
        "Quantising {input.model}"
    shell:
        command("wildcards.variant", "input.calls", "input.model", "output=output.model")
