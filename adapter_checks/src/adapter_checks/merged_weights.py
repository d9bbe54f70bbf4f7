"""Are the weights in a merged folder those of base + adapter? And if not: what was done instead?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapter_checks.initialisation import subtracted_initialisation
from adapter_checks.loaded_weights import adapter_names
from adapter_checks.model_folder import stored_names
from adapter_checks.names import plain_name
from adapter_checks.report import first_few

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from adapter_checks.merged_report import MergedReport

# A merge may round three times (base, change, sum) where the exact sum is rounded once. Independent errors add up as the
# square root of three, so twice one rounding is enough.
ROUNDINGS = 2.0
# Room for a sum in another order, and for an adapter computed in 16 bits: a thousandth of the change.
SUM_TOLERANCE = 1e-3
# How many times the change is there may be off by this much, beyond what rounding itself does.
TIMES_TOLERANCE = 0.1


class StoredWeights:
    """The tensors of a model's folder by the names that they have in the model, read one at a time.

    files   {file: {tensor: (dtype, shape)}}
    model   the model that they are loaded into: its class decides what they are called there
    tied    {name: name of the weight that it shares}; empty if the folder's configuration ties nothing
    """

    def __init__(self, files: dict[Path, dict], model: PreTrainedModel, tied: dict[str, str]):
        self._files = {name: file for file, header in files.items() for name in header}
        self._names, self._tied = stored_names(model, self._files), tied

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor that a model loaded from this folder has under this name, or None."""
        from safetensors import safe_open

        shared = self._tied.get(name, name)
        twins = [name, shared, *(twin for twin, source in self._tied.items() if source == shared)]
        if (stored := next((self._names[twin] for twin in twins if twin in self._names), None)) is None:
            return None
        with safe_open(self._files[stored], framework="pt") as file:
            return file.get_tensor(stored)


@dataclass
class _Layer:
    """One adapted weight. D is merged - base, and C what all adapters together change."""

    name: str
    numbers: int
    rank: int  # of the first adapter, like the next two
    scaling: float
    rslora: bool
    size: float  # |C|
    times: float  # <D, C> / <C, C>
    own_times: float  # the same of the exact merge, rounded once
    sizes: dict[str, float]  # the size of each adapter's change
    shares: dict[str, float]  # how much of it is in D, by least squares
    error: float  # |D - C|
    rounded: float  # |D - C| of the exact merge, rounded once
    limit: float
    pure: bool  # D is made of the adapters' changes and nothing else

    @property
    def ok(self) -> bool:
        return self.error <= self.limit and abs(self.times - self.own_times) <= TIMES_TOLERANCE


def compare_weights(
    report: MergedReport,
    model: PeftModel,
    shown: dict[str, str],
    merged: StoredWeights,
    base: StoredWeights,
    covered: bool,
) -> PreTrainedModel:
    """Compare every weight with base + adapters; findings, `times` and `rounding` go into the report.

    model  a PeftModel, `shown` its active adapters ({name in the model: name in a sentence}); it is used up
    covered  whether outputs are compared, too
    Returns the plain model that the exact merge gives, its weights rounded to the dtype of the merged ones.
    """
    from peft.tuners.lora import LoraLayer

    tied: dict[str, str] = cast("PreTrainedModel", model.get_base_model()).all_tied_weights_keys
    shared = {*tied, *tied.values()}
    layers = []
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer) and getattr(module.get_base_layer(), "weight", None) is not None:
            name = f"{plain_name(path)}.weight"
            layers.append(_merge_exactly(module, name, list(shown), merged.get(name), name in shared))
    compared = [layer for layer in layers if layer is not None]
    plain: PreTrainedModel = cast(Any, model).merge_and_unload()  # modules_to_save and what else is no LoRA layer
    head = _name_of(plain, plain.get_output_embeddings())
    ends = {*shared, head} - {None}
    missing: list[str] = []
    unknown: list[str] = []
    ties: list[str] = []
    others: list[str] = []
    adapted = {layer.name: layer for layer in compared}
    for name, weight in plain.named_parameters(remove_duplicate=False):
        found = merged.get(name)
        if found is None:  # if the base's files lack the name too, transformers renames the tensor when it loads them
            (ties if name in ends else missing if base.get(name) is not None else unknown).append(name)
        elif found.shape != weight.shape or not _alike(adapted.get(name), weight, found):
            if name in shared:
                ties.append(name)
            elif name not in adapted:
                others.append(name)
    _report_structure(report, ties, missing, unknown, others, covered)
    _report_layers(report, [layer for layer in compared if layer.name not in ties], plain, shown, merged, base)
    for name, weight in plain.named_parameters():
        if (found := merged.get(name)) is not None:
            weight.data.copy_(weight.detach().to(_precision(found, weight.dtype)))
    return plain


