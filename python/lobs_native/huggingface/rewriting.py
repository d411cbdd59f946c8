"""A folder that is written without the memory for its network: as a copy, with other values of some
tensors at their places."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lobs_native.errors import CheckpointError
from lobs_native.files.atomic import writing
from lobs_native.files.shelf import Place, memory_of, state_if_equal
from lobs_native.huggingface.checkpoint import INDEX, Checkpoint, change_config, copy_others
from lobs_native.huggingface.verification import check_zeros

__all__ = ["rewrite"]


def rewrite(
    model: nn.Module,
    checkpoint: Checkpoint,
    folder: Path,
    masks: Mapping[str, Tensor],
    places: Mapping[str, Place],
    config: Mapping[str, Any],
    drop: Callable[[Iterable[nn.Parameter]], object],
) -> dict[str, Any]:
    """Copy a checkpoint into ``folder`` with the present values of the model's parameters; then
    compare every one with what was written.

    Parameters
    ----------
    model : nn.Module
        From :func:`lobs_native.huggingface.checkpoint.load`. It is not modified.
    checkpoint : Checkpoint
        What it was loaded from.
    folder : Path
        An existing, empty folder.
    masks : {layer name: bool tensor}
        Weights must be zero where the mask is False.
    places : {name: Place}
        Where in the files of the checkpoint every parameter lies, in the dtype that it has now.
    config : mapping
        What is different in config.json, nested as it is there.
    drop : callable(parameters)
        Gives back the memory of parameters, so that no more than one is in memory.

    Returns
    -------
    dict
        For the report, as of :func:`lobs_native.huggingface.checkpoint.save`.

    Raises
    ------
    CheckpointError
        It could not be written, or is not the network in memory.
    """
    with writing(folder):
        left_out = copy_others(checkpoint, folder)
        copies = {checkpoint.folder / name: folder / name for name in checkpoint.files}
        index = checkpoint.folder / INDEX
        if index.is_file():
            copies[index] = folder / INDEX
        for path, copy in copies.items():
            shutil.copyfile(path, copy)
        change_config(folder, config)
        written = []
        for name, parameter in model.named_parameters():
            place = Place(copies[places[name].path], places[name].begin)
            if not _is_there(parameter, place):
                with place.path.open("r+b") as file:
                    file.seek(place.begin)
                    file.write(memory_of(parameter.detach()))
                written.append((name, parameter, place))
            drop([parameter])
    for name, parameter, place in written:
        if not _is_there(parameter, place):
            raise CheckpointError(f"MODEL: {name} differs from what was written when read again")
        drop([parameter])
    check_zeros(model, masks, lambda: drop(model.parameters()))
    return {
        "files left out": left_out,
        "tensors left out": [],
        "tensors pruned in another dtype": [],
    }


def _is_there(parameter: nn.Parameter, place: Place) -> bool:
    return not parameter.numel() or state_if_equal(parameter, place) is not None
