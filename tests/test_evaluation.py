"""Generation, metrics and perplexity, each against a plain computation of the same thing."""

import json
import math
import warnings

import pytest

from adapter_checks.errors import InputError
from course_utils import evaluation
from course_utils.tasks import TASKS

PROMPTS = ["a", "a much longer prompt than the first", "three words here", "é"]


def reference(model, tokenizer, prompt, max_new_tokens=8):
    """Greedy decoding of one prompt without padding, cache or `generate`."""
    import torch

    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    new = []
    with torch.no_grad():
        while len(new) < max_new_tokens and tokenizer.eos_token_id not in new:
            new.append(int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_generate_equals_greedy_decoding_of_each_prompt_alone(batch_size, tiny_model, tiny_tokenizer):
    expected = [reference(tiny_model, tiny_tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(expected)) > 1  # a model that says the same to all would prove nothing
    assert evaluation.generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=8, batch_size=batch_size) == expected


def test_generate_takes_strings_and_messages_alike(tiny_model, tiny_tokenizer):
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    both = [evaluation.generate(tiny_model, tiny_tokenizer, given, max_new_tokens=4) for given in (PROMPTS, messages)]
    assert both[0] == both[1]
    dialogue = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert evaluation.generate(tiny_model, tiny_tokenizer, [dialogue], 4) != evaluation.generate(
        tiny_model, tiny_tokenizer, ["c"], 4
    )


def test_generate_of_nothing_is_nothing(tiny_model, tiny_tokenizer):
    assert evaluation.generate(tiny_model, tiny_tokenizer, []) == []


def _prefer(model, token):
    """Make the model say this token whatever comes before."""
    import torch

    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([token]), 1.0)
    )


def test_generate_stops_at_the_end_of_the_turn(tiny_model, tiny_tokenizer):
    calls = []
    _prefer(tiny_model, tiny_tokenizer.eos_token_id)
    tiny_model.register_forward_hook(lambda *_: calls.append(1))
    assert evaluation.generate(tiny_model, tiny_tokenizer, ["a", "b"], max_new_tokens=8) == ["", ""]
    assert len(calls) == 1


def test_generate_stops_at_a_turn_token_that_only_the_generation_config_names(tiny_model, tiny_tokenizer):
    other = tiny_tokenizer.convert_tokens_to_ids("<|user|>")
    assert other != tiny_tokenizer.eos_token_id
    calls = []
    _prefer(tiny_model, other)
    tiny_model.register_forward_hook(lambda *_: calls.append(1))
    tiny_model.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, other]
    evaluation.generate(tiny_model, tiny_tokenizer, ["a"], max_new_tokens=8)
    assert len(calls) == 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_generate_is_greedy_and_quiet_though_the_model_has_settings_of_its_own(
    wrapped, tiny_model, tiny_tokenizer, caplog
):
    from peft import LoraConfig, get_peft_model

    expected = evaluation.generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
    settings = tiny_model.generation_config
    settings.update(do_sample=True, temperature=5.0, top_p=0.9, top_k=7, repetition_penalty=9.0, num_beams=2)
    model = (
        get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        if wrapped
        else tiny_model
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluation.generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert not caplog.records
    assert model.generation_config is settings and tiny_model.generation_config is settings


def test_generate_leaves_model_and_tokenizer_as_they_were(tiny_model, tiny_tokenizer):
    tiny_model.train()
    tiny_model.model.layers[0].eval()  # somebody froze this one
    modes = {name: module.training for name, module in tiny_model.named_modules()}
    side, padding = tiny_tokenizer.padding_side, tiny_tokenizer.pad_token
    during = []
    tiny_model.model.layers[1].register_forward_hook(lambda module, *_: during.append(module.training))
    evaluation.generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=2)
    assert {name: module.training for name, module in tiny_model.named_modules()} == modes
    assert True in modes.values() and False in modes.values() and not any(during)
    assert (tiny_tokenizer.padding_side, tiny_tokenizer.pad_token) == (side, padding)


