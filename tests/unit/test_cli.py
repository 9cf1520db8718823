"""The command `pdjax`, over a stand-in for the LLM that answers each prompt with its own words."""

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pdjax import cli
from pdjax.config import Config
from pdjax.flags import status
from pdjax.request import Completion, RequestOutput, SamplingParams, TokenLogprobs
from pdjax.stream import StreamChunk


class EchoTokenizer:
    def apply_chat_template(self, messages: list[dict]) -> list[int]:
        return [len(message["content"]) for message in messages]


class EchoLLM:
    """Answers "x" with "<x>", and prompts that hold "bad" with an error."""

    made: "EchoLLM"

    def __init__(self, config: Config) -> None:
        EchoLLM.made = self
        self.config = config
        self.tokenizer = EchoTokenizer()
        self.closed = False

    def generate(self, prompts: list[str], params: SamplingParams) -> list[RequestOutput]:
        self.params = params
        return [self._answer(prompt, params.n) for prompt in prompts]

    def chat(self, messages: list[list[dict]], params: SamplingParams) -> list[RequestOutput]:
        return self.generate([f"chat {turns[0]['content']}" for turns in messages], params)

    def stream(self, prompt: str | list[int], params: SamplingParams) -> Iterator[StreamChunk]:
        output = self._answer(str(prompt), 1)
        yield StreamChunk(f"<{prompt}", [1])
        yield StreamChunk(">", [2], output.finish_reason, output)

    def __enter__(self) -> "EchoLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def _answer(self, prompt: str, n: int) -> RequestOutput:
        error = "out of luck" if "bad" in prompt else None
        choice = Completion(
            [1, 2],
            f"<{prompt}>",
            "error" if error else "stop",
            None,
            [TokenLogprobs(-0.5, ((1, -0.5),))],
            error,
            None,
        )
        return RequestOutput("r", prompt, [7], [choice] * n)


@pytest.fixture(autouse=True)
def llm_module(monkeypatch) -> SimpleNamespace:
    converted: list[tuple] = []
    module = ModuleType("pdjax.llm")
    module.LLM = EchoLLM  # type: ignore[attr-defined]
    module.convert = lambda *args: converted.append(args)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pdjax.llm", module)
    monkeypatch.setattr("pdjax.llm", module, raising=False)
    return SimpleNamespace(converted=converted)


def pdjax(name: str, *args: str) -> int:
    command = cli.COMMANDS[name]
    return status(command.main, command.values, command.usage, [f"pdjax {name}", *args])


def test_one_prompt_gives_its_text_alone(capsys):
    assert pdjax("generate", "--prompt=hello") == 0
    assert capsys.readouterr().out == "<hello>\n"
    assert EchoLLM.made.closed


def test_several_prompts_and_choices_have_headings(capsys):
    assert pdjax("generate", "--prompt=a", "--prompt=b", "--n=2", "--temperature=1") == 0
    assert capsys.readouterr().out.splitlines() == [
        *("--- 'a', choice 1", "<a>", "--- 'a', choice 2", "<a>"),
        *("--- 'b', choice 1", "<b>", "--- 'b', choice 2", "<b>"),
    ]


def test_sampling_flags_reach_the_request():
    args = ["--temperature=0.5", "--top-k=3", "--seed=9", "--stop=x", "--stop=y", "--ignore_eos"]
    assert pdjax("generate", "--prompt=a", *args, "--stop_token_ids=4", "--logprobs=2") == 0
    assert EchoLLM.made.params == SamplingParams(
        temperature=0.5,
        top_k=3,
        seed=9,
        max_tokens=128,
        stop=("x", "y"),
        stop_token_ids=(4,),
        ignore_eos=True,
        logprobs=2,
    )


def test_config_and_overrides_reach_the_llm():
    assert pdjax("generate", "--prompt=a", "--config.decode.rows=24") == 0
    assert EchoLLM.made.config.decode.rows == 24
    assert not EchoLLM.made.config.warm_up


def test_prompts_from_a_file_as_a_chat(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    assert pdjax("generate", f"--prompts-file={file}", "--chat") == 0
    assert capsys.readouterr().out.splitlines() == [
        *("--- 'one'", "<chat one>", "--- 'two'", "<chat two>")
    ]


def test_json_is_an_object_a_line(capsys):
    assert pdjax("generate", "--json", "--prompt=a", "--prompt=b") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("a", "b")
    (choice,) = first["choices"]
    assert choice["text"] == "<a>"
    assert choice["logprobs"] == [{"chosen": -0.5, "top": [[1, -0.5]]}]


def test_stream_of_a_prompt_and_of_a_chat(capsys):
    assert pdjax("generate", "--stream", "--prompt=a") == 0
    assert pdjax("generate", "--stream", "--chat", "--prompt=four") == 0
    assert capsys.readouterr().out == "<a>\n<[4]>\n"


def test_a_failed_stream_says_why(capsys):
    assert pdjax("generate", "--stream", "--prompt=bad") == 1
    out, err = capsys.readouterr()
    assert out == "<bad>\n"
    assert err == "pdjax generate: 'bad' failed: out of luck\n"


def test_a_failed_request_leaves_its_neighbours_their_text(capsys):
    assert pdjax("generate", "--prompt=good", "--prompt=bad") == 1
    out, err = capsys.readouterr()
    assert "<good>" in out
    assert err == "pdjax generate: 'bad' failed: out of luck\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "prompt: give either"),
        (["--prompt=a", "--prompts_file=b"], "prompt: give either"),
        (["--prompts_file=/no/such/file"], "/no/such/file"),
        (["--prompt=a", "--top_p=2"], "top_p=2.0: must be in (0, 1]"),
        (["--prompt=a", "--n=2"], "n=2 with temperature=0"),
        (["--prompt=a", "--prompt=b", "--stream"], "stream: shows one choice"),
        (["--prompt=a", "--json", "--stream"], "stream: shows one choice"),
        (["--prompt=a", "--config.decode.row=2"], "generate: decode.row: no such field"),
    ],
)
def test_bad_input(capsys, args: list[str], message: str):
    assert pdjax("generate", *args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_an_empty_prompts_file_is_refused(capsys, tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    assert pdjax("generate", f"--prompts_file={tmp_path / 'empty'}") == 2
    assert "must hold a prompt a line" in capsys.readouterr().err


def test_convert(capsys, llm_module):
    assert pdjax("convert", "--source=a", "--output=b", "--dtype=bfloat16") == 0
    assert llm_module.converted == [("a", "b", "bfloat16")]
    assert pdjax("convert", "--source=a") == 2
    assert "needs both --source=MODEL and --output=DIRECTORY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"), [(["--help"], 0), ([], 0), (["help"], 0), (["generat"], 2)]
)
def test_overview_and_unknown_commands(capsys, argv: list[str], expected: int):
    with pytest.raises(SystemExit) as end:
        cli.main(["pdjax", *argv])
    assert end.value.code == expected
    out, err = capsys.readouterr()
    if expected:
        assert err == "pdjax: 'generat': no such command; allowed are generate, convert\n"
    else:
        assert "pdjax generate: complete prompts" in out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["pdjax", "--version"])
    assert end.value.code == 0
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    assert capsys.readouterr().out == f"pdjax {project['project']['version']}\n"
