"""``lizard-attn serve``: an OpenAI client reads from a real process what ``generate`` writes.

The server's packages are the optional extra ``serve``; without them its tests are skipped by name.
"""

import re
import subprocess
import sys

import pytest
import torch
from cli_calls import error
from readable import save_teacher
from served import save_lizard, server
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from lizard_models import load_model

NEEDS_SERVER = pytest.mark.skipif(not is_serve_available(), reason="needs pip install 'lizard-attn[serve]'")
QUESTION = [{"role": "user", "content": "what turns the mill?"}]
LINE = re.compile(r"prefix states: (\d+) of (\d+) tokens were read before")
GREEDY = dict(temperature=0.0, max_tokens=12)


def written(folder, text: str, tokens: int = 12) -> str:
    """What ``generate`` goes on with, without bytes of a character that is not finished, which a stream holds back."""
    loaded = load_model(str(folder), dtype=torch.float32)
    ids = loaded.tokenizer(text, return_tensors="pt")
    settings = dict(max_new_tokens=tokens, do_sample=False)
    output = loaded.model.generate(**ids, **settings)[0, ids["input_ids"].shape[1] :]
    return loaded.tokenizer.decode(output, skip_special_tokens=True).rstrip("\ufffd")


@NEEDS_SERVER
def test_an_openai_client_streams_what_generate_writes(tmp_path):
    from openai import OpenAI

    folder = save_lizard(tmp_path / "lizard")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    with server(
        folder, "--continuous-batching", log=tmp_path / "log"
    ) as url:  # which falls back, as for any model that cannot
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        for text in ("the wind", "the river runs down"):
            answer = client.completions.create(model=str(folder), prompt=text, stream=True, **GREEDY)
            assert "".join(part.choices[0].text for part in answer if part.choices) == written(folder, text)
        answer = client.chat.completions.create(model=str(folder), messages=QUESTION, stream=True, **GREEDY)
        parts = [part.choices[0].delta.content for part in answer if part.choices]
        assert len([part for part in parts if part]) > 2  # as they are written, not at the end
        assert "".join(part or "" for part in parts) == written(folder, chat)
        talk = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(folder), url]
        said = subprocess.run(  # it asks whether to go on where the limit ended an answer
            [*talk, "max_new_tokens=12", "do_sample=False"], input="hi\nn\n!exit\n", text=True, capture_output=True
        )
        assert said.returncode == 0, said.stderr
        assert "12 tokens in" in said.stdout


@NEEDS_SERVER
def test_a_second_turn_reads_what_is_new_and_a_restart_forgets_nothing(tmp_path):
    from openai import OpenAI

    folder, log = save_lizard(tmp_path / "lizard"), tmp_path / "log"
    tokenizer, before = AutoTokenizer.from_pretrained(folder), 0
    talk = [{"role": "system", "content": "the wind turns the mill " * 20}, *QUESTION]
    for turn in range(3):
        chat = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        with server(folder, "--prefix-folder", str(tmp_path / "states"), log=log) as url:  # a process a turn
            client = OpenAI(base_url=url, api_key="none", max_retries=0)
            asked = dict(model=str(folder), messages=talk, **GREEDY)
            parts = [part.choices[0].delta.content for part in client.chat.completions.create(stream=True, **asked)]
            answer = "".join(part or "" for part in parts)
            assert answer == written(folder, chat)
            again = client.chat.completions.create(**asked).choices[0].message.content
            assert again.rstrip("\ufffd") == answer
        read = [(int(found), int(all_of)) for found, all_of in LINE.findall(log.read_text())]
        length = len(tokenizer(chat)["input_ids"])
        assert [all_of for _, all_of in read] == [length, length]
        assert read[0][0] >= before and (turn > 0 or read[0][0] == 0)
        assert read[1][0] == length - 1
        before = length - 1
        talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"and then? {turn}"}]


def test_what_cannot_be_served_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    assert f"model '{tmp_path}/nowhere' cannot be read" in error("serve", tmp_path / "nowhere")  # asks no hub
    folder = save_teacher(tmp_path / "teacher")
    assert "'llama' model and not linearized" in error("serve", folder)
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert "pip install 'lizard-attn[serve]'" in error("serve", folder)


@pytest.mark.skipif(is_serve_available(), reason="the server's packages are here")
def test_without_its_packages_the_server_is_not_started(tmp_path):
    assert "lizard-attn[serve]" in error("serve", tmp_path)
