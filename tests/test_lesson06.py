"""The checks of lesson 6: the stub is to do, the solution passes, each typical mistake gets its own hint."""

import re
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy
import pytest
import torch

from adapter_checks.errors import InputError
from course_utils.exercises import lesson06
from tools import build, editions

LESSON = editions.parse(Path(build.ROOT, "lessons", "06_olora.py").read_text(encoding="utf-8"))


def from_the_lesson(name):
    """The function `name` as the lesson solves it."""
    source = next(cell.source for cell in LESSON.cells if re.search(rf"^def {name}\b", cell.source, flags=re.MULTILINE))
    names = {"torch": torch, "tempfile": tempfile, "shutil": shutil, "Path": Path}
    exec(compile(source.split("\n\n\nlesson06")[0], name, "exec"), names)
    return names[name]


SOLUTIONS = {
    "06.olora": from_the_lesson("olora_start"),
    "06.reach": from_the_lesson("steps_to"),
    "06.convert": from_the_lesson("convert"),
    "06.ship": from_the_lesson("ship"),
}


# Typical mistakes


def right_olora(weight, rank, alpha, sign=-1.0, scaling=None, keep=False):
    Q, R = torch.linalg.qr(weight)
    A, B = R[:rank], Q[:, :rank]
    scaling = alpha / rank if scaling is None else scaling
    return A, B, weight.clone() if keep else weight + sign * scaling * B @ A


def in_place(weight, rank, alpha):
    A, B, left = right_olora(weight, rank, alpha)
    weight.copy_(left)
    return A, B, weight


def like_pissa(weight, rank, alpha):
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    B, A = U[:, :rank], S[:rank, None] * Vh[:rank]
    return A, B, weight - alpha / rank * B @ A


def not_orthonormal(weight, rank, alpha):
    A, B, left = right_olora(weight, rank, alpha)
    return 2 * A, B / 2, left


def olora_in(given, returned=None):
    """The right start, computed in another dtype."""
    return lambda w, r, a: tuple(part.to(returned or w.dtype) for part in right_olora(w.to(given), r, a))


def s_in_A(weight, rank, alpha):
    A, B, left = right_olora(weight, rank, alpha)
    return alpha / rank * A, B, left


def first_where(reached, steps=sorted):
    """A `steps_to` with a mistake in the comparison or in the order of the steps."""
    return lambda losses, level: next((s for s in steps(losses) if s in losses and reached(losses[s], level)), None)


def at_most(loss, level):
    return loss <= level


def by_position(losses, level):
    return next((5 * (i + 1) for i, s in enumerate(sorted(losses)) if losses[s] <= level), None)


def nearest_below(losses, level):
    return max((s for s in losses if losses[s] <= level), key=losses.get, default=None)


def or_none(losses, level):
    return min((s for s in losses if losses[s] <= level), default=0) or None


def if_it_stays(losses, level):
    return None if losses[max(losses)] > level else first_where(at_most)(losses, level)


def turning_the_given(A0, B0, A, B, alpha):
    B0 *= -1
    return torch.cat([A, A0]), torch.cat([B, B0], dim=1), 2 * alpha


def convert_with(minus_A0=1, minus_B0=1, B_sign=1, times=2):
    def convert(A0, B0, A, B, alpha):
        new_alpha = times(alpha) if callable(times) else times * alpha
        return torch.cat([A, minus_A0 * A0]), torch.cat([B_sign * B, minus_B0 * B0], dim=1), new_alpha

    return convert


def of_the_differences(A0, B0, A, B, alpha):
    return torch.cat([A - A0, 0 * A]), torch.cat([B - B0, 0 * B], dim=1), 2 * alpha


# Other right answers


def olora_by_outer_products(weight, rank, alpha):
    """With NumPy, and all signs turned."""
    Q, R = numpy.linalg.qr(weight.numpy(), mode="reduced")
    A, B = -R[:rank], -Q[:, :rank]
    return A, B, weight.numpy() - (alpha / rank) * sum(numpy.outer(B[:, i], A[i]) for i in range(rank))


