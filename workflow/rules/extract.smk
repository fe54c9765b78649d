# Activations of every block, from replayed calls.
#
# in:  the teacher and record/calls.parquet
# out: activations/tokens.parquet, a sample of tokens at every block boundary;
#      activations/moments.safetensors, the sums that the probes are solved from (none unless
#      blocks are compared);
#      activations/conditioning.safetensors, the sums that low-rank modulations are fitted to (none
#      unless modulation.enabled)


rule extract:
    input:
        script=program("extract.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
    output:
        tokens=result("activations/tokens.parquet"),
        moments=result("activations/moments.safetensors"),
        conditioning=result("activations/conditioning.safetensors"),
    log:
        result("logs/extract.log"),
    benchmark:
        result("benchmarks/extract.tsv")
    conda:
        ENVIRONMENT
    threads: cores_of_one_process
    resources:
        **limits("extract", mem_mb=16000, runtime=120),
    params:
        config=subset(
            "seed",
            "device",
            "teacher",
            "extract",
            "modulation.enabled",
            "modulation.timesteps",
            "modulation.guidance",
        ),
        moments="" if compared() else "--no-moments",
        state=result("state/extract"),
        taken=taken("record"),
        teacher=teacher_stamp(),
        code=code("extract.py"),
    message:
        "Extracting activations of every block"
    shell:
        command(
            "input.calls",
            "params.state",
            "output.tokens",
            "output.moments",
            "{params.moments}",
            "output.conditioning",
            taken=True,
        )
