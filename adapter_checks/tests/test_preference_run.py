"""The check of runs on preferences: healthy runs of each kind are quiet before and after, and each planted fault is found."""

import copy
import random
import re
import warnings

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from adapter_checks import check_preference_run, check_training
from adapter_checks.bitsandbytes_workarounds import quiet_imports
from adapter_checks.run_log import RunLog
from tiny_models import CPU_TRAINING, make_tiny_adapter, make_tiny_model, make_tiny_tokenizer

quiet_imports()
disable_progress_bars()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
RUN = CPU_TRAINING | {
    "max_steps": 20,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


def user(text):
    return [{"role": "user", "content": text}]


def bot(text):
    return [{"role": "assistant", "content": text}]


def word(draw, letters):
    return "".join(draw.choice(letters) for _ in range(draw.randint(2, 5)))


def pair(number):
    """A reply of the first letters of the alphabet is better than one of the last."""
    draw = random.Random(number)
    return {"prompt": user(f"q{number}"), "chosen": bot(word(draw, "ab")), "rejected": bot(word(draw, "yz"))}


def swapped(row):
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


PAIRS = [pair(number) for number in range(64)]


def lora(**changes):
    usual = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**usual | changes)


@pytest.fixture
def model(tiny_tokenizer):
    return lambda: make_tiny_model(tiny_tokenizer)


@pytest.fixture
def dpo(model, tmp_path):
    """A DPOTrainer on the pairs, by default with a new adapter."""

    def make(rows=PAIRS, policy=None, reference=None, held_out=None, peft_config=None, **changes):
        torch.manual_seed(0)
        return DPOTrainer(
            policy or model(),
            ref_model=reference,
            args=DPOConfig(str(tmp_path), **RUN | changes),
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            eval_dataset=Dataset.from_list(held_out) if held_out else None,
            processing_class=make_tiny_tokenizer(),
            peft_config=peft_config or (None if policy else lora()),
        )

    return make


def trained(trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer


def codes(trainer):
    """Of a trainer after its run, and of its log alone, as sets."""
    beta = (trainer.beta if isinstance(trainer, DPOTrainer) else None) or None
    return set(check_preference_run(trainer).codes), set(check_preference_run(trainer.state.log_history, beta).codes)


def assert_quiet(trainer):
    before = check_preference_run(trainer)
    assert before.codes == [] and "steps" in [finding.code for finding in before.findings], before
    trained(trainer)
    assert codes(trainer) == (set(), set()), check_preference_run(trainer)
    assert "run" in [finding.code for finding in check_preference_run(trainer).findings]


# ------------------------------------------------------------------------------------------------ healthy runs


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "ipo"},
        {"loss_type": "hinge", "max_steps": 10},
        {"loss_type": "apo_zero"},
        {"loss_type": "apo_down", "max_steps": 5},
        {"loss_type": "robust", "label_smoothing": 0.1, "max_steps": 10},
        {"loss_type": "exo_pair", "label_smoothing": 1e-3, "max_steps": 5},
        {"loss_type": "nca_pair", "max_steps": 5},
        {"loss_type": "bco_pair", "max_steps": 5},
        {"loss_type": "sppo_hard", "learning_rate": 3e-4, "max_steps": 5},
        {"loss_type": "aot", "max_steps": 5},
        {"loss_type": "sigmoid_norm", "max_steps": 10},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"f_divergence_type": "forward_kl", "max_steps": 5},
        {"use_weighting": True, "max_steps": 5},
        {"ld_alpha": 0.5, "max_steps": 5},
        {"beta": 1.0, "max_steps": 10},
        {"beta": 0.01, "max_steps": 5},
        {"precompute_ref_log_probs": True, "max_steps": 5},
        {"gradient_accumulation_steps": 2, "max_steps": 4},
        {"logging_steps": 3, "max_steps": 6},
        {"warmup_steps": 10, "lr_scheduler_type": "cosine"},
        {"disable_dropout": False, "max_steps": 5},
        {"max_steps": 2},
    ],
    ids=str,
)
def test_healthy_dpo(settings, dpo):
    assert_quiet(dpo(**settings))


