"""Makes drafter GGUF files from DSpark checkpoints, and says what a GGUF file is.

checkpoint (read) -> tensors (names and shapes) -> conversion (plan) -> gguf_writer (write and verify); inspect reads
the result back. Needs neither torch nor the compiled module, except for K-quants.
"""

from dspark_cpp.convert.conversion import ConvertOptions, ConvertReport, convert
from dspark_cpp.convert.inspect import ModelSummary, summarize

__all__ = ["ConvertOptions", "ConvertReport", "ModelSummary", "convert", "summarize"]
