# What each variant is made of: closed forms and trained units, and the stage that each is from.
#
# in:  the teacher, record/calls.parquet; what closed forms cost (width/), what modulations get, block
#      times (latency budgets); the selection, and students and errors of every stage, as far as the
#      config has them
# out: variants/sets.json and variants/sets/<variant>.json, what finetune and assemble build;
#      variants/units.parquet, the same as a table; variants/measured.parquet, errors of the sets
#      that were tried; variants/maps.safetensors, maps that were fitted once more
#
# A checkpoint, since a variant whose file stays the same is not trained, nor assembled, again.
# Measured errors wait in state/choose, as in sensitivity.smk.


checkpoint choose:
    input:
        **launched("choose.py"),
        **model_files(),
        **price_files(),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
    output:
        sets=result("variants/sets.json"),
        each=[result(f"variants/sets/{name}.json") for name in pruned()],
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
        **limits("choose", mem_mb=32000, runtime=720, launched=True),
    params:
        config=subset_for_budgets(
            "seed",
            "device",
            "teacher",
            "choose",
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
        command(
            "input.calls",
            "{params.files}",
            "params.state",
            "output.sets",
            "output.each",
            "output.units",
            "output.measured",
            "refitted=output.refits",
            launched=True,
            taken=True,
        )