def test_healthy_references(dpo, model, tiny_model_folder):
    """Of each kind: an adapter that is trained on, a base that is trained whole, a copy, one loaded from disk, a stream of rows."""
    assert_quiet(dpo(policy=make_tiny_adapter(model()), max_steps=5))
    assert_quiet(dpo(policy=AutoModelForCausalLM.from_pretrained(tiny_model_folder), learning_rate=1e-4, max_steps=5))
    assert_quiet(
        dpo(
            policy=model(),
            reference=model(),
            learning_rate=1e-4,
            sync_ref_model=True,
            ref_model_sync_steps=4,
            max_steps=8,
        )
    )
    assert_quiet(dpo(reference=model(), peft_config=lora(init_lora_weights="pissa"), max_steps=5))
    assert_quiet(dpo(Dataset.from_list(PAIRS).to_iterable_dataset(), max_steps=5))


def test_a_run_with_noisy_labels_and_held_out_pairs(dpo):
    noisy = [swapped(row) if number % 5 == 0 else row for number, row in enumerate(PAIRS)]
    assert_quiet(dpo(noisy, held_out=PAIRS[:40], eval_strategy="steps", eval_steps=10, max_steps=30))


def test_a_reward_model(tiny_tokenizer, tmp_path):
    def trainer(rows, **changes):
        torch.manual_seed(0)
        config = make_tiny_model(tiny_tokenizer).config
        config.num_labels, config.initializer_range = 1, 0.02
        return RewardTrainer(
            LlamaForSequenceClassification(config),
            args=RewardConfig(str(tmp_path), **RUN | {"max_steps": 25, "learning_rate": 5e-3} | changes),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tiny_tokenizer(),
            peft_config=lora(task_type="SEQ_CLS", target_modules="all-linear"),
        )

    healthy = trained(trainer(PAIRS))
    assert codes(healthy) == (set(), set()) and "accuracy" in str(check_preference_run(healthy))
    assert (
        codes(trained(trainer([row | {"rejected": row["chosen"]} for row in PAIRS], max_steps=5)))
        == ({"no_gradient"},) * 2
    )
    # Each pair and its opposite
    assert (
        codes(trained(trainer([swap(row) for row in PAIRS for swap in (dict, swapped)], max_steps=25)))
        == ({"coin_toss"},) * 2
    )


