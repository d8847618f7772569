"""Engine versions side by side: `plan` what to run, `environments` to run it in, `worker` at their end, `executors`, `run`."""
