"""Training sequences with passkeys among the text: 10,000 of them as the paper's Figure 2 has it."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lizard_models.evaluation.passkey import passkey_examples
from lizard_models.text.sequences import PackedTokens

TRAINING_SEED = 1_000_000  # away from the seeds of evaluation


class WithPasskeys(Dataset):
    """The sequences of ``text`` and, after them, ``examples`` of five keys of 5 to 8 digits, answer included.

    An example fills a sequence exactly. Items and ``digest`` as ``PackedTokens`` has them; the order is the trainer's.
    """

    def __init__(self, text: PackedTokens, tokenizer: PreTrainedTokenizerBase, examples: int, seed: int = 0) -> None:
        self.text = text
        length = text.sequences.shape[1]
        pairs = passkey_examples(tokenizer, length, examples, keys=5, seed=TRAINING_SEED + seed)
        self.rows = np.array([prompt + answer for prompt, answer in pairs], text.sequences.dtype)
        added = hashlib.sha256(np.ascontiguousarray(self.rows, dtype="<i4").tobytes()).hexdigest()
        self.digest = hashlib.sha256(f"{text.digest} {added}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.text) + len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self.text):
            return self.text[index]
        return {"input_ids": torch.from_numpy(self.rows[index - len(self.text)].astype(np.int64))}
