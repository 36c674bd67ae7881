"""Options: types, precedence of the three places, and errors a user can act on."""

import json

import pytest

from torchaccel.errors import OptionsError
from torchaccel.methods import FAMILIES
from torchaccel.options import resolve


def test_nothing_asked_is_exact():
    options = resolve(None, {})
    assert options.methods == () and options.requested() == {} and not options.strict


def test_a_name_and_a_dict_mean_the_same():
    by_name = resolve({"sparse_attention": "streaming_llm"}, {}).requested()
    by_dict = resolve({"sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 1024}}, {}).requested()
    assert by_name == by_dict


def test_aliases_resolve_to_the_method():
    assert resolve({"layer_skipping": "uls"}, {}).requested()["layer_skipping"]["method"] == "unified"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_compresion": "int8"}, r"kv_compresion.*did you mean 'kv_compression'"),
        ({"kv_compression": "int9"}, r"int9.*did you mean 'int8'"),
        ({"kv_compression": 8}, r"kv_compression .*must be a method's name.*found 8"),
        ({"sparse_attention": {"method": "streaming_llm", "windows": 8}}, r"windows.*did you mean 'window'"),
        ({"sparse_attention": {"method": "streaming_llm", "window": 0}}, r"sparse_attention\.window.*greater than or"),
        ({"sparse_attention": {"method": "streaming_llm", "window": "wide"}}, r"sparse_attention\.window.*'wide'"),
        ({"token_pruning": {"method": "fastv", "keep": 1.5}}, r"token_pruning\.keep.*less than or equal to 1"),
        ({"token_pruning": {"method": "fastv", "keep": float("nan")}}, r"token_pruning\.keep"),
        (
            {"layer_skipping": {"method": "unified", "target_speedup": 0.5}},
            r"target_speedup.*greater than or equal to 1",
        ),
        ({"preset": "exakt"}, r"exakt.*did you mean 'exact'"),
        ({"strict": "perhaps"}, r"strict must be true or false"),
        (["int8"], r"options must be a dict"),
    ],
)
def test_errors_name_the_key_and_what_is_allowed(options, message):
    with pytest.raises(OptionsError, match=message):
        resolve(options, {})


def test_call_wins_over_environment_wins_over_file(tmp_path):
    file = tmp_path / "torchaccel.toml"
    file.write_text('kv_compression = "int8"\nlayer_skipping = "unified"\nsparse_attention = "streaming_llm"\n')
    environment = {
        "TORCHACCEL_CONFIG": str(file),
        "TORCHACCEL_SPARSE_ATTENTION": json.dumps({"method": "streaming_llm", "window": 7}),
        "TORCHACCEL_LAYER_SKIPPING": "none",
    }
    options = resolve({"sparse_attention": {"method": "streaming_llm", "window": 9}}, environment)
    assert options.requested()["sparse_attention"]["window"] == 9
    assert options.sources["sparse_attention"] == "options"
    assert options.sources["kv_compression"] == str(file)
    assert options.sources["layer_skipping"] == "TORCHACCEL_LAYER_SKIPPING"
    assert "layer_skipping" not in options.requested()
    assert resolve(None, environment).requested()["sparse_attention"]["window"] == 7


def test_presets_give_way_to_named_options():
    assert resolve({"preset": "exact"}, {}).methods == ()
    options = resolve({"preset": "balanced"}, {})
    assert options.requested() == {"kv_compression": {"method": "int8"}}
    assert options.sources["kv_compression"] == "preset:balanced"
    assert resolve({"preset": "balanced", "kv_compression": None}, {}).methods == ()


@pytest.mark.parametrize("text", ["= nonsense", "unknown_key = 1"])
def test_a_bad_file_is_named(tmp_path, text):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(OptionsError, match=r"bad\.toml"):
        resolve(None, {"TORCHACCEL_CONFIG": str(file)})


def test_a_missing_file_is_named():
    with pytest.raises(OptionsError, match=r"nowhere\.toml"):
        resolve(None, {"TORCHACCEL_CONFIG": "nowhere.toml"})


def test_methods_rewrite_in_family_order():
    options = resolve({"sparse_attention": "streaming_llm", "kv_compression": "int8", "token_pruning": "fastv"}, {})
    assert [m.family for m in options.methods] == ["token_pruning", "kv_compression", "sparse_attention"]
    assert list(FAMILIES) == ["token_pruning", "layer_skipping", "kv_compression", "sparse_attention"]


def test_options_are_frozen():
    method = resolve({"kv_compression": "int8"}, {}).methods[0]
    with pytest.raises(Exception, match=r"frozen|no field"):
        method.options.bits = 4


def test_a_method_for_prompts_and_one_for_what_follows():
    both = resolve({"sparse_attention": {"prefill": "xattention", "decode": {"method": "streaming_llm"}}}, {})
    prompts, later = both.methods
    assert prompts.phases == {"prefill"} and later.phases == {"extend", "decode"}
    asked = both.requested()["sparse_attention"]
    assert [(entry["method"], entry.get("phase")) for entry in asked] == [
        ("xattention", None),
        ("streaming_llm", "decode"),
    ]
    assert resolve({"sparse_attention": asked}, {}).requested() == both.requested()
    assert resolve({"sparse_attention": ["xattention", "streaming_llm"]}, {}).methods[1].phases == {
        "prefill",
        "extend",
        "decode",
    }
    assert resolve({"sparse_attention": {"prefill": None, "decode": "none"}}, {}).methods == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prefil": "xattention"}, r"prefil.*did you mean 'prefill'"),
        ({"decode": "xattention"}, r"'xattention' in decode, where it reads everything; name it for prefill"),
        ({"prefill": "quest"}, r"'quest' in prefill, where it reads everything; name it for decode"),
        ({"method": "streaming_llm", "phase": "decoding"}, r"decoding.*did you mean 'decode'"),
        ({"prefill": 8}, r"must be a method's name.*found 8"),
    ],
)
def test_errors_of_phases(value, message):
    with pytest.raises(OptionsError, match=message):
        resolve({"sparse_attention": value}, {})
