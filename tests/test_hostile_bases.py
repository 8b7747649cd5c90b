"""What the files of a base may try, case by case: each is an error that names the file."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from fuzz.mutators import RAW, put_together, taken_apart
from helpers.arrays import read_arrays
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.tiny import write_llama, write_model
from safetensors.numpy import save_file

from adapters_jax.errors import BaseFileError, BaseMismatchError, UserError
from adapters_jax.finetune.base_files.huggingface import INDEX, read_json, read_tensors
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig, save_decoder
from adapters_jax.finetune.models.registry import family_of
from adapters_jax.finetune.pretrained.base_model import load_base_model
from adapters_jax.finetune.pretrained.decoder import load_pretrained_decoder
from adapters_jax.finetune.pretrained.encoder import load_encoder
from adapters_jax.finetune.pretrained.locate import read_tokenizer
from adapters_jax.finetune.pretrained.record import sha256_of

pytestmark = pytest.mark.hostile

FIXTURES = Path(__file__).parent / "fixtures"
BASES = [
    *("bert", "roberta", "distilbert", "electra", "modernbert", "deberta_v2", "deberta_v3"),
    *("vit", "dinov2", "clip", "gpt2"),
    *(f"decoders/{path.name}" for path in sorted((FIXTURES / "decoders").iterdir())),
]
FILE = "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def base(tmp_path):
    """A copy of the tiny Llama, to be damaged."""
    return Path(shutil.copytree(FIXTURES / "llama", tmp_path / "base"))


def fails(base, name, *data, kind=BaseFileError):
    """Loading raises an error that names a file and the data, shortly and in plain text."""
    with raises(kind, base / name, *data) as caught:
        load_base_model(str(base))
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isprintable()


def rewrite(base, change):
    tensors = read_arrays(base)
    change(tensors)
    save_file(tensors, base / FILE)


def shard(base):
    """Splits the file into two shards and an index, which is returned."""
    tensors = read_arrays(base)
    (base / FILE).unlink()
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: x for n, x in tensors.items() if files[n] == file}, base / file)
    (base / INDEX).write_text(json.dumps({"weight_map": files}))
    return files


@pytest.mark.parametrize("data", [*RAW, b"[" * 100_000], ids=range(len(RAW) + 1))
def test_bad_json_is_an_error(base, data):
    (base / "config.json").write_bytes(data)
    fails(base, "config.json")
    (base / "config.json").write_bytes((FIXTURES / "llama" / "config.json").read_bytes())
    (base / INDEX).write_bytes(data)
    fails(base, INDEX)


def test_large_numbers_of_transformers_are_read_and_larger_files_are_not(base):
    text = '{"model_max_length": 1000000000000000019884624838656}'
    (base / "config.json").write_text(text + " " * (2**22 - len(text)))
    assert read_json(base / "config.json") == {"model_max_length": 1000000000000000019884624838656}
    (base / "config.json").write_text(text + " " * (2**22 + 1 - len(text)))
    with raises(BaseFileError, base / "config.json", 2**22 + 1, 2**22):
        read_json(base / "config.json")


JUNK = (
    *(None, True, -1, 0, 3, 2**30, 2**40, 10**39, 1e308, 1e-320, 0.5, "", "abc", [], [[]], {}),
    *(["abc"], [1, 2, 3], {"a": 1}, {"rope_type": "yarn"}),
)
MORE = (
    *("rope_scaling", "rope_parameters", "layer_types", "no_rope_layers", "sliding_window"),
    *("vision_config", "mlp_ratio", "sliding_window_pattern", "partial_rotary_factor"),
    *("query_pre_attn_scalar", "no_rope_layer_interval", "max_window_layers"),
)


@pytest.mark.parametrize("name", BASES)
def test_junk_in_a_configuration_is_our_error_or_a_configuration(name):
    values = json.loads((FIXTURES / name / "config.json").read_text())
    family, outcomes = family_of(values, name), {True: 0, False: 0}
    for key in dict.fromkeys([*values, *MORE]):
        for junk in JUNK if key != "model_type" else ():
            try:
                config = family.config.from_dict({**values, key: junk})
            except UserError:
                config = None
            assert config is None or config.num_layers <= 1_000
            outcomes[config is not None] += 1
    assert min(outcomes.values()) > 5, outcomes


def edited(base, **values):
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(json.dumps(json.loads(text) | values))


@pytest.mark.parametrize(
    ("values", "data"),
    [
        ({"num_hidden_layers": 2**40}, (2**40,)),
        ({"num_hidden_layers": 1_001}, (1_001, 1_000)),
        ({"hidden_size": -16}, ("hidden_size=-16",)),
        ({"hidden_size": "16"}, ("hidden_size='16'",)),
        ({"rms_norm_eps": "x"}, ("rms_norm_eps='x'", "finite")),
        ({"vocab_size": 2**33}, (2**33,)),
        ({"hidden_act": "silo"}, ("'silo'", "nearest: 'silu'")),
        ({"quantization_config": {"bits": 4}}, ("quantization_config={'bits': 4}",)),
        ({"partial_rotary_factor": 1e308}, ()),
    ],
)
def test_settings_out_of_range_or_unsupported_are_named(base, values, data):
    edited(base, model_type="phi3" if "partial_rotary_factor" in values else "llama", **values)
    fails(base, "config.json", *data)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_more_layers_than_tensors_build_nothing(tmp_path, name):
    base = Path(shutil.copytree(FIXTURES / name, tmp_path / "base"))
    edited(base, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 999})
    with raises(BaseMismatchError, 999):
        load_base_model(str(base))


def entry_edit(name=NORM, new=None, **fields):
    """Changes one entry of the header, or its name."""

    def edit(data):
        entries, body = taken_apart(data)
        at = [key for key, _ in entries].index(name)
        entries[at] = (new if new is not None else name, {**entries[at][1], **fields})
        return put_together(entries, body)

    return edit


def twice(data):
    entries, body = taken_apart(data)
    return put_together([*entries, entries[0]], body)


def with_number(bits):
    def edit(data):
        entries, body = taken_apart(data)
        start, _ = dict(entries)[NORM]["data_offsets"]
        return put_together(entries, body[:start] + bits + body[start + len(bits) :])

    return edit


BAD_TENSORS = {  # the edit, and the data in the message
    "cut": (lambda d: d[:-3], "end at byte"),
    "empty": (lambda d: b"", 0),
    "more data": (lambda d: d + b"x", "end at byte"),
    "a huge header": (lambda d: struct.pack("<Q", 2**63) + d[8:], 2**63),
    "twice": (twice, "duplicate key"),
    "a shape of petabytes": (entry_edit(shape=[2**30, 2**30]), NORM, [2**30, 2**30]),
    "huge offsets": (entry_edit(data_offsets=[2**62, 2**62 + 128]), "hole"),
    "a name that goes up": (entry_edit(new="../../etc/passwd"), "'../../etc/passwd'"),
    "an unknown dtype": (entry_edit(dtype="F4"), "'F4'"),
    "NaN": (with_number(b"\0\0\xc0\x7f"), NORM, "finite"),
    "infinity": (with_number(b"\0\0\x80\xff"), NORM, "finite"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors_are_an_error(base, kind):
    edit, *data = BAD_TENSORS[kind]
    (base / FILE).write_bytes(edit((base / FILE).read_bytes()))
    fails(base, FILE, *data)


def test_missing_extra_and_misshaped_tensors_and_integers_are_named(base):
    def damage(tensors):
        del tensors[NORM]
        tensors["model.extra"] = np.ones(3, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]

    rewrite(base, damage)
    with raises(BaseMismatchError, "norm.weight", "extra", "lm_head.weight"):
        load_base_model(str(base))
    shutil.copy(FIXTURES / "llama" / FILE, base / FILE)
    rewrite(base, lambda tensors: tensors.update({NORM: tensors[NORM].astype(np.int32)}))
    with raises(BaseMismatchError, "norm.weight", "int32"):
        load_base_model(str(base))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_numbers_that_are_not_finite_are_found_in_every_dtype_and_place(tmp_path, dtype):
    for place in (0, 65_535, 65_536, 6999):
        for number in (np.nan, -np.inf):
            array = np.ones(70_000, dtype)
            array[place] = number
            save_file({"a": array, "b": np.ones(3, dtype)}, tmp_path / FILE)
            tensors = read_tensors(tmp_path)
            np.asarray(tensors["b"])
            with raises(BaseFileError, tmp_path / FILE, " a"):
                np.asarray(tensors["a"])


@pytest.mark.parametrize(
    ("change", "data"),
    [
        (lambda files: {}, ["weight_map"]),
        (lambda files: [1], ["weight_map=[1]"]),
        (lambda files: None, ["weight_map=None"]),
        (lambda files: {**files, NORM: 5}, [NORM, 5]),
        (lambda files: {**files, NORM: "a\0.safetensors"}, [NORM]),
        (lambda files: {**files, NORM: f"../other/{FILE}"}, [NORM, f"../other/{FILE}"]),
        (lambda files: {**files, NORM: "/etc/passwd"}, [NORM, "/etc/passwd"]),
        (lambda files: {**files, NORM: "C:\\a.safetensors"}, [NORM, "C:"]),
        (lambda files: {**files, NORM: "pytorch_model.bin"}, [NORM, "pytorch_model.bin"]),
        (lambda files: {**files, "model.gone": "part-0.safetensors"}, ["model.gone", "part-0"]),
    ],
)
def test_a_bad_index_is_an_error(base, change, data):
    files = shard(base)
    (base / INDEX).write_text(json.dumps({"weight_map": change(files)}))
    fails(base, INDEX, *data)
    (base / INDEX).write_text("{}")
    fails(base, INDEX, "weight_map")


def test_a_tensor_in_two_shards_is_an_error(base):
    files = shard(base)
    other = base / f"part-{1 - int(files[NORM][5])}.safetensors"
    tensors = {name: np.asarray(x) for name, x in read_tensors(base).items()}
    own = {name: x for name, x in tensors.items() if files[name] == other.name or name == NORM}
    save_file(own, other)
    with raises(BaseFileError, NORM, "part-0.safetensors", "part-1.safetensors"):
        load_base_model(str(base))


@pytest.mark.parametrize("name", ["config.json", FILE])
def test_links_out_of_the_directory_and_pipes_are_errors(base, name):
    shutil.move(base / name, base.parent / name)
    (base / name).symlink_to(f"../{name}")
    fails(base, name, base.parent / name)
    (base / name).unlink()
    (base / "real").mkdir()
    shutil.move(base.parent / name, base / "real" / name)
    (base / name).symlink_to(f"real/{name}")
    load_base_model(str(base))
    if name == FILE:
        (base / "extra.safetensors").symlink_to("/dev/zero")
        with raises(BaseFileError, base / "extra.safetensors", "/dev/zero"):
            sha256_of(base)


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(base):
    repository = base.parent / "hub" / "models--me--tiny"
    snapshot, blobs = repository / "snapshots" / ("c" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for digest, name in (("a" * 40, "config.json"), ("b" * 64, FILE)):
        (base / name).rename(blobs / digest)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    assert load_base_model(str(snapshot)).kind == "decoder"
    (blobs / ("b" * 64)).rename(blobs / "passwords")
    (snapshot / FILE).unlink()
    (snapshot / FILE).symlink_to("../../blobs/passwords")
    fails(snapshot, FILE, blobs / "passwords")


def test_a_tokenizer_is_an_ordinary_file_with_a_tokenizer(base):
    (base / "tokenizer.json").write_text("[" * 100_000)
    with raises(BaseFileError, base / "tokenizer.json"):
        read_tokenizer(base)
    shutil.copy(write_llama(base.parent / "llama") / "tokenizer.json", base)
    words = json.loads((base / "tokenizer.json").read_text())
    words["model"]["unk_token"] = "<none>"
    (base / "tokenizer.json").write_text(json.dumps(words))
    with raises(BaseFileError, base / "tokenizer.json", "<none>"):
        read_tokenizer(base)
    (base / "tokenizer.json").unlink()
    os.mkfifo(base.parent / "pipe")
    (base / "tokenizer.json").symlink_to("../pipe")
    with raises(BaseFileError, base):
        read_tokenizer(base)


@pytest.mark.parametrize(
    ("number", "added", "fails"),
    [(0, False, True), (9_999_999, False, True), (0, True, False)],
)
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_tokens_without_a_row_in_the_embedding_are_named(tmp_path, kind, number, added, fails):
    base = (write_llama if kind == "decoder" else write_model)(tmp_path / "base")
    words = json.loads((base / "tokenizer.json").read_text())
    size = len(words["model"]["vocab"])
    if added:  # right behind the others, as a token for padding
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        new = {"id": size, "content": "<odd>", "special": True, **flags}
        words["added_tokens"] = [*words["added_tokens"], new]
    else:
        words["model"]["vocab"]["<odd>"] = max(number, size)
    (base / "tokenizer.json").write_text(json.dumps(words))
    load = load_pretrained_decoder if kind == "decoder" else load_encoder
    if not fails:
        assert load(str(base)).tokenizer.token_to_id("<odd>") == size
        return
    with raises(BaseFileError, base, "'<odd>'", size):
        load(str(base))


@pytest.mark.parametrize(
    ("file", "content", "data"),
    [
        ("tokenizer_config.json", '{"eos_token": NaN}', ["NaN"]),
        ("tokenizer_config.json", '{"eos_token": 5}', ["eos_token=5"]),
        ("tokenizer_config.json", '{"eos_token": {"content": [1]}}', ["eos_token={'content'"]),
        ("tokenizer_config.json", '{"chat_template": 5}', ["chat_template=5"]),
        ("tokenizer_config.json", '{"chat_template": [5]}', ["chat_template=[5]"]),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "default", "template": 5}]}',
            ["chat_template=[{"],
        ),
        ("chat_template.jinja", " " * (2**20 + 1), [2**20 + 1, 2**20]),
        ("chat_template.jinja", b"\xff", ["0xff"]),
    ],
)
def test_bad_files_of_a_tokenizer_are_errors(tmp_path, file, content, data):
    base = write_llama(tmp_path / "base")
    (base / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with raises(BaseFileError, base / file, *data):
        load_pretrained_decoder(str(base))


LOAD = """
import sys
import jax
from flax import nnx
from adapters_jax.finetune.models.decoder import load_decoder

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

