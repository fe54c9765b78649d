# What each variant is made of: closed forms and trained units, and the stage that each is from.
#
# in:  the teacher, record/calls.parquet; what closed forms cost (width/), what modulations get, block
#      times (latency budgets); the plan, and students and errors of every stage, as far as the config
#      has them
# out: variants/sets.json and variants/sets/<variant>.json, what finetune and assemble build;
#      variants/units.parquet, the same as a table; variants/measured.parquet, errors of the sets
#      that were tried; variants/maps.safetensors, maps that were fitted once more
#
# A checkpoint, since a variant whose file stays the same is not trained, nor assembled, again.
# Measured errors wait in state/choose, as in sensitivity.smk.


checkpoint choose:
    input:
        script=program("choose.py"),
        launcher=program("launch.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        maps=widths("maps.safetensors"),
        conditioning=conditioning(),
        start=start(),
        distill=taught("distill", "students.safetensors"),
        narrow=taught("narrow", "students.safetensors"),
        subsets=taught("subsets", "students.safetensors"),
        selection=selection(),
        width=widths("measured.parquet"),
        latency=latency(),
        distill_unit_costs=taught("distill", "unit_costs.parquet"),
        narrow_unit_costs=taught("narrow", "unit_costs.parquet"),
        subsets_unit_costs=taught("subsets", "unit_costs.parquet"),
    output:
        sets=result("variants/sets.json"),
        each=[result(f"variants/sets/{name}.json") for name in variants()],
        units=result("variants/units.parquet"),
        measured=result("variants/measured.parquet"),
        refits=result("variants/maps.safetensors"),
    log:
        result("logs/choose.log"),
    benchmark:
        result("benchmarks/choose.tsv")
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        gpu=gpu,
        mem_mb=megabytes("choose", 32000),
        runtime=minutes("choose", 720),
        processes=config["processes"],
        device=config["device"],
    params:
        config=lambda wildcards: configuration.subset(
            {**config, "variants": configuration.budgets(config["variants"])},
            "seed",
            "device",
            "teacher",
            "choose",
            "variants",
            *CONSTRAINTS,
            *WIDTH_FITS,
        ),
        files=optional(*MODELS, *PRICES),
        state=result("state/choose"),
        taken=taken(*training()[-1:], *(["width"] if closed() and not depth() else [])),
        teacher=teacher_stamp(),
        code=code("choose.py"),
    message:
        "Choosing what each variant is made of"
    shell:
        "{params.taken}python {input.launcher} --processes {resources.processes} "
        "--threads {threads} --device {resources.device} {input.script} --config {params.config:q} "
        "--calls {input.calls} {params.files} --state {params.state} --sets {output.sets} "
        "--each {output.each} "
        "--units {output.units} --measured {output.measured} --refitted {output.refits} 2>&1 | tee {log}"
