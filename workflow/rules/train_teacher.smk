# Remakes the embedded teacher from nothing; a target of its own, with its own config.
#
# in:  config/teacher-digits.yaml and scikit-learn's UCI digits
# out: results/teacher/digits/, a stock pipeline folder with prompts and scores; copy it to
#      resources/digits to prune it, or name it in teacher.path
#
# Not written to resources/digits: Snakemake deletes declared outputs before it runs a job.


rule train_teacher:
    input:
        **launched("train_teacher.py"),
        config="config/teacher-digits.yaml",
    output:
        model=directory("results/teacher/digits"),
    log:
        "results/teacher/train.log",
    benchmark:
        "results/teacher/train.tsv"
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        mem_mb=16000,
        runtime=480,
    params:
        state="results/teacher/state",
        code=code("train_teacher.py"),
    message:
        "Training the embedded teacher"
    shell:
        "python {input.launcher} --threads {threads} --device cpu {input.script} "
        "--config {input.config} --state {params.state} --output {output.model} 2>&1 | tee {log}"
