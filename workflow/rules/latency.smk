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
        gpu=gpu,
        mem_mb=megabytes("latency", 16000),
        runtime=minutes("latency", 60),
    params:
        config=subset(
            "seed", "device", "teacher", "evaluate.batch_size", "evaluate.latency_repeats"
        ),
        teacher=teacher_stamp(),
        code=code("latency.py"),
    message:
        "Timing blocks"
    shell:
        "python {input.script} --config {params.config:q} "
        "--calls {input.calls} --table {output.table} 2>&1 | tee {log}"
