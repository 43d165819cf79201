"""Nothing that a user types, and no file of a model, ends in a traceback: one line says what was wanted."""

import json
import shutil

import pytest
from cli_calls import call, error
from readable import byte_tokenizer, save_teacher, save_texts

from lizard_models import LizardConfig, linearize
from lizard_models.files.folders import SUMS, damaged, write_sums
from lizard_models.teachers.find import load_teacher
from lizard_models.teachers.loading import load_model
from lizard_models.text.documents import format_chat
from lizard_models.text.prompts import prompt_tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("world") / "teacher")


CONFIGS = [
    {"hidden_size": 65},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": 0},
    {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    {"rope_parameters": 5},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": 5},
    {"model_type": "nope"},
    {"model_type": 5},
    {"num_hidden_layers": 10**7},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 2},
    {"num_hidden_layers": "3"},
    {"vocab_size": 0},
    {"vocab_size": -3},
    {"hidden_act": "nope"},
    {"_attn_implementation": "owner/kernel"},
    {"attn_implementation": "owner/kernel"},
    {"dtype": "nope"},
    {"head_dim": 15},
    {"head_dim": 0},
    {"rms_norm_eps": "a"},
    {"intermediate_size": -4},
    {"architectures": 5},
]


@pytest.mark.parametrize("change", CONFIGS, ids=lambda change: "-".join(map(str, change)))
def test_a_teachers_configuration_that_fits_nothing_is_refused(saved, tmp_path, change):
    shutil.copytree(saved, tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    try:
        found = load_teacher(str(tmp_path / "teacher"))
        linearize(found.model, LizardConfig.preset("plain"))
    except ValueError as refused:
        assert "teacher" in str(refused) or "rope" in str(refused) or "heads" in str(refused), refused
    else:
        assert set(change) <= {"rms_norm_eps", "architectures", "num_hidden_layers", "attn_implementation", "dtype"}
    if "kernel" in str(change):
        with pytest.raises(ValueError, match="kernels of a hub|cannot be read|could not be read"):
            load_teacher(str(tmp_path / "teacher"))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"5", b"\xff\xfe", b"[" * 100_000], ids=range(6))
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_broken_file_of_a_teacher_is_one_error(saved, tmp_path, name, data):
    shutil.copytree(saved, tmp_path / "teacher")
    (tmp_path / "teacher" / name).write_bytes(data)
    with pytest.raises(ValueError, match="teacher|tokenizer|damaged"):
        load_teacher(str(tmp_path / "teacher"))


@pytest.mark.parametrize("data", [b"garbage", b"\xff\xfe", b"a" * 64 + b"  ../../etc/passwd\n", b"\n"])
def test_sums_that_are_none_are_named(tmp_path, data):
    (tmp_path / "a").write_text("1")
    write_sums(tmp_path)
    assert damaged(tmp_path) == []
    (tmp_path / SUMS).write_bytes(data)
    with pytest.raises(ValueError, match="SHA256SUMS is damaged .line 1 is no sum and name of a file"):
        damaged(tmp_path)


