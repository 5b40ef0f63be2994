"""Sandbox for model-written programs: run a program and its test in isolated processes, and return the outcome.

`isolation` detects the isolation layers ("walls") that the machine offers, `execute` runs programs with timeouts,
`records` has the input and output types. The rest runs inside the sandbox, in separate processes that import nothing
but the standard library: `inside` sets up the layers from `kernel`, `landlock`, `seccomp` and `cgroup`, then `worker`
runs the program or `checker` its test. The two exchange `plain` values. docs/sandbox.md lists the attacks and what
stops them.
"""
