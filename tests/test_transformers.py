"""The Trainer of transformers with a tied optimizer, on a small language model made from a configuration."""

import pytest
import torch
from checks import same_tree, tied_bitwise
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from tieopt import TiedOptimizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

WORDS, GROUPS = 20, [[2, 5, 9], [3, 4]]
CLIP = 0.1


@pytest.fixture(autouse=True)
def _own_state():
    """Trainers of one process share a state that outlives them."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class SeesTies(TrainerCallback):
    """Asserts that what is tied is equal after every step."""

    def __init__(self, weight):
        self.weight, self.seen = weight, 0

    def on_step_end(self, args, state, control, **kwargs):
        assert tied_bitwise(self.weight, GROUPS)
        self.seen += 1


def made(dropout=0.0):
    """A model whose embedding is its output layer as well, and the weight of both."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        attention_dropout=dropout,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    return model, model.model.embed_tokens.weight


def data(count=12):
    words = torch.randint(WORDS, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in words]


def optimized(model, weight, compact):
    """The optimizer that ties the embeddings of some words, and a scheduler of it."""
    inner = AdamW(model.parameters(), lr=0.01)
    optimizer = TiedOptimizer(inner, {weight: GROUPS}, compact=compact)
    return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def arguments(folder, **kwargs):
    return TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", "max_grad_norm": CLIP, **kwargs},
    )


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.host("transformers", "`Trainer`, accumulating, clipping, a scheduler", package="transformers")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_trainer_is_bit_for_bit_the_plain_loop(compact, accumulate, precision, tmp_path):
    model, weight = made()
    sees = SeesTies(weight)
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            gradient_accumulation_steps=accumulate,
            bf16=precision == "bf16",
            train_sampling_strategy="sequential",
        ),
        train_dataset=data(),
        optimizers=optimized(model, weight, compact),
        callbacks=[sees],
    )
    trainer.train()
    assert sees.seen == 6 // accumulate

    plain, weight = made()
    plain.train()
    optimizer, scheduler = optimized(plain, weight, compact)
    batches = torch.stack([one["input_ids"] for one in data()]).split(2)
    for number, words in enumerate(batches, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            # What the Trainer divides by: all words of the accumulated batches that are predicted.
            loss = plain(words, labels=words, num_items_in_batch=torch.tensor(accumulate * 2 * 5)).loss
        loss.backward()
        if number % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert same_tree(weights_of(model), weights_of(plain))


@pytest.mark.host("transformers", "`resume_from_checkpoint`", package="transformers")
def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(compact, tmp_path):
    def trained(folder, resume=None, **kwargs):
        # What is shuffled and dropped depends on the state of the random numbers, which is saved as well.
        model, weight = made(dropout=0.3)
        sees = SeesTies(weight)
        optimizers = optimized(model, weight, compact)
        settings = arguments(tmp_path / folder, **kwargs)
        trainer = Trainer(model, settings, train_dataset=data(), optimizers=optimizers, callbacks=[sees])
        trainer.train(resume_from_checkpoint=resume)
        optimizer, scheduler = optimizers
        return sees.seen, [weights_of(model), optimizer.state_dict(), scheduler.state_dict()]

    seen, uninterrupted = trained("whole", save_strategy="steps", save_steps=4)
    assert seen == 6
    seen, resumed = trained("resumed", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert seen == 2
    assert same_tree(resumed, uninterrupted)


@pytest.mark.host("transformers", "`create_optimizer`, tied gradients clipped", package="transformers")
@pytest.mark.parametrize("by_the_optimizer", [True, False])
def test_the_trainers_own_optimizer_is_tied_where_it_is_made_and_clipped_where_it_is_tied(
    compact, by_the_optimizer, tmp_path
):
    norms = []

    class Ties(Trainer):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            return TiedOptimizer(optimizer, {weight: GROUPS}, compact=compact)

    class Clips(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
            # Here nothing has stepped yet.
            if by_the_optimizer:
                norms.append(optimizer.optimizer.clip_grad_norm_(CLIP))
                torch.testing.assert_close(optimizer.optimizer.grad_norm(), torch.tensor(CLIP), rtol=1e-3, atol=0)
                return
            optimizer.optimizer.tie_gradients()
            assert tied_bitwise(weight.grad, GROUPS)
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))

    model, weight = made()
    sees = SeesTies(weight)
    settings = arguments(tmp_path, max_grad_norm=0.0, weight_decay=0.1)
    trainer = Ties(model, settings, train_dataset=data(), callbacks=[sees, Clips()])
    start = weights_of(model)
    trainer.train()

    assert sees.seen == len(norms) == 6
    assert all(norm > CLIP for norm in norms)
    # Those that decay, and those that do not: the Trainer's own choice.
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert not same_tree(weights_of(model), start)
