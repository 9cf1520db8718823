# ruff: noqa: E501, RUF001 (templates are as long as they are, and models use such bars)
"""Chat templates in the styles of well-known models, and conversations to render with them.

The templates were written for these tests. Between them they use the tags, filters, globals and
variables that templates of released models use.
"""

import datetime
from typing import Any

NOW = datetime.datetime(2026, 3, 9, 8, 7, 6, 54321)

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "image_token": "<image>",
}

TEMPLATES = {
    "chatml": """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama3_tools": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y %f") %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}<|eot_id|>
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ (message['content'] | trim) + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one tool call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "mistral_inst": """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}""",
    "generation_tags": """{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif -%}
{%- set ns = namespace(mode="/think", first=false) -%}
{%- if not enable_thinking %}{% set ns.mode = "/no_think" %}{% endif -%}
<|im_start|>system
Date: {{ strftime_now("%d %B %Y") }} {{ ns.mode }}
{%- if xml_tools %}
<tools>{% for tool in xml_tools %}{{ tool | string }}{% endfor %}</tools>
{%- endif %}
<|im_end|>
{% for message in messages %}
    {%- if message.role == "assistant" %}
        {% generation %}
        {%- set leaked = "inside" %}
        {{- "<|im_start|>assistant\\n" + message.content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- endgeneration %}
    {%- elif message.role in ["user", "tool"] %}
        {{- "<|im_start|>" + message.role + "\\n" + message.content|string + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{{- leaked is defined }}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}{% if ns.mode == "/no_think" %}{{ "<think>\\n\\n</think>\\n" }}{% endif %}
{%- endif %}
""",
    "deepseek_thinking": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is none %}{{'<none>'}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is defined %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- if message['role'] == 'assistant' and message['tool_calls'] %}{%- for tool in message['tool_calls'] %}{{'<｜tool▁call▁begin｜>' + tool['function']['name'] + '\n```json\n' + tool['function']['arguments']|string + '\n```'}}{%- endfor %}{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\n'}}{% endif %}""",
    "phi4_pieces": """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}""",
    "qwen_tools": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'You are helpful.' }}{%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif message.content is string %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- for part in message.content %}{%- if part.type == 'text' %}{{- part.text }}{%- else %}{{- image_token }}{%- endif %}{%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    "hermes_types": """{%- macro kind(spec) %}
{%- if spec.type == "array" %}{{ "List[" + spec["items"].type|default("Any") + "]" }}
{%- elif spec.type is string %}{{ {"string": "str", "number": "float", "integer": "int"}[spec.type]|default(spec.type) }}
{%- else %}{{ spec.type | join(" or ") }}{%- endif %}
{%- endmacro %}
{{- bos_token }}{%- if tools is iterable and tools | length > 0 %}
{%- for tool in tools %}{%- set f = tool.function if tool.function else tool %}
def {{ f.name }}({% for name, spec in f.parameters.properties.items() %}{{ name }}: {{ kind(spec) }}{% if not loop.last %}, {% endif %}{% endfor %}) # {{ f.description }}
{{ f.parameters.required | default([]) | tojson }}
{%- endfor %}{%- endif %}
{% for message in messages -%}
{{ loop.cycle('a', 'b') }} {{ message.role | upper }}: {{ message.content | default('-', true) }}
{% endfor %}""",
    "rag_documents": """{% if documents is none %}no documents{% else %}{% for document in documents %}
{{ loop.index }}. {{ document['title'] }}: {{ document.text | replace('\n', ' ') }}{% endfor %}{% endif %}
{% for message in messages | selectattr('role', 'equalto', 'user') %}Q: {{ message.content }}
{% endfor %}{{ messages | map(attribute='role') | unique | join('/') }}{{ tools is none }}{{ tools }}""",
    "json_filters": """{{ tools | tojson(indent=2, separators=(',', ' : ')) }}
{{ tools | tojson(ensure_ascii=True, sort_keys=True) }}
{% for message in messages %}{{ message | tojson(sort_keys=true) }}
{{ message | dictsort | string }}
{% if loop.index > 2 %}{% break %}{% endif %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index }}
{% endfor %}""",
    "reasoning": """{% for m in messages %}{{ m.role }}|{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}{% if m.thinking is defined %}[{{ m.thinking }}]{% endif %}{% if m.reasoning is defined %}({{ m.reasoning }}){% endif %}{{ m.content if m.content is defined else 'nothing' }}
{% endfor %}{% if add_generation_prompt and not (enable_thinking | default(true)) %}</think>{% endif %}{{ answer_in }}""",
    "tokens_and_undefined": """{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ image_token }}{{ sep_token }}{{ cls_token is defined }}{{ missing }}{{ missing is undefined }}{% set d = dict(a=1, b=2) %}{{ d }}{{ dict.fromkeys(['x'], 0) }}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m | length %}{% endfor %}{{ ns.n }}{{ range(3) | list }}{{ 2 ** 10 }}{{ '-' * 5 }}{{ messages[0].keys() | list }}""",
    "line_endings": "{% for m in messages %}\r\n{{ m.role }}:\r\n  {% if m.content %}\r\n{{ m.content }}\r{% endif %}\n\n{% endfor %}\r\n",
    "scopes": """{% set x = 1 %}{% for m in messages recursive %}{% set x = x + 1 %}{{ x }}{{ loop.depth }}{% if m.parts %}{{ loop(m.parts) }}{% endif %}{% else %}none{% endfor %}{{ x }}{% filter upper %}{{ messages[0].role }}{% endfilter %}{% with y = 2 %}{{ y }}{% endwith %}{% call(z) m2() %}{{ z }}{% endcall %}""".replace(
        "{% call", "{% macro m2() %}<{{ caller(3) }}>{% endmacro %}{% call"
    ),
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city — café",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "a <city> & 'country'"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "unit": {"type": ["string", "null"]},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "stop", "description": "", "parameters": {"properties": {}}},
    },
]

