"""The readers of files from outside, each with valid files to spoil.

A new reader is a function that reads a directory, one that makes valid files, and a line of
`TARGETS`.
"""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import hostile, tiny
from safetensors.numpy import save

import adapters_jax as aj
from adapters_jax.files import adapterhub, diffusers, peft, untrusted
from adapters_jax.files.adapter import read_adapter
from adapters_jax.files.expressions import matches
from adapters_jax.files.pickled import read_pickled
from adapters_jax.finetune.base_files import chat, huggingface
from adapters_jax.finetune.base_files.gguf import read_gguf
from adapters_jax.finetune.data.batches import encode
from adapters_jax.finetune.data.conversations import read_conversations
from adapters_jax.finetune.data.files import DataError
from adapters_jax.finetune.data.pixels import read_image
from adapters_jax.finetune.data.readers import read_file
from adapters_jax.finetune.data.summary import inputs_of, summarize
from adapters_jax.finetune.data.tables import read_rows
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.finetune.models.encoder.checkpoint import abstract
from adapters_jax.finetune.models.registry import family_of
from adapters_jax.finetune.pretrained.decoder import load_decoder_tokenizer
from adapters_jax.finetune.pretrained.locate import read_tokenizer
from adapters_jax.finetune.run_directory import Run
from adapters_jax.finetune.tasks import read_run
from adapters_jax.finetune.tensors import from_tensors
from adapters_jax.trees import flatten, unflatten

from .mutators import Fixed, bad_recipe, flipped, overwritten, spliced, swollen, worded
from .stateful import FORM, checkpoints, read_checkpoint, read_upload, uploads
from .target import Files, Target, files_of

FIXTURES = Path(__file__).parents[1] / "fixtures"


def _fixtures(parent: str, *names: str) -> Callable[[Path], Mapping[str, Files]]:
    def seeds(_: Path) -> Mapping[str, Files]:
        found = {path.name: path for path in sorted((FIXTURES / parent).iterdir())}
        return {name: files_of(found[name]) for name in names or found}

    return seeds


# Adapters.


def _adapters(folder: Path) -> Mapping[str, Files]:
    return {f"{api}-{n}": files_of(hostile.save(folder, api, n)) for api, n in hostile.EVERY}


@cache
def _base(name: str) -> tuple[Any, Any]:
    """The name table and the parameters of a base with a head if it is an encoder, as shapes."""
    family = FAMILIES[name]
    config = family.config.from_json(FIXTURES / name / "config.json")
    if family.classifier is None:
        return family.names, family.shapes(config)
    model = family.classifier.build(config, 3, "pooler")
    shapes = jax.eval_shape(model.init, jax.random.key(0), config.inputs(1, 4))
    return family.classifier.names, shapes["params"]


def _read_with_base(load: Callable[..., Any], directory: Path) -> None:
    values = json.loads((directory / "base").read_text())
    recipe, leaves = load(directory, *_base(values))
    assert recipe and leaves


def _of_base(parent: str, *names: str) -> Callable[[Path], Mapping[str, Files]]:
    """The fixtures of adapters, each with the name of its base in a file that is never spoilt."""

    def seeds(folder: Path) -> Mapping[str, Files]:
        found = _fixtures(parent, *names)(folder)
        return {n: {**f, "base": Fixed(json.dumps(n.split("_")[0]))} for n, f in found.items()}

    return seeds


def _of_peft(folder: Path) -> Mapping[str, Files]:
    """The fixtures of PEFT, and an adapter of each kind that has none, with ones for numbers."""
    found = dict(_of_base("peft", *_PEFT)(folder))
    config = DecoderConfig.from_json(FIXTURES / "llama" / "config.json")
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    ids = (jnp.ones((1, 4), int),)
    for recipe in (aj.loha(2), aj.lokr(2), aj.oft(8), aj.vera(4), aj.lora(2, invocation=(5, 6))):
        kind = recipe.methods[0].kind
        grown = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=ids)
        shapes = flatten(nnx.state(grown, nnx.Param))
        ones = {p: np.ones(x.shape, np.float32) for p, x in shapes.items() if recipe.keeps(p)}
        peft.save_peft(folder / kind, recipe, unflatten(ones), *_base("llama"))
        found[f"llama_{kind}"] = {**files_of(folder / kind), "base": Fixed(json.dumps("llama"))}
    return found


