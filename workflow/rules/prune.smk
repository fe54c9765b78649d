# The pruned model before training: one student per selected interval.
#
# in:  the teacher and intervals/intervals.parquet
# out: prune/plan.json, what each student replaces; prune/students.safetensors, start weights


rule prune:
    input:
        script=program("prune.py"),
        teacher=teacher_files(),
        intervals=result("intervals/intervals.parquet"),
    output:
        plan=result("prune/plan.json"),
        students=result("prune/students.safetensors"),
    log:
        result("logs/prune.log"),
    benchmark:
        result("benchmarks/prune.tsv")
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        mem_mb=16000,
        runtime=30,
    params:
        config=subset("seed", "teacher", "prune"),
        code=code("prune.py"),
    message:
        "Preparing students"
    shell:
        "python {input.script} --config {params.config:q} "
        "--intervals {input.intervals} "
        "--plan {output.plan} --students {output.students} 2>&1 | tee {log}"
