# What closed forms cost: least-squares maps in place of text runs and FFNs, low-rank modulations.
#
# in:  the teacher, record/calls.parquet, and as the config asks similarity/blocks.parquet (which
#      texts are alike; width.enabled), activations/conditioning.safetensors (modulation.enabled)
# out: width/measured.parquet, fit error, velocity error and saving of each candidate;
#      width/maps.safetensors, the least-squares maps
#
# Only with width.enabled or modulation.enabled. Selection adds the verdicts,
# width/candidates.parquet (intervals.smk).


rule width:
    input:
        **launched("width.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        blocks=similarity("blocks.parquet") if config["width"]["enabled"] else [],
        conditioning=conditioning(),
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
        **limits("width", mem_mb=32000, runtime=2880, launched=True),
    params:
        config=subset(
            "seed",
            "device",
            "teacher",
            "width.enabled",
            *WIDTH_PRICES,
            "modulation.enabled",
            "modulation.rank",
            *(["modulation.ladder"] if config["modulation"]["rank"] == "auto" else []),
        ),
        inputs=optional("blocks", "conditioning"),
        state=result("state/width"),
        taken=taken(*(["extract"] if conditioning() and not compared() else [])),
        teacher=teacher_stamp(),
        code=code("width.py"),
    message:
        "Fitting and measuring closed forms"
    shell:
        command(
            "input.calls",
            "{params.inputs}",
            "params.state",
            "output.table",
            "output.maps",
            launched=True,
            taken=True,
        )
