# Stage 1.3 in several jobs: each teaches some of the students (distill.smk has one job for all).
#
# in:  the teacher, record/calls.parquet, prune/selection.json and prune/students.safetensors
# out: as of distill.smk; distill/shards/shards.json, which job owns which units
#
# Only with distill.shards other than 1. How many jobs there are is known once there is a selection.
# A job runs the teacher up to the last block that its students need and, where the teacher's
# streams are kept (ppcl/training/input_cache.py), only from the first one; jobs are balanced by
# that (ppcl/training/shards.py). Checkpoints and streams live in state/distill-<shard>, as in
# distill.smk. Jobs that run at the same time on one machine take different GPUs
# (ppcl/runtime/gpus.py), and wait if there are not enough.


# What a shard, and so all of them together, depend on.
SHARD_KEYS = [
    "seed",
    "device",
    "teacher",
    *distill_keys(),
    "distill.cache_inputs",
    "width.linear_weight",
    "width.lr_scale",
]


localrules:
    assign_shards,


checkpoint assign_shards:
    input:
        script=program("assign_shards.py"),
        calls=result("record/calls.parquet"),
        selection=result("prune/selection.json"),
    output:
        shards=result("distill/shards/shards.json"),
    log:
        result("logs/assign_shards.log"),
    benchmark:
        result("benchmarks/assign_shards.tsv")
    conda:
        ENVIRONMENT
    resources:
        mem_mb=4000,
        runtime=10,
    params:
        config=subset(
            "seed",
            *(
                f"distill.{key}"
                for key in ("shards", "cache_inputs", "mode", "steps", "batch_size")
            ),
        ),
        code=code("assign_shards.py"),
    message:
        "Sharing students out over jobs"
    shell:
        command("input.calls", "input.selection", "output.shards")


rule distill_shard:
    input:
        **launched("distill.py"),
        teacher=teacher_files(),
        calls=result("record/calls.parquet"),
        selection=result("prune/selection.json"),
        students=result("prune/students.safetensors"),
        shards=result("distill/shards/shards.json"),
    output:
        students=temp(result("distill/shards/{shard}.safetensors")),
        log=temp(result("distill/shards/{shard}-log.parquet")),
        unit_costs=temp(result("distill/shards/{shard}-unit_costs.parquet")),
    log:
        result("logs/distill-{shard}.log"),
    benchmark:
        result("benchmarks/distill-{shard}.tsv")
    wildcard_constraints:
        shard=r"\d+",
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        **limits("distill", mem_mb=32000, runtime=2880, launched=True),
    params:
        config=subset(*SHARD_KEYS),
        state=lambda wildcards: result(f"state/distill-{wildcards.shard}"),
        teacher=teacher_stamp(),
        code=code("distill.py"),
    message:
        "Distilling shard {wildcards.shard} of the students"
    shell:
        command(
            "input.calls",
            "input.selection",
            "input.students",
            "input.shards",
            "wildcards.shard",
            "params.state",
            "output=output.students",
            "log_table=output.log",
            "output.unit_costs",
            launched=True,
        )


rule join_shards:
    input:
        script=program("join_shards.py"),
        selection=result("prune/selection.json"),
        students=distill_shards(".safetensors"),
        logs=distill_shards("-log.parquet"),
        costs=distill_shards("-unit_costs.parquet"),
    output:
        students=result("distill/students.safetensors"),
        log=result("distill/log.parquet"),
        unit_costs=result("distill/unit_costs.parquet"),
    log:
        result("logs/join_shards.log"),
    benchmark:
        result("benchmarks/join_shards.tsv")
    conda:
        ENVIRONMENT
    resources:
        mem_mb=megabytes("distill", 32000),
        runtime=60,
    params:
        config=subset(*SHARD_KEYS),
        taken=lambda wildcards, input: taken(
            *(f"distill-{shard}" for shard in range(len(input.students)))
        ),
        code=code("join_shards.py"),
    message:
        "Joining the shards of the students"
    shell:
        command(
            "input.selection",
            "input.students",
            "input.logs",
            "input.costs",
            "output=output.students",
            "log_table=output.log",
            "output.unit_costs",
            taken=True,
        )