def _merge_exactly(module, name, adapters, found, tied):
    """Merge into this layer by PEFT, but with one rounding, and measure what the merged folder has instead; on the CPU."""
    import torch

    layer = module.get_base_layer()
    if tied:  # else the merge would change the other weight too, which the adapter leaves alone
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    before, changes = layer.weight.detach().to("cpu", torch.float32, copy=True), []
    adapters = [adapter for adapter in adapters if adapter in adapter_names(module)]
    for adapter in adapters:
        # DoRA and the like change the weight by more than scaling * B @ A, lora_bias changes the bias, too.
        if adapter in module.lora_variant or module.lora_bias.get(adapter):
            earlier = layer.weight.detach().to("cpu", torch.float32, copy=True)
            module.merge(adapter_names=[adapter])
            changes.append(layer.weight.detach().cpu().float() - earlier)
        else:
            changes.append(module.get_delta_weight(adapter).to("cpu", torch.float32))
            module.merged_adapters.append(adapter)  # merged below
    change = sum(changes)
    exact = before + change
    layer.weight.data.copy_(
        exact
    )  # in place: a weight read from a file lies in that file's pages until it is written to
    if found is None or found.shape != exact.shape:
        return None
    difference, rounded = found.to(exact).sub(before), exact.to(_precision(found, layer.weight.dtype)).float()
    size, error, one_rounding = _norm(change), _norm(difference - change), _norm(rounded - exact)
    gram = torch.tensor([[_dot(one, other) for other in changes] for one in changes], dtype=torch.float64)
    shares = torch.linalg.pinv(gram, hermitian=True) @ torch.tensor(
        [_dot(one, difference) for one in changes], dtype=torch.float64
    )
    limit = ROUNDINGS * one_rounding + SUM_TOLERANCE * size + 4 * torch.finfo(torch.float32).eps * _norm(before)
    rest = _norm(difference - sum(share * one for share, one in zip(shares.tolist(), changes, strict=True)))
    first = adapters[0]
    return _Layer(
        name, exact.numel(), module.r[first], module.scaling[first], bool(module.use_rslora.get(first)), size,
        _dot(difference, change) / size**2 if size else 1.0, _dot(rounded - before, change) / size**2 if size else 1.0,
        dict(zip(adapters, map(_norm, changes), strict=True)), dict(zip(adapters, shares.tolist(), strict=True)), error, one_rounding,
        limit, rest <= limit + 0.05 * _norm(difference),
    )  # fmt: skip


def _dot(one, other) -> float:
    import torch

    return (one * other).sum(dtype=torch.float64).item()


def _norm(tensor) -> float:
    import torch

    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def _precision(found, dtype):
    """The coarser of `dtype` and the one whose precision the numbers have: a bfloat16 model saved in float32 has bfloat16's."""
    import torch

    narrow = (kind for kind in (torch.bfloat16, torch.float16) if torch.equal(found.to(kind).to(found.dtype), found))
    own = next(narrow, found.dtype) if found.dtype == torch.float32 else found.dtype
    return max((own if own.is_floating_point else dtype, dtype), key=lambda kind: torch.finfo(kind).eps)


