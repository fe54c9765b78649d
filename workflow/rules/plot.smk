# Figures, from parquet files alone, as SVG (embedded in the report) and PNG.
#
# in:  the tables that a figure shows
# out: plots/intervals, plots/training and plots/quality


rule plot_intervals:
    input:
        script=program("plot.py"),
        cka=result("similarity/cka.parquet"),
        blocks=result("similarity/blocks.parquet"),
        probes=result("probes/probes.parquet"),
        intervals=result("intervals/intervals.parquet"),
        width=widths("candidates.parquet"),
    output:
        search=report(
            result("plots/intervals/search.svg"),
            caption="../report/search.rst",
            category="Intervals",
            labels={"figure": "Search for intervals"},
        ),
        heatmap=report(
            result("plots/intervals/heatmap.svg"),
            caption="../report/heatmap.rst",
            category="Intervals",
            labels={"figure": "CKA between blocks"},
        ),
        probes=report(
            result("plots/intervals/probes.svg"),
            caption="../report/probes.rst",
            category="Intervals",
            labels={"figure": "Probe error along depth"},
        ),
        width=(
            report(
                result("plots/intervals/width.svg"),
                caption="../report/width.rst",
                category="Intervals",
                labels={"figure": "Linear FFNs and text runs"},
            )
            if config["width"]["enabled"]
            else []
        ),
        search_png=result("plots/intervals/search.png"),
        heatmap_png=result("plots/intervals/heatmap.png"),
        probes_png=result("plots/intervals/probes.png"),
        width_png=result("plots/intervals/width.png") if config["width"]["enabled"] else [],
    log:
        result("logs/plot-intervals.log"),
    benchmark:
        result("benchmarks/plot-intervals.tsv")
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=subset("similarity"),
        width=optional("width"),
        output=lambda wildcards, output: os.path.dirname(output.search),
        code=code("plot.py"),
    message:
        "Drawing the search for intervals"
    shell:
        "python {input.script} intervals --config {params.config:q} "
        "--cka {input.cka} --blocks {input.blocks} --probes {input.probes} "
        "--intervals {input.intervals} {params.width} "
        "--output {params.output} 2>&1 | tee {log}"


rule plot_training:
    input:
        script=program("plot.py"),
        distilled=result("distill/log.parquet"),
        subsets=[result("subsets/log.parquet")] if config["subsets"]["steps"] else [],
        finetuned=[result(f"finetune/{name}.parquet") for name in finetuned()],
    output:
        distill=report(
            result("plots/training/distill.svg"),
            caption="../report/distill.rst",
            category="Training",
            labels={"figure": "Distillation"},
        ),
        subsets=report(
            result("plots/training/subsets.svg"),
            caption="../report/subsets.rst",
            category="Training",
            labels={"figure": "Any-subset distillation"},
        ),
        finetune=report(
            result("plots/training/finetune.svg"),
            caption="../report/finetune.rst",
            category="Training",
            labels={"figure": "Fine-tuning"},
        ),
        distill_png=result("plots/training/distill.png"),
        subsets_png=result("plots/training/subsets.png"),
        finetune_png=result("plots/training/finetune.png"),
    log:
        result("logs/plot-training.log"),
    benchmark:
        result("benchmarks/plot-training.tsv")
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=subset("distill.loss", "variants"),
        output=lambda wildcards, output: os.path.dirname(output.distill),
        code=code("plot.py"),
    message:
        "Drawing loss curves"
    shell:
        "python {input.script} training --config {params.config:q} "
        "--distill-log {input.distilled} --subsets-log {input.subsets} "
        "--finetune-logs {input.finetuned} "
        "--output {params.output} 2>&1 | tee {log}"


rule plot_quality:
    input:
        script=program("plot.py"),
        metrics=result("evaluation/metrics.parquet"),
        images=result("evaluation/images.parquet"),
        points=result("pareto/points.parquet"),
    output:
        pareto=report(
            result("plots/quality/pareto.svg"),
            caption="../report/pareto.rst",
            category="Quality",
            labels={"figure": "Every budget from one set of students"},
        ),
        tradeoff=report(
            result("plots/quality/tradeoff.svg"),
            caption="../report/tradeoff.rst",
            category="Quality",
            labels={"figure": "Quality against size and latency"},
        ),
        images=report(
            result("plots/quality/images.svg"),
            caption="../report/images.rst",
            category="Quality",
            labels={"figure": "Images"},
        ),
        pareto_png=result("plots/quality/pareto.png"),
        tradeoff_png=result("plots/quality/tradeoff.png"),
        images_png=result("plots/quality/images.png"),
    log:
        result("logs/plot-quality.log"),
    benchmark:
        result("benchmarks/plot-quality.tsv")
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=subset("variants"),
        output=lambda wildcards, output: os.path.dirname(output.tradeoff),
        code=code("plot.py"),
    message:
        "Drawing quality against cost"
    shell:
        "python {input.script} quality --config {params.config:q} "
        "--metrics {input.metrics} --images {input.images} --points {input.points} "
        "--output {params.output} 2>&1 | tee {log}"
