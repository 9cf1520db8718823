"""The command `pdjax`, over a stand-in for the LLM that answers each prompt with its own words."""

import io
import json
import math
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from pdjax import cli
from pdjax.config import Config
from pdjax.core.logprobs import PromptLogprobs, TokenLogprobs
from pdjax.core.outputs import Completion, RequestOutput
from pdjax.core.request import SamplingParams
from pdjax.flags import status
from pdjax.stream import StreamChunk


class EchoTokenizer:
    def apply_chat_template(self, messages: list[dict]) -> list[int]:
        return [len(message["content"]) for message in messages]


ILL = {"bad": ("error", "out of luck"), "late": ("shed", "deadline: too late")}
"""Words of prompts that end with an error, and how."""


class EchoLLM:
    """Answers "x" with "<x>", and prompts that hold "bad" with an error."""

    made: "EchoLLM"
    params: SamplingParams | None = None
    rehearsed: SamplingParams | None = None
    salts: tuple[str | None, ...] = ()

    def __init__(self, config: Config, progress: bool = True) -> None:
        EchoLLM.made = self
        self.config = config
        self.recorder = SimpleNamespace(clear=lambda: None)
        self.tokenizer = EchoTokenizer()
        self.closed = False

    def generate(
        self,
        prompts: list[str],
        params: SamplingParams,
        progress: bool | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        self.rehearsed, self.params = self.params, params
        self.salts += (cache_salt,)
        return [self._answer(prompt, params.n) for prompt in prompts]

    def chat(
        self,
        messages: list[list[dict]],
        params: SamplingParams,
        progress: bool | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        said = [f"chat {turns[0]['content']}" for turns in messages]
        return self.generate(said, params, progress, cache_salt)

    def stream(self, prompt: str | list[int], params: SamplingParams) -> Iterator[StreamChunk]:
        output = self._answer(str(prompt), 1)
        yield StreamChunk(f"<{prompt}", [1])
        yield StreamChunk(">", [2], output.finish_reason, output)

    def stream_chat(self, messages: list[dict], params: SamplingParams) -> Iterator[StreamChunk]:
        return self.stream(self.tokenizer.apply_chat_template(messages), params)

    def __enter__(self) -> "EchoLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def _answer(self, prompt: str, n: int) -> RequestOutput:
        ill = next((word for word in ILL if word in prompt), None)
        finish, error = ILL.get(ill or "", ("stop", None))
        choice = Completion(
            [1, 2],
            f"<{prompt}>",
            finish,
            None,
            [TokenLogprobs(-0.5, ((1, -0.5),))],
            error,
            None,
        )
        scores = PromptLogprobs(np.array([7]), *np.zeros((2, 0)), *np.zeros((2, 0, 0)))
        return RequestOutput("r", prompt, [7], [choice] * n, scores)


@pytest.fixture(autouse=True)
def llm_module(monkeypatch) -> SimpleNamespace:
    converted: list[tuple] = []
    module = ModuleType("pdjax.llm")
    module.LLM = EchoLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pdjax.llm", module)
    monkeypatch.setattr("pdjax.llm", module, raising=False)
    monkeypatch.setattr("pdjax.convert.convert", lambda *args: converted.append(args))
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
    tops = ["--logprobs=2", "--prompt_logprobs=0"]
    args = ["--temperature=0.5", "--top-k=3", "--seed=9", "--stop=x", "--stop=y", "--ignore_eos"]
    assert pdjax("generate", "--prompt=a", *args, "--stop_token_ids=4", *tops) == 0
    assert EchoLLM.made.params == SamplingParams(
        temperature=0.5,
        top_k=3,
        seed=9,
        max_tokens=128,
        stop=("x", "y"),
        stop_token_ids=(4,),
        ignore_eos=True,
        logprobs=2,
        prompt_logprobs=0,
    )


def test_config_and_overrides_reach_the_llm():
    assert pdjax("generate", "--prompt=a", "--config.decode.rows=24") == 0
    assert EchoLLM.made.config.decode.rows == 24
    assert not EchoLLM.made.config.warm_up


def test_an_answer_is_rehearsed_before_anybody_waits_for_it():
    assert pdjax("generate", "--prompt=a", "--max_tokens=9") == 0
    made = EchoLLM.made
    assert made.params is not None
    assert made.rehearsed == replace(made.params, max_tokens=3)
    assert made.config.decode.page_buckets == (64,)  # nothing to compile between tokens


@pytest.mark.parametrize("chat", ["--chat", "--nochat"])
def test_no_answer_finds_its_rehearsal_in_the_prefix_cache(chat):
    assert pdjax("generate", "--prompt=a", chat) == 0
    [rehearsal, answer] = EchoLLM.made.salts
    assert EchoLLM.made.config.kv.prefix_cache and rehearsal is not None and answer is None


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
    assert first["prompt_logprobs"] == [None]
    (choice,) = first["choices"]
    assert choice["text"] == "<a>"
    assert choice["logprobs"] == [{"chosen": -0.5, "top": [[1, -0.5]]}]


def test_stream_of_a_prompt_and_of_a_chat(capsys):
    assert pdjax("generate", "--stream", "--prompt=a") == 0
    assert pdjax("generate", "--stream", "--chat", "--prompt=four") == 0
    assert capsys.readouterr().out == "<a>\n<[4]>\n"


@pytest.mark.parametrize("prompt", list(ILL))
def test_a_stream_that_fails_or_is_shed_says_why(capsys, prompt: str):
    assert pdjax("generate", "--stream", f"--prompt={prompt}") == 1
    out, err = capsys.readouterr()
    assert out == f"<{prompt}>\n"
    assert err == f"pdjax generate: {prompt!r} failed: {ILL[prompt][1]}\n"


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


class Screen(io.TextIOWrapper):
    """A stdout of another encoding."""

    def __init__(self, encoding: str) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding=encoding, write_through=True)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("asked", [[], ["--stream"], ["--json"]])
def test_no_answer_is_lost_to_the_encoding_of_the_screen(encoding, asked, monkeypatch):
    screen = Screen(encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    # The model's text may hold anything; the prompt comes back in it.
    monkeypatch.setattr(EchoLLM, "_answer", lone_surrogate(EchoLLM._answer))
    assert pdjax("generate", "--prompt=Größe 🔥", *asked) == 0
    shown = screen.bytes.getvalue().decode(encoding)
    if asked == ["--json"]:
        assert json.loads(shown)["choices"][0]["text"] == "<Größe 🔥\ud800>"
    else:
        assert {"ascii": r"Gr\xf6\xdfe", "cp1252": r"Größe \U"}.get(encoding, "Größe 🔥") in shown
        assert asked or r"\ud800" in shown


def lone_surrogate(answer: Callable) -> Callable:
    return lambda self, prompt, n: answer(self, prompt + "\ud800", n)


def test_what_is_not_finite_is_null_in_json(capsys, monkeypatch):
    answer = EchoLLM._answer

    def impossible(self, prompt: str, n: int) -> RequestOutput:
        output = answer(self, prompt, n)
        never = TokenLogprobs(-math.inf, ((1, -math.inf), (2, math.nan)))
        return replace(output, choices=[replace(output.choices[0], logprobs=[never])])

    monkeypatch.setattr(EchoLLM, "_answer", impossible)
    assert pdjax("generate", "--prompt=a", "--json", "--logprobs=2") == 0
    out = capsys.readouterr().out
    assert "Infinity" not in out and "NaN" not in out
    assert json.loads(out)["choices"][0]["logprobs"] == [
        {"chosen": None, "top": [[1, None], [2, None]]}
    ]


def test_a_stdout_that_is_closed_or_full_is_said(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert pdjax("generate", "--prompt=a") == 2
    assert capsys.readouterr().err == (
        "pdjax generate: stdout: is closed, so no answer could be shown\n"
    )
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert pdjax("generate", "--prompt=a") == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["prompt", "stop"])
def test_text_from_the_shell_that_is_not_utf_8_is_refused(flag, capsys):
    asked = [f"--{flag}=caf\udce9"] + (["--prompt=a"] if flag == "stop" else [])
    assert pdjax("generate", *asked) == 2
    err = capsys.readouterr().err
    assert (
        err
        == f"pdjax generate: {flag}='caf\\udce9': must be UTF-8, but the character at 3 is not\n"
    )


def test_a_prompts_file_that_is_not_utf_8_is_refused(capsys, tmp_path):
    (tmp_path / "latin").write_bytes(b"a\ncaf\xe9\n")
    assert pdjax("generate", f"--prompts_file={tmp_path / 'latin'}") == 2
    err = capsys.readouterr().err
    assert "prompts_file=" in err and "must be UTF-8, but the byte at 5 is not" in err
    assert err.count("\n") == 1


def test_a_prompt_is_a_line_as_editors_end_it(capsys, tmp_path):
    (tmp_path / "prompts").write_bytes("\ufeffone\u2028still\x0cone\r\ntwo\n".encode())
    assert pdjax("generate", f"--prompts_file={tmp_path / 'prompts'}", "--json") == 0
    prompts = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert prompts == ["one\u2028still\x0cone", "two"]


def test_an_empty_prompts_file_is_refused(capsys, tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    assert pdjax("generate", f"--prompts_file={tmp_path / 'empty'}") == 2
    assert "must hold a prompt a line" in capsys.readouterr().err


def test_convert_says_what_it_wrote(capsys, llm_module, tmp_path):
    (tmp_path / "weights").write_bytes(bytes(2_000_000))
    assert pdjax("convert", "--source=a", f"--output={tmp_path}", "--dtype=bfloat16") == 0
    assert llm_module.converted == [("a", str(tmp_path), "bfloat16")]
    assert capsys.readouterr().out == f"wrote {tmp_path}: bfloat16, 1 files, 2 MB\n"
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
        allowed = "generate, convert, trace, serve, bench, explain"
        assert err == f"pdjax: 'generat': no such command; allowed are {allowed}\n"
    else:
        assert "pdjax generate: complete prompts" in out


def test_a_config_may_import_modules_of_the_current_folder(capsys, monkeypatch, tmp_path):
    (tmp_path / "only_here.py").write_text("raise ValueError('it was found')")
    (tmp_path / "config.py").write_text("import only_here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    with pytest.raises(SystemExit) as end:
        cli.main(["pdjax", "trace", "--backend=sim", "--config=config.py"])
    assert end.value.code == 2 and sys.path[-1] == ""
    assert "config='config.py': it was found" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["pdjax", "--version"])
    assert end.value.code == 0
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    assert capsys.readouterr().out == f"pdjax {project['project']['version']}\n"
