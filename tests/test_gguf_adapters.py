"""LoRA in GGUF: the changes are those of PEFT's files, in each family's order of rows."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.arrays import read_arrays
from helpers.errors import raises
from helpers.finished import decoder_run
from safetensors.numpy import load_file
from test_gguf_families import CARRIED, FIXTURES, NAMES, tensors_of, values_of

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError, BaseFileError
from adapters_jax.files import names
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.formats import FORMATS
from adapters_jax.finetune.formats.base import Adapter, changes
from adapters_jax.finetune.formats.gguf import ADAPTER
from adapters_jax.finetune.pretrained.base_model import load_base_model


@pytest.fixture(autouse=True)
def names_of_transformers_4(monkeypatch):
    """PEFT's files name modules as checkpoints do, whichever transformers is installed."""
    monkeypatch.setattr(names, "installed", lambda: 4)


def drawn(base, wanted=lambda path: True, rank=2):
    """Random factors of every weight in the layers that is no expert's, and their recipe."""
    draw = np.random.default_rng(0).normal
    leaves, paths = {}, []
    for path, leaf in base.flat({}).items():
        module, _, name = path.rpartition("/")
        if name in ("kernel", "embedding") and leaf.ndim == 2 and wanted(path):
            paths.append(module)
            a, b = (leaf.shape[0], rank), (rank, leaf.shape[1])
            leaves |= {
                f"{module}/lora/{k}": draw(0, 0.2, shape).astype(np.float32)
                for k, shape in (("a", a), ("b", b))
            }
    return aj.Recipe(aj.LoRA(tuple(paths), rank, alpha=3.0, a_init="uniform")), leaves


def merged(directory, stored):
    """The base's tensors by Hugging Face's names, with the changes that PEFT's files make."""
    tensors, found = load_file(directory / "adapter_model.safetensors"), dict(stored)
    for key, a in tensors.items():
        name, _, end = key.removeprefix("base_model.model.").rpartition(".lora_")
        if not end.removesuffix(".weight").endswith("A"):
            continue
        b = tensors[key.replace("_A", "_B")]
        change = 1.5 * b @ a  # alpha / r of `drawn`
        own = f"{name}.weight"
        found[own] = stored[own] + (change.T if end == "embedding_A" else change)
    return found


def written(directory, base, *adapter):
    """An adapter in both formats; returns its changes, the base's tensors without and with them."""
    for to in ("gguf", "peft"):
        FORMATS[to].write(directory / to, Adapter(*adapter), base)
    found, fields = read_pairs(directory / "gguf" / ADAPTER)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    name = Path(base.name).name
    assert fields["general.architecture"] == NAMES.get(name, name)
    values, stored = values_of(name), read_arrays(FIXTURES / name)
    every = stored, merged(directory / "peft", stored)
    return found, *(tensors_of(name, values, tensors) for tensors in every)


def same(found, before, after):
    """Asserts that changes are the differences of weights, and that no other weight differs."""
    assert found.keys() == {own for own in after if not np.array_equal(after[own], before[own])}
    for own, change in found.items():
        np.testing.assert_allclose(change, after[own] - before[own], rtol=0, atol=2e-6)
        assert np.abs(change).max() > 0.01


