"""The load test itself: it finds a wrong answer, a cut stream is no answer, and its server dies at once."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.serving.load import Tally, ask
from benchmarks.serving.process import Server
from benchmarks.serving.tiny import CHARACTERS, Turn, conversations, save_model, tokenizer

SERVER = """
import http.server, os, subprocess, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", PORT), Health).serve_forever()
"""


def client(*parts, fails: Exception | None = None):
    """An OpenAI client whose stream says ``parts``, (text, finish_reason) each."""

    def create(**asked):
        for text, reason in parts:
            yield SimpleNamespace(choices=[SimpleNamespace(text=text, finish_reason=reason)])
        if fails is not None:
            raise fails

    return SimpleNamespace(completions=SimpleNamespace(create=create))


def test_right_wrong_and_cut_answers_are_told_apart():
    tally, turn = Tally(), Turn("what turns the mill?", "wind")
    assert ask(client(("wi", None), ("nd", "length")), "m", turn, tally, 4)
    assert ask(client(("wand", "length")), "m", turn, tally, 4)
    assert not ask(client(("wi", None)), "m", turn, tally, 4)  # ends without saying so
    assert not ask(client(("wind", None), fails=ConnectionResetError("gone")), "m", turn, tally, 4)
    assert tally.right == 1 and [wrong["got"] for wrong in tally.wrong] == ["wand"]
    assert dict(tally.errors) == {"ConnectionError": 1, "ConnectionResetError": 1}
    assert len(tally.first_token) == 2


@torch.no_grad()
def test_its_conversations_are_texts_of_tokens(tmp_path):
    words = tokenizer()
    assert words.decode(words(CHARACTERS)["input_ids"]) == CHARACTERS and len(words("abc")["input_ids"]) == 3
    model = save_model(tmp_path)
    talks = conversations(model, [12, 40], turns=2, tokens=5)
    assert [len(talk[0].prompt) for talk in talks] == [12, 40]
    for talk in talks:
        assert talk[1].prompt.startswith(talk[0].prompt + talk[0].answer)
        ids = words(talk[1].prompt, return_tensors="pt")["input_ids"]
        best = model(ids).logits[0, -1].argmax()
        assert words.decode(best[None]) == talk[1].answer[0]
    assert talks[0][0].prompt[:6] == talks[1][0].prompt[:6]


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_a_killed_server_leaves_no_child_and_starts_again(tmp_path):
    import psutil

    server = Server([sys.executable, "-c", SERVER], tmp_path / "log")
    for _ in range(2):
        server.start(30)
        server.measure()
        children = psutil.Process(server.process.pid).children()
        assert len(children) == 1
        server.kill()
        psutil.wait_procs(children, timeout=5)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert server.resident > 1 << 20
    failing = Server([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")
    with pytest.raises(RuntimeError, match="ended with 3"):
        failing.start(30)
