"""Chat templates: the text is jinja's, and no template takes much time, text or memory."""

import json
import tracemalloc

import pytest
from helpers.errors import raises
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adapters_jax.errors import BaseFileError, ChatTemplateError
from adapters_jax.finetune.base_files import chat
from adapters_jax.finetune.base_files.gguf import read_gguf
from adapters_jax.finetune.pretrained.assets import cached

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "1 < 2?\nIs it?"},
    {"role": "assistant", "content": "<think>a</think>Yes"},
    {"role": "user", "content": "Why?"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def by_jinja(template, reply=True):
    """The text of jinja's own environment, with the tojson of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **how: json.dumps(x, ensure_ascii=False, **how)
    values = {"messages": MESSAGES, "add_generation_prompt": reply, **TOKENS}
    return environment.from_string(template).render(values)


TEMPLATES = {
    "roles": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "a namespace": "{% set ns = namespace(first=true, n=0) %}{% for m in messages %}"
    "{% if ns.first and m['role'] == 'system' %}{% set ns.first = false %}{{ m.content.strip() }}"
    "{% else %}{% set ns.n = ns.n + 1 %}{{ '%d. %s' % (ns.n, m.content) }}\n{% endif %}"
    "{% endfor %}",
    "slices": "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest[::-1] %}{{ loop.index0 ~ ':' ~ m.content }}{{ '|' if not loop.last }}"
    "{% endfor %}{{ system }}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') "
    "| list | join(', ') }}{{ messages | length }}{{ messages | tojson(indent=2) }}"
    "{{ messages[0] | tojson }}{{ 'a b' | replace('a', 'x') | upper | title }}{{ x | default(3) }}"
    "{{ [3, 1, 2] | sort | first }}{{ {'b': 1, 'a': 2} | dictsort }}{{ 'ab' | reverse }}"
    "{{ messages[0].items() | list }}{{ {'a': 1} | items | list }}{{ 'a\nb' | indent(2) }}",
    "tests": "{% for m in messages if m.role is not in ['system'] %}{{ m.content is string }}"
    "{{ tools is defined }}{{ loop.index is even }}{{ m.x is none }}{{ m.content is mapping }}"
    "{% if loop.first and loop.length > 2 %}{% continue %}{% endif %}{{ m.content in 'Why?' }}"
    "{% endfor %}",
    "methods": "{% for m in messages %}{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}"
    "{{ m.content.replace('?', '!').startswith('1') }}{{ m.get('role', 'none').capitalize() }}"
    "{{ m['content'].rstrip() + '.' }}{% endfor %}{{ ', '.join(['a', 'b']) }}",
    "macros": "{% macro turn(m, by='-') %}{{ by }}{{ m.content }}{{ caller() if caller }}"
    "{% endmacro %}{{ turn(messages[1]) }}{{ turn(messages[1], by='+') }}"
    "{% call turn(messages[0]) %}!{% endcall %}{% set text %}[{{ bos_token }}]{% endset %}"
    "{{ text }}",
    "arithmetic": "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 7 / 2 }}{{ -3 }}{{ 'ab' * 3 }}"
    "{{ [1] + [2] }}"
    "{{ 1 < 2 <= 2 }}{{ 1.5 + 1 }}{{ (1, 2) }}{{ {'a': [none, true]} }}{{ '%05.1f' % 2.25 }}",
    "loops": "{% for i in range(3) %}{% for m in messages %}{% if loop.index > 2 %}{% break %}"
    "{% endif %}{{ i }}{{ loop.cycle('a', 'b') }}{{ loop.nextitem is defined }}"
    "{% else %}none{% endfor %}"
    "{% endfor %}{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% endfor %}"
    "{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}"
    "{% endif %}{% endfor %}",
    "blank lines": "{% for m in messages %}\n  {%- if m.role == 'user' %}\n    {{- m.content }}\n"
    "  {% endif %}\n{% endfor %}\nend\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_jinja(name):
    for reply in (True, False):
        expected = by_jinja(TEMPLATES[name], reply)
        assert len(expected) > 10
        assert chat.render(TEMPLATES[name], MESSAGES, reply=reply, **TOKENS) == expected


def test_the_text_of_smollm2_is_that_of_jinja():
    directory = cached("smollm2-135m")
    if directory is None:
        pytest.skip("SmolLM2 is not in the cache")
    template = read_gguf(directory).fields["tokenizer.chat_template"]
    assert chat.render(template, MESSAGES, **TOKENS) == by_jinja(template)
    assert chat.render(template, MESSAGES[1:], **TOKENS).count("<|im_start|>") == 5


def grown(start, step, count=60):
    """A template that makes a value from itself again and again."""
    loop = f"{{% for i in range({count}) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}"


def loops(body, count=100_000):
    return (
        f"{{% set b = range(100000) | list %}}{{% for i in range({count}) %}}{body}{{% endfor %}}"
    )


CALLER = "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
TEXTS = "{% macro f() %}" + loops("y" * 50_000) + "{% endmacro %}{% set x = f() %}"
FIBONACCI = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
HOSTILE = {
    "nested loops": loops("{% for j in range(100000) %}{% endfor %}"),
    "nested loops that filter": loops("{% for j in range(100000) if false %}{% endfor %}"),
    "recursive loops": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a field": "{{ '%999999999d' % 1 }}",
    "a field of a width": "{{ '%*d' % (10**9, 1) }}",
    "a field of digits": "{{ '%.99999999f' % 1.5 }}",
    "a field of a name": "{{ '%(a)999999999d' % {'a': 1} }}",
    "fields": "{{ ('%(a)s' * 20000) % {'a': 'x' * 100000} }}",
    "center": "{{ 'a'.center(5000000000) }}",
    "the filter center": "{{ 'a' | center(5000000000) }}",
    "the block center": "{% filter center(10**9) %}x{% endfilter %}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "format_map": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "range": "{{ range(10**9) | list }}",
    "a text times": "{{ 'x' * 10**9 }}",
    "times a text": "{{ 10**9 * 'x' }}",
    "a list times": "{{ [1] * 10**9 }}",
    "doubled text": grown("'x'", "ns.x + ns.x"),
    "doubled text by ~": grown("'x'", "ns.x ~ ns.x"),
    "doubled lists": grown("[1]", "[ns.x, ns.x]") + "{{ ns.x }}",
    "doubled tuples": grown("(1,)", "(ns.x, ns.x)", 28) + "{{ {ns.x: 1} }}",
    "doubled mappings": grown("{}", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x | tojson }}",
    "doubled namespaces": grown("1", "namespace(x=ns.x, y=ns.x)") + "{{ ns.x }}",
    "squared numbers": grown("3", "ns.x * ns.x"),
    "a power": "{{ 2 ** (2 ** 40) }}",
    "deep lists": grown("[1]", "[ns.x]", 99),
    "a join": "{{ ('x' * 10000).join(range(100000) | map('string')) }}",
    "the filter join": "{{ range(100000) | join('x' * 1000) }}",
    "replace": "{{ ('a' * 10000).replace('a', 'b' * 10000) }}",
    "the filter replace": "{{ ('a' * 10000) | replace('', 'b' * 10000) }}",
    "replace in a map": "{{ range(10000) | map('replace', '1', 'x' * 10000) | list }}",
    "strip": "{{ ('a' * 100000).strip('b' * 100000 + 'a') }}",
    "indent": "{{ ('a\n' * 10000) | indent(100000) }}",
    "indented JSON": "{{ range(100000) | list | tojson(indent=1000000) }}",
    "lists of filters": loops("{% set x = range(100000) | select('gt', 100000) %}"),
    "sorted": loops("{% set x = b | sort %}"),
    "in": loops("{% if -1 in b %}{% endif %}"),
    "is in": loops("{% if -1 is in b %}{% endif %}"),
    "equal": loops("{% if b == b + [1] %}{% endif %}"),
    "counted": loops("{% set x = b.count(-1) %}"),
    "changed": loops("{% set x = loop.changed(b + [i]) %}"),
    "sliced": loops("{% set x = b[1:] %}"),
    "split": loops("{% set x = ('x ' * 10000).split() %}"),
    "hashed": grown("(1,)", "(ns.x, ns.x)", 12) + loops("{{ {}[ns.x] }}"),
    "macros": FIBONACCI + "{{ f(60) }}",
    "endless macros": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "calls": CALLER + "{% call f() %}" * 30 + "x" * 1000 + "{% endcall %}" * 30,
    "blocks": "{% block a %}{{ self.a() }}{% endblock %}",
    "much text": loops("y" * 50_000),
    "much text of a macro": TEXTS,
    "deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "deep loops": "{% for i in [1] %}" * 99 + "{% endfor %}" * 99,
    "long source": "x" * 65_537,
    "a large program": "{{ eo }}" * 4096,
    "a long number": "{{ " + "9" * 5000 + " }}",
    "an unknown filter": "{{ 'a' | nothing }}",
    "an unknown test": "{{ 'a' is nothing }}",
    "a division": "{{ 1 / 0 }}",
    "a key": "{{ {}['a']['b'] }}",
    "an include": "{% include 'x' %}",
    "an undefined name": "{{ nothing.x }}",
    "a class": "{{ ''.__class__.__mro__ }}",
    "attr": "{{ '' | attr('__class__') }}",
    "globals": "{{ raise_exception.__globals__['x'] }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "a bad literal": "{{ 'a' 'b }}",
    "a long reason": "{{ raise_exception('x' * 100000) }}",
}


@pytest.mark.hostile
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_our_error(name):
    with raises(ChatTemplateError, "chat template") as caught:
        chat.render(HOSTILE[name], MESSAGES, **TOKENS)
    assert len(str(caught.value)) < 500


@pytest.mark.hostile
@pytest.mark.parametrize(
    "name",
    ["doubled text", "much text of a macro", "split", "the filter join", "a large program"],
)
def test_a_hostile_template_takes_little_memory(name):
    tracemalloc.start()
    try:
        with raises(ChatTemplateError, "chat template"):
            chat.render(HOSTILE[name], MESSAGES, **TOKENS)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_long_conversations_have_a_larger_budget():
    text = "word " * 200_000
    messages = [{"role": "user", "content": text}] * 3
    template = "{% for m in messages %}{{ m.content | trim ~ '\n' }}{% endfor %}"
    assert chat.render(template, messages) == (text.strip() + "\n") * 3


def test_the_error_of_a_template_is_one_of_the_files_of_a_base():
    assert issubclass(ChatTemplateError, BaseFileError)
