"""What looks at a run from outside: plans, costs, benchmarks, checks of devices, export, the command line."""