def olora_by_gram_schmidt(weight, rank, alpha):
    columns = []
    for column in weight.T[:rank]:
        for _ in range(2):  # the second time for what rounding left
            for other in columns:
                column = column - (other @ column) * other
        columns.append(column / column.norm())
    B = torch.stack(columns, dim=1)
    A = B.T @ weight
    return [A, B, torch.addmm(weight, B, A, alpha=-alpha / rank)]


def reach_in_a_loop(losses, level):
    found = None
    for step, loss in losses.items():
        if loss <= level and (found is None or step < found):
            found = step
    return found


def reach_with_numpy(losses, level):
    steps = numpy.array(sorted(losses))
    reached = steps[numpy.array([losses[step] for step in steps]) <= level]
    return reached[0] if len(reached) else None


def reach_by_exception(losses, level):
    try:
        return float(min(step for step in losses if losses[step] <= level))
    except ValueError:
        return None


def convert_by_blocks(A0, B0, A, B, alpha):
    return torch.vstack((-A0, A)), torch.hstack((B0, B)), alpha * 2


def convert_and_scale(A0, B0, A, B, alpha):
    """All of the scaling in B, and an alpha that leaves it there."""
    rank = A.shape[0]
    return torch.cat([A, A0]), alpha / rank * torch.cat([B, -B0], dim=1), 2 * rank


def convert_with_numpy(A0, B0, A, B, alpha):
    return numpy.concatenate([A, A0]), numpy.concatenate([B, -B0], axis=1), numpy.float64(2 * alpha)


def ship_and_put_back(model, initial, out):
    """The folder is renamed for the conversion, and its configuration written again after it."""
    initial = Path(initial)
    own = initial.rename(initial.with_name("for_a_moment"))
    before = (own / "adapter_config.json").read_bytes()
    model.save_pretrained(out, path_initial_model_for_weight_conversion=str(own))
    (own / "adapter_config.json").write_bytes(before)
    own.rename(initial)


def ship_by_hand(model, initial, out):
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    start, new = load_file(Path(initial) / "adapter_model.safetensors"), {}
    for name, tensor in get_peft_model_state_dict(model).items():
        parts = (tensor, start[name]) if "lora_A" in name else (tensor, -start[name])
        new[name] = torch.cat(parts, dim=0 if "lora_A" in name else 1).contiguous()
    config = LoraConfig.from_pretrained(initial)
    config.init_lora_weights, config.r, config.lora_alpha = True, 2 * config.r, 2 * config.lora_alpha
    config.save_pretrained(out)
    save_file(new, Path(out) / "adapter_model.safetensors")


def ship_from_a_copy_beside(model, initial, out):
    own = Path(shutil.copytree(Path(initial), f"{Path(initial)}_copy", dirs_exist_ok=True))
    model.save_pretrained(str(out), path_initial_model_for_weight_conversion=own)
    shutil.rmtree(own)


RIGHT = {
    "06.ship": [ship_and_put_back, ship_by_hand, ship_from_a_copy_beside],
    "06.olora": [
        lambda w, r, a: tuple(m if i == 2 else -m for i, m in enumerate(right_olora(w, r, a))),
        olora_by_outer_products,
        olora_by_gram_schmidt,
    ],
    "06.reach": [reach_in_a_loop, reach_with_numpy, reach_by_exception],
    "06.convert": [convert_with(minus_A0=-1), convert_by_blocks, convert_and_scale, convert_with_numpy],
}


def shipped_from(initial):
    """Gives PEFT this path."""
    return lambda model, given, out: model.save_pretrained(out, path_initial_model_for_weight_conversion=initial(given))


def ship_unconverted(model, initial, out):
    model.save_pretrained(out)


def ship_and_reset(model, initial, out):
    """Says of the trained adapter that it is a plain one."""
    from peft import LoraConfig

    model.save_pretrained(out)
    config = LoraConfig.from_pretrained(out)
    config.init_lora_weights = True
    config.save_pretrained(out)


def ship_less_itself(model, initial, out):
    with tempfile.TemporaryDirectory() as own:
        model.save_pretrained(Path(own, "trained"))
        model.save_pretrained(out, path_initial_model_for_weight_conversion=str(Path(own, "trained")))