_HI = {"role": "user", "content": 'Hi <there> & "you" — 日本'}
_CALL = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2]}},
        }
    ],
}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "user": {"messages": [_HI]},
    "no_prompt": {"messages": [_HI], "add_generation_prompt": False},
    "system": {"messages": [{"role": "system", "content": "  Be brief. \n"}, _HI]},
    "turns": {
        "messages": [
            _HI,
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."},
            {"role": "user", "content": "  And\r\nnow?  "},
        ],
        "add_generation_prompt": False,
    },
    "tools": {"messages": [_HI], "tools": TOOLS},
    "no_tools": {"messages": [_HI], "tools": []},
    "tool_call": {
        "messages": [
            _HI,
            _CALL,
            {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "21"},
            {"role": "tool", "content": '{"rain": false}'},
        ],
        "tools": TOOLS,
    },
    "content_none": {"messages": [_HI, {**_CALL, "content": None, "refusal": None}]},
    "content_empty": {"messages": [_HI, {**_CALL, "content": ""}], "tools": TOOLS[:1]},
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Look: "}, {"type": "image", "url": "x"}],
            }
        ]
    },
    "documents": {
        "messages": [{"role": "system", "content": "s"}, _HI],
        "documents": [{"title": "A", "text": "one\ntwo"}, {"title": "B", "text": "three"}],
    },
    "thinking_off": {"messages": [_HI], "chat_template_kwargs": {"enable_thinking": False}},
    "variables": {
        "messages": [_HI],
        "chat_template_kwargs": {
            "xml_tools": ["<t/>", {"a": (1, 2)}],
            "answer_in": "é",
            "date_string": "today",
            "bos_token": "<mine>",
        },
    },
    "reasoning": {
        "messages": [
            _HI,
            {"role": "assistant", "reasoning": "because", "content": "yes"},
            {"role": "user", "content": "?"},
            {"role": "assistant", "thinking": "t", "reasoning_content": None, "content": "no"},
            {"role": "assistant", "reasoning_content": "only"},
        ]
    },
    "tools_in_message": {
        "messages": [{"role": "system", "content": "s", "tools": '[{"name": "f"}]'}, _HI]
    },
    "roles": {
        "messages": [
            {"role": "developer", "content": "d", "parts": [{"role": "x"}, {"role": "y"}]},
            {"role": "assistant", "content": "first"},
        ]
    },
}
