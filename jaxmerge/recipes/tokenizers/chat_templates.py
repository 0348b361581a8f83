"""Chat templates by name, of a recipe, or of most of the models."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from jaxmerge.converters import CheckpointError
from jaxmerge.recipes.tokenizers.tokenizer import CONFIG, TEMPLATE, read_json, read_text

_LARGEST = 1_000_000

_ALPACA = """\
{%- for message in messages if message.role == 'system' %}
{%- if loop.last %}{{- message.content | trim }}{%- endif %}
{%- endfor %}
{{- '\\n\\n' }}
{%- for message in messages %}
{%- set content = message.content | trim %}
{%- if message.role == 'user' %}
{{- '### Instruction:\\n' ~ content ~ ('' if loop.last else '\\n\\n') }}
{%- elif message.role == 'assistant' %}
{{- '### Response:\\n' ~ content ~ ('' if loop.last else '\\n\\n') }}
{%- elif message.role == 'user_context' %}
{{- '### Input:\\n' ~ content ~ ('' if loop.last else '\\n\\n') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'assistant' %}
{{- '### Response:\\n' }}
{%- endif %}
"""

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_EXAONE = """\
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}
{{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{{- '[|' ~ message.role ~ '|]' ~ message.content }}
{{- '\\n' if message.role == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '[|assistant|]' }}
{%- endif %}
"""

_LLAMA3 = """\
{%- for message in messages %}
{{- bos_token if loop.first else '' }}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
{{- message.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_MISTRAL = """\
{{- bos_token }}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- for message in turns %}
{%- if message.role != ('user', 'assistant')[loop.index0 % 2] %}
{{- raise_exception('expected user and assistant in turn after at most one system message') }}
{%- elif message.role == 'user' %}
{%- set system = messages[0].content ~ '\\n\\n' if loop.first and turns != messages else '' %}
{{- ' [INST] ' ~ system ~ message.content ~ ' [/INST]' }}
{%- else %}
{{- ' ' ~ message.content ~ eos_token }}
{%- endif %}
{%- endfor %}
"""

NAMED = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}


def chosen_template(chat_template: str, folders: Sequence[str]) -> str | None:
    """Returns the template that a recipe's `chat_template` means.

    Args:
        chat_template: "auto" for the template that most models have (of equally frequent ones that
            of the model that comes first), the name of one, or a Jinja template.
        folders: the models', in order.

    Returns:
        The template; None where no model has one.

    Raises:
        CheckpointError: a model's files cannot be read.
    """
    if chat_template != "auto":
        return NAMED.get(chat_template, chat_template)
    found = [template.strip() for folder in folders if (template := template_of(folder))]
    return Counter(found).most_common(1)[0][0] if found else None


def template_of(folder: str) -> str | None:
    """Returns a model's chat template, wherever it is kept; of several the default one.

    Args:
        folder: the model's.

    Raises:
        CheckpointError: a file cannot be read.
    """
    template: object = read_text(folder, TEMPLATE)
    if template is None:
        template = (read_json(folder, CONFIG) or {}).get("chat_template")
    if template is None:
        template = (read_json(folder, "chat_template.json") or {}).get("chat_template")
    if isinstance(template, list):
        named = [one for one in template if isinstance(one, dict)]
        template = {one.get("name"): one.get("template") for one in named}
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str) and len(template) > _LARGEST:
        raise CheckpointError(
            f"{os.path.join(folder, TEMPLATE)}: {len(template)} characters are too many for a template"
        )
    return template if isinstance(template, str) else None
