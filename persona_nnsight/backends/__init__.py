"""Where the engine runs: on this machine, simulated, or on an NDIF server.

A backend has one way to do work, ``run(function, plan, limits)``, and nothing else in the project
knows where it is done.

* `local`: the function is called.
* `simulate`: nnsight's rehearsal of a remote run, in this process.
* `ndif`: the function is sent to an NDIF server, a part of the plan at a time.
* `wire`: what travels there, and what runs there first.
"""
