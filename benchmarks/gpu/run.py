"""What do the capture, the estimator and an ensemble's decoding cost on a GPU?

    python -m benchmarks.gpu.run OUTPUT --device cuda
    bash benchmarks/gpu.sh FOLDER

Llama-shaped models with random weights: the capture of 4-bit models next to a training step on the same rows, the
surrogates' solver next to the CPU, and four adapters that decode at once next to one. Parts that are not requested keep
what an earlier run wrote to OUTPUT. The shell script runs each part in a process of its own, and the tests that need a
GPU; with `--device cpu --tiny` both run anywhere, at toy sizes.
"""

import time
import warnings
from functools import partial

import datasets
import torch
import transformers

from ..common import machine, make_parser, read_results, shape_of, write_results
from . import capture, decoding, estimator
from .table import table

PARTS = {
    "capture_8b": partial(capture.measure, "llama-8b"),
    "capture_34b": partial(capture.measure, "llama-34b"),
    "decoding": decoding.measure,
    "estimator": estimator.measure,
}


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, help="of the models; those of the named shapes by default")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that all parts run")
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = read_results(arguments.output)
    results.setdefault("parts", {})
    # Of each part, as those of an earlier run may have had others.
    own = {"machine": machine(arguments.device), "arguments": shape_of(arguments, "parts", "device")}
    for part in arguments.parts:
        start = time.perf_counter()
        measured = PARTS[part](torch.device(arguments.device), arguments.tiny, arguments.layers)
        results["parts"][part] = {**own, **measured, "seconds": time.perf_counter() - start}
        write_results(arguments.output, results, table, arguments.device)


if __name__ == "__main__":
    main()