def _alike(layer, weight, found) -> bool:
    import torch

    if layer is not None:
        return layer.ok
    exact, precision = weight.detach().to("cpu", torch.float32), _precision(found, weight.dtype)
    one_rounding = _norm(exact.to(precision).float() - exact)
    allowance = 4 * torch.finfo(torch.float32).eps * _norm(exact)
    return _norm(found.to(precision).float() - exact) <= ROUNDINGS * one_rounding + allowance


def _name_of(model, module) -> str | None:
    return next((f"{name}.weight" for name, other in model.named_modules() if other is module), None)


# ---------------------------------------------------------------------------------------------- findings


def _report_structure(report, ties, missing, unknown, others, covered) -> None:
    if ties:
        report.fail(
            "tied_head",
            f"The weights that the embedding and the output head share are not those of the trained model: {first_few(ties, 3)}. One of "
            "both is missing, differs from the other, or was changed by a merge into the other.",
            "Save the base with a head of its own (tie_word_embeddings=False) before you merge into head or embedding; else keep "
            "tie_word_embeddings as the base has it, and don't save a head beside it.",
        )
    if missing:
        report.fail(
            "missing_weights",
            f"{len(missing)} of the model's weights are not in the merged files: {first_few(missing)}. On loading they are filled with "
            "random numbers.",
            "Save the merged model again with save_pretrained; copy all shards and the index.",
        )
    if others:
        report.fail(
            "other_weights",
            f"{len(others)} weights that the adapter doesn't touch, or whose shape is another, are not the base's: {first_few(others)}.",
            "Merge into the base that the adapter was trained on, loaded afresh. Biases or a head that were trained must be "
            "in the adapter's folder.",
        )
    if unknown:
        report.add(
            "ok" if covered else "warn",
            "not_compared",
            f"{len(unknown)} weights have other names in the files than in the model: {first_few(unknown)}. They were not compared one by "
            f"one; {'the comparison of outputs covers them' if covered else 'nothing else covers them'}.",
            "" if covered else "Load both models and compare these weights.",
        )


def _report_layers(report, layers, plain, shown, merged, base) -> None:
    changed, bad = [layer for layer in layers if layer.size], [layer for layer in layers if not layer.ok]
    if not changed:  # an untrained adapter, which other findings report
        return _report_residual(report, bad, 0.0, plain, merged, base) if bad else None
    times, own_times = (_mean((layer.size, value(layer)) for layer in changed) for value in (
        lambda layer: layer.times, lambda layer: layer.own_times))  # fmt: skip
    shares = {name: _mean((layer.sizes[key], layer.shares[key]) for layer in changed if key in layer.sizes)
              for key, name in shown.items()}  # fmt: skip
    report.times = times if len(shown) == 1 else shares
    rounded = math.hypot(*(layer.rounded for layer in layers))
    report.rounding = math.hypot(*(layer.error for layer in layers)) / rounded if rounded else None
    if not bad:
        report.note(
            "weights_agree",
            f"The adapter's change is in the merged weights {times:.2f} times, in all {len(layers)} layers"
            + (f"; they are {report.rounding:.1f} roundings from the exact ones." if rounded else "."),
        )
        if own_times < 1 - TIMES_TOLERANCE:
            report.warn(
                "change_rounded_away",
                f"The dtype of the merged weights is so coarse that only {own_times:.0%} of the adapter's change survives rounding.",
                "Merge and save in float32, or serve base and adapter unmerged.",
            )
    elif all(layer.pure for layer in bad) or all(
        _near(layer.times, -1) for layer in changed
    ):  # a swapped base may be rounded
        _report_multiple(report, changed, bad, times, shares)
    else:
        _report_residual(report, [layer for layer in bad if not layer.pure], times, plain, merged, base)


def _mean(pairs) -> float:
    """Of (size, value), weighted by the squared sizes: as if all layers were one matrix."""
    pairs = [(size**2, value) for size, value in pairs]
    whole = sum(weight for weight, _ in pairs)
    return sum(weight * value for weight, value in pairs) / whole if whole else 1.0


