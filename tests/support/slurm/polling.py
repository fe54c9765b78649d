"""Snakemake, which asks SLURM how its jobs are twice a second instead of ever more seldom.

The executor waits ten seconds longer after every question that brought no news, and no setting
says otherwise: right for a cluster that many share, and most of the time of a short test.
"""

import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

RemoteExecutor.next_seconds_between_status_checks = property(
    lambda self: 0.5, lambda self, value: None
)
main(sys.argv[1:])
