"""Stage 0, scores of keys: a ``KeyScore`` per layer learns which keys the teacher needs once they left the window."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from lizard_layers import LOOK_AHEAD, InWindow, KeyScore, WindowForm
from lizard_models.distill.arguments import RunArguments, total_steps
from lizard_models.distill.key_labels import TeacherAttention, key_labels
from lizard_models.distill.score_files import SCORES, load_scores, save_scores
from lizard_models.distill.stream import endless
from lizard_models.distill.trainer import StageResult, only_training, run_stage
from lizard_models.model.arithmetic import Shape
from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.layer_configs import lizard_config
from lizard_models.model.layer_loss import gradients_at_once
from lizard_models.recipes import Stage0Config
from lizard_ops import apply_rotary

STATISTICS = 3  # of keys and values, of which the linear term is made
MEASURED = (".received.mean", ".received.deviation")  # parameters of scores that ``start`` sets and nothing trains
SAMPLE = 4  # rows by which labels are standardised and the linear term starts
RIDGE = 1e-3


@dataclass
class Stage0Result(StageResult):
    """What a stage 0 did; ``losses`` are mean squared errors of labels of variance one, averaged over layers."""

    r2: list[list[float]] = field(default_factory=list)
    """Of each layer's key heads: 1 - squared errors / squared deviations of the labels from their mean."""

    @property
    def mean_r2(self) -> float:
        """Mean over layers and key heads."""
        heads = [value for layer in self.r2 for value in layer]
        return sum(heads) / len(heads) if heads else float("nan")


class LayerKeys(NamedTuple):
    """What one layer gives its score, and its label, in one forward of the teacher."""

    x: Tensor  # [B, T, hidden], the layer's normalised input
    k: Tensor  # [B, T, Hk, D] before RoPE
    v: Tensor  # [B, T, Hk, D]
    attention: TeacherAttention

    def seen(self, score: Any) -> InWindow | None:
        """What ``score`` reads of the window, if it does: the teacher's own queries and keys."""
        return None if score.received is None else InWindow(self.attention.q, self.attention.k)


def key_scores(model: LizardCausalLM, score_dim: int = 128) -> nn.ModuleList:
    """A fresh ``KeyScore`` for each converted layer, first to last, on the device of the layer.

    It reads what keys receive in their window where the layer's ``score_received`` says so.
    """
    made = []
    for attention in model.lizard_attentions():
        shape = attention.lizard.config
        sizes = (shape.hidden_size, shape.num_key_heads, shape.head_dim, score_dim, attention.layer_idx)
        score = KeyScore(*sizes, received=WindowForm.of(shape) if shape.score_received else None)
        made.append(score.to(attention.q_proj.weight.device))
    return nn.ModuleList(made)


def train_stage0(
    model: LizardCausalLM,
    scores: nn.ModuleList,
    dataset: Dataset,
    run: RunArguments,
    recipe: Stage0Config | None = None,
    held_out: Tensor | None = None,
) -> Stage0Result:
    """Fits ``scores`` to the labels that the teacher's attention gives; the rest of the model stays as it is.

    Each starts from its own start and from the linear term that is best on the first rows of ``dataset``. It learns the
    labels less their mean, over their deviation, per key head of those rows; afterwards it is scaled back, so that
    scores are estimates of the labels themselves (natural logarithms) and can be compared between heads and layers.
    Anchors, and keys with fewer than ``recipe.label_queries`` later queries, count for nothing.

    model: its other weights the teacher's; left in the mode it had, eval and frozen. scores: the model's own
    (``model.key_scores()``) or others of its shapes (``key_scores``). dataset: items {"input_ids": [T]}, best from
    ``text.look_ups.look_up_rows``. recipe: default the model's own. held_out: rows [N, T] on which ``r2`` is measured;
    None takes the first rows of ``dataset``, which were trained on. A finished run is only loaded with ``run.resume``:
    its scores and ``r2`` are in a file beside its checkpoints.

    Raises what ``run_stage`` does; ValueError for scores of another model, a window of LOOK_AHEAD keys or fewer, or
    rows with no key that counts.
    """
    recipe = recipe or lizard_config(model.config).stage0
    check_scores(model, scores)
    folder = Path(run.output_dir)
    last = folder / f"checkpoint-{total_steps(recipe, dataset)}"
    finished = run.resume and last.is_dir() and (folder / SCORES).is_file()
    sample = first_rows(dataset, SAMPLE)
    transfer = ScoreTransfer(model, scores, labels_of(recipe))
    learned = set(scores.parameters())
    mode = model.mode
    model.set_attention_mode("teacher")
    try:
        names = {name for name, p in transfer.named_parameters() if p in learned and not name.endswith(MEASURED)}
        with only_training(transfer, names):
            if not finished:
                transfer.start(sample)
            numbers = sum(p.numel() for p in learned)
            flop = Shape(model.config).stage_flop("stage0", recipe, numbers)
            run = replace(run, log_attention_every=0)  # no student reads anything here
            done = run_stage(transfer, dataset, recipe, run, quantity="squared error", flop_per_token=flop)
        if finished:
            return Stage0Result(**vars(done), r2=load_scores(folder, scores))
        transfer.scale_back()
    finally:
        model.set_attention_mode(mode)
    fit = score_fit(model, scores, sample if held_out is None else held_out, recipe)
    r2 = [layer.tolist() for layer in fit]
    save_scores(folder, scores, r2)
    return Stage0Result(**vars(done), r2=load_scores(folder, scores))  # the same bits in every process


