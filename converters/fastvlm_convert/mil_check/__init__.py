"""Execute a saved Core ML package on any system, op by op from the file, and say how right it is.

Core ML runs on Apple systems alone, so elsewhere nothing shows that a package computes what was meant. This
checker reads the protobuf and the weight file (not through coremltools' own program, which rebuilds and may
fold what it reads) and computes each op with torch in float32, or rounds each op's output to float16 as a
half-precision machine stores it. It doesn't model how the Neural Engine accumulates inside an op.

    package.py     the folder, its manifest, the interface of each function
    program.py     one function: its ops and constants, as stored
    blob.py        the weight file
    execution.py   execute(), which hands over to machine.py's loop; results.py what it gives back
    ops_*.py       what each op means; constexpr.py the compressed constants
    runtime.py     the checker in Core ML's place, so that a whole model runs over it

Light to import: coremltools and torch are imported when a package is opened or executed.
"""

from fastvlm_convert.mil_check.execution import execute, unknown_ops
from fastvlm_convert.mil_check.package import FeatureInfo, FunctionInfo, Package, open_package
from fastvlm_convert.mil_check.program import Operation, Program, StoredValue, ValueInfo
from fastvlm_convert.mil_check.results import Comparison, Execution, OpTrace, Precision, compare

__all__ = [
    "Comparison",
    "Execution",
    "FeatureInfo",
    "FunctionInfo",
    "OpTrace",
    "Operation",
    "Package",
    "Precision",
    "Program",
    "StoredValue",
    "ValueInfo",
    "compare",
    "execute",
    "open_package",
    "unknown_ops",
]