def test_the_check_leaves_a_trainer_as_it_was(dpo):
    losses = []
    for checked in (False, True):
        trainer = dpo(max_steps=3)
        trainer.model.train()
        modes = [module.training for module in trainer.model.modules()]
        if checked:
            state = torch.random.get_rng_state()
            check_preference_run(trainer)
            assert torch.equal(state, torch.random.get_rng_state())
            assert modes == [module.training for module in trainer.model.modules()]
            assert not any(trainer._metrics["eval"].values())
        losses.append([entry["loss"] for entry in trained(trainer).state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------------------------------ faults of DPO


def with_norm_trained(model):
    adapted = get_peft_model(model, lora())
    adapted.base_model.model.model.norm.weight.requires_grad_(True)
    return adapted


def trainable_reference(trainer):
    for name, weight in trainer.model.named_parameters():
        weight.requires_grad_(weight.requires_grad or ".ref." in name)
    return trainer


def sharing(policy, make):
    """A reference model whose tensors are those of the policy, as an assigned state dict makes them."""
    reference = make()
    reference.load_state_dict(policy.state_dict(keep_vars=True), assign=True)
    return reference


def merged(folder):
    whole = make_tiny_adapter(AutoModelForCausalLM.from_pretrained(folder)).merge_and_unload()
    return whole.requires_grad_(True)


REFERENCES = {
    "OLoRA, and the base as reference": ("reference_moved_base", lambda dpo, model, folder: dpo(peft_config=lora(init_lora_weights="olora"))),
    "PiSSA, precomputed": ("reference_moved_base", lambda dpo, model, folder: dpo(peft_config=lora(init_lora_weights="pissa"), precompute_ref_log_probs=True)),
    "a random B": ("reference_differs", lambda dpo, model, folder: dpo(peft_config=lora(init_lora_weights=False))),
    "a random B, IPO": ("reference_differs", lambda dpo, model, folder: dpo(peft_config=lora(init_lora_weights=False), loss_type="ipo", max_steps=4)),
    "merged, and loaded afresh": ("reference_differs", lambda dpo, model, folder: dpo(policy=merged(folder))),
    "another adapter's base": ("reference_differs", lambda dpo, model, folder: dpo(policy=make_tiny_adapter(model()), reference=model())),
    "another model": ("reference_differs", lambda dpo, model, folder: dpo(reference=make_tiny_model(make_tiny_tokenizer(), seed=1))),
    "OLoRA twice": ("start_not_shared", lambda dpo, model, folder: dpo(policy=get_peft_model(model(), lora(init_lora_weights="olora")))),
    "trained norms": ("reference_trains", lambda dpo, model, folder: dpo(policy=with_norm_trained(model()))),
}  # fmt: skip


@pytest.mark.parametrize(("code", "make"), REFERENCES.values(), ids=REFERENCES)
def test_wrong_references(code, make, dpo, model, tiny_model_folder):
    trainer = make(dpo, model, tiny_model_folder)
    trainer.args.max_steps = 3
    report = check_preference_run(trainer)
    assert report.codes == [code] and not report.ok, report
    trained(trainer)
    after, of_log = codes(trainer)
    assert code in after
    assert of_log == (set() if code in ("start_not_shared", "reference_trains") else {"reference_differs"})


def test_a_start_that_can_not_be_compared(dpo):
    broken, empty = dpo(), dpo()
    broken.data_collator = None
    report = check_preference_run(broken)
    assert report.codes == ["start_not_compared"] and "NoneType" in str(report) and report.ok
    empty.train_dataset = empty.train_dataset.select([])
    assert check_preference_run(empty).codes == ["empty"]


def test_the_first_loss_is_named_where_it_says_something(dpo):
    for settings, named in (({}, True), ({"loss_type": "ipo"}, False), ({"use_weighting": True}, False)):
        report = str(check_preference_run(dpo(peft_config=lora(init_lora_weights=False), **settings)))
        assert ("ln 2" in report) is named


def test_a_reference_that_is_the_policy(dpo, model):
    base = model()
    assert check_preference_run(dpo(policy=get_peft_model(base, lora()), reference=base)).codes == [
        "reference_is_policy"
    ]
    policy = model()
    trainer = dpo(policy=policy, reference=sharing(policy, model), learning_rate=1e-4, max_steps=5)
    assert check_preference_run(trainer).codes == ["reference_is_policy"]
    assert codes(trained(trainer)) == ({"reference_is_policy"}, {"margins_zero"})
    assert check_preference_run(trainable_reference(dpo(policy=make_tiny_adapter(model())))).codes == [
        "reference_trains"
    ]


def test_a_policy_that_does_not_move(dpo, model):
    frozen = dpo(policy=make_tiny_adapter(model(), inference_mode=True))
    assert check_preference_run(frozen).codes == ["nothing_trainable"]
    still = trained(dpo(learning_rate=0.0, max_steps=4))
    assert codes(still) == ({"bad_rate", "margins_zero", "not_moved"}, {"margins_zero"})
    adapter = dpo(policy=make_tiny_adapter(model()), max_steps=4)
    trained(adapter)
    for name, weight in adapter.model.named_parameters():  # as if the optimizer held other weights
        if ".default." in name:
            weight.data.copy_(adapter.model.get_parameter(name.replace(".default.", ".ref.")))
    assert "not_moved" in check_preference_run(adapter).codes


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([row | {"rejected": row["chosen"]} for row in PAIRS], {"max_steps": 5}, {"no_gradient"}),
        (PAIRS[10:], {"max_length": 7, "max_steps": 5}, {"no_gradient"}),  # cut where both begin
        (PAIRS, {"loss_type": "discopop"}, {"learns_backwards"}),
        (PAIRS, {"label_smoothing": 0.9, "loss_type": "aot"}, {"learns_backwards"}),
    ],
)
def test_runs_that_learn_nothing(rows, settings, expected, dpo):
    if "max_length" in settings:
        rows = [row | {side: bot("a" + row[side][0]["content"]) for side in ("chosen", "rejected")} for row in rows]
    assert codes(trained(dpo(rows, **settings))) == (expected, expected)


