"""The function for whole networks that users call: ``prune``; ``plan_prune`` is beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lobs_native.calibration.session import Forward
from lobs_native.network.carrying_out import carried_out
from lobs_native.network.settings import NetworkSettings, chosen_of
from lobs_native.report.report import Report

__all__ = ["prune"]


def prune(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    max_error: float | None = None,
    method: str = "auto",
    pattern: Any = "unstructured",
    scope: str = "layer",
    spread: float = 0.2,
    sensitivity: str | None = "auto",
    token_weights: str | None = None,
    budget: str = "weights",
    search: int = 0,
    search_seconds: float | None = None,
    damping: float = 0.01,
    prune_bias: bool = False,
    refine: str | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    strict: bool = False,
    inputs: str = "corrected",
    blocks: str | None = "auto",
    tune: str | None = None,
    tune_passes: int | None = None,
    tune_rate: float | None = None,
    classes: int | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    memory: int | None = None,
    offload: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: str = "auto",
    progress: bool = True,
    seed: int = 0,
    token_mask: str | None = "auto",
    measure: str = "sample",
    held_back: float = 0.0,
    settings: NetworkSettings | None = None,
    group: Any = None,
    original: nn.Module | None = None,
) -> Report:
    """Prune the linear, convolution and recurrent layers, attention and experts of a network in
    place, one after another, without retraining.

    Parameters
    ----------
    model : nn.Module
        Run in eval mode and with ``config.use_cache`` off for calibration (restored afterwards).
        Its weights and biases are changed in place, keeping dtype, device and zeros. On any error,
        and on Ctrl-C, all of them get their old values back.
    calibration : iterable of batches
        A batch is a tensor (``model(batch)``), a tuple or list (``model(*batch)``) or a dict
        (``model(**batch)``). No labels are needed; a few hundred to a few thousand samples are
        usual. An iterator that can be read only once is kept in memory, because the data is read
        several times.
    sparsity, threshold, max_error
        Exactly one, for every layer: see :func:`lobs_native.prune_weight`. With an N:M pattern,
        none.
    method, pattern, damping, prune_bias, refine, backend
        As in :func:`lobs_native.prune_weight`.
    scope : "layer", "row" or "model"
        As in :func:`lobs_native.prune_weight`; "model" compares weights over all layers and removes
        the share ``sparsity`` of all of them. It needs method "auto", "exact" or "admm", pattern
        "unstructured", and one more pass over the data.
    spread : float
        Only with scope "model": how far a layer's sparsity may be from the requested one. Every
        layer also keeps at least half of the weights that it was to keep. 1 sets no bounds.
    sensitivity : "auto", "output", "bound" or None
        "output" multiplies the costs of removals from a row by how much the network's output
        depends on it: the mean square, over the data and random directions v, of the gradient of
        ``v . output`` (the diagonal of the Gauss-Newton matrix), from one forward and backward pass
        without labels. It matters where "exact" and "admm" compare rows, in a layer or over the
        model. "auto" does this with scope "model", and wherever ``token_weights`` needs the same
        pass. Layers whose outputs are not a module's outputs (attention, experts) keep the
        requested sparsity, as do those that the output does not depend on.
        "bound" (scope "model") takes the squared spectral norms of the later layers instead, which
        minimises the bound of Theorem 3.2 up to a constant, for the networks it covers. None
        compares rows of a layer by their costs alone, and layers by cost over the square root of
        their ``tr(W H W^T)``.
    token_weights : "output" or None
        "output" lets each row of a layer's inputs (a token, a sample, a convolution's position)
        count in its second moments as much as the network's output depends on the layer's output
        there: by the mean square of the gradient that ``sensitivity`` describes, in the same pass,
        over the layer's outputs, relative to its mean over the data. Layers that read one tensor
        take the mean of their weights. All methods that use second moments then aim at the output
        of the network rather than the layer's, and errors are weighted likewise. Together with
        ``sensitivity`` "output" it is the factored (Kronecker) form of the empirical Fisher
        information. Needs 4 bytes for each row of each layer. Layers whose outputs are not a
        module's outputs (attention, experts) count all rows the same, and their notes say so.
    budget : "weights" or "flops"
        With scope "model", what ``sparsity`` is a share of: all weights, or all multiplications of
        one forward pass (a convolution's weight is used at every position).
    search : int >= 0
        With scope "model" and ``held_back``: how many divisions of the budget besides the first one
        are tried. With each, the network is pruned as a whole, and its output is measured on the
        batches held back: by the Kullback-Leibler divergence where it returns logits over
        ``classes``, by the relative change of the output otherwise. The best is taken, so that the
        network is never further from the original one there than without a search. It takes as many
        times as long. ``report.settings["search for a division"]`` says what it found; with
        ``run_dir``, evaluations are kept.
    search_seconds : float, optional
        No further division is begun after so many seconds. How many there were then depends on the
        machine; the report says it.
    include, exclude : glob or list of globs on names of layers or modules
        Default: everything that can be pruned. That is nn.Linear, nn.Conv1d to 3d and their
        transposes, nn.MultiheadAttention (``<name>.q_proj``, ``k_proj``, ``v_proj``, ``out_proj``),
        Conv1D and experts as transformers stores them (``<name>.gate_up_proj``, ``down_proj``),
        those of :func:`lobs_native.register_layer`, and every other parameter (its full name, or
        its module's if it is called "weight") that the model multiplies activations by: in
        functions, in modules with a forward of their own, in recurrent layers. Left alone are
        routers of mixtures of experts and of mixed filters, unless ``include`` names them (by a
        glob that does not end in a star), adapters such as LoRA, and whatever is looked up or
        combined entry by entry. A glob that matches nothing is an error.
    strict : bool
        What cannot be pruned, or is used in a way that is not understood, is left out, with the
        reason in ``report.skipped``; a warning says so where that is more than 2 % of the weights
        to be pruned. True makes it an error, before anything is changed. A layer that ``include``
        names (by a glob that does not end in a star) is always an error if it cannot be pruned.
    overrides : {glob: {argument: value}}
        Arguments for some layers only, for example ``{"classifier": {"sparsity": 0.3}}``; later
        entries win. Sparsity, threshold, max_error, method, pattern, scope, damping, prune_bias and
        refine can be overridden. A target (the first three) or an N:M pattern replaces every
        earlier target.
    inputs : "corrected", "pruned" or "dense"
        What a layer is calibrated on. "corrected" runs the original and the pruned network side by
        side. On the pruned network's inputs, a layer is fitted to the original network's outputs,
        so that it compensates for what the layers before it lost: ``W + (A P)^T`` is pruned in
        place of W, with ``P = mean of x^T (y0 - x W^T)``, whatever the method. Where an output goes
        straight into a sum with something else (a residual connection), the sums are made to agree.
        Errors, and ``max_error``, then include what the layers before lost. Experts, and layers
        with zeros that would be filled, are calibrated as with "pruned", and their notes say so.
        "corrected" usually leaves the network by far the closest to the original
        (``python bench/quality/whole_encoder.py``). It costs one more run of the original network
        for every run of the pruned one, so that calibration takes two to three times as long, and
        memory for a second copy of the weights, hidden states of both networks, and 24 bytes for
        each weight of the layer at work.
        "pruned" calibrates on the activations of the network as pruned so far, and each layer aims
        at its own old outputs: take it where time or memory is short, or to get "magnitude" and
        "wanda" as published, with kept weights that do not change. "dense" calibrates on those of
        the original network, with one pass over the data for all layers: the paper, and Theorem 3.2
        as printed.
    blocks : "auto" or None
        With inputs "corrected" or "pruned", run a stack of blocks (a transformer's) block by block
        on what each receives, instead of the whole model for every layer; the results are the same.
        "auto" does so where the modules of a list are called one after another, each on what the
        one before returned, and a replay of the first batch reproduces the model's output;
        ``report.settings`` lists these stacks ("blocks") and the reasons against others ("no
        blocks"). If the last block then does not return what it returns in the pruned model,
        because the model computes more than hidden states on the way, all is done again without
        blocks; with ``run_dir``, that is an error.
    tune : "network", "blocks" or None
        "network" tunes the network once all layers are pruned: all parameters of these layers, and
        norms and biases, together, with the zeros held, towards what the original network returns
        for the same batches, by Adam. No labels are needed. Logits over ``classes`` are compared by
        the Kullback-Leibler divergence, other outputs by the squared distance; padding does not
        count. A tenth of the batches, but at least one, is held back, and the network keeps the
        values of the pass after which it was closest to the original one there: its old ones if no
        pass was better. Every batch is a step, so that more and smaller batches tune further. It
        takes a backward pass through the network, the original outputs for all batches on disk, and
        17 bytes for each parameter that is tuned (float32; 21 for bfloat16). With ``memory``,
        blocks of a stack are run once more in the backward pass, which then keeps what is inside of
        one of them. With ``run_dir``, what was tuned is committed; a run that was killed before
        tunes from the beginning, to the same bits.
        "blocks" tunes each block of a stack once its layers are pruned, towards what the block
        returned in the original network (with inputs "pruned": what the original block makes of the
        present inputs), in the same way.
        ``report.settings["tuned"]`` has the errors before and after, on the batches held back and
        on as many others, and the seconds; errors of layers are of before.
    tune_passes : int, optional
        How often tuning goes through the data: twice where nothing is said. Small networks can do
        with 10 and more.
    tune_rate : float, optional
        The rate of the first step, relative to the root mean square of a parameter: 0.001 for the
        network and 0.002 for blocks where nothing is said. Small networks can take 0.016.
    classes : int >= 2, optional
        The network returns logits over so many classes, in the last dimension of an output, such as
        10 for (B, 10). ``tune="network"`` and ``search`` then compare these logits, and nothing
        else that it returns, by the Kullback-Leibler divergence of the classes' probabilities from
        the original ones. Where nothing is said: over the tokens of a language model, as
        ``config.vocab_size`` says, if the model has one. It is an error if the model returns no
        such output for the first batch, or if neither of the two is asked for.
    forward : callable(model, batch), optional
        How to run the model on a batch when none of the forms above is right.
    memory : int, optional
        Bytes that pruning may take besides the model, the data, a forward pass (with sensitivities,
        a backward pass; with corrected inputs, what a layer reads, and a sum it goes into, of one
        batch in both networks), and what libraries keep for themselves (some tens of megabytes). To
        stay within the limit, kernels use fewer threads, second moments are accumulated in several
        passes, and hidden states and original weights go to a temporary folder on disk. A plan is
        made before anything is changed (``report.settings["plan"]``; printed on a terminal), and
        MemoryError says what is needed if the limit is too small. From then on, in the whole
        process, glibc returns freed allocations of a megabyte or more to the system at once.
    offload : path, optional
        For networks beyond memory, on Linux: weights lie in files and are mapped, and take memory
        only while the block that they belong to is run or pruned. The folder, on a disk with room
        for what is pruned (twice that, for weights that lie in no file yet), gets files without
        names, which are gone with the process; the model's weights stay mapped from them. Weights
        of less than 4 kB stay in memory. Bits are those without it. Not with ``tune``, nor on
        other devices.
    device : optional
        Move the model (it stays there) and each batch to this device first.
    run_dir : path, optional
        A folder where every pruned layer is checkpointed, so that a run that is killed, or ended by
        an error or a full disk, loses none of them: call prune again with the same arguments, and
        only the other layers are calibrated and pruned. Between two layers, sums over the data and
        the inputs of the next block are checkpointed as well whenever writing them takes at most a
        twentieth of the time since the last checkpoint (with ``memory``, if they are small). On
        the same machine with as many threads, the network then has the bits of an uninterrupted
        run. The folder takes about the size of the weights, and twice that of the sums.
    resume : "auto", "never" or "anyway"
        What to do where ``run_dir`` holds a run. "auto" resumes it if model, data, arguments
        (except ``memory``), versions and threads are the same; otherwise it is an error that lists
        the differences. "anyway" resumes it in spite of differences, which
        ``report.settings["resumed despite"]`` then lists. "never" raises an error.
    progress : bool
        Progress bars on a terminal.
    seed : int
        Set before every pass over the data, and made anew from it for every batch, so that a
        stochastic forward repeats; the caller's generators are kept.
    token_mask : "auto" or None
        "auto" leaves padding out. With an ``attention_mask`` (B, T) of zeros and ones among the
        arguments of the model, that is the rows at zeros wherever a linear layer's input is
        (B, T, C), but not for encoder-decoder models, where it is unknown which part the mask
        belongs to. With torch's transformer layers and attention, it is what their key padding
        masks say, wherever these are made, and a ``src_key_padding_mask`` of the model says it for
        all its linear layers. Each layer's notes say how many rows, or that it could not. None
        counts padding like everything else.
    measure : "sample" or "all"
        The batches on which the change of the network's output is measured at the end, for which
        both networks run: all of them, or a sample, evenly spaced, with 512 rows of output
        (tokens) or a little more. A network that Theorem 3.2 covers is always measured on all.
        ``report.error_bound`` says how many rows and batches that were.
    held_back : float in [0, 1)
        Share of the batches that nothing is calibrated on (one at least, evenly spaced; all are
        kept in memory then). On them, the change of the output and every layer's relative error
        are measured as well: ``report.error_bound.held_back`` and ``held_back_error`` of a layer.
        Where these are much larger, the data is too little, and ``rows_enough`` of the layers says
        how much would do.
    settings : NetworkSettings, optional
        All arguments after ``calibration`` as one object, instead of keywords. A keyword that
        differs from its default is then an error.
    group : torch.distributed.ProcessGroup, optional
        The processes that share the work; ``torch.distributed.group.WORLD`` is all of them. Each
        calls prune with the same model, data and arguments, runs its part of the batches, prunes
        its part of the layers or of the rows of a large one, and gets the whole network and report,
        with the bits of one process with as many threads. Rank 0 alone writes ``run_dir``, and
        alone does what ``tune`` asks for. None: this process does all of it, even where there is a
        process group. Parameters that lie in pieces on these ranks (DTensor: FSDP2, tensor
        parallelism) are gathered, with ``offload`` into files, and each rank's pieces get the
        result; they stay the same objects, and ``report.settings["gathered"]`` counts them. Tested
        with gloo on CPUs; NCCL has not been tried.
    original : nn.Module, optional
        For a model that has been pruned before and is to lose more: what it was before the first
        call (``copy.deepcopy(model)``), with parameters of the same names, shapes and dtypes, and
        the same buffers. "Original network" above then means this one: layers with inputs
        "corrected" are fitted to its outputs, tuning and ``search`` aim at them, and the change of
        the output is measured from them. Layers with other inputs are fitted to their own outputs
        in the model as it was passed. Only its parameters' values are read; it is neither run nor
        changed. On an error, the model is as it was passed. With ``run_dir``, a resumed call needs
        the same one. Not with ``offload``; Theorem 3.2 does not cover it. None: the model as it is.

    Returns
    -------
    Report
        Each layer's incurred error, absolute and relative, the damping used, seconds, requested
        and reached sparsity; what became of all weights of the network (``coverage``), and why some
        were left alone (``skipped``); the bound of Theorem 3.2 where it holds, beside the measured
        output error; the masks.

    Raises
    ------
    ArgumentError, DtypeError, PatternError, BackendError
        An argument does not fit, nothing matches, or no layer is left that can be pruned. Nothing
        has been changed.
    NonFiniteError, NotPositiveDefiniteError
        The message names the layer; the model is as it was.
    MemoryError
        ``memory`` is too small for some layer, or parameters in pieces do not fit, gathered, into
        what is free; nothing has been changed.
    CheckpointError
        ``run_dir`` cannot be written or read, holds another run or is in use. The model is as it
        was.
    RankError
        Another process of ``group`` has ended, has failed, or does something else. The model is as
        it was. An error of another rank that has a class of its own is raised as that.

    Notes
    -----
    A weight that several layers share is pruned once, for the inputs of all of them, when the first
    is reached; their biases are updated only if they share one as well. A weight that something
    else uses too (an embedding, an excluded layer) is skipped, or refused if ``include`` names it.
    N:M patterns of a convolution group neighbouring input channels at one kernel position. Each
    expert is calibrated on the rows that are routed to it, and all experts count the same. One that
    saw fewer than 8 rows for each input loses the requested share of its weights by itself, by a
    second moment that is mixed with the identity; without rows, by magnitude. Notes say so, and
    also where there were fewer rows than columns. Source: Dong, Chen & Pan 2017; "corrected" is the
    asymmetric calibration of Li et al. 2025 (GPTAQ), with sums added here.
    """
    arguments = NetworkSettings(
        sparsity=sparsity,
        threshold=threshold,
        max_error=max_error,
        method=method,
        pattern=pattern,
        scope=scope,
        spread=spread,
        sensitivity=sensitivity,
        token_weights=token_weights,
        budget=budget,
        search=search,
        search_seconds=search_seconds,
        damping=damping,
        prune_bias=prune_bias,
        refine=refine,
        include=include,
        exclude=exclude,
        overrides=overrides,
        strict=strict,
        inputs=inputs,
        blocks=blocks,
        tune=tune,
        tune_passes=tune_passes,
        tune_rate=tune_rate,
        classes=classes,
        forward=forward,
        device=device,
        memory=memory,
        offload=offload,
        backend=backend,
        run_dir=run_dir,
        resume=resume,
        progress=progress,
        seed=seed,
        token_mask=token_mask,
        measure=measure,
        held_back=held_back,
    )
    chosen = chosen_of(settings, arguments)
    return carried_out(model, calibration, chosen, group=group, original=original)
