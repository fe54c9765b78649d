# What a run needs: sizes, memory and disk, from the transformer's config alone, without weights.
#
# in:  a config.json of the transformer; the selection and the recorded calls, where they exist
# out: forecast/forecast.parquet and a printed table; forecast/resources.json, from which jobs have
#      their limits
#
# A target of its own (forecast), for which nothing else is made.


rule forecast:
    input:
        **forecast_inputs(),
        script=program("forecast.py"),
    output:
        table=result("forecast/forecast.parquet"),
        resources=result("forecast/resources.json"),
    log:
        result("logs/forecast.log"),
    benchmark:
        result("benchmarks/forecast.tsv")
    conda:
        ENVIRONMENT
    resources:
        mem_mb=8000,
        runtime=20,
    params:
        config=subset(*FORECAST_KEYS),
        given=optional("intervals", "candidates", "calls"),
        code=code("forecast.py"),
    message:
        "Forecasting what a run needs"
    shell:
        command("{params.given}", "output.table", "output.resources")
