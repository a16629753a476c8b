"""The speed benchmark: the published procedure and ours, on the same model and the same grid.

`workloads` says what is run, `procedure` is the published way to run it and counts its forwards,
`floor` is the least that a plan needs, `measure` takes time, work and memory, `comparison` makes a
row of the table. `curves`, `startup` and `remote` are the other parts.
"""