def _report_multiple(report, layers, bad, times, shares) -> None:
    """Merged is base + a multiple of the change: which multiple, and how does one come to it?"""
    lost = [name for name, share in shares.items() if abs(share) < TIMES_TOLERANCE]
    kept = [name for name, share in shares.items() if abs(share - 1) < TIMES_TOLERANCE]
    none = [layer for layer in bad if abs(layer.times) < TIMES_TOLERANCE]
    causes = [
        cause for cause, factor in _SCALING_MISTAKES if all(_near(layer.times, factor(layer)) for layer in layers)
    ]
    if len(shares) > 1 and lost and kept:
        report.fail(
            "adapter_lost",
            f"The merged weights hold the change of {', '.join(kept)}, and nothing of {', '.join(lost)}: only one of the active "
            "adapters was merged.",
            "Make all of them active before merging: model.base_model.set_adapter([...]), or merge_and_unload(adapter_names=[...]).",
        )
    elif len(none) == len(layers):
        report.fail(
            "not_merged",
            "The merged weights are the base's: nothing of the adapter's change is in them.",
            "Save what merge_and_unload returns. If you did, the adapter was untrained or not loaded: run check_adapters before merging.",
        )
    elif len(none) == len(bad):
        report.fail(
            "partly_merged",
            f"In {len(bad)} of {len(layers)} layers nothing of the adapter's change is in the weights: "
            f"{first_few([layer.name for layer in bad])}.",
            "Merge again from a base loaded afresh: a merge that stopped midway can't be continued.",
        )
    elif all(_near(layer.times, 2) for layer in layers):
        report.fail(
            "merged_twice",
            f"The merged weights hold the adapter's change {times:.2f} times: it was merged twice, or into a base that held it "
            f"already{''.join(f', or {cause}' for cause in causes)}.",
            "Load the original base afresh, merge once, and save to a folder without the adapter.",
        )
    elif all(_near(layer.times, -1) for layer in layers):
        report.fail(
            "swapped",
            f"The merged weights hold the adapter's change {times:.2f} times: base and merged look swapped, or the adapter was "
            "subtracted.",
            "Pass base, adapter and merged model in this order. If you did, merge once into the original base, loaded afresh.",
        )
    else:
        spread = sorted(layer.times for layer in layers)
        how_often = f"{times:.2f} times" if _near(spread[0], times) and _near(spread[-1], times) else (
            f"between {spread[0]:.2f} and {spread[-1]:.2f} times")  # fmt: skip
        report.fail(
            "wrong_scaling",
            f"The merged weights hold the adapter's change {how_often}, and once is right"
            + (f": {' or '.join(causes)}." if causes else "."),
            "The scaling is alpha/r, and alpha/√r with use_rslora, where r and alpha may differ by layer (rank_pattern, "
            "alpha_pattern). Leave it to merge_and_unload.",
        )


# How many times the change is there if the scaling was taken for something else; scaling is the right one.
_SCALING_MISTAKES = (
    (
        "the scaling was taken as alpha and not divided",
        lambda layer: math.sqrt(layer.rank) if layer.rslora else layer.rank,
    ),
    (
        "the scaling was taken as alpha/√r, which is rsLoRA's",
        lambda layer: math.nan if layer.rslora else math.sqrt(layer.rank),
    ),
    (
        "the scaling was taken as alpha/r, and this adapter has rsLoRA's alpha/√r",
        lambda layer: 1 / math.sqrt(layer.rank) if layer.rslora else math.nan,
    ),
    ("the scaling was left out", lambda layer: 1 / layer.scaling),
)


def _near(number: float, expected: float) -> bool:
    return abs(expected - 1) > TIMES_TOLERANCE and abs(number - expected) <= 0.08 * abs(expected)