class Labels(NamedTuple):
    """Which labels are made of a layer's keys, and how: see ``key_labels``."""

    kind: str
    block: int
    queries: int

    def made(self, attention: LizardAttention, keys: LayerKeys) -> Tensor:
        """Labels [B, n, Hk] of the keys that count."""
        window = attention.lizard.config.window
        return key_labels(keys.attention, window, self.kind, self.block, self.queries)[:, self.counted(attention, keys)]

    def counted(self, attention: LizardAttention, keys: LayerKeys, ahead: int = 0) -> slice:
        """Places ``ahead`` of those of the keys that count: no anchors, and with enough later queries."""
        config = attention.lizard.config
        end = keys.x.shape[1] - config.window + 1 - self.queries
        return slice(config.anchors + ahead, end + ahead)


def labels_of(recipe: Stage0Config) -> Labels:
    """Those that a recipe asks for."""
    return Labels(recipe.label, recipe.label_block, recipe.label_queries)


class ScoreTransfer(nn.Module):
    """The loss of stage 0: the mean over layers of each score's squared error, from one forward of the teacher.

    A layer's labels and gradients are made when the teacher comes to it, so that memory holds one layer's at a time.
    """

    def __init__(self, model: LizardCausalLM, scores: nn.ModuleList, labels: Labels) -> None:
        super().__init__()
        self.model, self.labels = model, labels
        own = list(scores) == list(model.key_scores())
        self.apart = None if own else scores  # the model's own are in it already, and sharded with its layers
        self.means: list[Tensor] = []
        self.deviations: list[Tensor] = []

    @property
    def scores(self) -> nn.ModuleList:
        """One for each converted layer."""
        return self.model.key_scores() if self.apart is None else self.apart

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """input_ids [B, T] -> {"loss": float32 scalar}. Raises ValueError for rows with padding."""
        if attention_mask is not None:
            raise ValueError("attention_mask: got a mask, wanted None: stage 0 reads whole rows without padding")
        wanted, scores, losses = torch.is_grad_enabled(), self.scores, []

        def learn(number: int, attention: LizardAttention, keys: LayerKeys) -> None:
            labels = self.labels.made(attention, keys)
            mean, deviation = (t[number].to(labels.device) for t in (self.means, self.deviations))
            labels = (labels - mean) / deviation  # sharded layers are elsewhere than where they were measured
            score: Any = scores[number]

            def error() -> tuple[Tensor, Tensor]:
                found = predicted(score, attention, keys, self.labels)
                return (found - labels).square().mean(), found.detach()

            trained = [p for p in score.parameters() if p.requires_grad] if wanted else []
            with torch.set_grad_enabled(wanted):  # the teacher around it runs without
                losses.append(gradients_at_once(error, trained)[0])

        read_teacher(self.model, input_ids, self.labels, learn, scored_layers(self.model, self.scores))
        return {"loss": torch.stack([loss.to(losses[0].device) for loss in losses]).mean()}

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Standardise the labels by ``rows`` [N, T], and start every score from its best linear term there."""
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.scores]

        def look(number: int, attention: LizardAttention, keys: LayerKeys) -> None:
            score: Any = self.scores[number]
            seen = keys.seen(score)
            facts = score.statistics(keys.k, keys.v) if seen is None else score.facts(keys.k, keys.v, seen)
            facts = facts[:, self.labels.counted(attention, keys)]
            found[number].append((facts.flatten(0, 1), self.labels.made(attention, keys).flatten(0, 1)))

        for row in rows.split(1):
            read_teacher(self.model, row, self.labels, look, scored_layers(self.model, self.scores))
        self.means, self.deviations = [], []
        for score, parts in zip(self.scores, found, strict=True):
            facts, labels = (torch.cat(part) for part in zip(*parts, strict=True))  # [n, Hk, 3 or 6], [n, Hk]
            mean, deviation = labels.mean(0), labels.std(0, correction=0).clamp(min=1e-6)
            self.means.append(mean)
            self.deviations.append(deviation)
            start_linear(score, facts[..., :STATISTICS], (labels - mean) / deviation)
            start_received(score, facts)

    def scale_back(self) -> None:
        """Make the scores estimates of the labels as they are."""
        for score, mean, deviation in zip(self.scores, self.means, self.deviations, strict=True):
            score.rescale(deviation, mean)  # type: ignore[operator]


@torch.no_grad()
def start_linear(score: Any, facts: Tensor, labels: Tensor) -> None:
    """Reset ``score``, with the ridge regression of ``labels`` [n, Hk] on its statistics ``facts`` [n, Hk, 3]."""
    mean, deviation = facts.mean(0), facts.std(0, correction=0).clamp(min=1e-6)  # [Hk, 3]
    plain = (facts - mean) / deviation
    products = torch.einsum("nhf,nhg->hfg", plain, plain) / len(plain)
    answers = torch.einsum("nhf,nh->hf", plain, labels - labels.mean(0)) / len(plain)
    ridge = RIDGE * torch.eye(facts.shape[2], dtype=facts.dtype, device=facts.device)
    weight = torch.linalg.solve(products + ridge, answers) / deviation
    score.reset_parameters()
    score.linear_weight.copy_(weight)
    score.bias.copy_(labels.mean(0) - (weight * mean).sum(-1))


def start_received(score: Any, facts: Tensor) -> None:
    """Reset what ``score`` adds for what keys receive, if it does, by the facts [n, Hk, 6] of a sample."""
    if score.received is not None:
        score.received.reset_parameters()
        score.received.standardise(facts)


@torch.no_grad()
def score_fit(
    model: LizardCausalLM, scores: nn.ModuleList, rows: Tensor, recipe: Stage0Config | None = None
) -> list[Tensor]:
    """R2 of trained scores [Hk] float64, layer by layer, on ``rows`` [N, T] of the teacher; 1 is perfect, 0 the mean.

    The labels are those of ``recipe``.

    Raises ValueError for scores of another model.
    """
    check_scores(model, scores)
    wanted, mode = labels_of(recipe or lizard_config(model.config).stage0), model.mode
    sums: list[Any] = [0.0] * len(scores)

    def look(number: int, attention: LizardAttention, keys: LayerKeys) -> None:
        labels = wanted.made(attention, keys).double()
        error = predicted(scores[number], attention, keys, wanted).double() - labels
        parts = (torch.ones_like(labels), labels, labels.square(), error.square())
        sums[number] = sums[number] + torch.stack([part.sum((0, 1)) for part in parts])

    model.set_attention_mode("teacher")
    try:
        for row in rows.split(1):
            read_teacher(model, row, wanted, look, scored_layers(model, scores))
    finally:
        model.set_attention_mode(mode)
    return [(1 - error / (squares - total.square() / count)).cpu() for count, total, squares, error in sums]


def predicted(score: Any, attention: LizardAttention, keys: LayerKeys, labels: Labels) -> Tensor:
    """Scores [B, n, Hk] of the keys that ``labels`` counts."""
    delayed = score(keys.x, keys.k, keys.v, seen=keys.seen(score))[0]
    return delayed[:, labels.counted(attention, keys, ahead=score.delay)]


@torch.no_grad()
def read_teacher(
    model: LizardCausalLM,
    input_ids: Tensor,
    labels: Labels,
    look: Callable[[int, LizardAttention, LayerKeys], None],
    attentions: Sequence[LizardAttention] | None = None,
) -> None:
    """One forward of a model in mode "teacher" over whole rows [B, T]; ``look`` is called as it comes to each layer.

    look(number, attention, keys): number counts ``attentions`` from 0, default the converted layers. Raises ValueError
    for rows without a key that ``labels`` counts.
    """
    attentions = model.lizard_attentions() if attentions is None else attentions
    for attention in attentions:
        needed = attention.lizard.config.window + attention.lizard.config.anchors + labels.queries
        if input_ids.shape[1] < needed:
            raise ValueError(
                f"input_ids: got rows of {input_ids.shape[1]} tokens, wanted at least {needed}, window and anchors and "
                f"label_queries={labels.queries}: no key of a shorter one has as many later queries"
            )
    with _watched(attentions, look):
        model.model(input_ids=input_ids.to(next(model.parameters()).device), use_cache=False)


@contextlib.contextmanager
def _watched(
    attentions: Sequence[LizardAttention], look: Callable[[int, LizardAttention, LayerKeys], None]
) -> Iterator[None]:
    def hook(number: int) -> Callable[..., None]:
        def before(attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            look(number, attention, layer_keys(attention, *args, **kwargs))

        return before

    handles = [
        attention.register_forward_pre_hook(hook(number), with_kwargs=True)
        for number, attention in enumerate(attentions)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_keys(
    attention: LizardAttention, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> LayerKeys:
    """From the arguments of a layer's forward."""
    q, k, v = attention.heads(hidden_states)
    turn = position_embeddings if attention.use_rope else None
    turned = (q, k) if turn is None else (apply_rotary(q, *turn), apply_rotary(k, *turn))
    return LayerKeys(
        hidden_states,
        k,
        v,
        TeacherAttention(
            *turned,
            v,
            attention.o_proj.weight,
            attention.scaling,
            attention.softcap,
            attention.teacher_window,
            attention.o_proj.bias,
        ),
    )


