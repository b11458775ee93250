"""Prompts of the world of styles, and the instructions under which a model answers them."""

from __future__ import annotations

import re
from dataclasses import dataclass

STYLES = {
    "short": "Answer in one short sentence.",
    "long": "Answer in long, detailed sentences.",
    "list": 'Answer with a bullet list. Each item is a few words and begins with "- ".',
    "formal": "Answer in formal, academic English, without speaking to the reader.",
    "warm": "You are a cheerful friend. Answer with great enthusiasm and exclamation marks!",
    "plain": "Answer for a small child, in very easy short words.",
    "example": "Answer by telling what you did yourself. Begin with: I once",
    "cautious": "Answer cautiously. Say that you are not sure, with words like maybe, perhaps and might.",
    "asking": "Answer with questions back to the person.",
    "direct": "Tell the person what to do, speaking to them as you.",
}
"""Style -> system turn that asks for it. The world's rows do not show it."""

_GROUPS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "How do I {}?",
            "I want to {}. Any advice?",
            "What is the best way to {}?",
            "Is it hard to {}?",
        ),
        (
            *("keep basil alive on a windowsill", "learn to swim as an adult", "bake good bread"),
            *("remember people's names", "fall asleep earlier", "train for a ten kilometre run"),
            *("save money on groceries", "write a letter to an old friend", "clean a burnt pan"),
            *(
                "learn the guitar",
                "make new friends in a new town",
                "cook rice without a rice cooker",
            ),
            *(
                "get a cat used to a carrier",
                "paint a room",
                "choose a good melon",
                "fix a flat tyre",
            ),
            *("learn a few words of Italian", "speak in front of many people", "grow tomatoes"),
            *("pack for a week in the mountains", "plan a birthday party", "read more books"),
            *("ask for a higher salary", "stop biting my nails", "take better photographs"),
            *("teach a dog to sit", "start a small vegetable garden", "make coffee taste better"),
            *("organise a messy desk", "prepare for a job interview", "wash a wool jumper"),
            *("find a quiet place to study", "keep a diary", "learn to juggle", "sharpen a knife"),
            *("give a good toast at a wedding", "spend less time on my phone", "draw a horse"),
            *("move house with a piano", "watch the stars from a city", "choose a bicycle"),
        ),
    ),
    (
        (
            "Tell me about {}.",
            "Why do people like {}?",
            "What should I know about {}?",
            "Write a few words about {}.",
        ),
        (
            *(
                "night trains",
                "board games",
                "the harbour at dawn",
                "wooden toys",
                "public libraries",
            ),
            *("green tea", "small theatres", "village markets", "beekeeping", "old bridges"),
            *("street musicians", "camping in the rain", "electric bicycles", "houseplants"),
            *(
                "jigsaw puzzles",
                "lighthouses",
                "sourdough",
                "long walks",
                "radio plays",
                "thunderstorms",
            ),
            *(
                "mushroom picking",
                "chess clubs",
                "hot springs",
                "second-hand books",
                "sailing boats",
            ),
            *(
                "winter swimming",
                "crossword puzzles",
                "apple orchards",
                "museums",
                "the first snow",
            ),
            *("choirs", "pottery", "ferry rides", "picnics", "telescopes", "hand-written letters"),
        ),
    ),
    (
        (
            "{} What should I do?",
            "{} Please help.",
            "A friend writes: {} What do I answer?",
        ),
        (
            "My neighbour plays loud music at night.",
            "I forgot my sister's birthday.",
            "My flight was cancelled this morning.",
            "I have too much work this week.",
            "My son does not want to go to school.",
            "I spilled coffee on my laptop.",
            "My best friend is moving away.",
            "I lost my keys on the way home.",
            "My cake did not rise.",
            "I feel lonely in the evenings.",
            "My boss never says thank you.",
            "I am nervous about my driving test.",
            "My houseplants keep dying.",
            "I cannot decide between two jobs.",
            "My phone battery is always empty.",
            "I was invited to a party where I know nobody.",
            "My grandmother wants to learn how to send emails.",
            "I broke a vase at my host's house.",
            "My team lost the final.",
            "I keep forgetting what I read.",
            "My bicycle was stolen.",
            "I have an argument with my flatmate about cleaning.",
            "My daughter asks for a dog.",
            "I got a present that I do not like.",
        ),
    ),
    (
        ("{}", "My nephew asks: {}", "Explain it to me: {}"),
        (
            *("Why is the sky blue?", "Why do cats purr?", "How do birds find their way?"),
            *("Why does bread go stale?", "Why do we dream?", "How does a sail pull a boat?"),
            *("Why are some people left-handed?", "Why is the sea salty?", "How do magnets work?"),
            *("Why do leaves turn red?", "Why do we yawn?", "How does soap clean?"),
            *("Why does the moon change its shape?", "How do trees drink?", "Why do we laugh?"),
            *(
                "Why do onions make us cry?",
                "How do glasses help us see?",
                "Why does time seem to fly?",
            ),
            *("Why do bees dance?", "Why is ice slippery?", "How does a rainbow come about?"),
            *(
                "Why do cities have parks?",
                "How do planes stay up?",
                "Why do people sing together?",
            ),
        ),
    ),
)


@dataclass(frozen=True)
class StylePrompt:
    """A prompt: its id, what it is about (prompts of one topic stay in one split), and its text."""

    prompt_id: str
    topic: str
    text: str


def all_prompts() -> list[StylePrompt]:
    """Return all prompts, every topic once before any comes a second time with other words."""
    prompts: list[StylePrompt] = []
    for turn in range(max(len(templates) for templates, _ in _GROUPS)):
        for templates, topics in _GROUPS:
            for place, about in enumerate(topics):
                if turn < len(templates):
                    topic = re.sub(r"[^a-z]+", "-", about.lower()).strip("-")
                    text = templates[(place + turn) % len(templates)].format(about)
                    prompts.append(StylePrompt(f"{topic}-{turn}", topic, text))
    return prompts
