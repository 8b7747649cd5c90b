"""GGUF: weights, tokenizer and chat of a tiny file, errors for wrong files, and a real model."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.errors import raises
from test_decoder_model import TINY, build

from adapters_jax.errors import MismatchError, MissingPackageError, UserError
from adapters_jax.finetune.base_files import chat
from adapters_jax.finetune.base_files.gguf import read_gguf
from adapters_jax.finetune.gguf import find_gguf
from adapters_jax.finetune.gguf.tensors import half_split
from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.finetune.pretrained.assets import cached

WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext2" / "test.txt"
TOKENS = [
    "<|end|>",
    "<|user|>",
    *"ab12.Ġ",
    "Ġa",
    "ab",
    "12",
    "Ġab",
    "Ċ",
    "c",
    "d",
    "e",
    "f",
    "g",
    "h",
]
MERGES = ["Ġ a", "a b", "1 2", "Ġa b"]
CONFIG = replace(TINY, intermediate_size=32, rope_theta=500.0, rms_norm_eps=1e-5)
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|user|>{% endif %}"
FIELDS = {
    "llama.vocab_size": 20,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 32,
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 4,
    "llama.rope.freq_base": 500.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
}
NAMES_THERE = {
    "embeddings/embedding": "token_embd",
    "norm/scale": "output_norm",
    "head/kernel": "output",
    "layers/0/attention_norm/scale": "blk.0.attn_norm",
    "layers/0/mlp_norm/scale": "blk.0.ffn_norm",
    "layers/0/attention/query/kernel": "blk.0.attn_q",
    "layers/0/attention/key/kernel": "blk.0.attn_k",
    "layers/0/attention/value/kernel": "blk.0.attn_v",
    "layers/0/attention/output/kernel": "blk.0.attn_output",
    "layers/0/mlp/gate/kernel": "blk.0.ffn_gate",
    "layers/0/mlp/up/kernel": "blk.0.ffn_up",
    "layers/0/mlp/output/kernel": "blk.0.ffn_down",
}


def interleaved(weight, width=4):
    """Rows as llama.cpp has them: of each head 0, half, 1, half + 1, ..."""
    heads = range(0, len(weight), width)
    order = [
        head + i + half for head in heads for i in range(width // 2) for half in (0, width // 2)
    ]
    return weight[order]


def q4_1(rows):
    """Rows of 32 weights in blocks: a scale, a minimum, then 16 bytes of two weights each."""
    digits = np.round((rows + 2) * 4).astype(np.uint8)  # scale 1/4, minimum -2
    packed = digits[:, :16] | digits[:, 16:] << 4
    head = np.tile(np.array([0.25, -2], np.float16).view(np.uint8), (len(rows), 1))
    return np.concatenate([head, packed], axis=1)


def tensors_of(model):
    """The model's weights as a file has them, `ffn_down` in steps of 1/4 that Q4_1 can hold."""
    down = model.layers[0].mlp.output.kernel
    down[...] = jnp.clip(jnp.round(down[...] * 8), -8, 7) / 4
    found = {}
    for path, name in NAMES_THERE.items():
        node = model
        for part in path.split("/"):
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        weight = np.array(node[...].T if path.endswith("kernel") else node[...], order="C")
        found[f"{name}.weight"] = interleaved(weight) if name[-2:] in ("_q", "_k") else weight
    return found