def scored_layers(model: LizardCausalLM, scores: nn.ModuleList) -> list[LizardAttention]:
    """The layers that ``scores`` are for: the converted ones, or as many that keep keys.

    Raises ValueError for another number of scores.
    """
    attentions = model.lizard_attentions()
    keeping = [attention for attention in attentions if attention.lizard.key_score is not None]
    if len(scores) == len(attentions):
        return attentions
    if len(scores) != len(keeping):
        raise ValueError(f"scores: got {len(scores)}, wanted one for each of the {len(attentions)} converted layers")
    return keeping


def check_scores(model: LizardCausalLM, scores: nn.ModuleList) -> None:
    """Raises ValueError unless each is of its layer's shape (``scored_layers``), with a window to leave."""
    attentions = scored_layers(model, scores)
    for score, attention in zip(scores, attentions, strict=True):
        config = attention.lizard.config
        wanted = (config.hidden_size, config.num_key_heads, config.head_dim)
        came = tuple(getattr(score, name, None) for name in ("hidden_size", "num_key_heads", "head_dim"))
        if came != wanted:
            raise ValueError(f"scores: of layer {attention.layer_idx} got sizes {came}, wanted {wanted}")
        form = WindowForm.of(config) if config.score_received else None
        if score.window_form != form:
            raise ValueError(f"scores: of layer {attention.layer_idx} read {score.window_form}, wanted {form}")
        if config.window <= LOOK_AHEAD:
            raise ValueError(
                f"window={config.window} of layer {attention.layer_idx}: scores read {LOOK_AHEAD} tokens after their "
                f"keys, wanted a window of at least {LOOK_AHEAD + 1}"
            )


def first_rows(dataset: Dataset, count: int) -> Tensor:
    """The first ``count`` rows [n, T] of a data set, fewer if it has no more."""
    if isinstance(dataset, IterableDataset):
        stream: Any = endless(dataset)
        return torch.stack([item["input_ids"] for item in islice(stream, count)])
    rows: Any = dataset
    return torch.stack([rows[i]["input_ids"] for i in range(min(count, len(rows)))])