def test_settings_that_the_loss_does_not_take(dpo):
    assert check_preference_run(dpo(beta=-0.1)).codes == ["bad_beta"]
    assert codes(trained(dpo(beta=0.0, max_steps=3))) == ({"bad_beta", "no_gradient"}, {"no_gradient"})
    assert check_preference_run(dpo(label_smoothing=0.1)).codes == ["without_effect"]
    for loss in ("robust", ["sigmoid", "aot"]):
        assert check_preference_run(dpo(label_smoothing=0.1, loss_type=loss)).codes == []


def test_a_rate_for_all_weights(dpo):
    trainer = dpo(learning_rate=1e-6)
    assert check_preference_run(trainer).codes == ["rate_too_low"]
    assert codes(trained(trainer)) == ({"rate_too_low", "hardly_moved"}, {"hardly_moved"})
    for usual, expected in ((1e-6, ["rate_too_low"]), (5e-6, [])):
        trainer = dpo(learning_rate=usual)
        assert check_preference_run(trainer).codes == check_training(trainer).codes == expected


def test_pairs_in_both_orders(dpo):
    rows = [swap(row) for row in PAIRS[:32] for swap in (dict, swapped)]
    assert codes(trained(dpo(rows, max_steps=40, learning_rate=2e-2))) == ({"coin_toss"},) * 2


def test_held_out_pairs_that_are_labelled_the_other_way_round(dpo):
    trainer = trained(dpo(held_out=[swapped(row) for row in PAIRS[:40]], eval_strategy="steps", eval_steps=20))
    report = check_preference_run(trainer)
    assert report.codes == ["held_out_fails"] and "swapped" in str(report)
    trainer.eval_dataset = trainer.eval_dataset.select(range(8))
    assert check_preference_run(trainer).codes == [], "eight pairs say little"


def test_weights_that_are_not_numbers(dpo):
    trainer = dpo(max_steps=3)
    next(weight for weight in trainer.model.parameters() if weight.requires_grad).data.fill_(float("nan"))
    assert codes(trained(trainer)) == ({"not_finite"},) * 2


# ------------------------------------------------------------------------------------------------ logs of DPO, made by hand


def dpo_log(steps=40, first=-20.0, chosen=0.0, rejected=-10.0, accuracies=(0.5, 0.9), **last):
    """Steps in which chosen and rejected move by that many nats, with beta 0.1."""
    log = []
    for step in range(1, steps + 1):
        share = (step - 1) / (steps - 1)
        accuracy = accuracies[0] + (accuracies[1] - accuracies[0]) * share
        log.append({"step": step, "loss": 0.69 - 0.1 * share, "grad_norm": 1.0, "learning_rate": 1e-4,
                    "rewards/chosen": 0.1 * chosen * share, "rewards/rejected": 0.1 * rejected * share,
                    "rewards/margins": 0.1 * (chosen - rejected) * share, "rewards/accuracies": accuracy,
                    "logps/chosen": first + chosen * share, "logps/rejected": first + rejected * share})  # fmt: skip
    log[-1] |= last
    return log