load_decoder(sys.argv[2])  # what jax allocates once
before = status("VmRSS")
_, model = load_decoder(sys.argv[1])
size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(jax.block_until_ready(model))))
print(size, (status("VmHWM") - before) / size)
"""


@pytest.mark.weekly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_sharded_base_takes_at_most_1_2_times_its_bytes_of_memory(tmp_path):
    tiny = FIXTURES / "llama"
    values = json.loads((tiny / "config.json").read_text())
    sizes = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    config = DecoderConfig.from_dict(values | sizes | heads | {"num_hidden_layers": 4})
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))  # numbers take long to draw
    nnx.update(model, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), nnx.state(model)))
    base = tmp_path / "base"
    base.mkdir()
    save_decoder(base, config, model)
    shard(base)
    made = subprocess.run(
        [sys.executable, "-c", LOAD, base, tiny], check=True, capture_output=True, text=True
    )
    size, ratio = map(float, made.stdout.split())
    assert size > 300e6
    assert 0.9 < ratio < 1.2


def test_a_million_empty_tensors_are_refused_before_they_are_read(tmp_path):
    entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    header = ("{" + ",".join(entry.format(f"t{i}") for i in range(10**6)) + "}").encode()
    (tmp_path / FILE).write_bytes(struct.pack("<Q", len(header)) + header)
    tracemalloc.start()
    try:
        with raises(BaseFileError, tmp_path / FILE, len(header), (len(header) + 8) // 32):
            read_tensors(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


def test_a_command_says_it_in_one_line(base, capsys):
    (base / "config.json").write_text('{"model_type": "llama", "vocab_size": NaN}')
    with command_raises(BaseFileError, base / "config.json", "NaN"):
        assert main(["audit", "--model", str(base)]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "Traceback" not in captured.err
