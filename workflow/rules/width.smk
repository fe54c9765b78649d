# What each text run and each linear FFN costs if least-squares maps replace it: stage 2's prices.
#
# in:  the teacher, record/calls.parquet and similarity/blocks.parquet (which texts are alike)
# out: width/measured.parquet, fit error, velocity error and saving of each candidate
#
# Only with width.enabled. Selection adds the verdicts, width/candidates.parquet (intervals.smk).


rule width:
    input:
        script=program("width.py"),
        launcher=program("launch.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        blocks=similarity("blocks.parquet") if config["width"]["enabled"] else [],
    output:
        table=result("width/measured.parquet"),
        maps=result("width/maps.safetensors"),
    log:
        result("logs/width.log"),
    benchmark:
        result("benchmarks/width.tsv")
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        gpu=1,
        mem_mb=megabytes("width", 32000),
        runtime=minutes("width", 2880),
        processes=config["processes"],
        device=config["device"],
    params:
        config=subset("seed", "device", "teacher", *WIDTH_PRICES),
        state=result("state/width"),
        teacher=teacher_stamp(),
        code=code("width.py"),
    message:
        "Measuring what narrower blocks cost"
    shell:
        "python {input.launcher} --processes {resources.processes} --threads {threads} "
        "--device {resources.device} {input.script} --config {params.config:q} "
        "--calls {input.calls} --blocks {input.blocks} --state {params.state} "
        "--table {output.table} --maps {output.maps} 2>&1 | tee {log}"