def _report_residual(report, bad, times, plain, merged, base) -> None:
    """Merged is base + change + something else: look at that something in the smallest layer."""
    import torch

    layer = min(bad, key=lambda layer: layer.numbers)
    exact, found = plain.get_parameter(layer.name).detach().to("cpu", torch.float32), merged.get(layer.name).float()
    original = exact if (original := base.get(layer.name)) is None else original.float()
    residual = found - exact
    without = found - (exact - original)
    relative = _norm(residual) / max(_norm(original), 1e-30)
    likeness = torch.nn.functional.cosine_similarity(without.flatten(), original.flatten(), dim=0).item()
    where = f"In {len(bad)} layers ({first_few([layer.name for layer in bad], 1)}) the merged weights are not base + adapter"
    rank = _low_rank(residual)
    initialisation = None
    if rank:
        initialisation = subtracted_initialisation(original, -residual) or subtracted_initialisation(original, residual)
    if any(_has_16_levels(weight) for weight in (found, without)):
        if likeness > 0.9:
            report.fail(
                "quantised_base",
                f"{where}: they are off by {relative:.0%} and take 16 values a block, as after rounding to 4 bits.",
                "Merge into the 16-bit or 32-bit base. If you want the dequantised one, save it (before any forward) and pass its "
                "folder as the base.",
            )
        else:
            report.fail(
                "repacked_base",
                f"{where}: they are 4-bit numbers in a foreign order (cosine {likeness:.2f} with the base). On some processors "
                "bitsandbytes packs 4-bit weights anew in an eval forward, and dequantising or merging afterwards reads them wrongly, "
                "in silence.",
                "Merge into the 16-bit or 32-bit base; or load the 4-bit model afresh and merge before any forward.",
            )
    elif initialisation:
        report.fail(
            "base_mutated",
            f"{where}: they lack or repeat the initialisation of an adapter, {initialisation}. The adapter was merged into a base that another one had "
            "changed when it was made or loaded; or it is of that kind itself, and its configuration no longer says so.",
            "Load the original base afresh: unload() doesn't put it back. Convert such adapters when you save them "
            "(path_initial_model_for_weight_conversion).",
        )
    elif rank:
        report.fail(
            "foreign_change",
            f"{where}: they hold a further change of rank {rank}, and this adapter's {times:.2f} times. Another adapter was merged "
            "too, or instead.",
            "Merge this adapter alone, into the original base loaded afresh; pass all adapters as a list if several belong in.",
        )
    else:
        likely = (
            "another base, or one whose weights were scrambled (merging after a 4-bit forward does that on some processors)"
            if likeness < 0.5
            else "rounding of the base to 16 bits before the merge"
            if relative < 2**-7
            else "a base that was fine-tuned, rounded or mutated"
        )
        report.fail(
            "base_changed",
            f"{where}: they differ by {relative:.2%} of the base's size, and neither a rank nor a scaling explains it. Likely: {likely}.",
            "Merge into the very base that the adapter was trained on, loaded afresh from its files.",
        )


def _has_16_levels(weight) -> bool:
    """Whether blocks of 64 numbers take at most 16 values, as 4-bit formats give them: then most neighbours are equal.

    Of 63 gaps between sorted numbers at least 48 are then zero, up to the rounding of 16-bit dtypes; of Gaussian
    numbers about 20 are below 0.8% of the block's largest.
    """
    if weight.numel() % 64:
        return False
    blocks = weight.reshape(-1, 64)
    blocks = (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)).sort(1).values
    return ((blocks.diff(dim=1) < 0.008).sum(1)).float().median().item() > 40


def _low_rank(matrix) -> int | None:
    """The rank of a matrix that rounding noise was added to, if it is at most a third of what it could be; else None."""
    import torch

    if matrix.dim() != 2:
        return None
    most = min(128, min(matrix.shape) // 3)
    with torch.random.fork_rng(devices=[]):  # svd_lowrank draws at random
        torch.manual_seed(0)
        values = torch.svd_lowrank(matrix, q=min(most + 8, *matrix.shape), niter=4)[1]
    rank = int(((values**2).cumsum(0) < 0.98 * _norm(matrix) ** 2).sum()) + 1
    return rank if rank <= most else None