def ship_merged(model, initial, out):
    import copy

    copy.deepcopy(model).merge_and_unload().save_pretrained(out)


def ship_into_a_folder_below(model, initial, out):
    SOLUTIONS["06.ship"](model, initial, out / "adapter")


def ship_and_unload(model, initial, out):
    SOLUTIONS["06.ship"](model, initial, out)
    model.delete_adapter("default")


@pytest.mark.parametrize(
    "check, wrong, hint",
    [
        (lesson06.ship, shipped_from(lambda given: given), "initial folder has changed"),
        (lesson06.ship, shipped_from(lambda given: f"{given}/"), "Adapter  does not exist"),
        (
            lesson06.ship,
            shipped_from(lambda given: shutil.copytree(given, f"{tempfile.mkdtemp()}/default")),
            "the trained adapter is gone",
        ),
        (lesson06.ship, ship_unconverted, "still an OLoRA adapter"),
        (lesson06.ship, ship_and_reset, "doesn't give the trained model"),
        (lesson06.ship, ship_less_itself, "changes nothing"),
        (lesson06.ship, ship_merged, "no adapter_config.json, but"),
        (lesson06.ship, ship_into_a_folder_below, "but adapter"),
        (lesson06.ship, ship_and_unload, "Leave it as it was"),
        (lesson06.ship, lambda model, initial, out: 3, "no adapter_config.json, but nothing"),
        (lesson06.olora, lambda w, r, a: right_olora(w, r, a, keep=True), "would change at step 0"),
        (lesson06.olora, lambda w, r, a: right_olora(w, r, a, sign=1.0), "sign is wrong"),
        (lesson06.olora, lambda w, r, a: right_olora(w, r, a, scaling=1.0), "not BA alone"),
        (lesson06.olora, lambda w, r, a: right_olora(w, r, a, scaling=a), "don't add up"),
        (lesson06.olora, in_place, "Return a new one"),
        (lesson06.olora, like_pissa, "aren't the first r directions"),
        (lesson06.olora, not_orthonormal, "orthonormal"),
        (lesson06.olora, lambda w, r, a: right_olora(w, r, a)[:2], "3 things"),
        (lesson06.olora, lambda w, r, a: right_olora(w, r + 1, a), "A has shape"),
        (lesson06.olora, lambda w, r, a: (right_olora(w, r, a)[1], right_olora(w, r, a)[0], w), "A has shape"),
        (lesson06.olora, olora_in(torch.float64, torch.float64), "float32, and A in float64: keep the weight's dtype"),
        (lesson06.olora, olora_in(torch.float32, torch.float32), "float64, and A in float32: keep the weight's dtype"),
        (lesson06.olora, olora_in(torch.float32), "float32 rounding: keep the weight's dtype"),
        (lesson06.olora, lambda w, r, a: right_olora(w, r, a, scaling=a // r), "2 // 4 is 0"),
        (lesson06.olora, s_in_A, "A has s in it already"),
        (
            lesson06.olora,
            lambda w, r, a: (a / r * right_olora(w, r, a)[0], *right_olora(w, r, a, scaling=(a / r) ** 2)[1:]),
            "A has s in it already",
        ),
        (lesson06.olora, lambda w, r, a: tuple(m * float("nan") for m in right_olora(w, r, a)), "NaN"),
        (lesson06.reach, lambda losses, level: min(losses.values()), "this is a loss"),
        (lesson06.reach, lambda losses, level: min(losses, key=losses.get), "lowest loss|None"),
        (
            lesson06.reach,
            lambda losses, level: next((s for s, v in losses.items() if v <= level), None),
            "order of the dict",
        ),
        (
            lesson06.reach,
            lambda losses, level: next((s for s in sorted(losses) if losses[s] < level), None),
            "at or below",
        ),
        (
            lesson06.reach,
            lambda losses, level: next((s for s in sorted(losses) if losses[s] <= level), max(losses)),
            "return None",
        ),
        (
            lesson06.reach,
            lambda losses, level: sorted(losses)[-1] if min(losses.values()) <= level else None,
            "lowest loss|first step",
        ),
        (lesson06.reach, lambda losses, level: "10", "should be a number"),
        (lesson06.reach, first_where(at_most, lambda losses: sorted(losses)[1:]), "left out the first step"),
        (lesson06.reach, first_where(at_most, lambda losses: sorted(losses, key=str)), "sorted as text"),
        (lesson06.reach, first_where(at_most, lambda losses: range(5, max(losses) + 1, 5)), "90 came back"),
        (lesson06.reach, by_position, "need not be 5 apart"),
        (lesson06.reach, nearest_below, "nearest to the level"),
        (lesson06.reach, first_where(lambda loss, level: round(loss, 1) <= level), "losses as they are"),
        (lesson06.reach, first_where(lambda loss, level: loss <= level + 0.3), "losses as they are"),
        (lesson06.reach, or_none, "Step 0 is a step"),
        (lesson06.reach, if_it_stays, "whatever comes after"),
        (lesson06.convert, convert_with(), "products are added"),
        (lesson06.convert, convert_with(minus_A0=-1, minus_B0=-1), "products are added"),
        (lesson06.convert, convert_with(B_sign=-1), "wrong way round"),
        (lesson06.convert, convert_with(minus_B0=-1, times=1), "alpha / rank has to stay"),
        (lesson06.convert, convert_with(minus_B0=-1, times=4), "alpha / rank has to stay"),
        (lesson06.convert, lambda A0, B0, A, B, alpha: (A - A0, B - B0, alpha), "needs 2r"),
        (lesson06.convert, of_the_differences, "product of the differences"),
        (lesson06.convert, convert_with(B_sign=-1, times=-2), "stays above 0"),
        (lesson06.convert, convert_with(minus_B0=-1, times=lambda alpha: int(2 * alpha)), "whole number"),
        (lesson06.convert, convert_with(minus_B0=-1, times=lambda alpha: 2 * int(alpha)), "whole number"),
        (
            lesson06.convert,
            lambda A0, B0, A, B, alpha: (torch.cat([A, A0]), torch.cat([-B0, B], dim=1), 2 * alpha),
            "halves stand in different order",
        ),
        (
            lesson06.convert,
            lambda *given: tuple(
                part.float() if i < 2 else part for i, part in enumerate(SOLUTIONS["06.convert"](*given))
            ),
            "Keep their dtype",
        ),
        (lesson06.reach, lambda losses, level: first_where(at_most)(losses, min(level, 1.0)), "the level is reached"),
        (lesson06.reach, lambda losses, level: first_where(at_most)(losses, max(level, 1.0)), "losses as they are"),
        (lesson06.olora, lambda w, r, a: right_olora(w, r, max(a, 1)), "not BA alone"),
        (lesson06.convert, turning_the_given, "has changed"),
        (lesson06.convert, lambda A0, B0, A, B, alpha: (torch.cat([A, A0]), torch.cat([B, -B0], dim=1)), "3 things"),
        (
            lesson06.convert,
            lambda A0, B0, A, B, alpha: (torch.cat([A0, A]), torch.cat([B, -B0], dim=1), 2 * alpha),
            "laid side by side",
        ),
        (
            lesson06.convert,
            lambda A0, B0, A, B, alpha: (torch.cat([A, A0]), torch.cat([B, -B0]), 2 * alpha),
            "the new B has shape|The new B has shape",
        ),
    ],
)
def test_typical_mistakes_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert re.search(hint, outcome.hint), outcome.hint


# What PEFT does, as the lesson and the page of symptoms say it


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
    ).eval()


def adapted(adapter_name="default", **changes):
    from peft import LoraConfig, get_peft_model

    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "init_lora_weights": "olora",
        "task_type": "CAUSAL_LM",
    }
    return get_peft_model(tiny(), LoraConfig(**settings | changes), adapter_name=adapter_name).eval()


