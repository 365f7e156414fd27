"""What `sweep --help` prints."""

HELP = """\
usage: lightning-toys sweep [-c FILE ...] --grid.ANY.FLAG '[...]' [--grid.ANOTHER '[...]'] [--flag value ...]
       lightning-toys sweep  -c FILE ...  --search.ANY.FLAG '{low: 1e-4, high: 1e-2, log: true}' --search.metric NAME

fits and tests every cell, then compares. What was done is not run again; what was cut off goes on from its last
checkpoint. A cell that another process holds is skipped, and said to be.

  --grid.ANY.FLAG '[a, b]'    the values of a flag; cells are all combinations
  --grid.config '[a.yaml, b.yaml]'
                              configuration files, stacked on those of -c, which may then be absent
  --sweep.retry true          run cells again that failed before

on several processors, by Ray: pip install 'lightning-toys[sweep]'
  --sweep.jobs N              cells at a time (default 1: this process, without Ray); Ray is started here, and ended
  --sweep.address ADDRESS     a Ray cluster: auto, or HOST:PORT; as many cells at a time as it has room for, or N
  --sweep.cpus X --sweep.gpus X
                              for each cell, fractions too (default: 1 CPU; the GPUs shared out evenly)
  --sweep.dashboard true      Ray's dashboard in the browser

  --search.ANY.FLAG SPACE     what Optuna chooses: {low: 1e-4, high: 1e-2, log: true}, {low: 1, high: 8, int: true},
                              {choices: [relu, gelu]}; needs pip install 'lightning-toys[search]'
  --search.metric NAME        a metric of results.json; its mean over seeds is minimised
  --search.direction minimize|maximize   --search.trials N (default 20)   --search.seed N (default 0)
  --search.sampler tpe|cmaes|random|grid|gp   --search.pruner none|median|hyperband
                              or a class by its path, such as optuna.samplers.QMCSampler

every other flag is that of fit (fit --help); docs/scale.md has clusters, nodes and schedulers
"""
