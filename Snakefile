# Depth and width pruning of diffusion transformers (PPCL, arXiv 2511.16156), from teacher to pipelines.
#
#   snakemake --cores all                                    the embedded default, config/digits.yaml
#   snakemake --cores all --configfile config/mine.yaml      your model
#   snakemake --cores all interval_plots                     figures of the search, from parquet only
#   snakemake --cores all ablation                           the method against its alternatives
#   snakemake --cores all forecast                           memory, sizes and disk, without weights
#   snakemake --cores all train_teacher                      remake the embedded teacher

from snakemake.utils import min_version

min_version("9.0")


# A config file given on the command line stands alone: nothing of the default's leaks into it.
if not workflow.overwrite_configfiles:

    configfile: "config/digits.yaml"


include: "workflow/rules/common/setup.smk"
include: "workflow/rules/common/keys.smk"
include: "workflow/rules/common/stages.smk"
include: "workflow/rules/common/limits.smk"
include: "workflow/rules/common/commands.smk"
include: "workflow/rules/common/figures.smk"


validate()
refuse_without_cuda()
FORECAST = forecast()
if reporting():
    config["summary"] = reported()


report: "workflow/report/workflow.rst"


wildcard_constraints:
    variant="|".join(map(re.escape, variants())),
    benchmark="|".join(map(re.escape, benchmarks())) or "none",
    model="|".join(map(re.escape, ["teacher", *variants()])),


include: "workflow/rules/plot.smk"
include: "workflow/rules/forecast.smk"


# Finished searches are drawn from their parquet files alone, whatever became of the rest; a forecast
# takes what is there and has nothing made.
if targets() != {"forecast"} and not interval_plots_only():

    include: "workflow/rules/record.smk"
    include: "workflow/rules/extract.smk"
    include: "workflow/rules/probe.smk"
    include: "workflow/rules/similarity.smk"
    include: "workflow/rules/sensitivity.smk"
    include: "workflow/rules/width.smk"
    include: "workflow/rules/latency.smk"

    if depth():

        include: "workflow/rules/intervals.smk"
        include: "workflow/rules/prune.smk"

    if trains() and config["distill"]["shards"] == 1:

        include: "workflow/rules/distill.smk"

    elif trains():

        include: "workflow/rules/distill_shards.smk"

    if staged():

        include: "workflow/rules/narrow.smk"

    if "subsets" in training():

        include: "workflow/rules/subsets.smk"
    include: "workflow/rules/choose.smk"
    include: "workflow/rules/encode.smk"
    include: "workflow/rules/finetune.smk"
    include: "workflow/rules/assemble.smk"

    if quantised():

        include: "workflow/rules/quantise.smk"
    include: "workflow/rules/pareto.smk"
    include: "workflow/rules/evaluate.smk"
    include: "workflow/rules/describe.smk"
    include: "workflow/rules/gather_metrics.smk"

    if benchmarks():

        include: "workflow/rules/benchmark_pictures.smk"
    include: "workflow/rules/ablation.smk"
    include: "workflow/rules/train_teacher.smk"


localrules:
    all,
    ablation,
    interval_plots,


rule all:
    default_target: True
    input:
        artifacts=artifacts(),
        models=models(),
        cards=cards(),
        plots=plots("intervals", "training", "quality"),


rule ablation:
    input:
        results=result("ablation/results.parquet"),
        plots=plots("ablation"),


rule interval_plots:
    input:
        plots=plots("intervals"),


onsuccess:
    forget_taken(workflow.dag.jobs)
    # `all` is left out by --until, --omit-from and --batch, which may leave no metrics.
    if any(job.rule.name == "all" and workflow.dag.finished(job) for job in workflow.dag.jobs):
        logger.info(f"\n{summary('text')}\n")
