# Candidate intervals (Eq. 5), and the selection under the config's target.
#
# in:  similarity/cka.parquet and sensitivity/intervals.parquet (with intervals.cost: velocity)
# out: intervals/intervals.parquet, each candidate with the reason for or against it


rule intervals:
    input:
        script=program("intervals.py"),
        cka=result("similarity/cka.parquet"),
        sensitivity=sensitivity(),
    output:
        intervals=result("intervals/intervals.parquet"),
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
        config=subset_for_smallest_budget("similarity.streams", "intervals"),
        sensitivity=lambda wildcards, input: (
            f"--sensitivity {input.sensitivity}" if input.sensitivity else ""
        ),
        code=code("intervals.py"),
    message:
        "Choosing intervals"
    shell:
        "python {input.script} --config {params.config:q} "
        "--cka {input.cka} {params.sensitivity} "
        "--intervals {output.intervals} 2>&1 | tee {log}"
