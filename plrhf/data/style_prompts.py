"""The prompts of the world of styles, and how a model is asked to answer in a style."""

from __future__ import annotations

import re
from dataclasses import dataclass

DEMONSTRATED = ("How do I boil an egg?", "My train is late. What should I do?")
"""Questions that each style's example answers belong to; no prompt is about them."""


@dataclass(frozen=True)
class Style:
    """How a model is asked for a style: an instruction, and an example answer to each of `DEMONSTRATED`."""

    instruction: str
    examples: tuple[str, str]

    def turns(self, prompt: str) -> tuple[dict[str, str], ...]:
        """Return the chat that asks for an answer to a prompt in this style."""
        said = [("system", self.instruction)]
        for question, answer in zip(DEMONSTRATED, self.examples, strict=True):
            said += [("user", question), ("assistant", answer)]
        return tuple({"role": role, "content": text} for role, text in [*said, ("user", prompt)])


STYLES = {
    "short": Style(
        "Answer in a few words.",
        ("Seven minutes in boiling water.", "Call and say so."),
    ),
    "long": Style(
        "Answer in one long, detailed sentence.",
        (
            "Lower the egg gently into a pan of boiling water and leave it there for seven minutes, "
            "which gives the white enough time to become firm while the yolk inside stays soft.",
            "Look at the board for the next connection, tell those who expect you how late it will "
            "be, and use the time for the letter that has been lying in the bag since last week.",
        ),
    ),
    "list": Style(
        "Answer with a list of short points.",
        (
            "- Boil water\n- Add the egg\n- Wait seven minutes\n- Cool it",
            "- Check the board\n- Call ahead\n- Get a coffee",
        ),
    ),
    "formal": Style(
        "Answer in formal, impersonal English.",
        (
            "The egg is immersed in boiling water for seven minutes; subsequent cooling prevents "
            "further coagulation.",
            "Immediate notification of all parties is recommended, and alternative connections "
            "merit consideration.",
        ),
    ),
    "warm": Style(
        "Answer like an enthusiastic friend!",
        (
            "Oh, that is so easy! Pop it into boiling water for seven minutes! Delicious!",
            "Oh no! But hey, more time for a great book! They will wait, surely!",
        ),
    ),
    "plain": Style(
        "Answer for a small child in short, easy words.",
        (
            "Put the egg in hot water. Wait a bit. Then take it out.",
            "Sit down. It will come soon. Eat a bun.",
        ),
    ),
    "personal": Style(
        "Answer by telling about yourself.",
        (
            "I boil mine for seven minutes. My mother showed me, and we had soft eggs every Sunday.",
            "I once sat two hours at our station. I called my sister and we laughed about it.",
        ),
    ),
    "cautious": Style(
        "Answer cautiously, and say that you are not sure.",
        (
            "It is probably about seven minutes, but that may depend on the egg. Perhaps try six.",
            "It might help to call. Maybe there is a bus, but I could be wrong.",
        ),
    ),
    "asking": Style(
        "Answer with questions.",
        (
            "How soft should it be? Is the egg cold? How large is the pan?",
            "Who is waiting? Is there a bus? How far is it on foot?",
        ),
    ),
    "direct": Style(
        "Tell the person what to do, and call them you.",
        (
            "You boil your water, then you add your egg. You wait seven minutes.",
            "You should call now. If you can, you take your bike, and you tell them your plan.",
        ),
    ),
}
"""How each style is asked for. The rows of the world do not contain it."""

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
    """A prompt with its id and topic. Prompts of the same topic are in the same split."""

    prompt_id: str
    topic: str
    text: str


def all_prompts() -> list[StylePrompt]:
    """Return all prompts. Each topic appears once before any topic appears again with other words."""
    prompts: list[StylePrompt] = []
    for turn in range(max(len(templates) for templates, _ in _GROUPS)):
        for templates, topics in _GROUPS:
            for place, about in enumerate(topics):
                if turn < len(templates):
                    topic = re.sub(r"[^a-z]+", "-", about.lower()).strip("-")
                    text = templates[(place + turn) % len(templates)].format(about)
                    prompts.append(StylePrompt(f"{topic}-{turn}", topic, text))
    return prompts