@pytest.mark.parametrize(
    ("expected", "log"),
    [
        (set(), dpo_log()),
        (set(), [*dpo_log(), {"train_loss": 0.6, "step": 40}, {"eval_loss": 0.6, "step": 40}]),
        (set(), dpo_log(chosen=-8, rejected=-30)),  # of 20 nats, as usual
        ({"chosen_falls"}, dpo_log(chosen=-30, rejected=-60)),
        (set(), dpo_log(first=-1.5, chosen=-4, rejected=-30)),
        ({"chosen_falls"}, dpo_log(first=-1.5, chosen=-11, rejected=-60)),
        ({"rejected_runs_away"}, dpo_log(first=-5.0, rejected=-140)),
        (set(), dpo_log(first=-5.0, rejected=-40)),
        (set(), dpo_log(first=-250.0, rejected=-400)),
        (set(), dpo_log(accuracies=(0.5, 0.7))),
        ({"coin_toss"}, dpo_log(accuracies=(0.5, 0.52))),
        (set(), dpo_log(accuracies=(0.5, 0.52), chosen=0.2, rejected=-0.2)),  # has not moved enough to say
        (set(), dpo_log(accuracies=(0.5, 0.5), steps=12)),
        ({"hardly_moved"}, dpo_log(chosen=0.01, rejected=-0.01)),
        (set(), dpo_log(chosen=0.01, rejected=-0.01, steps=12)),
        ({"not_finite"}, dpo_log(grad_norm=float("nan"))),
        ({"not_finite"}, dpo_log(**{"logps/chosen": None})),
        ({"held_out_fails"}, [*dpo_log(), {"eval_loss": 0.7, "eval_rewards/accuracies": 0.45, "step": 40}]),
        (set(), [*dpo_log(), {"eval_loss": 0.6, "eval_rewards/accuracies": 0.7, "step": 40}]),
        ({"reference_differs"}, [{"step": 1, "loss": 0.586, "rewards/margins": 1.565, "rewards/accuracies": 0.75}]),
        (set(), [{"step": 10, "loss": 0.586, "rewards/margins": 1.565, "rewards/accuracies": 0.75}]),
        (set(), [{"step": 1, "loss": 0.6931, "rewards/margins": 0.01, "rewards/accuracies": 0.5}]),
    ],
)  # fmt: skip
def test_logs_of_dpo(expected, log):
    assert set(check_preference_run(log).codes) == expected, check_preference_run(log)


def test_beta_of_a_log():
    log = [{"step": 1, "loss": 0.69, "rewards/margins": 0.03, "rewards/accuracies": 0.6}]
    assert check_preference_run(log).codes == [] and check_preference_run(log, beta=0.01).codes == ["reference_differs"]


def test_a_run_within_its_warm_up_is_not_judged():
    log = dpo_log(chosen=0.01, rejected=-0.01, steps=30)
    for step, entry in enumerate(log):
        entry["learning_rate"] = 1e-6 * step
    assert check_preference_run(log).codes == []


# ------------------------------------------------------------------------------------------------ GRPO and RLOO


@pytest.fixture(scope="module")
def talker(tiny_tokenizer):
    """A model that was trained to answer with some of four letters, and to end its turn."""
    model, draw = make_tiny_model(tiny_tokenizer).train(), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        chats = [user(f"q{draw.randrange(64)}") + bot(word(draw, "abcd")[:4]) for _ in range(16)]
        texts = tiny_tokenizer.apply_chat_template(chats, tokenize=False)
        batch = tiny_tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def online(talker, tmp_path):
    def make(reward, kind=GRPOTrainer, policy=None, **changes):
        torch.manual_seed(0)
        config = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[kind]
        usual = RUN | {
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 8,
            "learning_rate": 3e-3,
        }
        return kind(
            policy or copy.deepcopy(talker),
            reward_funcs=reward,
            args=config(str(tmp_path), **usual | changes),
            train_dataset=Dataset.from_list([{"prompt": user(f"q{number}")} for number in range(32)]),
            processing_class=make_tiny_tokenizer(),
            peft_config=None if isinstance(policy, PeftModel) else lora(),
        )

    return make


def texts(completions):
    return [completion[0]["content"] for completion in completions]


def share_of_a(completions, **_):
    return [text.count("a") / max(1, len(text)) for text in texts(completions)]


def constant(completions, **_):
    return [1.0] * len(completions)


def nothing(completions, **_):
    return [None] * len(completions)


def length(completions, **_):
    return [float(len(text)) for text in texts(completions)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(GRPOTrainer, {}), (GRPOTrainer, {"beta": 0.04, "max_steps": 6}), (GRPOTrainer, {"loss_type": "dr_grpo", "scale_rewards": "none", "max_steps": 4}),
     (GRPOTrainer, {"logging_steps": 2, "max_steps": 6}), (RLOOTrainer, {"max_steps": 8})],
)  # fmt: skip
def test_healthy_online_runs(kind, settings, online):
    assert_quiet(online(share_of_a, kind, **settings))


def test_an_adapter_that_is_trained_on_online(online, talker):
    assert_quiet(online(share_of_a, policy=make_tiny_adapter(copy.deepcopy(talker)), beta=0.04, max_steps=4))


