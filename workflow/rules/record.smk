# Calibration: the transformer's own calls in the stock pipeline.
#
# in:  the teacher and the calibration prompts
# out: record/calls.parquet, every call's arguments, timestep and sigma, for replay;
#      record/blocks.parquet, what stages that don't load the teacher need to know of its blocks;
#      record/sizes.parquet, the bytes of their parts
#
# Finished batches wait in state/record, which Snakemake does not know of, so that a killed run
# goes on where it was.


rule record:
    input:
        **launched("record.py"),
        teacher=teacher_files(),
        prompts=config["record"]["prompts"],
        pictures=pictures("record"),
    output:
        calls=result("record/calls.parquet"),
        block_facts=result("record/blocks.parquet"),
        sizes=result("record/sizes.parquet"),
    log:
        result("logs/record.log"),
    benchmark:
        result("benchmarks/record.tsv")
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        **limits("record", mem_mb=16000, runtime=120, launched=True),
    params:
        config=subset("seed", "device", "teacher", "pipeline", "record"),
        state=result("state/record"),
        teacher=teacher_stamp(),
        prompts=prompts_stamp("record"),
        code=code("record.py"),
    message:
        "Recording the teacher's calls on {input.prompts}"
    shell:
        command("output.calls", "output.block_facts", "output.sizes", "params.state", launched=True)
