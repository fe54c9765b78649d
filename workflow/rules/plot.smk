# Figures, from parquet files alone, as SVG (embedded in the report) and PNG.
#
# in:  the tables that a figure shows
# out: plots/intervals, plots/training and plots/quality


if figures("intervals"):

    rule plot_intervals:
        input:
            script=program("plot.py"),
            cka=similarity("cka.parquet"),
            blocks=similarity("blocks.parquet"),
            probes=[result("probes/probes.parquet")] if compared() else [],
            intervals=[result("intervals/intervals.parquet")] if depth() else [],
            width=candidates(),
        output:
            search=figure("intervals", "search", "Search for intervals"),
            heatmap=figure("intervals", "heatmap", "CKA between blocks"),
            probes=figure("intervals", "probes", "Probe error along depth"),
            width=figure("intervals", "width", "Linear FFNs and text runs"),
            modulation=figure("intervals", "modulation", "Low-rank modulation"),
            search_png=png("intervals", "search"),
            heatmap_png=png("intervals", "heatmap"),
            probes_png=png("intervals", "probes"),
            width_png=png("intervals", "width"),
            modulation_png=png("intervals", "modulation"),
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
            config=subset("similarity", "width.enabled", "modulation.enabled"),
            tables=optional("cka", "blocks", "probes", "intervals", "width"),
            output=lambda wildcards, output: os.path.dirname(output[0]),
            code=code("plot.py"),
        message:
            "Drawing the search for intervals"
        shell:
            "python {input.script} intervals --config {params.config:q} {params.tables} "
            "--output {params.output} 2>&1 | tee {log}"


if figures("training"):

    rule plot_training:
        input:
            script=program("plot.py"),
            distill_log=taught("distill", "log.parquet"),
            subsets_log=taught("subsets", "log.parquet"),
            finetuned=[result(f"finetune/{name}.parquet") for name in finetuned()],
        output:
            distill=figure("training", "distill", "Distillation"),
            subsets=figure("training", "subsets", "Any-subset distillation"),
            finetune=figure("training", "finetune", "Fine-tuning"),
            distill_png=png("training", "distill"),
            subsets_png=png("training", "subsets"),
            finetune_png=png("training", "finetune"),
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
            logs=optional("distill_log", "subsets_log"),
            output=lambda wildcards, output: os.path.dirname(output[0]),
            code=code("plot.py"),
        message:
            "Drawing loss curves"
        shell:
            "python {input.script} training --config {params.config:q} {params.logs} "
            "--finetune-logs {input.finetuned} "
            "--output {params.output} 2>&1 | tee {log}"


rule plot_quality:
    input:
        script=program("plot.py"),
        metrics=result("evaluation/metrics.parquet"),
        images=result("evaluation/images.parquet"),
        points=result("pareto/points.parquet"),
        units=result("variants/units.parquet"),
        width=[] if depth() else widths("measured.parquet"),
    output:
        sets=figure("quality", "sets", "What each variant is made of"),
        width=figure("quality", "width", "Linear FFNs and text runs"),
        modulation=figure("quality", "modulation", "Low-rank modulation"),
        pareto=figure("quality", "pareto", "Every budget by itself"),
        tradeoff=figure("quality", "tradeoff", "Quality against size and latency"),
        images=figure("quality", "images", "Images"),
        sets_png=png("quality", "sets"),
        width_png=png("quality", "width"),
        modulation_png=png("quality", "modulation"),
        pareto_png=png("quality", "pareto"),
        tradeoff_png=png("quality", "tradeoff"),
        images_png=png("quality", "images"),
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
        config=subset("variants", "width.enabled", "modulation.enabled"),
        tables=optional("width"),
        output=lambda wildcards, output: os.path.dirname(output.sets),
        code=code("plot.py"),
    message:
        "Drawing quality against cost"
    shell:
        "python {input.script} quality --config {params.config:q} "
        "--metrics {input.metrics} --images {input.images} --points {input.points} "
        "--units {input.units} {params.tables} "
        "--output {params.output} 2>&1 | tee {log}"
