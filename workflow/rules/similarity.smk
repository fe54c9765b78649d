# Stage 1.2: how long runs of probes stay like the teacher (Eq. 3 and 4), for all (u, k).
#
# in:  activations/tokens.parquet and probes/probes.safetensors
# out: similarity/cka.parquet, cka and delta of every run;
#      similarity/blocks.parquet, the heat map of all pairs of blocks


rule similarity:
    input:
        script=program("similarity.py"),
        tokens=result("activations/tokens.parquet"),
        probes=result("probes/probes.safetensors"),
    output:
        cka=result("similarity/cka.parquet"),
        blocks=result("similarity/blocks.parquet"),
    log:
        result("logs/similarity.log"),
    benchmark:
        result("benchmarks/similarity.tsv")
    conda:
        ENVIRONMENT
    threads: cores_of_one_process
    resources:
        gpu=gpu,
        mem_mb=megabytes("similarity", 8000, teacher=False),
        runtime=minutes("similarity", 120),
    params:
        config=subset("seed", "device", "similarity"),
        code=code("similarity.py"),
    message:
        "Comparing runs of probes with the teacher"
    shell:
        command("input.tokens", "input.probes", "output.cka", "output.blocks")