@pytest.mark.parametrize(
    ("reward", "kind", "settings", "expected"),
    [
        (constant, GRPOTrainer, {"max_steps": 4}, {"no_spread"}),
        (constant, RLOOTrainer, {"max_steps": 4}, {"no_spread"}),
        (nothing, GRPOTrainer, {"max_steps": 4}, {"reward_missing"}),
        (share_of_a, GRPOTrainer, {"max_steps": 4, "temperature": 0.01}, {"no_spread"}),
        (length, GRPOTrainer, {"max_steps": 25, "learning_rate": 6e-3}, {"replies_cut"}),
        (share_of_a, GRPOTrainer, {"max_steps": 4, "max_completion_length": 1}, {"replies_cut"}),
    ],
)
def test_online_runs_with_a_fault(reward, kind, settings, expected, online):
    trainer = trained(online(reward, kind, **settings))
    assert codes(trainer) == (expected, expected)
    assert check_preference_run(trainer).ok is (expected == {"replies_cut"}), (
        "without a reward nothing is learned at all"
    )


def test_replies_as_long_as_the_context(online):
    assert check_preference_run(online(share_of_a, max_completion_length=256)).codes == ["beyond_context"]
    assert check_preference_run(online(share_of_a, max_completion_length=200)).codes == []


def test_an_online_reference_on_a_moved_base(online, talker):
    for kind, beta in ((GRPOTrainer, 0.04), (RLOOTrainer, 0.05)):
        trainer = online(share_of_a, kind, beta=beta, max_steps=1, policy=make_tiny_adapter(copy.deepcopy(talker)))
        trainer.model.delete_adapter("ref")  # leaves the bare base as reference
        assert codes(trained(trainer)) == ({"reference_differs"},) * 2
    trainer = online(
        share_of_a, policy=get_peft_model(copy.deepcopy(talker), lora(init_lora_weights="olora")), beta=0.04
    )
    assert check_preference_run(trainer).codes == ["start_not_shared"]
    without = online(
        share_of_a, policy=get_peft_model(copy.deepcopy(talker), lora(init_lora_weights="olora")), beta=0.0
    )
    assert check_preference_run(without).codes in ([], ["start_not_shared"])


def online_log(steps=40, reward=(0.3, 0.7), noise=0.02, **metrics):
    """Metrics that go in a line from the first of two values to the second."""
    usual = {"reward_std": (0.3, 0.3), "frac_reward_zero_std": (0.2, 0.5), "entropy": (0.5, 0.2), "grad_norm": (1, 1), "loss": (0, 0),
             "completions/clipped_ratio": (0, 0.05), "completions/mean_length": (20, 22), "learning_rate": (1e-5, 1e-5), "kl": (0, 0.1)}  # fmt: skip
    lines = usual | {"reward": reward} | {name.replace("__", "/"): line for name, line in metrics.items()}
    draw = random.Random(0)
    return [
        {"step": step + 1} | {name: low + (high - low) * step / (steps - 1) + (draw.gauss(0, noise) if name == "reward" else 0)
                              for name, (low, high) in lines.items()}
        for step in range(steps)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("expected", "log"),
    [
        (set(), online_log()),
        (set(), online_log(frac_reward_zero_std=(0.6, 1.0), reward=(0.6, 1.0))),  # solved
        ({"no_spread"}, online_log(frac_reward_zero_std=(0.95, 0.95), reward=(0.5, 0.5))),
        ({"replies_cut"}, online_log(completions__clipped_ratio=(0.0, 1.0), completions__mean_length=(20, 256))),
        ({"replies_cut"}, online_log(completions__clipped_ratio=(1.0, 1.0))),
        (set(), online_log(completions__clipped_ratio=(0.5, 0.1))),
        ({"entropy_collapsed"}, online_log(entropy=(0.5, -0.06))),
        (set(), online_log(entropy=(0.36, 0.07))),
        ({"kl_high"}, online_log(kl=(0, 2.0))),
        (set(), online_log(kl=(0, 0.8))),
        ({"reference_differs"}, online_log(kl=(0.3, 0.8))),
        ({"reward_not_rising"}, online_log(reward=(0.5, 0.5))),
        ({"reward_not_rising"}, online_log(reward=(0.5, 0.2))),
        (set(), online_log(reward=(0.5, 0.5), noise=0.2)),  # too noisy to say
        (set(), online_log(reward=(0.5, 0.5), steps=12)),
        ({"not_finite"}, [*online_log(), {"step": 41, "loss": float("nan"), "reward": 0.5}]),
        ({"reward_missing"}, [*online_log(), {"step": 41, "loss": 0.0, "reward": None}]),
        ({"reward_missing"}, [{**entry, "reward": float("nan")} for entry in online_log()]),
        (set(), [{**entry, "rewards/share_of_a/std": None} for entry in online_log()]),
        (set(), [{**entry, "rewards/f/mean": entry["step"] % 3 or None} for entry in online_log()]),  # for some prompts only
        ({"reward_missing"}, [{**entry, "rewards/f/mean": None, "rewards/g/mean": 0.5} for entry in online_log()]),
    ],
)  # fmt: skip
def test_logs_of_online_runs(expected, log):
    assert set(check_preference_run(log).codes) == expected, check_preference_run(log)


