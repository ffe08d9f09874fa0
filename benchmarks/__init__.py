"""Benchmarks of btrm against other trainers, on equal terms; rules and results are in `benchmarks/README.md`.

Modules, in import order: environment (machine, versions, commit), workload (model, pairs, order), gate (one step
at a time, timed), arms (TRL and the seed recipe), btrm_arms (btrm and the bare backbone), worker (one process per arm),
results (schema, summary), table (README), train_throughput and score_best_of_n (commands).
"""
