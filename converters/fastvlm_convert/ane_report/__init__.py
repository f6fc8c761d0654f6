"""Where a Core ML package may run: static rules over its program, for where Core ML can't be asked.

A heuristic: Apple publishes no list of what the Neural Engine takes, so each rule names where it comes from. On a
Mac `fastvlm_convert.compute_plan` asks Core ML itself.

    operation.py   an op with what its arguments are
    rules.py       the rules, and the ops that are expected on the Neural Engine
    macs.py        multiply-accumulates of an op
    summary.py     report(): all of it over a package
"""

from fastvlm_convert.ane_report.rules import Finding, Rule
from fastvlm_convert.ane_report.summary import Report, read_programs, report

__all__ = ["Finding", "Report", "Rule", "read_programs", "report"]