def read_pairs(path):
    """The changes of a file by weight, computed as llama.cpp does, and its fields."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    alpha, found = fields["adapter.lora.alpha"], {}
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = alpha / b.shape[1]
        found[name] = scale * ((a @ b.T) if name.startswith("token_embd") else (b @ a))
    return found, fields


def outside_experts(path):
    return path.startswith("layers/") and "experts" not in path


@pytest.mark.witness("llama", "gemma3_text", "qwen3_moe", "phi3", "cohere", "starcoder2")
@pytest.mark.parametrize("name", sorted(CARRIED))
def test_a_files_changes_are_those_of_the_weights_and_it_reads_back(name, tmp_path):
    base = load_base_model(str(FIXTURES / name))
    recipe, leaves = drawn(base, outside_experts)
    same(*written(tmp_path, base, recipe, leaves))
    again = FORMATS["gguf"].read(tmp_path / "gguf", base)
    if name not in ("phi3", "glm4"):  # whose parts of a fused weight get one A of all their ranks
        assert changes((recipe, leaves), again) == []
    FORMATS["gguf"].write(tmp_path / "again", Adapter(*again), base)
    one, other = (tmp_path / where / ADAPTER for where in ("gguf", "again"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("gemma3", "gemma3"),
        ("qwen2_vl", "qwen2vl"),
        ("qwen2_5_vl", "qwen2vl"),
        ("qwen3_vl", "qwen3vl"),
    ],
)
def test_of_a_multimodal_checkpoint_it_is_the_language_models(name, architecture, tmp_path):
    base = load_base_model(str(FIXTURES.parent / "towers" / name))
    adapter = drawn(base, outside_experts)
    assert FORMATS["gguf"].problems(Adapter(*adapter), base) == []
    for to in ("gguf", "peft"):
        FORMATS[to].write(tmp_path / to, Adapter(*adapter), base)
    found, fields = read_pairs(tmp_path / "gguf" / ADAPTER)
    assert fields["general.architecture"] == architecture
    kind = next(k for k, x in gguf.MODEL_ARCH_NAMES.items() if x == architecture)
    theirs = gguf.get_tensor_name_map(kind, 3)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    expected = {}
    for key in (key for key in tensors if key.endswith("_A.weight")):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        own = theirs.get_name(f"{module.replace('language_model.', '')}.weight", (".weight",))
        expected[own] = 1.5 * tensors[key.replace("_A", "_B")] @ tensors[key]
    assert expected.keys() == found.keys() and len(found) == 3 * 7
    for own, change in expected.items():
        assert np.abs(change).max() > 0.01
        np.testing.assert_allclose(found[own], change, atol=2e-6)
    assert changes(adapter, FORMATS["gguf"].read(tmp_path / "gguf", base)) == []


def test_an_embedding_and_an_output_layer_of_their_own_are_written(tmp_path):
    base = load_base_model(str(FIXTURES / "mistral"))
    recipe, leaves = drawn(base, lambda path: not path.startswith("layers/"))
    found, before, after = written(tmp_path, base, recipe, leaves)
    assert found.keys() == {"token_embd.weight", "output.weight"}
    same(found, before, after)
    assert changes((recipe, leaves), FORMATS["gguf"].read(tmp_path / "gguf", base)) == []


def test_an_invocation_goes_to_llama_cpp_and_back(tmp_path):
    base = load_base_model(str(FIXTURES / "mistral"))
    recipe, leaves = drawn(base, outside_experts)
    (lora,) = recipe.attached
    activated = aj.ActivatedLoRA(lora.targets, 2, 3.0, a_init="uniform", invocation=(5, 17))
    FORMATS["gguf"].write(tmp_path, Adapter(aj.Recipe(activated), leaves), base)
    field = gguf.GGUFReader(tmp_path / ADAPTER).get_field("adapter.alora.invocation_tokens")
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert field.contents() == [5, 17]
    found, again = FORMATS["gguf"].read(tmp_path, base)
    (method,) = found.attached
    assert type(method) is aj.ActivatedLoRA and method.invocation == (5, 17)
    assert changes((aj.Recipe(activated), leaves), (found, again)) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        decoder_run()
        assert main(["convert", "runs/meanings", "there", "--to", "gguf"]) == 0
    return folder


@pytest.mark.slow
def test_a_run_goes_to_gguf_and_back(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(folder)
    words = ["--to", "native", "--model", "llama", "--json"]
    for source in ("there", f"there/{ADAPTER}"):
        back = tmp_path / source.replace("/", "-")
        assert main(["convert", source, str(back), *words]) == 0
        assert json.loads(capsys.readouterr().out)["from"] == "gguf"
        before, after = (aj.read_adapter(path)[1] for path in ("runs/meanings/adapter", back))
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[path], after[path]) for path in before)
    assert ADAPTER in Path("there/README.md").read_text()


def test_a_tied_embedding_and_an_unknown_base_are_refused(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    base = load_base_model("llama")
    recipe, leaves = drawn(base, lambda path: "embedding" in path)
    with raises(aj.UserError, "llama.cpp", "embed_tokens", "adapters-jax merge"):
        FORMATS["gguf"].write(tmp_path / "out", Adapter(recipe, leaves), base)
    assert len(FORMATS["gguf"].problems(Adapter(recipe, leaves), base)) == 1
    gpt2 = load_base_model(str(FIXTURES / "gpt2"))
    recipe, leaves = drawn(gpt2, outside_experts)
    with raises(aj.UserError, "gpt2", "--to peft"):
        FORMATS["gguf"].write(tmp_path / "out", Adapter(recipe, leaves), gpt2)


def edited(path, fields=(), tensors=(), architecture="llama"):
    """A small file of an adapter, with other fields and tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in ({"general.type": "adapter", "adapter.type": "lora"} | dict(fields)).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(name, value)
    for name, shape in tensors:
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


QUERY = "blk.0.attn_q.weight"
GOOD = ((f"{QUERY}.lora_a", (2, 32)), (f"{QUERY}.lora_b", (32, 2)))


def test_a_file_without_alpha_has_a_scale_of_one(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    path = edited(tmp_path / "a.gguf", (), GOOD)
    recipe, _ = FORMATS["gguf"].read(path, load_base_model("llama"))
    (method,) = recipe.methods
    assert method.scale_at("layers/0/attention/query") == 1.0


WRONG = {
    "kind": ({"general.type": "model"}, GOOD, "llama", ["general.type='model'", "adapter"]),
    "type": ({"adapter.type": "control_vector"}, GOOD, "llama", ["control_vector"]),
    "architecture": ({}, GOOD, "mamba", ["mamba", "llama"]),
    "tensor": ({}, (("blk.0.ssm_a.weight.lora_a", (2, 32)),), "llama", ["ssm_a"]),
    "axes": ({}, ((f"{QUERY}.lora_a", (32,)),), "llama", ["[32]"]),
    "nothing": ({}, (), "llama", ["no tensors"]),
    "half a pair": ({}, GOOD[:1], "llama", ["q_proj"]),
    "shape": ({}, (GOOD[0], (f"{QUERY}.lora_b", (16, 2))), "llama", ["q_proj"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_no_adapter_of_the_base_are_named(case, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    fields, tensors, architecture, data = WRONG[case]
    path = edited(tmp_path / "wrong.gguf", fields, tensors, architecture)
    with raises(AdapterFileError, *data):
        FORMATS["gguf"].read(path, load_base_model("llama"))


def test_a_damaged_file_is_named(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    path = tmp_path / "cut.gguf"
    path.write_bytes(Path("there", ADAPTER).read_bytes()[:-9])
    with raises(BaseFileError, path):
        FORMATS["gguf"].read(path, load_base_model("llama"))
