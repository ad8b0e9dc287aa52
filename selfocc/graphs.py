"""CUDA graphs: what a function asks of a GPU, asked again as one."""

from collections.abc import Callable

import torch


def capture(function: Callable[[], object]) -> Callable[[], object]:
    """A function that does on the GPU what `function` does there, on the same memory, which holds
    its results until the next call.

    `function` takes tensors that stay where they are, waits for nothing, and has run before, so
    that what is compiled, tried out or made once is so. This does not run it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> object:
        graph.replay()
        return results

    return replay
