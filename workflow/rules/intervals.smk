# Candidate intervals (Eq. 5), and the selection of depth and width under the config's budgets.
#
# in:  record/blocks.parquet, similarity/cka.parquet, and as the config asks
#      sensitivity/intervals.parquet (intervals.cost: velocity), probes/probes.parquet (influence),
#      width/measured.parquet (width.enabled, modulation.enabled), latency/blocks.parquet (latency
#      budgets), record/sizes.parquet (budgets of bytes)
# out: intervals/intervals.parquet and, with closed forms, width/candidates.parquet: each candidate
#      with the reason for or against it


rule intervals:
    input:
        script=program("intervals.py"),
        block_facts=result("record/blocks.parquet"),
        cka=result("similarity/cka.parquet"),
        sensitivity=sensitivity(),
        probes=influences(),
        width=widths("measured.parquet"),
        latency=latency(),
        sizes=sizes(),
    output:
        intervals=result("intervals/intervals.parquet"),
        candidates=candidates(),
    log:
        result("logs/intervals.log"),
    benchmark:
        result("benchmarks/intervals.tsv")
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=subset_for_smallest_budgets(
            "similarity.streams",
            "intervals",
            *CONSTRAINTS,
        ),
        inputs=optional("sensitivity", "probes", "width", "latency", "sizes"),
        candidates=lambda wildcards, output: (
            f"--candidates {output.candidates}" if output.candidates else ""
        ),
        taken=lambda wildcards, input: taken(
            *(stage for stage in ("sensitivity", "width") if input.get(stage))
        ),
        code=code("intervals.py"),
    message:
        "Choosing what to prune"
    shell:
        command(
            "input.cka",
            "input.block_facts",
            "{params.inputs}",
            "output.intervals",
            "{params.candidates}",
            taken=True,
        )