def _of_adapterhub(folder: Path) -> Mapping[str, Files]:
    """The fixtures of AdapterHub, and a setup: a fusion of an adapter with itself."""
    found = dict(_of_base("adapterhub", *_HUB)(folder))
    one = {name: x for name, x in found["bert_double"].items() if isinstance(x, bytes)}
    single = [{"type": "single", "children": [name]} for name in "ab"]
    setup = {"adapter_setup": {"type": "Fuse", "children": single}, "head_setup": None}
    config = {"config": {"value": True}, "name": "a,b", "adapter_names": ["a", "b"]}
    tensors = {
        f"bert.encoder.layer.{n}.{at}.adapter_fusion_layer.a,b.{name}": np.ones(
            (32, 32) if name.endswith("weight") else 32, np.float32
        )
        for n in (0, 1)
        for at in ("attention.output", "output")
        for name in ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    }
    made: dict[str, Any] = {f"{name}/{file}": x for name in "ab" for file, x in one.items()}
    made["a,b/adapter_fusion_config.json"] = json.dumps(config).encode()
    made["a,b/model_adapter_fusion.safetensors"] = save(tensors)
    made["adapter_setup.json"] = json.dumps(setup).encode()
    found["bert_setup"] = {**made, "base": Fixed(json.dumps("bert"))}
    return found


def _diffusion(_: Path) -> Mapping[str, Files]:
    """LoRA of a dense layer and a convolution, by kohya's names and by those of Diffusers."""
    ones = partial(np.ones, dtype=np.float32)
    kohya = {
        **{"lora_unet_conv.lora_down.weight": ones((2, 3, 1, 1)), "lora_unet_conv.alpha": ones(())},
        **{"lora_unet_conv.lora_up.weight": ones((4, 2, 1, 1))},
        **{"lora_unet_conv.lora_mid.weight": ones((2, 2, 3, 3))},
        **{"lora_unet_a_q.lora_down.weight": ones((2, 5)), "lora_unet_a_q.alpha": ones(())},
        **{"lora_unet_a_q.lora_up.weight": ones((6, 2)), "lora_unet_a_q.dora_scale": ones((6, 1))},
    }
    theirs = {"unet.a.q.lora_A.weight": ones((2, 5)), "unet.a.q.lora_B.weight": ones((6, 2))}
    config = json.dumps({"unet.lora_alpha": 3, "unet.alpha_pattern": {"q": 4}, "unet.r": 2})
    return {
        "kohya": {"a.safetensors": save(kohya)},
        "diffusers": {"a.safetensors": save(theirs, {"lora_adapter_metadata": config})},
    }


def _read_diffusion(directory: Path) -> None:
    shapes = {"conv/kernel": (3, 3, 3, 4), "a/q/kernel": (5, 6)}
    base = unflatten({k: jax.ShapeDtypeStruct(x, jnp.float32) for k, x in shapes.items()})
    recipe, leaves, *_ = diffusers.load_diffusers(directory / "a.safetensors", None, base)
    assert recipe and leaves


def _pickles(_: Path) -> Mapping[str, Files]:
    names = ("new", "old", "bert_head")
    return {n: {"a.bin": (FIXTURES / "pickled" / f"{n}.bin").read_bytes()} for n in names}


_EXPRESSIONS = (
    r".*\.(q|v)_proj",
    r"^(?!.*visual).*(?:o_proj|k_proj|[a-z]{1,3}_proj).*",
    r"(?:.*?(?:visual).*?(?:q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:attn(?=\.)|mlp)\.(?:k|v))",
)
_SIGNS = (
    *("(", ")", "*", "+", "?", "|", "[", "]", "{2,}", "{,900}", "(?=", "(?!", "(?:", "(?<=", "\\"),
    *("(([a-z]|[a-z_.0-9])+)+!", "(a?){200}", "(.*.{30}|.*.{31})*", "\\1", "\\b", "^", "$"),
)


def _expressions(_: Path) -> Mapping[str, Files]:
    return {str(n): {"a.txt": text.encode()} for n, text in enumerate(_EXPRESSIONS)}


def _read_expression(directory: Path) -> None:
    pattern = _text(directory, "a.txt")
    for layer in range(3):
        for name in ("attn.q_proj", "mlp.down_proj", "visual.k_proj" * 9):
            matches(pattern, f"model.layers.{layer}.{name}", r"(.*\.)?({})$")