def test_modes_come_back_after_an_error_too(tiny_model, tiny_tokenizer):
    tiny_model.train()
    with pytest.raises(ValueError, match="adapter_names"):
        evaluation.generate(
            tiny_model, tiny_tokenizer, ["a"], max_new_tokens=2, adapter_names=["x"]
        )  # not a PEFT model
    assert tiny_model.training and tiny_model.lm_head.training


def test_generate_without_a_pad_token(tiny_model):
    from tiny_models import make_tiny_tokenizer

    tokenizer = make_tiny_tokenizer()
    expected = evaluation.generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=4)
    tokenizer.pad_token = None
    assert evaluation.generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=4) == expected


def test_generate_refuses_what_can_not_work(tiny_model, tiny_tokenizer):
    from tiny_models import make_tiny_tokenizer

    with pytest.raises(InputError, match="context of 256"):
        evaluation.generate(tiny_model, tiny_tokenizer, ["a" * 250], max_new_tokens=48)
    with pytest.raises(ValueError, match="4 prompts and 1 adapter names"):
        evaluation.generate(tiny_model, tiny_tokenizer, PROMPTS, adapter_names=["reading"])
    bare = make_tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        evaluation.generate(tiny_model, bare, ["a"])


def test_mixed_adapter_batches_equal_one_adapter_at_a_time(tiny_model, tiny_tokenizer):
    import torch
    from peft import LoraConfig, get_peft_model

    before = evaluation.generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(tiny_model, config, adapter_name="one")
    model.add_adapter("two", config)
    alone = {"__base__": before}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = evaluation.generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
    assert all(len({answers[i] for answers in alone.values()}) == 3 for i in range(4))
    names = ["two", "__base__", "one", "two"]
    mixed = evaluation.generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8, batch_size=3, adapter_names=names)
    assert mixed == [alone[name][i] for i, name in enumerate(names)]


# ---------------------------------------------------------------------------------------------- metrics

ANSWER = json.dumps({"who": "Mara Tull", "what": "a brass lamp", "where": "the mill"})


@pytest.mark.parametrize("task", ["reading", "sailor", "mood", "recall"])
def test_text_metrics_compare_stripped_text(task):
    same = TASKS[task].metric
    assert same("happy", "happy") and same(" happy\n", "happy")
    assert not same("unhappy", "happy") and not same("Happy", "happy") and not same("", "happy")
    assert not same("happy or unhappy", "happy")


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (ANSWER, True),
        ('{"where":"the mill",\n "who":"Mara Tull","what":"a brass lamp"}', True),  # order and spaces are no matter
        (ANSWER.replace("mill", "mall"), False),
        (ANSWER.replace('"where"', '"place"'), False),
        (ANSWER[:-1], False),
        (ANSWER + " and more", False),
        (f"[{ANSWER}]", False),
        ("null", False),
        ("NaN", False),
        ("", False),
        ("[" * 100_000, False),
        ('{"who": ["Mara Tull"], "what": {}, "where": null}', False),
    ],
)
def test_extract_metric_parses_and_compares_fields(prediction, right):
    assert TASKS["extract"].metric(prediction, ANSWER) is right


def make_rows():
    told = [("happy", "stay", False), ("unhappy", "meal", False), ("happy", "stay", True), ("unhappy", "meal", True)]
    return [
        {
            "prompt": [{"role": "user", "content": "?"}],
            "completion": [{"role": "assistant", "content": answer}],
            "kind": kind,
            "novel": novel,
        }
        for answer, kind, novel in told
    ]


def test_score_counts_all_kinds_and_novel_rows():
    result = evaluation.score("mood", ["happy", "unhappy", "happy", "happy"], make_rows())
    assert result == {"score": 0.75, "n": 4, "by_kind": {"meal": 0.5, "stay": 1.0}, "novel": 0.5}
    assert evaluation.score("mood", ["happy"], make_rows()[:1])["novel"] is None