@pytest.fixture
def quiet_peft():
    with warnings.catch_warnings(action="ignore"):
        yield


def test_converting_with_the_adapters_own_name_deletes_it(tmp_path, quiet_peft):
    model = adapted("sailor")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="should be set to `True`"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "sailor"))
    assert list(model.peft_config) == []


def test_a_slash_at_the_end_is_an_error_and_a_missing_folder_names_the_hub(tmp_path, quiet_peft):
    model = adapted()
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="Adapter  does not exist"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=f"{tmp_path / 'start'}/")
    with pytest.raises(Exception, match="Repo id must be|Can't find"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "nowhere"))
    assert list(model.peft_config) == ["default"]


def test_conversion_rewrites_the_configuration_that_it_is_given(tmp_path, quiet_peft):
    from peft import LoraConfig

    model = adapted()
    model.save_pretrained(tmp_path / "start")
    assert LoraConfig.from_pretrained(tmp_path / "start").init_lora_weights == "olora"
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert LoraConfig.from_pretrained(tmp_path / "start").init_lora_weights is True


def test_a_change_of_the_configuration_is_saved_and_a_mistyped_one_is_named(tmp_path, quiet_peft):
    from peft import LoraConfig

    adapted().save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_bytes()
    for settings, sentence in (
        (["lora_alpha", 32], "A dict is needed"),
        ({"init_lora_weight": "olora"}, "no setting 'init_lora_weight'. Do you mean 'init_lora_weights'"),
        ({"zzz": 1}, "no setting 'zzz'. Take one of the names"),
        ({"lora_alpha": "32"}, "lora_alpha is a number.* without quotes, not '32'"),
    ):
        with pytest.raises(InputError, match=sentence):
            lesson06.change(tmp_path, settings)
        assert (tmp_path / "adapter_config.json").read_bytes() == before
    assert lesson06.change(tmp_path, {"init_lora_weights": True}).init_lora_weights is True
    assert LoraConfig.from_pretrained(tmp_path).init_lora_weights is True


