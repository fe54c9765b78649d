# Stage 1.1: one linear probe per block and stream (Eq. 1).
#
# in:  activations/moments.safetensors, and held-out tokens of activations/tokens.parquet
# out: probes/probes.parquet, each probe's quality; probes/probes.safetensors, its weights


rule probe:
    input:
        script=program("probe.py"),
        moments=result("activations/moments.safetensors"),
        tokens=result("activations/tokens.parquet"),
    output:
        table=result("probes/probes.parquet"),
        probes=result("probes/probes.safetensors"),
    log:
        result("logs/probe.log"),
    benchmark:
        result("benchmarks/probe.tsv")
    conda:
        ENVIRONMENT
    threads: cores_of_one_process
    resources:
        mem_mb=8000,
        runtime=60,
    params:
        config=subset("seed", "probe"),
        taken=taken("extract"),
        code=code("probe.py"),
    message:
        "Fitting linear probes"
    shell:
        command(
            "input.moments",
            "input.tokens",
            "probes_table=output.table",
            "output.probes",
            taken=True,
        )