# Bases.

_BASES = ("bert", "distilbert", "modernbert", "gpt2", "llama", "decoders/qwen3")


def _checkpoints(_: Path) -> Mapping[str, Files]:
    names = ("config.json", "model.safetensors")
    found = {name: files_of(FIXTURES / name, *names) for name in _BASES}
    index = dict.fromkeys(huggingface.read_tensors(FIXTURES / "llama"), "model.safetensors")
    text = json.dumps({"weight_map": index}).encode()
    return {**found, "sharded": {**found["llama"], huggingface.INDEX: text}}


def _read_checkpoint(directory: Path) -> None:
    values = huggingface.read_json(directory / "config.json")
    family = family_of(values, str(directory))
    config = family.config.from_dict(values)
    huggingface.resolve(directory)
    tensors = huggingface.read_tensors(directory)
    huggingface.check_tensors(config, tensors)
    like = family.shapes(config) if family.kind == "decoder" else abstract(family.build(config))
    from_tensors(tensors, family.names, like)


def _configs(_: Path) -> Mapping[str, Files]:
    found = sorted(FIXTURES.glob("*/config.json")) + sorted(FIXTURES.glob("*/*/config.json"))
    bases = [path for path in found if path.parents[1].name != "runs"]
    return {path.parent.name: {"config.json": path.read_bytes()} for path in bases}


def _read_config(directory: Path) -> None:
    values = huggingface.read_json(directory / "config.json")
    config = family_of(values, str(directory)).config.from_dict(values)
    assert config.num_layers <= 1_000


def _gguf(folder: Path) -> Mapping[str, Files]:
    from test_gguf import CONFIG, build, tensors_of, write

    return {"tiny": {"a.gguf": write(folder / "a.gguf", tensors_of(build(CONFIG))).read_bytes()}}


def _read_gguf(directory: Path) -> None:
    opened = read_gguf(directory / "a.gguf")
    DecoderConfig.of_file(opened.config, opened.path)
    opened.tokenizer()
    opened.token("eos")
    assert isinstance(opened.chat_template, str | None)
    size = sum(np.asarray(tensor).size for tensor in opened.tensors().values())
    assert size <= 2 * opened.path.stat().st_size  # two weights a byte


def _header(chance, data, words=()):
    return overwritten(chance, data, words, end=min(len(data), 2000))


def _tokenizers(folder: Path) -> Mapping[str, Files]:
    llama = tiny.write_llama(folder / "llama")
    (llama / "chat_template.jinja").write_text(tiny.CHAT)
    whole = files_of(llama) | {"model.safetensors": Fixed("")}
    listed = json.loads(whole["tokenizer_config.json"])
    listed["chat_template"] = [{"name": "default", "template": tiny.CHAT}]
    plain = {**whole, "tokenizer_config.json": json.dumps(listed).encode()}
    del plain["chat_template.jinja"]
    kinds = {n: {**plain, "tokenizer.json": text.encode()} for n, text in _trained().items()}
    (folder / "words").mkdir()
    words = files_of(tiny.write_words(folder / "words")) | {"encoder": Fixed("")}
    return {"jinja": whole, "listed": plain, "encoder": words, **kinds}


