# Figures, from parquet files alone, as SVG (embedded in the report) and PNG. The catalogue,
# ppcl/figures/catalogue.py, says what there is to draw, from which tables and when.
#
# in:  the tables that a figure shows
# out: plots/intervals, plots/training and plots/quality


if figures("intervals"):

    rule plot_intervals:
        input:
            **figure_tables("intervals"),
            script=program("plot.py"),
        output:
            **figure_files("intervals"),
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
            config=subset(*figure_keys("intervals")),
            figures=figure_names("intervals"),
            tables=optional(*figure_tables("intervals")),
            output=folder_of_figures,
            code=code("plot.py"),
        message:
            "Drawing the search for intervals"
        shell:
            command("params.figures", "{params.tables}", "params.output", group="intervals")


if figures("training"):

    rule plot_training:
        input:
            **figure_tables("training"),
            script=program("plot.py"),
        output:
            **figure_files("training"),
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
            config=subset(*figure_keys("training")),
            figures=figure_names("training"),
            tables=optional(*figure_tables("training")),
            output=folder_of_figures,
            code=code("plot.py"),
        message:
            "Drawing loss curves"
        shell:
            command("params.figures", "{params.tables}", "params.output", group="training")


rule plot_quality:
    input:
        **figure_tables("quality"),
        script=program("plot.py"),
    output:
        **figure_files("quality"),
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
        config=subset(*figure_keys("quality")),
        figures=figure_names("quality"),
        tables=optional(*figure_tables("quality")),
        output=folder_of_figures,
        code=code("plot.py"),
    message:
        "Drawing quality against cost"
    shell:
        command("params.figures", "{params.tables}", "params.output", group="quality")
