import pytest

from pdjax.config import (
    Config,
    DecodeConfig,
    HandoffConfig,
    KVConfig,
    ModelConfig,
    PrefillConfig,
)
from pdjax.config.load import load_config
from pdjax.config.presets import PRESETS

pytestmark = pytest.mark.smoke


def test_fields_are_replaced_by_their_dotted_names():
    base = Config(seed=3)
    config = load_config(base, {"decode.rows": 12, "decode.stages": 3, "kv.page_size": 4})
    assert (config.decode.rows, config.decode.stages, config.kv.page_size) == (12, 3, 4)
    assert config.seed == 3
    assert base.decode.rows == 8


def test_fields_that_constrain_each_other_change_together():
    base = Config(decode=DecodeConfig(rows=4, stages=4))
    assert load_config(base, {"decode.stages": 3, "decode.rows": 6}).decode.stages == 3
    with pytest.raises(ValueError, match=r"decode.rows=4: must be a multiple of decode.stages=3"):
        load_config(base, {"decode.stages": 3})


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("decode.rows", "16", 16),
        ("prefill.token_buckets", "(64, 512)", (64, 512)),
        ("prefill.pages", "None", None),
        ("model.source", "12", "12"),
        ("colocated", "True", True),
        ("colocated", "true", True),
        ("kv.prefix_cache", "false", False),
        ("prefill.token_buckets", "512", (512,)),
        ("prefill.token_buckets", 512, (512,)),
        ("decode.attention", "None", None),
        ("decode.attention", "reference", "reference"),
    ],
)
def test_text_is_read_as_the_type_of_the_field(field, text, value):
    config = load_config(Config(), {field: text})
    for name in field.split("."):
        config = getattr(config, name)
    assert config == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"decod.rows": 1}, r"decod: no such field; Config has .*; did you mean decode\?$"),
        ({"decode.row": 1}, r"decode.row: no such field; DecodeConfig has .* mean decode.rows"),
        ({"rows": 1}, r"rows: no such field; .*; did you mean decode.rows\?$"),
        ({"decode.source": "x"}, r"decode.source: no such field; .*; did you mean model.source\?$"),
        ({"tp": 1}, r"tp: no such field; .*; did you mean prefill.tp or decode.tp\?$"),
        ({"nothing_like_it": 1}, r"nothing_like_it: no such field; Config has [\w, ]+$"),
        ({"seed.x": 1}, r"seed.x: seed has no fields of its own"),
        ({"kv.memory_fraction": 0.0}, r"kv.memory_fraction=0.0: must be in \(0, 1\]"),
        ({"kv.memory_fraction": 1.5}, r"kv.memory_fraction=1.5: must be in \(0, 1\]"),
        ({"decode.rows": "many"}, r"decode.rows='many': must be int"),
        ({"decode.rows": 1.5}, r"decode.rows=1.5: must be int"),
        ({"decode.rows": True}, r"decode.rows=True: must be int"),
        ({"prefill.pages": "few"}, r"prefill.pages='few': must be int or None"),
        ({"decode": 3}, r"decode=3: must be DecodeConfig"),
        ({"decode": DecodeConfig(), "decode.rows": 4}, r"decode.rows: decode is overridden as a w"),
        (
            {"decode.rows": 4, "decode": DecodeConfig()},
            r"decode: overridden as a whole, and fields",
        ),
        ({"decode.rows.x": 4}, r"decode.rows.x: rows has no fields of its own"),
        ({"max_waiting": 0}, r"max_waiting=0: must be at least 1"),
        ({"decode.rows": 0}, r"decode.rows=0: must be at least 1"),
        ({"kv.dtype": "int4"}, r"kv.dtype='int4': allowed are float32, bfloat16"),
        ({"model.source": "random"}, r"model.spec=None: needed"),
        ({"colocated": True, "decode.stages": 2}, r"colocated=True: needs"),
        (
            {"prefill.dispatch_thread": True, "colocated": True},
            r"prefill.dispatch_thread=True: need",
        ),
        (
            {"prefill.dispatch_thread": True, "shared_devices": True},
            r"prefill.dispatch_thread=True",
        ),
    ],
)
def test_bad_overrides_say_what_is_allowed(overrides, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        load_config(Config(), overrides)


@pytest.mark.parametrize("buckets", [(), (0, 4), (4, 4), (8, 4), (4, "8"), (4.0,)])
def test_buckets_are_increasing(buckets):
    with pytest.raises(ValueError, match=r"page_buckets=.*positive and increasing"):
        DecodeConfig(page_buckets=buckets)


def test_the_largest_token_bucket_holds_the_budget():
    with pytest.raises(ValueError, match=r"must hold prefill.token_budget=512"):
        PrefillConfig(token_buckets=(64, 256))


def test_a_file_gives_a_config(tmp_path):
    file = tmp_path / "some.py"
    with pytest.raises(ValueError, match=r"no such Python file, nor a preset's name.*model.source"):
        load_config(file)
    file.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"the file has no get_config\(\)"):
        load_config(file)
    file.write_text("get_config = dict\n")
    with pytest.raises(ValueError, match=r"returned dict, not a pdjax.Config"):
        load_config(file)
    file.write_text("from pdjax.config import Config\ndef get_config(): return Config(seed=5)\n")
    assert load_config(file, {"kv.page_size": 8}) == Config(seed=5, kv=KVConfig(page_size=8))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def get_config(:\n", "SyntaxError: "),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("get_config = 3\n", "TypeError: 'int' object is not callable"),
        (
            "from pdjax.config import DecodeConfig\ndef get_config(): DecodeConfig(row=8)\n",
            "TypeError: .*'row'",
        ),
        (
            "from pdjax.config import DecodeConfig\ndef get_config(): DecodeConfig(rows=0)\n",
            "decode.rows=0: must be at least 1$",
        ),
        ("raise RuntimeError('two\\nlines')\n", "RuntimeError: two lines$"),
        ("raise ValueError\n", "ValueError"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_in_one_line(tmp_path, source, reason):
    file = tmp_path / "some.py"
    file.write_text(source)
    with pytest.raises(ValueError, match=rf"^config='.*some\.py': {reason}") as caught:
        load_config(file)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ModelConfig, {"source": None}, "model.source=None: must be str"),
        (KVConfig, {"page_size": 16.0}, "kv.page_size=16.0: must be int"),
        (PrefillConfig, {"pages": "9"}, "prefill.pages='9': must be int or None"),
        (DecodeConfig, {"rows": "8"}, "decode.rows='8': must be int"),
        (DecodeConfig, {"page_buckets": 8}, "decode.page_buckets=8: must be tuple or None"),
        (Config, {"decode": None}, "decode=None: must be DecodeConfig"),
        (Config, {"colocated": 1}, "colocated=1: must be true or false or None"),
        (
            Config,
            {"compilation_cache": ""},
            "compilation_cache='': must be a directory, 'off' or None",
        ),
        (
            HandoffConfig,
            {"wire_dtype": "int4"},
            "handoff.wire_dtype='int4': allowed are int8, float8_e4m3fn",
        ),
        (HandoffConfig, {"lease": 0.0}, "handoff.lease=0.0: must be None or above 0 seconds"),
        (HandoffConfig, {"retries": -1}, "handoff.retries=-1: must be at least 0"),
        (
            Config,
            {"handoff": HandoffConfig(give_back=True), "kv": KVConfig(prefix_cache=False)},
            "handoff.give_back=True: needs kv.prefix_cache=True, to be of any use",
        ),
        (
            Config,
            {
                "handoff": HandoffConfig(give_back=True, wire_dtype="int8"),
                "kv": KVConfig(prefix_cache=True),
            },
            "handoff.give_back=True: with handoff.wire_dtype='int8', decode.kv_dtype=None rounded "
            "KV would come back; the former must be None, the latter None or the prefill side's",
        ),
        (Config, {"flexible": "prefill"}, "flexible='prefill': allowed are none, decode, all"),
        (
            Config,
            {"flexible": "decode"},
            "flexible='decode': needs a prefill.mixed_budget, but that is None",
        ),
        (
            Config,
            {"flexible": "all", "prefill": PrefillConfig(mixed_budget=8), "colocated": True},
            "flexible='all': needs colocated=False, but that is True",
        ),
        (
            Config,
            {
                "flexible": "all",
                "prefill": PrefillConfig(mixed_budget=8),
                "decode": DecodeConfig(stages=2),
            },
            "flexible='all': needs decode.stages=1, as mixed steps do, but that is 2",
        ),
        (
            Config,
            {
                "flexible": "all",
                "prefill": PrefillConfig(mixed_budget=8),
                "decode": DecodeConfig(page_size=8),
            },
            "flexible='all': needs decode.page_size to be None or kv.page_size=16, but that is 8",
        ),
        (
            Config,
            {
                "flexible": "decode",
                "prefill": PrefillConfig(mixed_budget=8),
                "decode": DecodeConfig(kv_dtype="int8"),
            },
            "flexible='decode': needs decode.kv_dtype to be None or 'float32', but that is 'int8'",
        ),
        (
            KVConfig,
            {"dtype": "int8"},
            "kv.dtype='int8': prefill attention reads no quantised pages; allowed are float32, "
            "bfloat16, and decode.kv_dtype='int8' for the decode side",
        ),
        (
            DecodeConfig,
            {"kv_dtype": "int4"},
            "decode.kv_dtype='int4': allowed are float32, bfloat16, int8, float8_e4m3fn",
        ),
        (
            Config,
            {"decode": DecodeConfig(kv_dtype="int8"), "colocated": True},
            "decode.page_size=None, decode.kv_dtype='int8': must be None with colocated=True, "
            "where both phases share a pool, and prefill attention reads no quantised pages",
        ),
        (
            Config,
            {
                "decode": DecodeConfig(kv_dtype="int8"),
                "handoff": HandoffConfig(wire_dtype="float8_e4m3fn"),
            },
            "handoff.wire_dtype='float8_e4m3fn': must be None or 'int8' with decode.kv_dtype="
            "'int8', whose pages travel with the scales that they keep",
        ),
        (
            Config,
            {
                "decode": DecodeConfig(kv_dtype="int8"),
                "handoff": HandoffConfig(give_back=True),
                "kv": KVConfig(prefix_cache=True),
            },
            "handoff.give_back=True: with handoff.wire_dtype=None, decode.kv_dtype='int8' rounded "
            "KV would come back; the former must be None, the latter None or the prefill side's",
        ),
        (
            Config,
            {"decode": DecodeConfig(page_size=24)},
            "decode.page_size=24: must divide kv.page_size=16 or be a multiple of it",
        ),
        (Config, {"seed": -1}, r"seed=-1: must be in \[0, 2\*\*32\)"),
        (Config, {"seed": 2**32}, r"seed=4294967296: must be in \[0, 2\*\*32\)"),
    ],
)
def test_constructions_say_what_is_allowed(kind, fields, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind(**fields)


@pytest.mark.parametrize(
    ("name", "value", "usual"),
    [
        ("streaming", False, True),
        ("layer_groups", 3, None),
        ("rebalance", True, False),
        ("wire_dtype", "int8", None),
        ("checksums", True, False),
        ("lease", None, 60.0),
        ("deadline", 5.0, 60.0),
        ("retries", 0, 1),
        ("reprefills", 0, 1),
        ("max_bytes_in_flight", 100, None),
    ],
)
def test_with_colocated_all_other_handoff_fields_are_defaults(name, value, usual):
    message = f"^handoff.{name}={value!r}: must be {usual!r} with colocated=True, where nothing"
    handoff = HandoffConfig(**{"after_tokens": 2, "stay_below": 9, name: value})
    with pytest.raises(ValueError, match=message):
        Config(colocated=True, handoff=handoff)
    assert Config(colocated=True, handoff=handoff.where_nothing_moves).handoff.after_tokens == 2
    assert Config(handoff=handoff).handoff == handoff


def test_giving_back_needs_two_pools():
    kept = {"kv.prefix_cache": True, "handoff.give_back": True}
    with pytest.raises(ValueError, match=r"^handoff.give_back=True: must be False with colocated="):
        load_config(Config(colocated=True), kept)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_configs(name):
    assert load_config(name) == PRESETS[name]()


CPU_FILE = "configs/smollm2_cpu.py"


@pytest.mark.parametrize("source", [*PRESETS, CPU_FILE])
def test_limits_of_a_config_are_for_its_own_model(source):
    own = load_config(source)
    assert own.model.max_model_len is not None
    other = load_config(source, {"model.source": "another"})
    assert other.model.max_model_len is None
    assert (other.prefill.page_buckets, other.decode.page_buckets) == (None, None)
    same = load_config(source, {"model.source": own.model.source, "model.dtype": "bfloat16"})
    assert same.model.max_model_len == own.model.max_model_len
    assert same.prefill.page_buckets == own.prefill.page_buckets


@pytest.mark.parametrize(
    "changes",
    [
        {"model.source": "another", "model.max_model_len": 64},
        {"model": {"max_model_len": 64, "source": "another"}},
    ],
)
def test_a_limit_that_is_asked_for_holds_for_any_model(changes):
    config = load_config("smollm2", changes)
    assert (config.model.source, config.model.max_model_len) == ("another", 64)
    changes = {"model.source": "another", "decode.page_buckets": (7, 9)}
    assert load_config(CPU_FILE, changes).decode.page_buckets == (7, 9)


def test_a_path_is_the_string_that_it_stands_for(tmp_path):
    config = load_config("smollm2", {"model.source": tmp_path, "compilation_cache": tmp_path})
    assert (config.model.source, config.compilation_cache) == (str(tmp_path), str(tmp_path))
    assert config.model.max_model_len is None  # another model than the preset's
    assert ModelConfig(source=tmp_path).source == str(tmp_path)
    with pytest.raises(ValueError, match=r"^decode\.rows=PosixPath\(.*: must be int$"):
        load_config("smollm2", {"decode.rows": tmp_path})


def test_a_model_that_is_given_whole_keeps_its_own_limit():
    model = ModelConfig(source="another", max_model_len=64)
    assert load_config("smollm2", {"model": model}).model == model


def test_devices_are_counted():
    config = Config(
        model=ModelConfig(),
        prefill=PrefillConfig(engines=2, tp=3),
        decode=DecodeConfig(engines=1, stages=2, tp=1),
    )
    assert config.devices == 8
    assert Config(colocated=True).devices == 1
