# How long blocks take, whole and narrow: what selection by a latency budget adds up.
#
# in:  the teacher and record/calls.parquet
# out: latency/blocks.parquet, the seconds that each part of each block saves
#
# Only with a latency budget among the variants.


rule latency:
    input:
        script=program("latency.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
    output:
        table=result("latency/blocks.parquet"),
    log:
        result("logs/latency.log"),
    benchmark:
        result("benchmarks/latency.tsv")
    conda:
        ENVIRONMENT
    threads: every_core
    resources:
        **limits("latency", mem_mb=16000, runtime=60),
    params:
        config=subset(
            "seed", "device", "teacher", "evaluate.batch_size", "evaluate.latency_repeats"
        ),
        teacher=teacher_stamp(),
        code=code("latency.py"),
    message:
        "Timing blocks"
    shell:
        command("input.calls", "output.table")