@pytest.mark.parametrize("data", [b"[]", b"5", b"{", b"\xff"])
def test_a_broken_record_of_training_is_named(saved, tmp_path, data):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "training.json").write_bytes(data)
    with pytest.raises(ValueError, match="training.json is damaged"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1/0 }}",
        "{% for",
        "{{ messages.__class__.__mro__ }}",
        "no place",
        "{{ messages[0].content }}" * 2,
        "{{ x.y }}",
    ],
)
def test_templates_that_cannot_be_used_are_named(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat: the model's chat template"):
        list(prompt_tokens(["hi"], tokenizer, chat=True))
    if "/0" in template or "% for" in template:
        with pytest.raises(ValueError, match="chat: the model's chat template cannot be used"):
            format_chat([{"role": "user", "content": "hi"}], tokenizer)


GENERATE = ["generate", "nowhere", "hi"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([*GENERATE, "--top-p", "0"], "--top-p is 0.0, wanted a share above 0"),
        ([*GENERATE, "--top-p", "2"], "--top-p is 2.0"),
        ([*GENERATE, "--top-p", "nan"], "--top-p is nan"),
        ([*GENERATE, "--temperature", "1e-40"], "--temperature is 1e-40, wanted 0, or"),
        ([*GENERATE, "--temperature", "inf"], "--temperature is inf"),
        (["eval", "nowhere", "--tasks", ","], "nothing to measure"),
        (["eval", "nowhere", "--lengths", ","], "nothing to measure"),
        (["eval", "nowhere", "--lengths", "400", "--out", "FILE"], "FILE' is not a folder"),
        (["eval", "nowhere", "--stream", "x", "--out", "FILE/a/b"], "FILE' is not a folder"),
        (["demo", "--out", "FILE"], "FILE' is not a folder"),
        (["demo", "--out", "FILE/a"], "FILE' is not a folder"),
        (["linearize", "", "--out", "OUT"], "teacher: the name is empty"),
        (["linearize", "TEACHER", "--data", "", "--out", "OUT"], "data: a source is empty"),
        (["linearize", "TEACHER", "--data", "TEXTS", "--out", "FILE/a"], "FILE' is not a folder"),
        (["linearize", "TEACHER", "--out", "OUT", "--set", "softmax_layers=3"], "softmax_layers must be tuple"),
        (["linearize", "TEACHER", "--out", "OUT", "--set", "stage1.betas=5"], "betas must be tuple"),
        (["linearize", "TEACHER", "--out", "OUT", "--set", "attention.window=99999999999999999999"], "below 2**48"),
        (["linearize", "TEACHER", "--out", "OUT", "--set", "stage1.max_steps=99999999999999999999"], "below 2**48"),
        (["linearize", "TEACHER", "--out", "OUT", "--seed", "-1"], "seed must be from 0"),
        (["linearize", "TEACHER", "--out", "OUT", "--resume", "--resume", "auto"], "data"),
        (["linearize", "TEACHER", "--out", "OUT", "--diverged", "nan"], "--diverged: it must be above 1"),
        (
            ["linearize", "TEACHER", "--out", "OUT", "--peak-tflops", "nan"],
            "--peak-tflops: it must be a positive number",
        ),
        (["linearize", "TEACHER", "--out", "OUT", "--state-mib", "inf"], "--state-mib: it must be a number of MiB"),
        ([*GENERATE, "--save-state", "FILE/x"], "there is no folder 'FILE'"),
        ([*GENERATE, "--save-state", "TEXTS"], "a folder is there"),
    ],
    ids=range(25),
)
def test_options_that_mean_nothing_are_refused_before_anything_is_loaded(saved, tmp_path, monkeypatch, command, said):
    monkeypatch.setattr("lizard_models.text.documents.hub_answers", lambda path="": False)
    save_texts(tmp_path / "texts")
    (tmp_path / "file").write_text("1")
    names = {"FILE": tmp_path / "file", "OUT": tmp_path / "out", "TEACHER": saved, "TEXTS": tmp_path / "texts"}
    for name, path in names.items():
        command = [argument.replace(name, str(path)) for argument in command]
    line = error(*command)
    assert line.startswith("error: ") and said.replace("FILE", str(tmp_path / "file")) in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    "command",
    [
        [*GENERATE, "--seed", "9" * 30],
        [*GENERATE, "-n", "9" * 30],
        [*GENERATE, "--temperature", "nan"],
        ["linearize", "teacher", "--out", "a\0b"],
        ["nope"],
    ],
)
def test_what_the_command_line_refuses_itself(command):
    said = call(*command, code=2)
    assert "rror" in said.stderr and isinstance(said.exception, SystemExit)


NO_HOME = "~nobody-at-all/x"
PLACES = {
    "data": (["linearize", "TEACHER", "--data", "PLACE", "--out", "OUT"], "--data: "),
    "out": (["linearize", "TEACHER", "--preset", "plain", "--data", "TEXTS", "--out", "PLACE"], "--out: "),
    "cache": (["linearize", "TEACHER", "--data", "TEXTS", "--out", "OUT", "--cache", "PLACE"], "--cache: "),
    "from": (["linearize", "TEACHER", "--data", "TEXTS", "--out", "OUT", "--from", "PLACE"], "--from: "),
    "teacher": (["linearize", "PLACE", "--data", "TEXTS", "--out", "OUT"], "teacher: "),
    "convert": (["convert", "TEACHER", "--out", "PLACE"], "--out: "),
    "report": (["report", "PLACE"], "report: "),
    "generate": (["generate", "PLACE", "hi"], "model: "),
}


@pytest.mark.parametrize("name", PLACES)
def test_homes_that_nobody_has_are_named(saved, tmp_path, name):
    command, start = PLACES[name]
    save_texts(tmp_path / "texts")
    names = {"PLACE": NO_HOME, "TEACHER": saved, "TEXTS": tmp_path / "texts", "OUT": tmp_path / "out"}
    line = error(*(names.get(word, word) for word in command))
    assert line == f"error: {start}no home is known for {NO_HOME!r}; write the path out"


@pytest.mark.parametrize("name", ["data", "out"])
def test_links_to_themselves_and_paths_too_long_are_one_line(saved, tmp_path, name):
    command, _ = PLACES[name]
    save_texts(tmp_path / "texts")
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / "loop" / "x", tmp_path / ("a/" * 3000)):
        names = {"PLACE": place, "TEACHER": saved, "TEXTS": tmp_path / "texts", "OUT": tmp_path / "out"}
        assert error(*(names.get(word, word) for word in command)).startswith("error: ")
