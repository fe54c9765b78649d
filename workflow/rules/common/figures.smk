# The figures that a run has, and its report.

from ppcl.figures import catalogue
from ppcl.figures.run_tables import TABLES


def figures(group):
    """The catalogue's entries of a group, as far as this run has what they show."""
    return [entry for entry in catalogue.of_group(group) if entry.shown(settings())]


def plots(*groups):
    """The figures of some groups, as SVG and PNG."""
    return [
        result(f"plots/{group}/{entry.name}.{extension}")
        for group in groups
        for entry in figures(group)
        for extension in ("svg", "png")
    ]


def figure_names(group):
    """For params: which figures are to be drawn."""
    return [entry.name for entry in figures(group)]


def figure_keys(group):
    """The config's keys that drawing a group's figures depends on."""
    return sorted({key for entry in figures(group) for key in entry.keys})


def figure_tables(group):
    """For a rule's input: a group's tables, by name; of some, each fine-tuned variant has one."""
    names = {name for entry in figures(group) for name in entry.tables}
    paths = {name: result(path) for name, path in TABLES.items() if name in names}
    return {
        name: (
            [path.replace("<variant>", variant) for variant in finetuned()]
            if "<variant>" in path
            else path
        )
        for name, path in paths.items()
    }


def figure_files(group):
    """For a rule's output: a group's figures as SVG, which the report shows, and as PNG."""
    files = {}
    for entry in figures(group):
        files[entry.name] = report(
            result(f"plots/{group}/{entry.name}.svg"),
            caption=f"../report/{entry.name}.rst",
            category=group.capitalize(),
            labels={"figure": entry.title},
        )
        files[f"{entry.name}_png"] = result(f"plots/{group}/{entry.name}.png")
    return files


def folder_of_figures(wildcards, output):
    """For params: where a rule's figures go."""
    return os.path.dirname(output[0])


def interval_plots_only():
    """Whether nothing but the interval plots is asked for, and their tables exist."""
    tables = figure_tables("intervals").values()
    return targets() == {"interval_plots"} and all(Path(table).is_file() for table in tables)


def reporting():
    """Whether the command line asks for a report (read from the arguments, as in `targets`)."""
    return workflow.is_main_process and any(word.startswith("--report") for word in sys.argv[1:])


def reported():
    """A function that returns the table at the top of a report. It reads the results now or, with
    --report-after-run, when it is called after the run."""
    if not targets() <= {"all"}:
        return str  # of nothing: an empty text
    if "--report-after-run" in sys.argv[1:]:
        return lambda: summary("rst")
    table = summary("rst")
    return lambda: table


def summary(form):
    """The table of what the variants reach, as `text` or `rst`."""
    metrics = result("evaluation/metrics.parquet")
    if not Path(metrics).is_file():
        refuse(
            f"run '{config['run']}' has no {metrics} to report on yet: run it first, or name "
            "the config of another run with --configfile"
        )
    from ppcl.evaluation import summary as summary_table  # pandas, which takes a second to import

    try:
        rows = summary_table.rows(metrics, result("models"), config["teacher"]["path"])
        scores = summary_table.scores(metrics)
    except UserError as error:
        refuse(error)
    return getattr(summary_table, form)(rows, scores)
