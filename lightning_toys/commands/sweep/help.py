"""What `sweep --help` prints."""

from lightning_toys.commands.sweep.claims import BEAT, STALE

HELP = f"""\
usage: lightning-toys sweep [-c FILE ...] --grid.ANY.FLAG '[...]' [--grid.ANOTHER '[...]'] [--flag value ...]
       lightning-toys sweep  -c FILE ...  --search.ANY.FLAG '{{low: 1e-4, high: 1e-2, log: true}}' --search.metric NAME

fits and tests every cell, then compares; any number of processes may run the same command on one shared folder: each
takes cells that nobody else holds. What was done is not run again, what was cut off goes on from its last checkpoint.

  --grid.ANY.FLAG '[a, b]'    the values of a flag; cells are all combinations
  --grid.config '[a.yaml, b.yaml]'
                              configuration files, stacked on those of -c, which may then be absent
  --sweep.jobs N              worker processes on this machine (default 1: this one); where there are GPUs, one a worker
  --sweep.devices '[0, 1]'    the GPUs to use, one a worker in turn (default: all); without --sweep.jobs, a worker each
  --sweep.stale SECONDS       a cell's holder on another machine counts as dead after so long without a sign of life
                              (default {STALE:.0f}; one comes every {BEAT:.0f}); on the same machine a death is seen
  --sweep.retry true          run cells again that failed before

  --search.ANY.FLAG SPACE     what Optuna chooses: {{low: 1e-4, high: 1e-2, log: true}}, {{low: 1, high: 8, int: true}},
                              {{choices: [relu, gelu]}}; needs pip install 'lightning-toys[search]'
  --search.metric NAME        a metric of results.json; its mean over seeds is minimised
  --search.direction minimize|maximize   --search.trials N (default 20)   --search.seed N (default 0)

every other flag is that of fit (fit --help); docs/scale.md has machines, nodes and schedulers
"""
