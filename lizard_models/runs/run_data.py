"""The text of a run: what its stages train on, and what it is measured on."""

from __future__ import annotations

from typing import Any

from lizard_models.distill.parallel import is_main_process
from lizard_models.files.sources import Say, cache_dir
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.recipes import Recipe, Stage0Config
from lizard_models.runs.plan import Plan
from lizard_models.runs.score_rows import score_rows
from lizard_models.teachers.find import Teacher
from lizard_models.text.documents import files_left_out
from lizard_models.text.mixture import MixedTokens, load_mixture
from lizard_models.text.overlap import overlap
from lizard_models.text.sequences import Documents, PackedTokens, load_documents


class RunData:
    """Reads the text of a plan, and says what came of it.

    ``documents`` are those that are measured on, None if there are none. Raises ValueError for text that cannot be
    read.
    """

    def __init__(self, plan: Plan, teacher: Teacher, say: Say) -> None:
        self.plan, self.teacher, self.say = plan, teacher, say
        self.documents = self._documents()
        self.told: list[str] = []
        for source in dict.fromkeys((*plan.data, *plan.eval_data)):
            if left := files_left_out(source):
                say(f"not read in {source}: {len(left)} hidden files or outputs of runs, such as {left[0]}")

    def rows(self, stage: str, recipe: Recipe, model: LizardCausalLM) -> Any:
        """What a stage trains on. stage: its name, for the line that says so."""
        plan = self.plan
        cache = cache_dir(plan.cache)
        how: dict[str, Any] = dict(text_field=plan.text_field, encoding=plan.encoding, cache=cache, say=self.say)
        if isinstance(recipe, Stage0Config):
            rows = score_rows(plan.data, self.teacher, model, recipe, plan.weights, **how)
            self.say(f"data of {stage}: {rows.told}")
            return rows
        try:
            sequences = load_mixture(
                plan.data,
                plan.weights,
                self.teacher.tokenizer,
                recipe.sequence_length,
                seed=recipe.seed,
                examples=recipe.examples,
                vocab_size=self.teacher.model.config.vocab_size,
                **how,
            )
        except ValueError as error:  # its length is no option of the other stages
            raise ValueError(
                str(error).replace("seq_len", "stage3.sequence_length") if stage == "stage3" else str(error)
            ) from error
        size = f"{len(sequences)} sequences" if hasattr(sequences, "__len__") else "streamed sequences"
        size += f" ({', '.join(map(str, sequences.counts))} by weight)" if isinstance(sequences, MixedTokens) else ""
        self.say(f"data of {stage}: {size} of {recipe.sequence_length} tokens")
        self._tell_overlap(sequences)
        return sequences

    def _tell_overlap(self, sequences: Any) -> None:
        """Names what is both trained on and measured on; of streamed text nobody knows."""
        if self.documents is None or not isinstance(sequences, PackedTokens) or not is_main_process():
            return
        found = overlap(self.documents.tokens, sequences)
        if found is not None and (told := found.told()) and told not in self.told:
            self.told.append(told)
            self.say(f"warning: {told}")

    def _documents(self) -> Documents | None:
        if self.plan.passkey_lengths and self.teacher.tokenizer is None:
            raise ValueError("passkey lengths: the teacher has no tokenizer to write the test with")
        if not self.plan.eval_data:
            return None
        return load_documents(
            self.plan.eval_data,
            self.teacher.tokenizer,
            self.plan.eval_length + 1,
            count=self.plan.eval_documents,
            text_field=self.plan.text_field,
            encoding=self.plan.encoding,
            vocab_size=self.teacher.model.config.vocab_size,
        )
