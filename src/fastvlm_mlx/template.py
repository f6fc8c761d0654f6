"""How a conversation is written down for a decoder: what stands around its turns, as data, one entry per template.

Source: apple/ml-fastvlm 592b4ad, llava/conversation.py (`qwen_2` and `vicuna_v1`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fastvlm_mlx.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Special:
    """A special token, by its spelling in the vocabulary."""

    token: str


Part: TypeAlias = str | Special


@dataclass(frozen=True, slots=True)
class TurnStyle:
    """How one role's turns are written.

    Attributes:
        before: the text; all that is written of an answer that is to be generated.
        lead: stands between `before` and the text, where there is one.
        after: the text.
        then: joins the turn to the next one: text that is tokenised in one piece with it, and left out at the end.
    """

    before: tuple[Part, ...]
    after: tuple[Part, ...] = ()
    lead: str = ""
    then: str = ""


@dataclass(frozen=True, slots=True)
class Template:
    """How a conversation is written.

    Attributes:
        system: the default system prompt.
        turns: the style of each role: "system", "user" and "assistant".
        stops: special tokens that end an answer.
        begin: special tokens before everything, once.
    """

    system: str
    turns: Mapping[str, TurnStyle]
    stops: tuple[str, ...]
    begin: tuple[Special, ...] = ()


START, END = "<|im_start|>", "<|im_end|>"
CHATML = Template(
    system="You are a helpful assistant.",
    turns={
        role: TurnStyle(before=(Special(START), f"{role}\n"), after=(Special(END), "\n"))
        for role in ("system", "user", "assistant")
    },
    stops=(END, "<|endoftext|>"),
)
VICUNA_V1 = Template(
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    turns={
        "system": TurnStyle(before=(), then=" "),
        "user": TurnStyle(before=("USER: ",), then=" "),
        "assistant": TurnStyle(before=("ASSISTANT:",), lead=" ", after=(Special("</s>"),)),
    },
    stops=("</s>",),
    begin=(Special("<s>"),),
)
TEMPLATES: Mapping[str, Template] = {"chatml": CHATML, "vicuna_v1": VICUNA_V1}


def find_template(name: str) -> Template:
    """The template of that name.

    Raises:
        ConfigError: there is none; names those that are.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"template is {name!r}; this version knows {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def special_tokens(name: str) -> tuple[str, ...]:
    """The special tokens that prompts of a template have, each once; a tokenizer must know them.

    Raises:
        ConfigError: there is no such template.
    """
    template = find_template(name)
    turns = (part for turn in template.turns.values() for part in (*turn.before, *turn.after))
    parts = (*template.begin, *turns)
    return tuple(dict.fromkeys(part.token for part in parts if isinstance(part, Special)))
