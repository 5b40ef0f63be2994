"""Run programs that a model wrote, and tell whether their tests were passed.

`isolation` finds what walls the machine offers, `run` runs programs and keeps the time, `records` holds what goes in
and comes out. The rest runs inside, in processes of its own that import nothing but the standard library: `inside`
builds the walls from `kernel`, `landlock` and `seccomp`, then `worker` runs the program or `checker` its tests, which
talk to each other in `plain` values. docs/sandbox.md says what stops what.
"""
