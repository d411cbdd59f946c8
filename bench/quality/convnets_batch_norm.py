"""Ways to re-estimate batch normalisation after pruning, on the residual network of convnets.py.

    python bench/quality/convnets_batch_norm.py [--images FOLDER] [--cache PREFIX] [--threads N]

Compares this package's, layer after layer; torch's ``update_bn``, one pass in training mode; and
passes in eval mode, which feed a layer values that the layers before it normalised with outdated
statistics. The tables show errors in percent on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: modules are found from the folder bench
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import lobs_native as lobs
from paper.data import FASHION, Images
from quality.convnets import AT_ONCE, CALIBRATION, METHODS, fashion, percent_wrong, trained


@torch.no_grad()
def in_eval_mode(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """One pass: a layer gets the statistics of its inputs while all layers have the old ones."""
    seen: dict[nn.BatchNorm2d, list[Tensor]] = {}
    handles = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            seen[module] = []
            handles.append(
                module.register_forward_pre_hook(lambda layer, args: seen[layer].append(args[0]))
            )
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    for layer, parts in seen.items():
        variance, mean = torch.var_mean(torch.cat(parts), dim=(0, 2, 3))
        layer.running_mean, layer.running_var = mean, variance


def compare_batch_norm(model: nn.Module, training: Images, tested: Images) -> None:
    """Prune one network, re-estimate it in several ways, and print the errors."""
    x, y = training.x[:CALIBRATION], training.y[:CALIBRATION]
    sorted_by_class = x[y.argsort(stable=True)]
    ours = lobs.reestimate_batch_norm

    def several(passes: int) -> Callable[[nn.Module, Sequence[Tensor]], None]:
        def run(model: nn.Module, batches: Sequence[Tensor]) -> None:
            for _ in range(passes):
                in_eval_mode(model, batches)

        return run

    def update_bn(model: nn.Module, batches: Sequence[Tensor]) -> None:
        torch.optim.swa_utils.update_bn(batches, model)

    ways: dict[str, tuple[Callable[..., Any], Sequence[Tensor]]] = {
        "as pruned": (lambda model, batches: None, ()),
        "layer after layer, batches of 100": (ours, x.split(100)),
        "layer after layer, of 4": (ours, x.split(4)),
        "layer after layer, of 100, by class": (ours, sorted_by_class.split(100)),
        "training mode, batches of 100": (update_bn, x.split(100)),
        "training mode, of 20": (update_bn, x.split(20)),
        "training mode, of 4": (update_bn, x.split(4)),
        "training mode, of 100, by class": (update_bn, sorted_by_class.split(100)),
        **{f"eval mode, passes: {n}": (several(n), x.split(100)) for n in (1, 2, 3, 5)},
    }
    print("\n| sparsity | method | batch norm re-estimated | error | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for method, sparsity in (("magnitude", 0.7), ("exact, layer", 0.7), ("exact, layer", 0.8)):
        pruned = copy.deepcopy(model)
        batches = x.split(AT_ONCE)
        lobs.prune(pruned, batches, sparsity=sparsity, progress=False, **METHODS[method])
        for name, (way, data) in ways.items():
            variant = copy.deepcopy(pruned)
            begun = time.perf_counter()
            way(variant, data)
            seconds = time.perf_counter() - begun
            error = percent_wrong(variant.eval(), tested)
            print(f"| {sparsity:.0%} | {method} | {name} | {error:.2f} | {seconds:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Re-estimating batch normalisation.")
    parser.add_argument("--images", type=Path, default=FASHION, help="of Fashion-MNIST")
    parser.add_argument("--cache", help="prefix of files with trained weights")
    parser.add_argument("--threads", type=int, help="default torch's")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    training, tested = (fashion(arguments.images, which) for which in ("train", "t10k"))
    compare_batch_norm(trained("resnet", training, 0, arguments.cache), training, tested)


if __name__ == "__main__":
    main()