def test_score_takes_a_dataset():
    from datasets import Dataset

    rows = Dataset.from_list(make_rows())
    assert evaluation.score("mood", ["happy"] * 4, rows) == evaluation.score("mood", ["happy"] * 4, make_rows())


def test_score_refuses_what_it_can_not_count():
    with pytest.raises(ValueError, match="3 predictions and 4 rows"):
        evaluation.score("mood", ["happy"] * 3, make_rows())
    with pytest.raises(ValueError, match="at least one"):
        evaluation.score("mood", [], [])
    with pytest.raises(InputError, match="no task 'moood'"):
        evaluation.score("moood", ["happy"] * 4, make_rows())


def test_evaluate_task_scores_what_the_model_says(tiny_model, tiny_tokenizer):
    rows = make_rows()
    said = evaluation.generate(tiny_model, tiny_tokenizer, [row["prompt"] for row in rows], max_new_tokens=6)
    rows[2]["completion"][0]["content"] = said[2]
    for row in (rows[0], rows[1], rows[3]):
        row["completion"][0]["content"] = said[2] + " not"
    result = evaluation.evaluate_task(tiny_model, tiny_tokenizer, "mood", rows)  # six are what a mood's answer may take
    assert result["score"] == 0.25 and result["predictions"] == said
    short = evaluation.evaluate_task(tiny_model, tiny_tokenizer, "mood", rows, max_new_tokens=2)
    assert short["predictions"] != said


# ---------------------------------------------------------------------------------------------- perplexity

TEXTS = ["A short one.", "A text that is a good deal longer than the first, so that padding matters.", "Third"]


def test_perplexity_weighs_each_token_the_same_and_ignores_padding(tiny_model, tiny_tokenizer):
    import torch

    losses = []
    for text in TEXTS:
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            log_probabilities = tiny_model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        losses += (-log_probabilities[range(ids.shape[1] - 1), ids[0, 1:]]).tolist()
    expected = math.exp(sum(losses) / len(losses))
    for batch_size in (1, 2, 16):
        assert evaluation.perplexity(tiny_model, tiny_tokenizer, TEXTS, batch_size) == pytest.approx(expected, rel=1e-4)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary_size(tiny_model, tiny_tokenizer):
    import torch

    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
    assert evaluation.perplexity(tiny_model, tiny_tokenizer, TEXTS) == pytest.approx(len(tiny_tokenizer), rel=1e-5)


def test_perplexity_cuts_long_texts_and_skips_those_with_nothing_to_predict(tiny_model, tiny_tokenizer):
    whole = evaluation.perplexity(tiny_model, tiny_tokenizer, [TEXTS[1][:9]])
    assert evaluation.perplexity(tiny_model, tiny_tokenizer, [TEXTS[1], "", "x"], max_length=9) == pytest.approx(
        whole, rel=1e-5
    )
    with pytest.raises(ValueError, match="nothing to predict"):
        evaluation.perplexity(tiny_model, tiny_tokenizer, ["", "x"])
    assert not tiny_model.training


def test_band_fails_outside_only_for_the_shipped_model_and_only_strictly(monkeypatch, capsys):
    monkeypatch.delenv("COURSE_BASE_MODEL", raising=False)
    monkeypatch.delenv("COURSE_STRICT", raising=False)
    evaluation.band("reading", 0.95, 0.9, 1)
    evaluation.band("reading", 0.5, 0.9, 1)
    assert [line[:6] for line in capsys.readouterr().out.splitlines()] == ["[OK]  ", "[FAIL]"]
    monkeypatch.setenv("COURSE_STRICT", "1")
    with pytest.raises(InputError, match="outside the band"):
        evaluation.band("reading", 0.5, 0.9, 1)
    monkeypatch.setenv("COURSE_BASE_MODEL", "organisation/model")
    evaluation.band("reading", 0.5, 0.9, 1)
    assert capsys.readouterr().out.splitlines()[-1].startswith("[INFO]")