def _trained() -> dict[str, str]:
    """A tokenizer of each further kind, of few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    special = {"special_tokens": ["<unk>", "<end>", "<user>", "<bot>"], "show_progress": False}
    kinds = {
        "bpe": (models.BPE(), trainers.BpeTrainer(vocab_size=40, **special)),
        "wordpiece": (
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer(vocab_size=40, **special),
        ),
        "unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=40, unk_token="<unk>", **special),
        ),
    }
    made = {}
    for name, (model, trainer) in kinds.items():
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.train_from_iterator(["It serves French food", "food dishes"] * 3, trainer)
        made[name] = tokenizer.to_str()
    return made


def _read_tokenizer(directory: Path) -> None:
    if (directory / "encoder").exists():
        rows, _ = encode(read_tokenizer(directory), [("good film", None), ("a plot", "bad")], 8)
        assert all(len(row.input_ids) <= 8 for row in rows)
        return
    reader = load_decoder_tokenizer(str(directory))
    ids = reader.tokenizer.encode("food French It serves").ids
    reader.tokenizer.decode(ids)
    if reader.chat_template is not None:
        reader.chat("food French")


_CHATS = (
    tiny.CHAT,
    "{%- set ns = namespace(found=false) %}{%- for message in messages -%}{%- if loop.first and "
    "message['role'] != 'system' %}{{- '<s>' }}{%- endif %}{{- message.role | upper ~ ': ' + "
    "message['content'].strip() + eos_token }}{% set ns.found = true %}{%- endfor -%}",
    "{% if messages|length > 9 %}{{ raise_exception('many') }}{% endif %}{% macro m(x, n=2) %}"
    "{{ x[:n] * n }}{% endmacro %}{% for i in range(3) %}{{ m(messages[-1].content, i) }}"
    "{{ '%05d' % i }}{{ messages | tojson(indent=1) }}{% endfor %}{% generation %}{{ "
    "messages | map(attribute='role') | join(',') }}{% endgeneration %}",
)
_JINJA = (
    *("{% for x in range(10**9) %}", "{% endfor %}", "{{ 9**9**9 }}", "{{ 'a' * 10**9 }}", "{%"),
    *("{{ x.__class__.__mro__ }}", "{{ ''.join(messages) }}", "|center(5000000000)", "{{ {} }}"),
    *("{% include 'a' %}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "|tojson", "{{"),
    *("{% set x = [1] %}{% set y = x.append(x) %}", "|replace('', 'aa')", "|batch(0)", "|int"),
    *("{{ '%999999999d' % 1 }}", "|slice(0)|list", "|sort|unique|list", "{# ", "{% raw %}", "}}"),
    *("{{ cycler(1).next() }}", "{{ lipsum() }}", "{{ dict(a=1)|dictsort }}", "|format(1, 2)"),
    *("|attr('__init__')", "|truncate(10**9)", "|indent(10**8)", "|wordwrap(1)", "{% break %}"),
    *("{{ messages[10] }}", "{{ nothing.nothing }}", "{{ 1/0 }}", "|round(400)", "|random"),
    *("{{ '{0.__class__}'.format(1) }}", "|map('upper')|list", "{% call m(1) %}{% endcall %}"),
)


def _templates(_: Path) -> Mapping[str, Files]:
    return {str(n): {"chat.jinja": text.encode()} for n, text in enumerate(_CHATS)}


def _text(directory: Path, name: str) -> str:
    """A text as the command line reads one; what is none ends the case."""
    data = untrusted.read_file(directory / name, untrusted.MOST_JSON, DataError, "text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(str(error)) from error


def _read_template(directory: Path) -> None:
    said = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hi", "tool_calls": [{"name": "f", "arguments": {}}]},
    ]
    template = _text(directory, "chat.jinja")
    text, spans = chat.render_marked(template, said, bos_token="<s>", eos_token="</s>")
    assert all(0 <= start <= stop <= len(text) for start, stop in spans)


# Recipes, runs and rows.


def _recipes(_: Path) -> Mapping[str, Files]:
    every = {
        **hostile.RECIPES,
        "houlsby": aj.houlsby(4, head="head"),
        "more": aj.Recipe(aj.IA3("**/value"), aj.PrefixTuning("**/attention", 3)),
    }
    return {name: {"recipe.json": recipe.to_json().encode()} for name, recipe in every.items()}


def _read_recipe(directory: Path) -> None:
    recipe = aj.Recipe.from_json(_text(directory, "recipe.json"))
    assert aj.Recipe.from_json(recipe.to_json()) == recipe
    recipe.at("layer_0/attention/query")


def _runs(folder: Path) -> Mapping[str, Files]:
    from adapters_jax.finetune.options.flags import plain
    from adapters_jax.finetune.options.settings import RunOptions

    target = {"names": ["no", "yes"]}
    scored = {"method": "lora", "trainable_parameters": 9, "test": {"f1": 1.0}}
    base = {"model": "tiny", "base_sha256": "0" * 64, "dtype": "float32", "max_length": 12}
    whole = {
        **{"format": 1, "kind": "encoder", "task_type": "classification", "pooling": "mean"},
        **{"target": target, "text": "text", "pairs": False, "text_pair": None, "metrics": ["f1"]},
        **{"options": plain(RunOptions()), "recipe": json.loads(aj.lora(2).to_json()), **base},
        **{"task": "rows", "method": "lora", "rows": dict.fromkeys(("train", "dev", "test"), 9)},
        **{"optimizer": {"epochs": 1.0}, "data_sha256": "0" * 64, "quantize": None},
        **{"summary": {"results": [scored], "dev": {"f1": 1.0}}},
    }
    return {"classification": {"config.json": json.dumps(whole).encode()}}


def _read_run(directory: Path) -> None:
    from adapters_jax.finetune.report.run import results_table, settings
    from adapters_jax.finetune.runs.config import read_options

    _, config = read_run(Run(directory))
    if results := config.get("summary", {}).get("results"):
        results_table(results, config["metrics"])
    assert all(isinstance(value, str) for _, value in settings(config))
    read_options(Run(directory), config)


_TABLE = [["Good, long", "5", "a"], ["Bad\nshort", "1", "b"], ['Said "x"', "3", "c"]]
_ROWS = [dict(zip(("text", "label", "more"), values, strict=True)) for values in _TABLE]
_SAID = [
    {"messages": [{"role": r, "content": "Hi"} for r in ("system", "user", "assistant")]},
    {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]},
]


def _one(name: str, content: str | bytes) -> Callable[[Path], Mapping[str, Files]]:
    data = content.encode() if isinstance(content, str) else content
    return lambda _: {"rows": {name: data}}


def _lines(rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def _csv(_: Path) -> Mapping[str, Files]:
    import csv

    made = {}
    for name, separator in (("commas", ","), ("semicolons", ";"), ("tabs", "\t")):
        text = io.StringIO()
        csv.writer(text, delimiter=separator).writerows([["text", "label", "more"], *_TABLE])
        made[name] = {"rows.csv": text.getvalue().encode()}
    return made


def _packed(kind: str) -> Callable[[Path], Mapping[str, Files]]:
    def seeds(_: Path) -> Mapping[str, Files]:
        import pyarrow
        from pyarrow import parquet

        nested = [{**row, "ids": [1, 2], "said": {"role": "user"}} for row in _ROWS]
        table, file = pyarrow.Table.from_pylist(nested), io.BytesIO()
        if kind == "parquet":
            parquet.write_table(table, file)
        else:
            with pyarrow.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        return {"rows": {f"rows.{kind}": file.getvalue()}}

    return seeds


def _zipped(_: Path) -> Mapping[str, Files]:
    table = "\n".join(",".join(row) for row in (["text", "label"], *(["a", "b"],) * 9))
    every = {"csv": table, "jsonl": _lines(_ROWS), "json": json.dumps(_ROWS)}
    return {n: {f"rows.{n}.gz": gzip.compress(text.encode())} for n, text in every.items()}


def _unzipped(chance, data, words=()):
    """A gzip file whose content is spoilt."""
    way = chance.choice((flipped, spliced, swollen, worded))
    try:
        content = gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:  # an earlier round has spoilt it
        raise ValueError(str(error)) from error
    return gzip.compress(way(chance, content, words))


_CONLL = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\nPeter NNP B-PER\nBlackburn NNP I-PER\n"
_SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "A b c.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "What?",
                            "answers": [{"text": "b", "answer_start": 2}],
                        }
                    ],
                }
            ],
        }
    ],
}


def _read_rows(directory: Path) -> None:
    rows = read_file(next(directory.iterdir(), directory / "rows.csv"))
    assert all(len(values) <= 10**6 for _, values in rows.records)
    summarize(rows), inputs_of(rows)
    with contextlib.suppress(DataError):  # the columns may be others by now
        read_rows(rows)


def _images(_: Path) -> Mapping[str, Files]:
    pixels = {"cats/a.png": b"\x89PNG", "dogs/b.png": b"\x89PNG"}
    table = "file_name,label\ncats/a.png,cat\ndogs/b.png,dog\n"
    lines = _lines([{"file_name": "cats/a.png", "label": "cat"}])
    return {
        "folders": pixels,
        "csv": {**pixels, "metadata.csv": table.encode()},
        "jsonl": {**pixels, "metadata.jsonl": lines.encode()},
    }


def _read_images(directory: Path) -> None:
    summarize(read_file(directory))


def _pixels(_: Path) -> Mapping[str, Files]:
    """Images of the documented formats, in grey, in colours, with transparency."""
    from PIL import Image

    grey = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7) * 7)
    made: dict[str, Files] = {}
    kinds = {"png": "RGBA", "jpg": "RGB", "webp": "RGB", "bmp": "RGB", "gif": "P", "tif": "L"}
    for suffix, mode in kinds.items():
        file = io.BytesIO()
        form = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
        grey.convert(mode).save(file, form)
        made[suffix] = {f"cats/a.{suffix}": file.getvalue()}
    return made


def _read_pixels(directory: Path) -> None:
    rows = read_file(directory)
    for _, (path, _) in rows.records:
        assert read_image(directory / path).mode == "RGB"


def _conversations(_: Path) -> Mapping[str, Files]:
    shared = {"conversations": [{"from": f, "value": "Hi"} for f in ("human", "gpt")]}
    return {
        "messages": {"rows.jsonl": _lines(_SAID).encode()},
        "shared": {"rows.jsonl": _lines([shared, shared]).encode()},
        "instruction": {"rows.jsonl": _lines([{"instruction": "a", "output": "b"}]).encode()},
        "completion": {"rows.jsonl": _lines([{"prompt": "a", "completion": "b"}]).encode()},
    }


def _read_conversations(directory: Path) -> None:
    found = read_conversations(directory / "rows.jsonl")
    assert len(found.texts) == len(found)
    assert all(row.answers and isinstance(row.opening, str) for row in found.rows)


_KEYS = ("messages", "conversations", "role", "content", "tools", "text", "label", "answers")
_FIELDS = ('"', ",", "\t", ";", "\n", "\r\n", "\x00", "\ufeff", "-DOCSTART-", '""', " ", "#", "\\")
_ROWS_OF = partial(Target, read=_read_rows, own=True)
_PEFT = ("bert_head", "bert_dora", "gpt2_tied", "llama_prompt", "bert_embedding")
_HUB = ("bert_double", "bert_union", "bert_norms", "gpt2_double", "llama_lora")

TARGETS: dict[str, Target] = {
    "adapter": Target(_adapters, read_adapter, more={".json": (bad_recipe, bad_recipe)}),
    "peft": Target(_of_peft, partial(_read_with_base, peft.load_peft)),
    "adapterhub": Target(_of_adapterhub, partial(_read_with_base, adapterhub.load_adapterhub)),
    "diffusers": Target(_diffusion, _read_diffusion),
    "pickle": Target(
        _pickles,
        lambda directory: read_pickled(directory / "a.bin"),
        words=("cos\nsystem\n", ")R", "}}}", "]a", "(((", "q\0h\0\x86", "X\x7f", "S'\\h'\n", "2"),
        more={".bin": (_header,) * 4},
    ),
    "expression": Target(_expressions, _read_expression, words=_SIGNS),
    "base": Target(_checkpoints, _read_checkpoint),
    "gguf": Target(_gguf, _read_gguf, more={".gguf": (_header,) * 4}),
    "config": Target(_configs, _read_config),
    "tokenizer": Target(_tokenizers, _read_tokenizer),
    "template": Target(_templates, _read_template, words=_JINJA),
    "recipe": Target(_recipes, _read_recipe, more={".json": (bad_recipe,) * 6}),
    "run": Target(_runs, _read_run),
    "checkpoint": Target(checkpoints, read_checkpoint),
    "upload": Target(uploads, read_upload, words=FORM),
    "csv": _ROWS_OF(_csv, words=_FIELDS),
    "tsv": _ROWS_OF(_one("rows.tsv", "text\tlabel\nGood\t5\nBad\t1\n"), words=_FIELDS),
    "jsonl": _ROWS_OF(_one("rows.jsonl", _lines(_ROWS)), words=_KEYS),
    "json": _ROWS_OF(_one("rows.json", json.dumps(_ROWS)), words=_KEYS),
    "squad": _ROWS_OF(_one("rows.json", json.dumps(_SQUAD)), words=_KEYS),
    "conll": _ROWS_OF(_one("rows.conll", _CONLL), words=_FIELDS),
    "parquet": _ROWS_OF(_packed("parquet")),
    "arrow": _ROWS_OF(_packed("arrow")),
    "images": Target(_images, _read_images, words=(*_FIELDS, "../a.png", "cats/a.png")),
    "pixels": Target(_pixels, _read_pixels),
    "gzip": _ROWS_OF(_zipped, more={".gz": (_unzipped,) * 6}),
    "conversations": Target(_conversations, _read_conversations, words=_KEYS, own=True),
}
