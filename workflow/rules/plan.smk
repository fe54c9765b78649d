# What a run needs: sizes, memory and disk, from the transformer's config alone, without weights.
#
# in:  a config.json of the transformer; the selection and the recorded calls, where they exist
# out: plan/plan.parquet and a printed table; plan/resources.json, from which jobs have their limits
#
# A target of its own (plan), for which nothing else is made.


rule plan:
    input:
        **plan_inputs(),
        script=program("plan.py"),
    output:
        table=result("plan/plan.parquet"),
        resources=result("plan/resources.json"),
    log:
        result("logs/plan.log"),
    benchmark:
        result("benchmarks/plan.tsv")
    conda:
        ENVIRONMENT
    resources:
        mem_mb=8000,
        runtime=20,
    params:
        config=subset(*PLAN_KEYS),
        given=optional("intervals", "candidates", "calls"),
        code=code("plan.py"),
    message:
        "Planning"
    shell:
        "python {input.script} --config {params.config:q} {params.given} "
        "--table {output.table} --resources {output.resources} 2>&1 | tee {log}"
