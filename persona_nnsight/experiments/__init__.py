"""The experiments: grid and options in, results out.

One file each. Each is a plan, which needs no weights, carried out by `execution`.
"""