def test_a_reward_that_falls_is_said_to_fall():
    assert "mean reward falls" in str(check_preference_run(online_log(reward=(0.5, 0.2))))
    assert "does not rise" in str(check_preference_run(online_log(reward=(0.5, 0.5))))


# ------------------------------------------------------------------------------------------------ where it does not apply


def test_what_is_no_run_on_preferences(model, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS[:4]]
    sft = SFTTrainer(
        model(),
        args=SFTConfig(str(tmp_path), **RUN | {"max_steps": 1}),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tiny_tokenizer(),
        peft_config=lora(),
    )
    assert check_preference_run(sft).codes == ["no_preference_run"] and "SFTTrainer" in str(check_preference_run(sft))
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    usual = {name: value for name, value in RUN.items() if name != "gradient_checkpointing"}
    cpo = CPOTrainer(
        model(),
        args=CPOConfig(str(tmp_path), **usual | {"max_steps": 2}),
        train_dataset=Dataset.from_list(PAIRS[:8]),
        processing_class=make_tiny_tokenizer(),
        peft_config=lora(),
    )
    assert check_preference_run(trained(cpo)).codes == ["no_preference_run"]
    kto = {"step": 1, "loss": 0.5, "kl": 0.0, "rewards/margins": 0.0, "rewards/chosen": 0.0, "logps/chosen": -1.0}
    for log in (
        trained(sft).state.log_history,
        cpo.state.log_history,
        [],
        [{}],
        [kto],
        [{"train_loss": 1.0, "step": 3}],
    ):
        assert check_preference_run(log).codes == ["no_preference_run"]
    for odd in ("trainer_state.json", 3, {"log_history": []}, [3]):
        assert check_preference_run(odd).codes == ["bad_argument"]
    assert check_preference_run(dpo_log(), beta=0).codes == ["bad_argument"]


def test_a_log_in_a_checkpoint(dpo, tmp_path):
    trained(dpo(max_steps=4, save_strategy="steps", save_steps=4))
    import json

    (state,) = tmp_path.glob("checkpoint-4/trainer_state.json")
    assert check_preference_run(json.loads(state.read_text())["log_history"]).codes == []


def test_means_of_a_log():
    log = RunLog(
        [{"step": step, "loss": 0.0, "m": float(step)} for step in range(1, 11)] + [{"eval_m": 5.0, "step": 10}]
    )
    assert (log.steps, log.start("m"), log.end("m"), log.start("n")) == (10, 1.5, 9.5, None)
    assert log.past_warm_up() is False and len(log.evaluations) == 1
    assert RunLog([{"loss": 0.0, "step": 1, "m": float("nan")}]).broken("m") == [1]


def test_what_the_run_did_is_told(dpo):
    said = re.sub(r"\s+", " ", str(check_preference_run(trained(dpo()))))
    assert re.search(
        r"20 steps; accuracy 0\.\d\d to 1\.00; margin .* against the reference \+\S+ and -\S+ nats", said
    ), said
