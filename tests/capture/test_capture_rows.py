"""Whose gradient is whose: rows that a layer mixes up, rows taken alone, rows that are not one example."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import SequenceClassifierOutput

from helpers import architectures as zoo
from helpers import capture_cells as cells
from helpers import oracles, toy
from helpers.captures import relative_error
from hf_ensemble.capture import GradientExtractor
from hf_ensemble.errors import CaptureError, ScoringError
from hf_ensemble.models.inputs import row_of
from hf_ensemble.tasks import TaskSet, data_collator_for, encode


class Network(nn.Module):
    """Embeds tokens, sends them through a part and answers from their mean."""

    def __init__(self, part, classes=3, width=8):
        super().__init__()
        self.embedding = nn.Embedding(zoo.WORDS, width).requires_grad_(False)
        self.part = part
        self.head = nn.Linear(width, classes).requires_grad_(False)

    def forward(self, input_ids, attention_mask=None):
        return SequenceClassifierOutput(logits=self.head(self.part(self.embedding(input_ids)).mean(dim=1)))


def captured(model, ids, labels):
    extractor = GradientExtractor(model, projection_dim=None)
    return extractor, extractor({"input_ids": ids, "labels": labels}).features


def alone(model, ids, labels):
    def margin(i):
        return oracles.margins(model(input_ids=ids[i : i + 1]).logits, labels[i : i + 1])[0]

    return oracles.per_example_gradients(model, margin, len(ids))


def questions(count, length=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, zoo.WORDS, (count, length), generator=generator)
    return ids, torch.randint(0, 3, (count,), generator=generator)


class Reordered(nn.Module):
    """Its layer sees the rows of a batch in another order."""

    def __init__(self, order):
        super().__init__()
        self.layer, self.order = nn.Linear(8, 8), order

    def forward(self, x):
        order = self.order(len(x))
        return self.layer(x[order]).tanh()[order.argsort()]


@pytest.mark.parametrize(
    "order",
    [
        lambda size: torch.arange(size).flip(0),
        lambda size: torch.arange(size).roll(1),
        # Two of them change places, all others stay.
        lambda size: torch.tensor([1, 0, *range(2, size)] if size > 1 else [0]),
    ],
    ids=["reversed", "rolled", "two"],
)
@pytest.mark.parametrize("size", [2, 5, 16])
def test_a_layer_that_sees_rows_in_another_order_takes_the_fallback(order, size):
    torch.manual_seed(0)
    model = Network(Reordered(order))
    ids, labels = questions(size)
    # A batch of one row says nothing of their order.
    extractor, _ = captured(model, ids[:1], labels[:1])
    assert extractor.hooked
    found = extractor({"input_ids": ids, "labels": labels}).features
    assert extractor.fallback == ["part.layer.weight", "part.layer.bias"]
    assert relative_error(found, alone(model, ids, labels)) < 1e-5


class Experts(nn.Module):
    """Each token goes to the expert that its first feature chooses."""

    def __init__(self, count, chosen):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))
        self.chosen = chosen

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        chosen, out = self.chosen(tokens), torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out[chosen == i] = expert(tokens[chosen == i]).tanh()
        return out.view_as(x)


def by_position(positions):
    """The tokens at these positions of the flattened batch go to expert 0, all others to expert 1."""

    def chosen(tokens):
        taken = torch.ones(len(tokens), dtype=torch.long)
        taken[[position for position in positions if position < len(tokens)]] = 0
        return taken

    return chosen


def test_an_expert_that_gets_as_many_tokens_as_there_are_examples():
    torch.manual_seed(0)
    # Three tokens in a batch of three rows of four: two of the first row, one of the last.
    model = Network(Experts(2, by_position([0, 2, 9])))
    ids, labels = questions(3)
    extractor = GradientExtractor(model, projection_dim=None)
    found = extractor({"input_ids": ids, "labels": labels}).features
    assert extractor.hooked == []
    # Alone, each row would choose by its own positions, so autograd takes the rows in the batch.
    model.part.chosen = lambda tokens: (tokens[:, 0] > 0).long()
    found = extractor({"input_ids": ids, "labels": labels}).features
    assert relative_error(found, alone(model, ids, labels)) < 1e-5


def test_an_expert_that_agreed_by_chance_is_found_out_later():
    torch.manual_seed(0)
    ids, labels = questions(3)
    model = Network(Experts(2, by_position([0, 4, 8])))
    extractor = GradientExtractor(model, projection_dim=None)
    extractor({"input_ids": ids, "labels": labels})
    # One token of each row, in the rows' order, looks like a head behind a pooler.
    assert set(extractor.hooked) == {"part.experts.0.weight", "part.experts.0.bias"}
    # Again three tokens, now of other rows: those with this feature.
    tokens = model.embedding(ids).reshape(-1, 8)[:, 0]
    limit = tokens.sort(descending=True).values[2:4].mean()
    model.part.chosen = lambda tokens: (tokens[:, 0] < limit).long()
    assert (tokens.view(3, 4) > limit).sum(dim=1).tolist() != [1, 1, 1]
    found = extractor({"input_ids": ids, "labels": labels}).features
    assert extractor.hooked == []
    assert relative_error(found, alone(model, ids, labels)) < 1e-5


def test_experts_that_the_first_batch_does_not_choose_are_no_error():
    torch.manual_seed(0)
    model = Network(Experts(3, lambda tokens: torch.zeros(len(tokens), dtype=torch.long)))
    ids, labels = questions(4)
    extractor, found = captured(model, ids, labels)
    assert relative_error(found, alone(model, ids, labels)) < 1e-5
    assert {name.split(".")[2] for name in extractor.unused} == {"1", "2"}
    model.part.chosen = lambda tokens: (tokens[:, 0] > 0).long() + (tokens[:, 1] > 0).long()
    found = extractor({"input_ids": ids, "labels": labels}).features
    assert extractor.unused == [] and relative_error(found, alone(model, ids, labels)) < 1e-5


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(8, 8), nn.Linear(8, 8), kind

    def forward(self, x):
        if self.kind == "in place":
            hidden = self.first(input=x)
            hidden += x
            return self.second(torch.relu_(hidden)).mul_(2)
        return checkpoint(lambda x: self.second(self.first(x).tanh()), x, use_reentrant=self.kind == "reentrant")


@pytest.mark.parametrize("kind", ["in place", "not reentrant"])
def test_outputs_changed_in_place_and_checkpoints_in_evaluation_mode(kind):
    torch.manual_seed(0)
    model = Network(Block(kind))
    ids, labels = questions(5)
    extractor, found = captured(model, ids, labels)
    assert not extractor.fallback and relative_error(found, alone(model, ids, labels)) < 1e-5


def test_reentrant_checkpoints_in_evaluation_mode_are_refused():
    model = Network(Block("reentrant"))
    model.embedding.requires_grad_(True)
    with pytest.raises(CaptureError, match="Set use_reentrant=False"):
        captured(model, *questions(3))


@pytest.mark.parametrize(("adapter", "batches", "rows"), [("lora", 1, 0), ("dora", 1, 5), ("ia3", 0, 5)])
def test_what_the_fallback_costs(adapter, batches, rows):
    model = zoo.adapted(zoo.model("llama"), "llama", adapter)
    extractor, sizes = GradientExtractor(model, projection_dim=None), []
    batch = cells.batch(cells.examples("llama", 5))
    extractor(batch)
    body = model.get_base_model().model.layers[0]
    handle = body.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(inputs[0].shape[:2])))
    extractor(batch)
    handle.remove()
    # Each example alone, without the padding that the batch gives it.
    alone = [(1, int(length)) for length in batch["attention_mask"].sum(dim=1)]
    assert sizes == batches * [(5, 9)] + (alone if rows else [])


def test_rows_alone_keep_their_label_sets():
    tokenizer, tasks = toy.tokenizer(), TaskSet.from_datasets(toy.text_tasks(train=3))
    space = tasks.label_space
    batch = data_collator_for(tasks.row_format, tokenizer, labels_are_tokens=False)(
        list(encode(tasks.table("train"), tokenizer, tasks.row_format, space))
    )
    model = toy.with_lora(toy.bert(len(space)))
    together, alone = (GradientExtractor(model, projection_dim=None, label_space=space) for _ in range(2))
    alone.hooked = []
    wanted, found = together(batch), alone(batch)
    assert relative_error(found.features, wanted.features) < 1e-5
    assert torch.allclose(found.margin, wanted.margin, atol=1e-5) and torch.allclose(found.loss, wanted.loss, atol=1e-6)
    assert torch.equal(found.num_tokens, wanted.num_tokens)


def test_padding_goes_only_where_nothing_else_counts_tokens():
    ids = torch.tensor([[4, 5, 6, 0], [4, 5, 6, 7]])
    labels = torch.tensor([[-100, -100, 6, -100], [-100, -100, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "scale": torch.tensor(2.0), "flag": True}
    row, label = row_of(inputs, labels, 0)
    assert row["input_ids"].tolist() == [[4, 5, 6]] and row["attention_mask"].shape == (1, 3)
    assert label.tolist() == [[-100, -100, 6]] and row["flag"] and row["scale"] == 2
    kept = [
        ({**inputs, "decoder_input_ids": ids}, labels),
        ({**inputs, "bias": torch.zeros(2, 4)}, labels),
        ({key: value for key, value in inputs.items() if key != "attention_mask"}, labels),
        (inputs, labels.clone().fill_(3)),
        (inputs, labels[:, :2]),
    ]
    for other, own_labels in kept:
        row, label = row_of(other, own_labels, 0)
        assert row["input_ids"].shape == (1, 4) and label.shape[1] == own_labels.shape[1]
    axes = torch.arange(3).view(3, 1, 1).expand(3, 2, 4)
    assert row_of({**inputs, "position_ids": axes}, labels, 1)[0]["position_ids"].shape == (3, 1, 4)
    with pytest.raises(ScoringError, match=r"one row of 'pixels' for each of the 2 examples, found shape \(7, 3\)"):
        row_of({**inputs, "pixels": torch.zeros(7, 3)}, labels, 0)


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"seq_lengths": torch.tensor([4, 5])}, "seq_lengths"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "cu_seq_lens_q"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 3)}, "position_ids that start again"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]] * 3)}, "an attention_mask that numbers"),
        ({"attention_mask": torch.ones(3, 1, 9, 9)}, "an attention_mask that is not of shape"),
        ({"attention_mask": {"full_attention": None}}, "an attention_mask that is not of shape"),
    ],
)
def test_packed_rows_are_refused(extra, found):
    batch = {"input_ids": torch.randint(3, zoo.WORDS, (3, 9)), "labels": torch.randint(3, zoo.WORDS, (3, 9))}
    model = toy.with_lora(toy.llama())
    with pytest.raises(ScoringError, match=f"one example per row, found {found}.*packing=False and padding_free=False"):
        GradientExtractor(model, 16)({**batch, **extra})


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_that_only_padding_starts_again_are_no_packing(side):
    model = toy.with_lora(toy.llama())
    rows = cells.examples("llama")
    batch = cells.batch(rows, side)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
    found = GradientExtractor(model, None)({**batch, "position_ids": positions}).features
    assert relative_error(found, cells.expected(model, rows)) < 1e-5


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_whose_every_token_counts_is_not_asked_for_its_first(side):
    model = toy.with_lora(toy.llama())
    rows = [{**row, "labels": row["input_ids"]} for row in cells.examples("llama")]
    found = GradientExtractor(model, None)(cells.batch(rows, side))
    assert found.num_tokens.tolist() == [len(row["labels"]) - 1 for row in rows]
    assert relative_error(found.features, cells.expected(model, rows)) < 1e-5
