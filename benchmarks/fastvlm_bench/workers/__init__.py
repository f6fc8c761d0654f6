"""The sides of a comparison, each for a process of its own in the environment that its library is in.

They import the standard library, `fastvlm_bench.machine` and their own library, nothing else.
"""