def test_the_folder_that_comes_back_has_one_word_changed_and_its_numbers_kept(tmp_path, quiet_peft):
    import json

    from peft import PeftModel

    ids, model = torch.arange(1, 9)[None], adapted()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "given")
    with torch.no_grad():
        trained = model(ids).logits
    lesson06.lend(tmp_path / "given", tmp_path / "back", tiny())
    lesson06.lend(tmp_path / "given", tmp_path / "back", tiny())  # the cell runs as often as somebody tries
    given, back = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("given", "back"))
    for config in (given, back):
        config["target_modules"].sort()  # PEFT holds them in a set, and writes it in any order
    assert {key for key in given if given[key] != back[key]} == {"init_lora_weights"}
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("given", "back")]
    assert weights[0] == weights[1]
    for how, same in (("back", False), ("given", True)):
        with torch.no_grad():
            found = PeftModel.from_pretrained(tiny(), tmp_path / how)(ids).logits
        assert torch.allclose(found, trained, atol=1e-3) == same


def test_shapes_patterns_and_memory(tmp_path, quiet_peft):
    from peft import PeftModel

    large = adapted(r=64)
    layer = large.base_model.model.model.layers[0].self_attn.q_proj
    assert (
        layer.lora_A["default"].weight.shape == (32, 32)
        and layer.r["default"] == 64
        and layer.scaling["default"] == 8 / 64
    )
    with pytest.raises(ValueError, match="rank to be even"):
        adapted(init_lora_weights="orthogonal", r=3)
    model = adapted(use_rslora=True, rank_pattern={"q_proj": 2})
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="not supported when using `rank_pattern`"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        PeftModel.from_pretrained(tiny(), tmp_path / "plain", low_cpu_mem_usage=True)


@pytest.mark.parametrize("inputs, times", [(256, 3.5), (576, 5.2)])
def test_gaussian_draws_a_larger_a(inputs, times):
    from peft import LoraConfig, get_peft_model
    from torch import nn

    sizes = []
    for start in (True, "gaussian"):
        torch.manual_seed(0)
        model = get_peft_model(
            nn.Sequential(nn.Linear(inputs, 256, bias=False)),
            LoraConfig(r=8, target_modules=["0"], init_lora_weights=start),
        )
        sizes.append(model.base_model.model[0].lora_A["default"].weight.std().item())
    assert sizes[1] / sizes[0] == pytest.approx(times, rel=0.1)