def write(path, tensors, architecture="llama", **changes):
    """A GGUF file; a field that is changed to None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    for name, value in (FIELDS | changes).items():
        if value is not None:
            adders[type(value)](name, value)
    for name, weight in tensors.items():
        if name.endswith("ffn_down.weight"):
            writer.add_tensor(name, q4_1(weight), raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def tensors(model):
    return tensors_of(model)


@pytest.fixture
def file(tensors, tmp_path):
    return write(tmp_path / "tiny.gguf", tensors)


def test_a_file_is_the_model_it_was_written_from(model, file, tensors):
    config, loaded = load_decoder(file)
    assert replace(config, rms_norm_eps=1e-5, head_dim=None) == CONFIG
    assert config.rms_norm_eps == pytest.approx(1e-5)
    expected, got = nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(loaded))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    query = read_gguf(file).tensors()["model.layers.0.self_attn.q_proj.weight"]
    assert np.abs(query - tensors["blk.0.attn_q.weight"]).max() > 0.1
    stored = read_gguf(file).tensors().values()
    assert {np.asarray(tensor).dtype for tensor in stored} == {np.dtype("float32")}
    assert all(np.asarray(tensor).shape == tensor.shape for tensor in stored)


def test_a_directory_with_one_file_and_an_open_file_load_alike(model, file):
    for source in (file.parent, read_gguf(file)):
        _, loaded = load_decoder(source, param_dtype=jnp.bfloat16)
        kernel = loaded.layers[0].mlp.output.kernel[...]
        np.testing.assert_array_equal(kernel, model.layers[0].mlp.output.kernel[...])
    (file.parent / "config.json").write_text("{}")
    assert find_gguf(file.parent) is None
    (file.parent / "config.json").unlink()
    (file.parent / "other.gguf").write_bytes(b"")
    with raises(UserError, file.parent, "other.gguf, tiny.gguf"):
        load_decoder(file.parent)


def test_without_an_output_the_embeddings_are_tied(tensors, tmp_path):
    rest = {name: weight for name, weight in tensors.items() if name != "output.weight"}
    config, loaded = load_decoder(write(tmp_path / "tied.gguf", rest))
    assert config.tie_word_embeddings
    assert not hasattr(loaded, "head")


def test_the_tokenizer_cuts_digits_then_merges(file):
    tokenizer = read_gguf(file).tokenizer()
    encoded = tokenizer.encode("<|user|>ab ab.12 1<|end|>")
    expected = ["<|user|>", "ab", "Ġab", ".", "1", "2", "Ġ", "1", "<|end|>"]
    assert encoded.tokens == expected
    assert encoded.ids == [TOKENS.index(token) for token in expected]
    assert tokenizer.decode(encoded.ids) == "ab ab.12 1"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False).startswith("<|user|>ab")


def test_special_tokens_and_chat(file):
    opened = read_gguf(file)
    assert opened.special_tokens == {"eos": 0}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert opened.chat(messages) == "<|user|>a<|end|><|user|>b<|end|><|user|>"
    assert opened.chat(messages, reply=False) == "<|user|>a<|end|><|user|>b<|end|>"


@pytest.mark.parametrize(
    ("template", "datum"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + messages[0]['name'] }}", "'name'"),
        ("{{ messages[0]['role'] + 1 }}", "int"),
        ("{% for %}", "end of statement block"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ messages.append(1) }}", "append"),
    ],
)
def test_a_template_that_cannot_render_raises_an_error_with_the_cause(template, datum):
    with raises(UserError, "chat template", datum):
        chat.render(template, [{"role": "user", "content": "a"}])


def test_templates_are_rendered_as_in_transformers():
    """Blocks leave no blank line and no indentation, and loops may break."""
    lines = ["{% for m in messages %}", "  {% if loop.index == 3 %}", "    {% break %}"]
    lines += ["  {% endif %}", "<{{ m.role }}> {{ m.content }}", "{% endfor %}", "end"]
    messages = [{"role": "user", "content": text} for text in "abc"]
    assert chat.render("\n".join(lines), messages) == "<user> a\n<user> b\nend"


def test_a_chat_needs_a_message():
    with raises(UserError, "[{'role': 'user', 'content': '...'}]"):
        chat.render(TEMPLATE, [])


@pytest.mark.parametrize(
    ("architecture", "changes", "data"),
    [
        ("t5", {}, ["wrong.gguf", "general.architecture='t5'", "'llama'", "'qwen3moe'"]),
        (
            "llama",
            {"llama.rope.scaling.type": "ntk"},
            ["wrong.gguf", "rope.scaling.type='ntk'", "'yarn'"],
        ),
        (
            "llama",
            {"llama.logit_scale": 2.0, "llama.attention.causal": 0, "llama.clamp": 8},
            ["wrong.gguf", "llama.logit_scale=2.0", "llama.clamp=8"],
        ),
        (
            "llama",
            {"llama.block_count": None, "llama.embedding_length": None},
            ["wrong.gguf", "llama.embedding_length, llama.block_count"],
        ),
        ("llama", {"llama.embedding_length": "16"}, ["wrong.gguf", "hidden_size='16'"]),
        ("llama", {"llama.block_count": 2**31 - 1}, ["wrong.gguf", 2**31 - 1]),
        ("llama", {"llama.attention.head_count": 0}, ["num_attention_heads=0"]),
        ("llama", {"llama.attention.head_count": [4, 4]}, ["num_attention_heads=[4, 4]"]),
        ("llama", {"llama.attention.value_length": 8}, ["wrong.gguf", 8, 4]),
        ("llama", {"llama.attention.head_count": 5}, ["5 attention heads", "2 key"]),
    ],
)
def test_unsupported_files_raise_an_error_that_names_the_fields(
    tmp_path, tensors, architecture, changes, data
):
    path = write(tmp_path / "wrong.gguf", tensors, architecture, **changes)
    with raises(UserError, *data):
        load_decoder(path)


@pytest.mark.parametrize(
    ("changes", "data"),
    [
        ({"tokenizer.ggml.model": "llama"}, ["tokenizer.ggml.model='llama'", "'gpt2'"]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, ["tokenizer.ggml.pre='llama-bpe'", "'smollm'"]),
        ({"tokenizer.ggml.add_bos_token": True}, ["tokenizer.ggml.add_bos_token=True", "False"]),
        ({"tokenizer.ggml.merges": None}, ["tokenizer.ggml.merges"]),
        ({"tokenizer.ggml.token_type": [3]}, ["zip"]),
        ({"tokenizer.ggml.merges": ["x y"]}, ["'x y'"]),
    ],
)
def test_unsupported_tokenizers_raise_an_error_that_names_the_fields(
    tmp_path, tensors, changes, data
):
    path = write(tmp_path / "other.gguf", tensors, **changes)
    with raises(UserError, path, *data):
        read_gguf(path).tokenizer()


def test_a_file_without_a_chat_template_raises(tmp_path, tensors):
    path = write(tmp_path / "base.gguf", tensors, **{"tokenizer.chat_template": None})
    with raises(UserError, path, "tokenizer.chat_template"):
        read_gguf(path).chat([{"role": "user", "content": "a"}])


def test_tensors_of_another_shape_or_name_are_named(tmp_path, tensors):
    changed = tensors | {"strange.weight": np.ones(2, np.float32)}
    changed["blk.0.attn_q.weight"] = changed["blk.0.attn_q.weight"][:8]
    name = "layers.0.self_attn.q_proj.weight"
    with raises(MismatchError, "1 unexpected", "strange.weight", name, [8, 16], [16, 16]):
        load_decoder(write(tmp_path / "odd.gguf", changed))
    for rows in (7, 6):
        with raises(UserError, "blk.0.attn_q", rows, 2):
            half_split(np.ones((rows, 16)), heads=2, name="blk.0.attn_q")


def test_a_file_cut_short_or_of_another_kind_is_damaged(file):
    whole = file.read_bytes()
    for cut in (0, 3, 8, 23, 40, 200, 700, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:cut])
        with raises(UserError, file):
            read_gguf(file)
    file.write_bytes(json.dumps({"not": "a model"} | dict.fromkeys(map(str, range(40)))).encode())
    with raises(UserError, file, "GGUF magic"):
        read_gguf(file)


def test_a_field_that_is_not_utf8_is_damage(file):
    file.write_bytes(file.read_bytes().replace(b"smollm", b"sm\xffllm"))
    with raises(UserError, file, "utf-8"):
        read_gguf(file)


def test_weights_that_are_no_floats_are_named(tmp_path, tensors):
    integers = tensors | {"output_norm.weight": np.ones(16, np.int32)}
    with raises(UserError, "output_norm.weight", "I32"):
        load_decoder(write(tmp_path / "integers.gguf", integers))


def test_an_absent_file_and_an_absent_package(file, monkeypatch):
    with raises(UserError, "'no.gguf'"):
        load_decoder("no.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with raises(MissingPackageError, file.name, "gguf", "[finetune]'"):
        read_gguf(file)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with raises(MissingPackageError, "jinja2", "[finetune]'"):
        chat.render(TEMPLATE, [{"role": "user", "content": "a"}])


@pytest.mark.weekly
@pytest.mark.usefixtures("optimized")
def test_smollm2_reads_wikitext_as_well_as_it_should():
    directory = cached("smollm2-135m")
    if directory is None or not WIKITEXT.is_file():
        pytest.skip("SmolLM2 is not in the cache, or WikiText-2 is not beside the project")
    opened = read_gguf(directory)
    tokenizer, text = opened.tokenizer(), WIKITEXT.read_text(encoding="utf-8")[1000:9000]
    tokens = tokenizer.encode(text).ids
    assert tokenizer.decode(tokens) == text
    _, model = load_decoder(opened)

    @nnx.jit
    def perplexity(model, ids):
        chosen = jax.nn.log_softmax(model(ids)[:, :-1])
        return jnp.exp(-jnp.take_along_axis(chosen, ids[:, 1:, None], axis=-1).mean())

    assert perplexity(model, jnp.array([tokens[:1024]])) == pytest.approx(14.57, rel=0.01)
