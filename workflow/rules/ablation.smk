# The comparison: every method of ppcl/ablation/methods.py at the same size, with the same training.
#
# in:  shared artifacts of the run: calls, tokens, what modulations get, probes, CKA, what intervals
#      and widths cost, and block times
# out: ablation/runs/<method>-<number>.parquet, one run each; ablation/results.parquet, all of them;
#      ablation/tables.md, for a reader; ablation/calibration.parquet, prices against errors after
#      training; plots/ablation/
#
# It may run in parts: with ablation.methods, only these methods run, and are put together; runs of
# others stay.
#
# A job uses one core. A small teacher's runs on a CPU go as many at once as there are cores; else one
# at a time, or as many as `--resources gpu=<n>` says. A run depends on its own entry of the table
# alone: a new method, or more seeds, redoes nothing. Checkpoints live in
# state/ablation-<method>-<number>, as in distill.smk.

if "ablation" in targets():
    for part in ("intervals", "width", "modulation"):
        if not config[part]["enabled"]:
            refuse(f"the target ablation compares what {part} gains; set {part}.enabled to true")

# What a run depends on; how long the main run trains is not among it.
ABLATION_KEYS = [
    *(f"intervals.{k}" for k in ("tolerance", "training_leaves", "protect_first", "protect_last")),
    *(f"width.{key}" for key in ("cka_floor", "linear_weight", "lr_scale")),
    *WIDTH_FITS,
    *(
        f"{stage}.{key}"
        for stage in ("distill", "subsets", "finetune")
        for key in config[stage]
        if key
        not in (
            "steps",
            "batch_size",
            "heldout_rows",
            "loss",
            "mode",
            "shards",
            "cache_inputs",
            "sharding",
            "cpu_offload",
        )
    ),
    *(
        f"evaluate.{key}"
        for key in ("prompts", "judge", "batch_size", "bootstrap", "latency_repeats")
    ),
    *(
        f"ablation.{key}"
        for key in config["ablation"]
        if key != "methods" and not key.endswith("seeds")
    ),
]
SHARED = {
    "calls": "record/calls.parquet",
    "tokens": "activations/tokens.parquet",
    "conditioning": "activations/conditioning.safetensors",
    "probes": "probes/probes.safetensors",
    "cka": "similarity/cka.parquet",
    "sensitivity": "sensitivity/intervals.parquet",
    "width": "width/measured.parquet",
    "latency": "latency/blocks.parquet",
}
CALIBRATED = {name: SHARED[name] for name in ("calls", "probes", "cka", "sensitivity", "width")}


# Seconds each, from small tables: not worth a place in a cluster's queue.
localrules:
    rank_rivals,
    gather_ablation,


rule ablate:
    input:
        **{name: result(path) for name, path in SHARED.items()},
        script=program("ablate.py"),
        teacher=teacher_files(),
        prompts=config["evaluate"]["prompts"],
    output:
        run=result("ablation/runs/{method}-{number}.parquet"),
    log:
        result("logs/ablation-{method}-{number}.log"),
    benchmark:
        result("benchmarks/ablation-{method}-{number}.tsv")
    wildcard_constraints:
        method="|".join(map(re.escape, methods.METHODS)),
        number=r"\d+",
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=gpu,
        mem_mb=memory(32000),
        runtime=2880,
    params:
        config=subset(
            "seed",
            "device",
            "teacher",
            "pipeline",
            "similarity",
            "sensitivity",
            *ABLATION_KEYS,
        ),
        method=lambda wildcards: methods.job(wildcards.method),
        shared=lambda wildcards, input: " ".join(f"--{name} {input[name]}" for name in SHARED),
        state=lambda wildcards: result(f"state/ablation-{wildcards.method}-{wildcards.number}"),
        teacher=teacher_stamp(),
        prompts=prompts_stamp("evaluate"),
        code=code("ablate.py"),
    message:
        "Ablation: {wildcards.method}, run {wildcards.number}"
    shell:
        command(
            "--method {params.method:q}",
            "wildcards.number",
            "{params.shared}",
            "params.state",
            "output=output.run",
        )


checkpoint rank_rivals:
    input:
        script=program("gather_ablation.py"),
        runs=ablation_runs(methods.of_group("rival")),
    output:
        best=result("ablation/best_rivals.json"),
    log:
        result("logs/rank-rivals.log"),
    benchmark:
        result("benchmarks/rank-rivals.tsv")
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        code=code("gather_ablation.py"),
    message:
        "Ranking the rivals"
    shell:
        "python {input.script} best --runs {input.runs} --output {output.best} 2>&1 | tee {log}"


rule gather_ablation:
    input:
        script=program("gather_ablation.py"),
        runs=known_ablation_runs(),
        more=more_ablation_runs,
    output:
        table=result("ablation/results.parquet"),
        words=result("ablation/tables.md"),
    log:
        result("logs/gather-ablation.log"),
    benchmark:
        result("benchmarks/gather-ablation.tsv")
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        code=code("gather_ablation.py"),
    message:
        "Gathering the runs of the ablation"
    shell:
        "python {input.script} table --runs {input.runs} {input.more} --output {output.table} "
        "2>&1 | tee {log}; "
        "python {input.script} words --results {output.table} --output {output.words} "
        "2>&1 | tee -a {log}"


rule calibrate:
    input:
        **{name: result(path) for name, path in CALIBRATED.items()},
        script=program("calibrate.py"),
        teacher=teacher_files(),
    output:
        table=result("ablation/calibration.parquet"),
    log:
        result("logs/calibrate.log"),
    benchmark:
        result("benchmarks/calibrate.tsv")
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=gpu,
        mem_mb=memory(32000),
        runtime=2880,
    params:
        config=subset(
            "seed",
            "device",
            "teacher",
            "similarity.streams",
            "sensitivity",
            "intervals",
            "width",
            *distill_keys(),
            "ablation.distill_steps",
            "ablation.subsets_steps",
            "ablation.batch_size",
        ),
        shared=lambda wildcards, input: " ".join(f"--{name} {input[name]}" for name in CALIBRATED),
        state=result("state/calibrate"),
        teacher=teacher_stamp(),
        code=code("calibrate.py"),
    message:
        "Training students of every length for the prices' calibration"
    shell:
        command("{params.shared}", "params.state", "output.table")


rule plot_ablation:
    input:
        **figure_tables("ablation"),
        script=program("plot.py"),
    output:
        **figure_files("ablation"),
    log:
        result("logs/plot-ablation.log"),
    benchmark:
        result("benchmarks/plot-ablation.tsv")
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=subset(*figure_keys("ablation")),
        figures=figure_names("ablation"),
        tables=optional(*figure_tables("ablation")),
        output=folder_of_figures,
        code=code("plot.py"),
    message:
        "Drawing the ablation"
    shell:
        command("params.figures", "{params.tables}", "params.output", group="ablation")
